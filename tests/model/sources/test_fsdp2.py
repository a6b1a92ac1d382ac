"""What fully_shard has gathered, or begun to gather, when a swap begins or ends.

Every test compares with training that no swap has disturbed, and what the model computes with what
a model computes that nothing has sharded.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from sharded_ema import ShardedEMA
from sharded_ema.errors import StateError
from tests.helpers.layouts import (
    Run,
    as_float,
    assert_equal,
    build,
    reference_step,
    sizes,
    world,
)
from tests.helpers.pool import WorkerPool

Worlds = dict[int, WorkerPool]


def units(run: Run) -> list[Any]:
    return [module for module in run.bare.modules() if isinstance(module, FSDPModule)]


def output_of(weights: dict[str, Tensor]) -> Tensor:
    """What the model computes with some weights when nothing shards it."""
    plain = build("plain")
    with torch.no_grad():
        for name, parameter in plain.bare.named_parameters():
            if name in weights:
                parameter.copy_(weights[name])
    return plain.evaluate()


# ---------------------------------------------------------------------- what is left behind


def gather_early(run: Run) -> None:
    for unit in units(run):
        unit.unshard(async_op=True)


def gather_now(run: Run) -> None:
    for unit in units(run):
        unit.unshard()


def leave_a_layer_out(run: Run) -> None:
    first, second = run.bare.blocks
    run.bare.set_modules_to_forward_prefetch([second])  # type: ignore[operator]
    first.set_modules_to_forward_prefetch([second])  # type: ignore[operator]
    with torch.no_grad():
        first(torch.ones(2, 10))


def leave_a_layer_out_of_the_backward(run: Run) -> None:
    first, second = run.bare.blocks
    second.set_modules_to_backward_prefetch([first])  # type: ignore[operator]
    run.bare.set_is_last_backward(False)  # type: ignore[operator]
    with torch.no_grad():
        run.evaluate()
    second(torch.ones(2, 10)).sum().backward()
    run.bare.set_is_last_backward(True)  # type: ignore[operator]
    run.optimizer.zero_grad()


def keep_gathered(run: Run) -> None:
    run.bare.set_reshard_after_forward(False)  # type: ignore[operator]
    run.evaluate()


def fail(*_: Any) -> None:
    raise KeyError("in the middle")


def fail_in_forward(run: Run, *, before: str, grad: bool) -> None:
    module = run.bare.get_submodule(before)
    handle = module.register_forward_pre_hook(fail)
    with pytest.raises(KeyError), torch.set_grad_enabled(grad):
        run.target(torch.ones(2, 7))
    handle.remove()


def fail_in_backward(run: Run, *, behind: str) -> None:
    module = run.bare.get_submodule(behind)

    def hook(_: nn.Module, __: Any, output: Tensor) -> None:
        output.register_hook(fail)

    handle = module.register_forward_hook(hook)
    with pytest.raises(KeyError):
        run.target(torch.ones(2, 7)).sum().backward()
    handle.remove()
    run.optimizer.zero_grad()


LEFT: dict[str, Callable[[Run], None]] = {
    "early": gather_early,
    "now": gather_now,
    "forward prefetch": leave_a_layer_out,
    "backward prefetch": leave_a_layer_out_of_the_backward,
    "kept": keep_gathered,
    "forward, first layer": partial(fail_in_forward, before="inp", grad=False),
    "forward, between": partial(fail_in_forward, before="blocks.1", grad=True),
    "forward, in a unit": partial(fail_in_forward, before="blocks.1.down", grad=True),
    "backward, between": partial(fail_in_backward, behind="blocks.0"),
    "backward, in a unit": partial(fail_in_backward, behind="blocks.1.up"),
    "backward, in the root": partial(fail_in_backward, behind="inp"),
}


def leave(mode: str, kind: str, older: bool) -> None:
    never, run = build(mode), build(mode)
    ema = ShardedEMA(run.target, 0.9, **run.options)
    ema.attach(run.optimizer)
    average = as_float(run.gather())
    with pytest.MonkeyPatch.context() as patch:
        if older:  # PyTorch before 2.13 has none
            patch.delattr(
                "torch.distributed.fsdp._fully_shard._fsdp_state.FSDPState._reset_iter_state"
            )
        for index in range(8):
            for each in (never, run):
                each.step(index)
            reference_step(average, run.gather(), 1 - 0.9)
            before, inside, at_the_end = (bool(index & bit) for bit in (1, 2, 4))
            if before:
                LEFT[kind](run)
            with ema.swap():
                if inside:
                    LEFT[kind](run)
                    ema.state_dict()  # a call that reads brings the model to rest, too
                assert torch.equal(run.evaluate(), output_of(average))
                if at_the_end:
                    LEFT[kind](run)
            assert torch.equal(run.evaluate(), output_of(never.gather()))
        assert_equal(run.gather(), never.gather())
        LEFT[kind](run)
        ema.copy_to()
        assert torch.equal(run.evaluate(), output_of(average))
    ema.close()


@pytest.mark.parametrize("kind", LEFT)
def test_what_is_gathered_serves_no_other_weights(worlds: Worlds, kind: str) -> None:
    worlds[2].run(leave, "fsdp2", kind, False)


@pytest.mark.parametrize("kind", [kind for kind in LEFT if "ward, " in kind])
def test_a_pass_that_did_not_end_in_older_pytorch(worlds: Worlds, kind: str) -> None:
    worlds[2].run(leave, "fsdp2", kind, True)


@pytest.mark.parametrize("kind", ["early", "forward prefetch", "backward, in a unit"])
@pytest.mark.parametrize("mode", ["hsdp", "replicate"])
def test_what_is_gathered_in_other_layouts(worlds: Worlds, mode: str, kind: str) -> None:
    worlds[sizes(mode, [2])[0]].run(leave, mode, kind, False)


def accumulate(mode: str, synchronised: str) -> None:
    """Gradients that were accumulated, on each rank or over one axis, outlive a failed forward."""
    never, run = build(mode), build(mode)
    ema = ShardedEMA(run.target, 0.9, **run.options)
    ema.attach(run.optimizer)
    for index in range(6):
        last = index % 2 == 1
        for each in (never, run):
            target: Any = each.target
            getattr(target, f"set_requires_{synchronised}")(last)
            target.set_reshard_after_backward(last)
            target.set_is_last_backward(last)
            each.step(index, backward_only=not last)
        with ema.swap():
            run.evaluate()
            fail_in_forward(run, before="blocks.1.down", grad=True)
    assert_equal(run.gather(), never.gather())
    ema.close()


@pytest.mark.parametrize(
    ("mode", "synchronised"),
    [("fsdp2", "gradient_sync"), ("hsdp", "gradient_sync"), ("hsdp", "all_reduce")],
)
def test_accumulated_gradients_are_kept(worlds: Worlds, mode: str, synchronised: str) -> None:
    worlds[sizes(mode, [2])[0]].run(accumulate, mode, synchronised)


def from_within() -> dict[str, str]:
    run = build("fsdp2")
    ema = ShardedEMA(run.target, 0.9)
    run.step(0)
    ema.update()
    said = {}

    def call(*_: Any) -> None:
        uses = {"swap": lambda: ema.swap().__enter__(), "state_dict": ema.state_dict}
        for name, use in uses.items():
            with pytest.raises(StateError) as caught:
                use()
            said[f"{name} in the {moment}"] = str(caught.value)

    moment = "forward"
    want = run.evaluate()
    handle = run.bare.blocks[1].down.register_forward_hook(call)  # type: ignore[union-attr]
    assert torch.equal(run.evaluate(), want)
    handle.remove()
    moment = "backward"
    out = run.target(torch.ones(2, 7))
    out.register_hook(call)
    out.sum().backward()
    run.optimizer.zero_grad()
    with ema.swap():
        assert not torch.equal(run.evaluate(), want)
    assert torch.equal(run.evaluate(), want)
    ema.close()
    return said


def test_from_within_a_forward_or_backward_is_refused(worlds: Worlds) -> None:
    for said in worlds[2].run(from_within):
        assert len(said) == 4
        assert all("within a forward or backward" in text for text in said.values())


# ---------------------------------------------------------------------- who gathers


class Policy(nn.Module):
    """A network in something larger, with tied weights outside it."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.tied = nn.Linear(8, 12), nn.Linear(8, 12)
        self.net = nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh())
        self.tied.weight = self.encoder.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.encoder(x) + self.tied(x))


