"""Exports open with from_pretrained of transformers, diffusers and PEFT, bit by bit the average."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from sharded_ema import ShardedEMA, consolidate
from sharded_ema.tools import conversions
from sharded_ema.tools.huggingface import read_model
from sharded_ema.tools.kept import kept_wide

pytest.importorskip("transformers", minversion="5", reason="pip install 'transformers>=5'")

import transformers
from transformers.conversion_mapping import (
    _MODEL_TO_CONVERSION_PATTERN,
    get_checkpoint_conversion_mapping,
)
from transformers.core_model_loading import WeightConverter

pytestmark = pytest.mark.filterwarnings("ignore")
SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 2,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "MixtralForCausalLM": {"num_local_experts": 4},
    "Qwen3MoeForCausalLM": {"num_experts": 4, "moe_intermediate_size": 8, "head_dim": 8},
    "PhimoeForCausalLM": {"num_local_experts": 4},  # names beyond the table
    "NomicBertModel": {"num_key_value_heads": None},  # released with q, k and v in one
}


def move(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) / 100)


def trained(kind: str, folder: Path, **changes: Any) -> Any:
    """A released model, and then one that was trained on; its average is seeded with the latter."""
    torch.manual_seed(0)
    model_class = getattr(transformers, kind)
    config = model_class.config_class(**{**SIZES, **MODELS.get(kind, {}), **changes})
    model_class(config).to(torch.bfloat16).save_pretrained(folder / "release")
    model = model_class.from_pretrained(folder / "release", dtype=torch.float32)
    move(model)
    ShardedEMA(model, 0.9).save(folder / "step_1", step=1)
    return model


def export(folder: Path, name: str, **options: Any) -> Path:
    report = consolidate(folder / "step_1", folder / name, progress=False, **options)
    assert report.ok, report.text()
    return folder / name


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype
        for name, tensor in wanted.items()
    )


@pytest.mark.parametrize("by", ["table", "transformers"])
@pytest.mark.parametrize("kind", MODELS)
def test_the_names_of_the_release(
    kind: str, by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if by == "transformers":
        monkeypatch.setattr(conversions, "_by_table", lambda tensors, _: dict(tensors))
    model = trained(kind, tmp_path)
    out = export(tmp_path, "out", like=tmp_path / "release")
    model.save_pretrained(tmp_path / "wanted")  # which takes apart and joins with torch
    both = [load_file(path / "model.safetensors") for path in (out, tmp_path / "wanted")]
    assert same(*both)
    assert both[0].keys() == load_file(tmp_path / "release" / "model.safetensors").keys()
    loaded = type(model).from_pretrained(out)
    assert loaded.dtype is torch.float32 and same(loaded.state_dict(), model.state_dict())


def test_the_table_is_that_of_transformers() -> None:
    """Whatever transformers fuses of tensors with the names in the table, it fuses as we do."""
    met = set()
    for kind in _MODEL_TO_CONVERSION_PATTERN:
        for converter in get_checkpoint_conversion_mapping(kind) or []:
            parts = tuple(p.rpartition(".experts.*.")[2] for p in converter.source_patterns)
            if not isinstance(converter, WeightConverter) or ".experts.*." not in (
                converter.source_patterns[0].replace("mlp.experts", ".experts")
            ):
                continue
            known = {part for _, entry in conversions._FUSED for part in entry}
            if not set(parts) <= known:
                continue
            (target,) = converter.target_patterns
            operations = [(type(op).__name__, op.dim) for op in converter.operations]
            assert (target.rpartition("experts.")[2], parts) in conversions._FUSED, kind
            assert operations == [("MergeModulelist", 0), ("Concatenate", 1)][: len(parts)], kind
            met.add(parts)
    assert len(met) >= 3


def test_elements_are_followed() -> None:
    from sharded_ema.model.internals.transformers import _Following

    with torch.device("meta"):
        tensors = {"a": torch.empty(4, 6, 2), "b": torch.empty(3, 2)}
    with _Following(tensors) as following:
        gate, up = torch.chunk(tensors["a"], 2, dim=1)
        assert following.parts(gate) is None
        assert following.parts(up.contiguous()[1]) == [("a", 18, 24)]
        both = torch.cat([up[0], tensors["b"]], dim=0)
        assert following.parts(both) == [("a", 6, 12), ("b", 0, 6)]
        assert following.parts(both[2:4]) == [("a", 10, 12), ("b", 0, 2)]
        assert following.parts(torch.stack([tensors["b"][1], gate[0, 0]])) == [
            ("b", 2, 4), ("a", 0, 2),
        ]  # fmt: skip
        assert following.parts(tensors["b"].t()) is None
        assert following.parts(torch.cat([tensors["b"], tensors["b"]], dim=1)) is None
        assert following.parts(tensors["b"] + 1) is None


@pytest.mark.parametrize("dtype", [None, "float16", "bfloat16"])
def test_the_dtype_that_was_written(dtype: str | None, tmp_path: Path) -> None:
    model = trained("LlamaForCausalLM", tmp_path, tie_word_embeddings=True)
    out = export(tmp_path, "out", like=tmp_path / "release", dtype=dtype)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(out)
    wanted = getattr(torch, dtype or "float32")
    assert loaded.dtype is wanted
    assert same(loaded.state_dict(), {k: v.to(wanted) for k, v in model.state_dict().items()})


@pytest.mark.parametrize(
    ("kind", "changes", "module"),
    [
        ("T5ForConditionalGeneration", {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1,
                                        "num_heads": 2}, "wo"),
        ("MixtralForCausalLM", {"num_local_experts": 4}, None),
    ],
)  # fmt: skip
def test_what_transformers_keeps_in_fp32(
    kind: str, changes: dict[str, Any], module: str | None, tmp_path: Path
) -> None:
    model_class = getattr(transformers, kind)
    model = model_class(model_class.config_class(**{**SIZES, **changes}))
    model.config.architectures = [kind]
    model.config.save_pretrained(tmp_path / "like")
    kept = {*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())}
    wide = {n for n in model.state_dict() if kept & set(n.split("."))}
    assert kept == ({module} if module else set())
    assert kept_wide(read_model(tmp_path / "like"), model.state_dict()) == wide
    ShardedEMA(model, 0.9).save(tmp_path / "step_1", step=1)
    out = export(tmp_path, "out", like=tmp_path / "like", dtype="float16")
    stored = load_file(out / "model.safetensors")
    assert {n for n, t in stored.items() if t.dtype == torch.float32} == wide & stored.keys()
    loaded = model_class.from_pretrained(out).state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded[name], tensor if name in wide else tensor.half()), name


def test_a_component_and_a_whole_pipeline_of_diffusers(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers", reason="pip install diffusers")
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    unet = diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, norm_num_groups=4, layers_per_block=1,
        block_out_channels=(8,), **blocks,
    )  # fmt: skip
    pipeline = diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler(num_train_timesteps=7))
    pipeline.save_pretrained(tmp_path / "base")
    move(unet)
    ShardedEMA(unet, 0.9).save(tmp_path / "step_1", step=1)
    for size in ("5GB", 2000):
        out = export(tmp_path, f"whole {size}", like=tmp_path / "base", max_shard_size=size)
        loaded = diffusers.DDPMPipeline.from_pretrained(out)
        assert same(loaded.unet.state_dict(), unet.state_dict())
        assert loaded.scheduler.config.num_train_timesteps == 7
        part = export(tmp_path, f"{size}", like=tmp_path / "base" / "unet", max_shard_size=size)
        loaded = diffusers.UNet2DModel.from_pretrained(part)
        assert same(loaded.state_dict(), unet.state_dict())
    index = f"{out}/unet/diffusion_pytorch_model.safetensors.index.json"
    assert len(set(json.loads(Path(index).read_text())["weight_map"].values())) > 1


def test_an_adapter_of_peft(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="pip install peft")
    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    base.save_pretrained(tmp_path / "base")
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    model.save_pretrained(tmp_path / "adapter")
    move(model)
    ShardedEMA(model, 0.9).save(tmp_path / "step_1", step=1)
    out = export(tmp_path, "out", like=tmp_path / "adapter")
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    loaded = peft.PeftModel.from_pretrained(again, out)
    wanted = {n: t for n, t in model.state_dict().items() if "lora_" in n}
    found = {n: t for n, t in loaded.state_dict().items() if "lora_" in n}
    assert wanted and same(found, wanted)
