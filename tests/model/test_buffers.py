"""Buffers in a swap, in a save, and those that an average should have had."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import update_bn

from sharded_ema import ShardedEMA, consolidate
from sharded_ema.errors import EMAWarning
from tests.helpers.layouts import world
from tests.helpers.pool import WorkerPool

Worlds = dict[int, WorkerPool]

RULES = {"*.running_*": "average", "*": "copy"}


def build(layout: str = "plain", norm: nn.Module | None = None) -> tuple[nn.Module, nn.Module]:
    """A model with batch statistics in a layout, and the module inside."""
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(6) if norm is None else norm
    bare = nn.Sequential(nn.Linear(4, 6), norm, nn.ReLU(), nn.Linear(6, 2))
    if layout == "ddp":
        return DistributedDataParallel(bare), bare
    if layout == "fsdp2":
        mesh = init_device_mesh("cpu", (world(),))
        for index in (0, 3):
            fully_shard(bare[index], mesh=mesh)
        return fully_shard(bare, mesh=mesh), bare
    if layout == "fsdp1":
        return FSDP(bare, use_orig_params=True, device_id=torch.device("cpu")), bare
    return bare, bare


BATCHES = [
    torch.randn(16, 4, generator=torch.Generator().manual_seed(seed)) * 3 + 1 for seed in range(4)
]


def train(target: nn.Module, ema: ShardedEMA) -> None:
    optimizer = torch.optim.SGD(target.parameters(), lr=0.05)
    handle = ema.attach(optimizer)
    for batch in BATCHES:
        target(batch).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    handle.remove()


def buffers_of(bare: nn.Module) -> dict[str, Tensor]:
    return {
        name.replace("_fsdp_wrapped_module.", ""): b.clone() for name, b in bare.named_buffers()
    }


def recomputed_in_a_swap(layout: str, buffers: Any, path: str) -> None:
    target, bare = build(layout)
    ema = ShardedEMA(target, 0.8, buffers=buffers, timeout=60)
    train(target, ema)
    before = buffers_of(bare)
    with ema.swap():
        first = buffers_of(bare)
    averaged = buffers != "copy"
    assert torch.equal(first["1.running_mean"], before["1.running_mean"]) != averaged
    with ema.swap():
        update_bn(BATCHES[:3], target)
        inside = buffers_of(bare)
        for format in ("safetensors", "dcp"):
            ema.save(f"{path}/{format}", step=4, format=format)
        handle = ema.save(f"{path}/later", step=4, asynchronous=True)
        state = ema.state_dict()
    handle.result()
    assert not torch.equal(inside["1.running_mean"], before["1.running_mean"])
    assert not torch.equal(inside["1.running_mean"], first["1.running_mean"])
    after = buffers_of(bare)
    for name, value in before.items():
        assert torch.equal(after[name], value), name
    key = "ema.1.running_mean" if averaged else "_buffers.1.running_mean"
    if averaged:  # what was given out is no alias of a buffer that has other values by now
        found = state[key] if not hasattr(state[key], "pieces") else state[key].pieces[0][1]
        assert torch.equal(found, inside["1.running_mean"])
    with ema.swap():  # the average itself has gone on as it was
        for name, value in buffers_of(bare).items():
            assert torch.equal(value, first[name]), name
    ema.save(f"{path}/after", step=5)
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        torch.save({"inside": inside, "after": first}, f"{path}/expected")


def check_saved(path: Path) -> None:
    expected = torch.load(path / "expected")
    for name, key in (("safetensors", "inside"), ("dcp", "inside"), ("later", "inside"),
                      ("after", "after")):  # fmt: skip
        consolidate(path / name, path / f"export-{name}", progress=False)
        saved = load_file(path / f"export-{name}" / "model.safetensors")
        for buffer, value in expected[key].items():
            assert torch.equal(saved[buffer], value), (name, buffer)


@pytest.mark.parametrize("buffers", ["copy", "average", RULES], ids=str)
def test_statistics_recomputed_in_a_swap_are_saved_and_do_not_stay(
    buffers: Any, tmp_path: Path
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EMAWarning)
        recomputed_in_a_swap("plain", buffers, str(tmp_path))
    check_saved(tmp_path)


@pytest.mark.parametrize("buffers", ["copy", "average"])
@pytest.mark.parametrize("layout", ["ddp", "fsdp2", "fsdp1"])
def test_so_they_are_on_several_ranks(
    worlds: Worlds, layout: str, buffers: str, tmp_path: Path
) -> None:
    worlds[2].run(recomputed_in_a_swap, layout, buffers, str(tmp_path))
    check_saved(tmp_path)


# ---------------------------------------------------------------------- what a body may do to them


def filled(model: nn.Module) -> None:
    model.state.fill_(7.0)  # type: ignore[operator, union-attr]


def replaced(model: nn.Module) -> None:
    model.state = torch.full((3,), 7.0)


def resized(model: nn.Module) -> None:
    model.state = torch.full((5,), 7.0)


def resized_in_place(model: nn.Module) -> None:
    model.state.resize_(5)  # type: ignore[operator, union-attr]


def removed(model: nn.Module) -> None:
    del model.state


def emptied(model: nn.Module) -> None:
    model.state = None


def inferred(model: nn.Module) -> None:
    with torch.inference_mode():
        model.state = model.state + 7.0  # type: ignore[operator]


@pytest.mark.parametrize(
    "change",
    [filled, replaced, resized, resized_in_place, removed, emptied, inferred],
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize("buffers", ["copy", "ignore"])
def test_a_buffer_is_put_back_whatever_the_body_did(
    change: Callable[[nn.Module], None], buffers: str
) -> None:
    model = nn.Linear(2, 2)
    own = torch.arange(3.0)
    model.register_buffer("state", own)
    ema = ShardedEMA(model, 0.5, buffers=buffers)
    for failing in (False, True):
        with torch.no_grad():
            model.weight.add_(1.0)
        ema.update()
        weight = model.weight.detach().clone()
        try:
            with ema.swap():
                change(model)
                if failing:
                    raise KeyError("body")
        except KeyError:
            assert failing
        assert model.state is own and own.tolist() == [0.0, 1.0, 2.0]
        assert torch.equal(model.weight, weight)
        assert not own.is_inference()
    ema.update()
    ema.state_dict()


@pytest.mark.parametrize("change", [filled, replaced, inferred], ids=lambda f: f.__name__)
def test_an_averaged_buffer_is_put_back_too(change: Callable[[nn.Module], None]) -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("state", torch.arange(3.0))
    ema = ShardedEMA(model, 0.5, buffers="average")
    with ema.swap():
        change(model)
    assert model.state.tolist() == [0.0, 1.0, 2.0]  # type: ignore[operator, union-attr]
    with ema.swap():
        assert model.state.tolist() == [0.0, 1.0, 2.0]  # type: ignore[operator, union-attr]


def test_scratch_memory_is_left_alone_and_conversion_is_followed() -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("state", torch.arange(3.0))
    model.register_buffer("cache", torch.zeros(2), persistent=False)
    ema = ShardedEMA(model, 0.5)
    with ema.swap():
        assert ema.memory["swap_backup"] == 4 * (6 + 3)
        model.cache = torch.ones(9)
        model.to(torch.bfloat16)
        model.state.fill_(7.0)  # type: ignore[operator, union-attr]
    assert model.cache.shape == (9,)
    assert model.state.dtype is model.weight.dtype is torch.bfloat16  # type: ignore[union-attr]
    assert model.state.tolist() == [0.0, 1.0, 2.0]  # type: ignore[operator, union-attr]


def test_a_rounded_average_of_a_buffer_is_saved_as_it_is(tmp_path: Path) -> None:
    """The model's bf16 buffers are the average, rounded, unless the body has changed them."""
    model = nn.BatchNorm1d(2).bfloat16()
    ema = ShardedEMA(model, 0.9, buffers="average")
    model.running_mean.fill_(1.0)  # type: ignore[union-attr]
    for _ in range(3):
        ema.update()
    exact = ema.state_dict()["ema.running_mean"].clone()
    assert not torch.equal(exact, exact.bfloat16().float())
    with ema.swap():
        assert torch.equal(ema.state_dict()["ema.running_mean"], exact)
        model.running_mean[0] = 3.0  # type: ignore[index]
        assert ema.state_dict()["ema.running_mean"][0] == 3.0
    assert torch.equal(ema.state_dict()["ema.running_mean"], exact)