def nothing_else(model: Policy, **options: Any) -> None:
    pass


def a_part(model: Policy, **options: Any) -> None:
    fully_shard(model.net[0], **options)


def the_target(model: Policy, **options: Any) -> None:
    fully_shard(model.net, **options)


def nested(model: Policy, **options: Any) -> None:
    fully_shard(model.net[2], **options)
    fully_shard(model.net, **options)


def several(model: Policy, **options: Any) -> None:
    fully_shard([model.encoder, model.tied, model.net[0]], **options)


def over_some(model: Policy, **options: Any) -> None:
    """After a forward the units stay gathered over two of four ranks."""
    for layer in (model.net[0], model.net[2]):
        fully_shard(layer, reshard_after_forward=2, **options)


INSIDE = {f.__name__: f for f in (nothing_else, a_part, the_target, nested, several, over_some)}


def part(inside: str, target: str, gathered: bool) -> None:
    """Both models train alike; one of them is sharded, and a part of it is averaged."""
    torch.manual_seed(0)
    model, plain, averaged = Policy(), Policy(), Policy()
    plain.load_state_dict(model.state_dict())
    options: dict[str, Any] = {"mesh": init_device_mesh("cpu", (world(),))}
    INSIDE[inside](model, **options)
    fully_shard(model, **options)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, plain)]
    x = torch.linspace(-1, 1, 32).view(4, 8)
    if gathered:
        with torch.no_grad():
            model(x)
    ema = ShardedEMA(model.get_submodule(target), 0.9)
    ema.attach(optimizers[0])
    average = as_float(plain.state_dict())
    for step in range(4):
        for each, optimizer in ((model, optimizers[0]), (plain, optimizers[1])):
            (each(x) - 3).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        reference_step(average, plain.state_dict(), 1 - 0.9)
        averaged.load_state_dict(plain.state_dict())
        mine = {f"{target}.{name}" for name in ema.names}
        averaged.load_state_dict({name: average[name] for name in mine}, strict=False)
        with torch.no_grad():
            if step % 2:
                model(x)
                for unit in model.modules():
                    if isinstance(unit, FSDPModule):
                        unit.unshard(async_op=True)
            with ema.swap():
                assert torch.allclose(model(x), averaged(x), atol=1e-6)
            assert torch.allclose(model(x), plain(x), atol=1e-6)
    for unit in model.modules():
        if isinstance(unit, FSDPModule):
            unit.reshard()
    for got, want in zip(model.parameters(), plain.parameters(), strict=True):
        assert isinstance(got, DTensor)
        assert torch.allclose(got.full_tensor(), want, atol=1e-6)
    ema.close()


@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("inside", INSIDE)
def test_a_part_of_what_is_sharded(worlds: Worlds, inside: str, gathered: bool) -> None:
    worlds[4 if inside == "over_some" else 2].run(part, inside, "net", gathered)


@pytest.mark.parametrize("inside", ["nothing_else", "several"])
def test_a_part_with_tied_weights(worlds: Worlds, inside: str) -> None:
    worlds[2].run(part, inside, "tied", True)


def below_ddp() -> None:
    torch.manual_seed(0)
    model, averaged = DistributedDataParallel(Policy()), Policy()
    averaged.load_state_dict(model.module.state_dict())
    x = torch.ones(4, 8)
    ema = ShardedEMA(model.module.net, 0.9)
    with torch.no_grad():
        for parameter in model.module.net.parameters():
            parameter.mul_(2)
        want = model(x)
        with ema.swap():
            assert torch.equal(model(x), averaged(x))
        assert torch.equal(model(x), want)
    ema.close()


def test_a_part_of_replicas(worlds: Worlds) -> None:
    worlds[2].run(below_ddp)
