"""Names that state-dict hooks change, extra states, ties: exports load strictly into the class."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from sharded_ema import ShardedEMA, consolidate
from sharded_ema.errors import BindError, EMAWarning
from tests.helpers.layouts import rank, whole
from tests.helpers.pool import WorkerPool

Worlds = dict[int, WorkerPool]


class Fused(nn.Module):
    """Leaves the name of its inner layer out, as fusion layers of torchtune do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.fusion = nn.Linear(3, 3)
        self._register_state_dict_hook(self._leave_out)
        self.register_load_state_dict_pre_hook(self._put_in)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fusion(self.layer(x))
        return y

    def _leave_out(self, module: nn.Module, state: dict[str, Any], prefix: str, said: Any) -> None:
        for key in [key for key in state if key.startswith(f"{prefix}layer.")]:
            state[key.replace(f"{prefix}layer.", prefix, 1)] = state.pop(key)

    def _put_in(self, module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        for name in ("weight", "bias"):
            state[f"{prefix}layer.{name}"] = state.pop(f"{prefix}{name}")


class Packed(nn.Module):
    """Stores its parameter, and one of its buffers, under other names by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3))
        self.register_buffer("seen", torch.zeros(2))
        self.register_buffer("kept", torch.zeros(1))

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}packed"] = destination.pop(f"{prefix}weight")
        destination[f"{prefix}statistics.seen"] = destination.pop(f"{prefix}seen")

    def _load_from_state_dict(self, state: Any, prefix: str, *args: Any) -> None:
        state[f"{prefix}weight"] = state.pop(f"{prefix}packed")
        state[f"{prefix}seen"] = state.pop(f"{prefix}statistics.seen")
        super()._load_from_state_dict(state, prefix, *args)


class Scaled(nn.Module):
    """Has a history beside its tensors, as fp8 layers do."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(3))
        self.history = [0.5]

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.history)

    def set_extra_state(self, state: Tensor) -> None:
        self.history = state.tolist()


class Model(nn.Module):
    """All of it; a tie whose first name the state dict does not have, and one with both names."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Fused(), Fused()])
        self.packed = Packed()
        self.scaled = Scaled()
        self.head = nn.Linear(3, 5, bias=False)
        self.embed = nn.Embedding(5, 3)
        self.embed.weight = self.head.weight
        self.one, self.two = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        self.two.weight = self.one.weight
        self.frozen = nn.Linear(2, 2)
        self.frozen.requires_grad_(False)
        self.register_state_dict_post_hook(self._rename)
        self.register_load_state_dict_pre_hook(self._rename_back)

    @staticmethod
    def _rename(module: nn.Module, state: dict[str, Any], prefix: str, said: Any) -> None:
        del state[f"{prefix}head.weight"]
        state[f"{prefix}cold.weight"] = state.pop(f"{prefix}frozen.weight")
        state[f"{prefix}cold.bias"] = state.pop(f"{prefix}frozen.bias")

    @staticmethod
    def _rename_back(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        state[f"{prefix}head.weight"] = state[f"{prefix}embed.weight"]
        for name in ("weight", "bias"):
            state[f"{prefix}frozen.{name}"] = state.pop(f"{prefix}cold.{name}")

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        x = self.two(self.one(x)) + self.scaled.bias
        return self.head(x) @ self.embed.weight + (x @ self.packed.weight.t()).sum()


def wrapped(bare: Model, mode: str) -> nn.Module:
    if mode == "ddp":
        return DistributedDataParallel(bare)
    if mode == "fsdp2":
        mesh = init_device_mesh("cpu", (2,))
        fully_shard(bare.blocks[0], mesh=mesh)
        return fully_shard(bare, mesh=mesh)
    if mode.startswith("fsdp1"):
        options: dict[str, Any] = {"use_orig_params": mode == "fsdp1"}
        if mode == "fsdp1_flat":
            options["ignored_states"] = list(bare.frozen.parameters())
        return FullyShardedDataParallel(bare, device_id=torch.device("cpu"), **options)
    if mode == "compiled":
        bare.blocks[1] = checkpoint_wrapper(bare.blocks[1])
        return torch.compile(bare, backend="eager")  # type: ignore[return-value]
    return bare


def full(target: nn.Module) -> dict[str, Tensor]:
    """Trained parameters by their place in the bare model, by PyTorch's own means."""
    with (
        FullyShardedDataParallel.summon_full_params(target, writeback=False)
        if isinstance(target, FullyShardedDataParallel)
        else torch.no_grad()
    ):
        found = {}
        for name, parameter in target.named_parameters():
            for part in ("_fsdp_wrapped_module.", "_orig_mod.", "_checkpoint_wrapped_module."):
                name = name.replace(part, "")
            found[name.removeprefix("module.")] = whole(parameter).float()
        return found