# ---------------------------------------------------------------------- the warning


def warned(action: Callable[[], object]) -> list[str]:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        action()
    messages = [str(w.message) for w in seen if issubclass(w.category, EMAWarning)]
    return [message for message in messages if "running statistics" in message]


def swap(ema: ShardedEMA) -> None:
    with ema.swap():
        pass


NORMS: dict[str, Callable[[], nn.Module]] = {
    "batch": lambda: nn.BatchNorm1d(6),
    "sync": lambda: nn.SyncBatchNorm(6),
    "instance": lambda: nn.InstanceNorm1d(6, track_running_stats=True),
    "cumulative": lambda: nn.BatchNorm1d(6, momentum=None),
}
LOOKS: dict[str, Callable[[ShardedEMA, Path], object]] = {
    "swap": lambda ema, path: swap(ema),
    "save": lambda ema, path: ema.save(path, step=1),
    "copy_to": lambda ema, path: ema.copy_to(),
    "close": lambda ema, path: ema.close(),
}


def move(model: nn.Module, norm: nn.Module) -> None:
    """What a training step does, also of layers that run on a GPU only."""
    if norm.training and getattr(norm, "running_mean", None) is not None:
        norm.running_mean.mul_(0.9).add_(0.1)  # type: ignore[union-attr, operator]
        norm.running_var.mul_(0.9).add_(0.2)  # type: ignore[union-attr, operator]


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("kind", NORMS)
def test_statistics_that_move_and_are_not_averaged_are_told_once(
    kind: str, look: str, tmp_path: Path
) -> None:
    norm = NORMS[kind]()
    model, _ = build(norm=norm)
    emas: list[ShardedEMA] = []
    assert not warned(lambda: emas.append(ShardedEMA(model, 0.9)))
    (ema,) = emas
    assert not warned(lambda: swap(ema))  # nothing has moved yet
    move(model, norm)
    assert not warned(ema.update)
    (message,) = warned(lambda: LOOKS[look](ema, tmp_path / "x"))
    assert 'buffers="average"' in message and "update_bn" in message
    if look != "close":
        assert not warned(lambda: (swap(ema), ema.save(tmp_path / "y", step=2), ema.close()))


@pytest.mark.parametrize(
    "case", ["evaluation", "none", "average", "rules", "ignore", "other buffer", "layer norm"]
)
def test_where_there_is_nothing_to_tell_nothing_is_told(case: str, tmp_path: Path) -> None:
    norm: nn.Module = nn.BatchNorm1d(6, track_running_stats=case != "none")
    if case == "layer norm":
        norm = nn.LayerNorm(6)
    model, _ = build(norm=norm)
    model.register_buffer("counter", torch.zeros(1))
    buffers: Any = {"average": "average", "rules": RULES, "ignore": "ignore"}.get(case, "copy")
    if case in ("evaluation", "other buffer"):
        norm.eval()
    ema = ShardedEMA(model, 0.9, buffers=buffers)
    for batch in BATCHES:
        model(batch)
        move(model, norm)
        if case == "other buffer":
            model.counter.add_(1)  # type: ignore[operator, union-attr]
        ema.update()
    assert not warned(lambda: (swap(ema), ema.save(tmp_path / "x", step=1), ema.close()))
