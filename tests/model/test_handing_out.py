"""The average whole in memory, and in another module, in every layout."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from sharded_ema import EMAWarning, ShardedEMA
from sharded_ema.errors import BindError, ConfigError, SwapError
from tests.helpers.layouts import (
    MODES,
    Ragged,
    Run,
    as_float,
    assert_equal,
    build,
    rank,
    reference_step,
    sizes,
)
from tests.helpers.pool import WorkerPool

Worlds = dict[int, WorkerPool]

LAYOUTS = [(mode, size) for mode in MODES for size in sizes(mode, (3,))]


def trained(mode: str, steps: int = 3) -> tuple[Run, ShardedEMA, dict[str, Tensor]]:
    """A run, its average, and that of a plain loop."""
    run = build(mode)
    ema = ShardedEMA(run.target, 0.9, **run.options)
    ema.attach(run.optimizer)
    expected = as_float(run.gather())
    for index in range(steps):
        run.step(index)
        reference_step(expected, run.gather(), 1 - 0.9)
    return run, ema, expected


def hand_out(mode: str) -> None:
    run, ema, expected = trained(mode)
    before = run.gather()
    frozen = run.gather(frozen=True)["frozen"]
    full = ema.full_state_dict()
    assert (full == {}) == (rank() != 0)
    everywhere = ema.full_state_dict(rank0_only=False, dtype=torch.bfloat16)
    wanted = {"frozen": frozen, "running": run.bare.running, "count": run.bare.count, **expected}
    for state in [full] if rank() == 0 else []:
        assert_equal({name: state[name] for name in expected}, expected)
        assert torch.equal(state["tied.weight"], expected["inp.weight"])
        assert torch.equal(state["count"], run.bare.count)
        Ragged().load_state_dict(state)
    assert everywhere.keys() == {*wanted, "tied.weight"}
    for name, value in wanted.items():
        at_most = value.bfloat16() if value.is_floating_point() else value
        assert torch.equal(everywhere[name], at_most), name
    assert_equal(run.gather(), before)
    ema.close()


@pytest.mark.parametrize(("mode", "size"), LAYOUTS)
def test_full_state_dict(worlds: Worlds, mode: str, size: int) -> None:
    worlds[size].run(hand_out, mode)


def write_into_others(mode: str, others: Sequence[str]) -> None:
    run, ema, expected = trained(mode)
    before, buffers = run.gather(), (run.bare.running.clone(), run.bare.count.clone())
    for other in others:
        recipient = build(other, seed=1)
        was = recipient.gather()
        for p in recipient.bare.parameters():
            p.requires_grad_(False)
        ema.copy_to(module=recipient.target)
        for p in recipient.bare.parameters():
            p.requires_grad_(True)
        recipient.bare.frozen.requires_grad_(False)
        now = recipient.gather()
        assert_equal(now, {n: a.to(was[n].dtype) for n, a in expected.items()})
        assert torch.equal(recipient.bare.running, buffers[0].to(recipient.bare.running.dtype))
        assert torch.equal(recipient.bare.count, buffers[1])
        recipient.evaluate()
        recipient = build(other, seed=1)
        ema.copy_to(module=recipient.target, share=0.25)
        wanted = {n: p.float().lerp(expected[n], 0.25).to(p.dtype) for n, p in was.items()}
        assert_equal(recipient.gather(), wanted)
    assert_equal(run.gather(), before)
    ema.close()


@pytest.mark.parametrize(
    ("mode", "others", "size"),
    [
        ("fsdp2", ("fsdp2", "plain", "fsdp1", "fsdp2_bf16", "ddp"), 3),
        ("ddp", ("ddp", "plain", "fsdp2"), 2),
        ("hsdp", ("hsdp", "fsdp2", "tp_fsdp2"), 4),
        ("fsdp1", ("fsdp1", "plain", "fsdp2"), 2),
        ("fsdp1_bf16", ("fsdp1_bf16", "ddp_bf16"), 2),
        ("tp", ("plain", "fsdp2", "tp"), 2),
    ],
)
def test_copy_into_other_modules(
    worlds: Worlds, mode: str, others: tuple[str, ...], size: int
) -> None:
    worlds[size].run(write_into_others, mode, others)


def exchange_nothing_where_all_is_here() -> None:
    mesh = init_device_mesh("cpu", (2,))
    model, recipient = (fully_shard(nn.Linear(5, 3), mesh=mesh) for _ in range(2))
    ema = ShardedEMA(model, 0.9)
    with ExitStack() as stack:
        calls = [
            stack.enter_context(patch.object(dist, call, wraps=getattr(dist, call)))
            for call in ("send", "recv", "broadcast")
        ]
        ema.copy_to(module=recipient)
        assert not any(call.called for call in calls)
        assert torch.equal(recipient.weight.to_local(), model.weight.to_local())
        ema.copy_to(module=nn.Linear(5, 3))
        assert any(call.called for call in calls)
    ema.close()


def test_a_module_sharded_alike_takes_its_part_from_this_rank(worlds: Worlds) -> None:
    worlds[2].run(exchange_nothing_where_all_is_here)


def one_rank_alone_is_wrong(mode: str) -> None:
    _, ema, expected = trained(mode)
    other = build("plain", seed=1).target if rank() else nn.Linear(2, 2)
    with pytest.raises(BindError, match=r"rank 0: the module is another model: it lacks"):
        ema.copy_to(module=other)
    recipient = build("plain", seed=1)
    ema.copy_to(module=recipient.target)
    assert_equal(recipient.gather(), expected)
    ema.close()


def test_what_is_wrong_on_one_rank_is_said_on_all(worlds: Worlds) -> None:
    worlds[2].run(one_rank_alone_is_wrong, "fsdp2")


# ---------------------------------------------------------------------- in one process


def simple(
    norm: type[nn.Module] = nn.LayerNorm,
) -> tuple[nn.Module, torch.optim.Optimizer, ShardedEMA, list[Tensor]]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), norm(4))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5, momentum=0.9)
    ema = ShardedEMA(net, 0.9)
    ema.attach(optimizer)
    average = [p.detach().clone() for p in net.parameters()]
    for _ in range(3):
        net(torch.randn(5, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        for a, p in zip(average, net.parameters(), strict=True):
            a.lerp_(p.detach(), 1 - 0.9)
    return net, optimizer, ema, average


def test_part_of_the_way_with_the_own_weights() -> None:
    net, optimizer, ema, average = simple()
    momentum = [optimizer.state[p]["momentum_buffer"].clone() for p in net.parameters()]
    wanted = [p.detach().lerp(a, 0.3) for p, a in zip(net.parameters(), average, strict=True)]
    ema.copy_to(share=0.3)
    assert all(map(torch.equal, net.parameters(), wanted))
    kept = ema.full_state_dict()
    names = [name for name, _ in net.named_parameters()]
    assert all(torch.equal(kept[n], a) for n, a in zip(names, average, strict=True))
    held = [optimizer.state[p]["momentum_buffer"] for p in net.parameters()]
    assert all(map(torch.equal, held, momentum))
    ema.copy_to()
    assert all(map(torch.equal, net.parameters(), average))


def test_a_share_of_nothing_or_too_much_is_refused() -> None:
    _, _, ema, _ = simple()
    for share in (0.0, -0.1, 1.5, float("nan")):
        with pytest.raises(ConfigError, match="share must be in"):
            ema.copy_to(share=share)


def test_another_module_gets_average_and_buffers() -> None:
    net, _, ema, average = simple(nn.BatchNorm1d)
    other = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double().requires_grad_(False)
    before = [p.detach().clone() for p in net.parameters()]
    with pytest.warns(EMAWarning, match="running statistics"):
        ema.copy_to(module=other)
    assert all(torch.equal(p, a.double()) for p, a in zip(other.parameters(), average, strict=True))
    assert torch.equal(other[1].running_mean, net[1].running_mean.double())
    assert all(map(torch.equal, net.parameters(), before))
    assert not any(p.requires_grad for p in other.parameters())


def test_the_model_itself_is_no_other_module() -> None:
    net, _, ema, _ = simple()
    for same in (net, nn.Sequential(*net)):
        with pytest.raises(ConfigError, match="of the averaged model itself"):
            ema.copy_to(module=same)


def test_other_shapes_are_refused() -> None:
    _, _, ema, _ = simple()
    other = nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5))
    before = [p.detach().clone() for p in other.parameters()]
    with pytest.raises(BindError, match=r"0\.weight is \(5, 3\) there and \(4, 3\) here"):
        ema.copy_to(module=other)
    assert all(map(torch.equal, other.parameters(), before))


def test_a_module_for_which_an_average_stands_in_is_refused() -> None:
    _, _, ema, _ = simple()
    other = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    theirs = ShardedEMA(other, 0.5)
    with theirs.swap(), pytest.raises(SwapError, match="of another ShardedEMA"):
        ema.copy_to(module=other)


def test_the_whole_average_is_a_copy_also_inside_a_swap() -> None:
    _, _, ema, average = simple()
    with ema.swap():
        full = ema.full_state_dict()
    full["0.weight"].zero_()
    again = ema.full_state_dict()
    assert torch.equal(again["0.weight"], average[0])
    with pytest.raises(ConfigError, match="dtype must be a floating one"):
        ema.full_state_dict(dtype=torch.int32)


def test_frozen_adapters_base_is_left_out_when_it_is_skipped() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    net[0].requires_grad_(False)
    assert ShardedEMA(net, 0.9).full_state_dict().keys() == net.state_dict().keys()
    skipped = ShardedEMA(net, 0.9, frozen="skip").full_state_dict()
    assert skipped.keys() == {"1.weight", "1.bias"}


def plain_copies_under_ddp() -> None:
    model = DistributedDataParallel(nn.Linear(3, 2))
    ema = ShardedEMA(model, 0.9)
    full = ema.full_state_dict(rank0_only=False)
    assert torch.equal(full["weight"], model.module.weight)
    ema.close()


def test_slices_of_replicas_come_together(worlds: Worlds) -> None:
    worlds[2].run(plain_copies_under_ddp)