def export(mode: str, folder: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    bare = Model()
    target = wrapped(bare, mode)
    trained = [p for p in target.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    ema = ShardedEMA(target, 0.5, **options)
    ema.attach(optimizer)
    expected = full(target)
    for _ in range(2):
        target(torch.ones(2, 3)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        for name, value in full(target).items():
            expected[name].lerp_(value, 0.5)
    bare.scaled.history.append(2.0)
    bare.packed.seen.add_(3)
    ema.save(f"{folder}/save", step=2)
    with ema.swap():
        pass
    assert ema.load(f"{folder}/save") == 2
    ema.close()
    if rank() == 0:
        assert consolidate(f"{folder}/save", f"{folder}/out", progress=False).ok
        into = Model()
        into.load_state_dict(load_file(f"{folder}/out/model.safetensors"), strict=True)
        found = {name: p.detach() for name, p in into.named_parameters()}
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            if not name.startswith("frozen"):
                assert torch.equal(found[name], value), name
        assert torch.equal(into.frozen.weight, expected["frozen.weight"])
        assert into.scaled.history == [0.5, 2.0]
        assert into.packed.seen.tolist() == [3.0, 3.0]


@pytest.mark.parametrize("mode", ["plain", "compiled"])
def test_an_export_loads_strictly_into_the_class(mode: str, tmp_path: Path) -> None:
    export(mode, str(tmp_path), {})


@pytest.mark.parametrize("mode", ["ddp", "fsdp2", "fsdp1", "fsdp1_flat"])
def test_an_export_of_several_ranks_does(worlds: Worlds, mode: str, tmp_path: Path) -> None:
    worlds[2].run(export, mode, str(tmp_path), {})


def engine(stage: int, folder: str) -> None:
    from tests.helpers import engines

    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    trainer, *_ = engines.deepspeed.initialize(
        model=model, optimizer=optimizer, config=engines.config(stage)
    )
    ema = ShardedEMA(trainer, 0.5)
    ema.save(f"{folder}/save", step=0)
    ema.close()
    if rank() == 0:
        assert consolidate(f"{folder}/save", f"{folder}/out", progress=False).ok
        torch.manual_seed(0)
        before, into = Model(), Model()
        into.load_state_dict(load_file(f"{folder}/out/model.safetensors"), strict=True)
        for (name, a), b in zip(before.named_parameters(), into.parameters(), strict=True):
            assert torch.equal(a, b), name
    trainer.destroy()


@pytest.mark.parametrize("stage", [1, 3])
def test_an_export_of_an_engine_does(engine_worlds: Worlds, stage: int, tmp_path: Path) -> None:
    engine_worlds[2].run(engine, stage, str(tmp_path))


def test_names_are_those_of_the_state_dict_and_patterns_know_both() -> None:
    model = Model()
    ema = ShardedEMA(model, 0.9)
    names = {key.partition(".")[2] for key in ema.state_dict() if key != "_meta"}
    # Ties are stored once, and known by their other names.
    assert names == set(model.state_dict()) - {"two.weight"}
    assert "embed.weight" in ema.names
    for pattern in ("blocks.0.bias", "blocks.0.layer.bias"):
        assert "blocks.0.bias" not in ShardedEMA(model, 0.9, exclude=pattern).names
    for pattern in ("head.weight", "embed.weight"):
        assert ShardedEMA(model, 0.9, include=pattern).names == ["embed.weight"]
    model.blocks[0].layer.weight = nn.Parameter(torch.ones(3, 3))  # type: ignore[union-attr]
    with pytest.raises(BindError, match=r"parameter blocks\.0\.weight was replaced"), ema.swap():
        pass


def test_models_without_hooks_are_not_asked() -> None:
    class Asked(nn.Linear):
        def state_dict(self, *args: Any, **kwargs: Any) -> Any:
            raise AssertionError

    assert ShardedEMA(nn.Sequential(Asked(2, 2)), 0.9).names == ["0.weight", "0.bias"]


def merge(module: nn.Module, state: dict[str, Any], prefix: str, said: Any) -> None:
    parts = [state.pop(f"{prefix}{name}.weight") for name in "qkv"]
    state[f"{prefix}qkv.weight"] = torch.cat(parts)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(2, 2, bias=False) for _ in range(3))


def test_tensors_that_hooks_make_are_warned_of(tmp_path: Path) -> None:
    model = Attention()
    model.register_state_dict_post_hook(merge)
    with pytest.warns(EMAWarning, match=r"1 entries .*qkv\.weight.*lacks 3 .*q\.weight"):
        ema = ShardedEMA(model, 0.9)
    assert ema.names == ["q.weight", "k.weight", "v.weight"]
    ema.save(tmp_path / "x", step=1)
    assert ema.load(tmp_path / "x") == 1


def test_tensors_that_hooks_convert_keep_their_names() -> None:
    def halve(module: nn.Module, state: dict[str, Any], prefix: str, said: Any) -> None:
        for key, value in state.items():
            state[key] = value.bfloat16()

    model = nn.Linear(2, 2)
    model.register_state_dict_post_hook(halve)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ema = ShardedEMA(model, 0.9)
    assert ema.names == ["weight", "bias"]
    assert ema.state_dict()["ema.weight"].dtype is torch.float32


def test_an_extra_state_that_is_no_tensor_is_warned_of(tmp_path: Path) -> None:
    class Counted(nn.Linear):
        def get_extra_state(self) -> dict[str, int]:
            return {"count": 3}

        def set_extra_state(self, state: Any) -> None:
            pass

    model = nn.Sequential(Counted(2, 2))
    with pytest.warns(
        EMAWarning, match=r"of 1 modules returns no tensor \(0\._extra_state, a dict"
    ):
        ema = ShardedEMA(model, 0.9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ShardedEMA(model, 0.9, buffers="ignore")
    ema.save(tmp_path / "x", step=1)
    consolidate(tmp_path / "x", tmp_path / "out", progress=False)
    state = load_file(tmp_path / "out" / "model.safetensors")
    assert copy.deepcopy(model).load_state_dict(state, strict=False).missing_keys == [
        "0._extra_state"
    ]


def test_an_extra_state_may_change_its_size_but_not_become_something_else(tmp_path: Path) -> None:
    model = Scaled()
    ema = ShardedEMA(model, 0.9, buffers="average")
    model.history = [1.0, 2.0, 3.0]
    assert ema.state_dict()["_buffers._extra_state"].tolist() == [1.0, 2.0, 3.0]
    model.get_extra_state = lambda: None  # type: ignore[method-assign]
    with pytest.raises(BindError, match=r"returns a NoneType now"):
        ema.save(tmp_path / "x", step=1)
