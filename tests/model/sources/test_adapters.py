"""PEFT adapters: only what is trained is averaged, and the export is an adapter that PEFT loads."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from sharded_ema import ShardedEMA, consolidate
from sharded_ema.errors import CheckpointMismatchError
from tests.helpers.layouts import rank
from tests.helpers.pool import WorkerPool

peft = pytest.importorskip("peft", reason="PEFT is not installed: pip install 'sharded-ema[test]'")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

Worlds = dict[int, WorkerPool]


def base_model() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=20,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return transformers.LlamaForCausalLM(config)


def with_adapter(*, save_head: bool = False) -> nn.Module:
    config = peft.LoraConfig(
        r=3,  # fewer rows than ranks: some have none
        target_modules=["q_proj", "down_proj"],
        modules_to_save=["lm_head"] if save_head else None,
        init_lora_weights=False,
    )
    return peft.get_peft_model(base_model(), config)


def sharded() -> nn.Module:
    model = with_adapter()
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def locals_of(model: nn.Module) -> list[torch.Tensor]:
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained and all(isinstance(p, DTensor) for p in trained)
    return [p._local_tensor for p in trained]  # type: ignore[attr-defined]


def number_the_slices(folder: str) -> dict[str, torch.Tensor]:
    """Every rank writes its number into its own slices, and finds it there after a round trip."""
    model = sharded()
    ema = ShardedEMA(model, 0.0)
    assert all("lora_" in name for name in ema.names)
    trained = sum(p.numel() for p in with_adapter().parameters() if p.requires_grad)
    sizes = [0] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(sizes, ema.memory["shadow"])
    assert sum(sizes) == 4 * trained
    with torch.no_grad():
        for tensor in locals_of(model):
            tensor.fill_(rank() + 1)
    ema.update()
    ema.save(f"{folder}/average", step=1)
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    whole = {n: p.full_tensor().detach() for n, p in trainable.items()}
    ema.close()

    fresh = sharded()
    with torch.no_grad():
        for tensor in locals_of(fresh):
            tensor.zero_()
    ema = ShardedEMA(fresh, 0.0)
    ema.load(f"{folder}/average")
    ema.copy_to()
    for tensor in locals_of(fresh):
        assert torch.equal(tensor, torch.full_like(tensor, rank() + 1))
    ema.close()
    return whole


def test_every_slice_comes_back_in_a_peft_export(worlds: Worlds, tmp_path: Path) -> None:
    whole = worlds[4].run(number_the_slices, str(tmp_path))[0]
    assert {float(v) for t in whole.values() for v in t.unique()} == {1.0, 2.0, 3.0, 4.0}
    original = with_adapter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT looks for the base model on the Hub
        original.save_pretrained(tmp_path / "adapter")
    report = consolidate(
        tmp_path / "average", tmp_path / "out", like=tmp_path / "adapter", progress=False
    )
    assert report.ok
    assert (tmp_path / "out" / "adapter_config.json").is_file()
    loaded = peft.PeftModel.from_pretrained(base_model(), tmp_path / "out")
    found = dict(loaded.named_parameters())
    for name, value in whole.items():
        assert torch.equal(found[name], value)


@pytest.mark.filterwarnings("ignore:Could not find a config file")  # PEFT 0.15
def test_modules_saved_beside_an_adapter(tmp_path: Path) -> None:
    model = with_adapter(save_head=True)
    ema = ShardedEMA(model, 0.0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
    ema.update()
    ema.save(tmp_path / "average", step=1)
    model.save_pretrained(tmp_path / "adapter")
    report = consolidate(
        tmp_path / "average", tmp_path / "out", like=tmp_path / "adapter", progress=False
    )
    assert report.ok, report.text()
    loaded = peft.PeftModel.from_pretrained(base_model(), tmp_path / "out")
    with torch.no_grad():
        ids = torch.arange(8)[None]
        assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_one_of_several_adapters(tmp_path: Path) -> None:
    model = with_adapter()
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model.add_adapter("second", config)
    model.base_model.set_adapter(["default", "second"])
    ema = ShardedEMA(model, 0.0)
    ema.save(tmp_path / "average", step=0)
    with pytest.raises(CheckpointMismatchError, match="none was chosen"):
        consolidate(
            tmp_path / "average", tmp_path / "out", like=_config(tmp_path, config), progress=False
        )
    with pytest.raises(CheckpointMismatchError, match="'third' is not one of them"):
        consolidate(tmp_path / "average", tmp_path / "out", adapter="third", progress=False)
    report = consolidate(
        tmp_path / "average",
        tmp_path / "out",
        like=_config(tmp_path, config),
        adapter="second",
        progress=False,
    )
    assert report.ok
    loaded = peft.PeftModel.from_pretrained(base_model(), tmp_path / "out")
    expected = {n.replace("second", "default"): p for n, p in model.named_parameters()}
    found = {n: p for n, p in loaded.named_parameters() if "lora_" in n}
    assert len(found) == 4
    for name, parameter in found.items():
        assert torch.equal(parameter, expected[name]) or "down_proj" in name


def _config(folder: Path, config: object) -> Path:
    config.save_pretrained(folder / "adapter")  # type: ignore[attr-defined]
    return folder / "adapter"


def test_the_base_can_be_stored_on_request(tmp_path: Path) -> None:
    model = with_adapter()
    ema = ShardedEMA(model, 0.0, frozen="save")
    assert any(key.startswith("_frozen.") for key in ema.state_dict())
    ema.save(tmp_path / "average", step=0)
    assert consolidate(tmp_path / "average", tmp_path / "out", progress=False).ok
