"""The average as a live module: what it computes, what it takes, what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from sharded_ema import EMAWarning, ShardedEMA
from sharded_ema.errors import (
    BindError,
    ConfigError,
    StateError,
    SwapError,
    UnsupportedLayoutError,
)
from sharded_ema.model.sources.replicas import Replicas
from tests.helpers.layouts import rank, world
from tests.helpers.pool import WorkerPool

Worlds = dict[int, WorkerPool]
STEPS = 20


class Layer(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Net(nn.Module):
    """Uneven and empty shards on two, three and four ranks; a tied and a frozen weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inp = nn.Linear(3, 5)
        self.layers = nn.ModuleList([Layer(5, 7), Layer(5, 1)])
        self.frozen = nn.Linear(5, 5).requires_grad_(False)
        self.out = nn.Linear(5, 3, bias=False)
        self.tied = nn.Linear(5, 3, bias=False)
        self.tied.weight = self.out.weight
        self.register_buffer("scale", torch.ones(()))
        self.aside = [self.inp]  # an attribute that leads to a module

    def forward(self, x: Tensor) -> Tensor:
        h = self.aside[0](x)
        for layer in self.layers:
            h = layer(h)
        return (self.out(h) + self.tied(self.frozen(h))) * self.scale


def whole(tensor: Tensor) -> Tensor:
    full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full.detach().clone()


def computed(average: dict[str, Tensor], x: Tensor) -> Tensor:
    """What a plain module with these weights computes."""
    plain = Net()
    plain.load_state_dict(average, strict=False)
    with torch.no_grad():
        return plain(x)


def data(index: int) -> Tensor:
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(index + 100 * rank()))


def wrap(layout: str) -> tuple[nn.Module, dict[str, Any]]:
    if layout.endswith(", shared"):  # the default: each replica keeps a part of the average
        model, _ = wrap(layout.removesuffix(", shared"))
        return model, {}
    net: nn.Module = Net()
    if layout == "fsdp2":
        mesh = init_device_mesh("cpu", (world(),))
        for layer in net.layers:  # type: ignore[union-attr]
            fully_shard(layer, mesh=mesh)
        return fully_shard(net, mesh=mesh), {}
    if layout == "hsdp":
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        for layer in net.layers:  # type: ignore[union-attr]
            fully_shard(layer, mesh=mesh)
        return fully_shard(net, mesh=mesh), {"shard_replicas": False}
    if layout == "ddp":
        return DistributedDataParallel(net), {"shard_replicas": False}
    return net, {}


def gather(model: nn.Module) -> dict[str, Tensor]:
    if hasattr(model, "reshard"):
        for module in model.modules():
            if hasattr(module, "reshard"):
                module.reshard()
    return {
        name.removeprefix("module."): whole(p)
        for name, p in model.named_parameters(remove_duplicate=False)
    }


def beside_the_student(layout: str, order: str) -> dict[str, int]:
    model, options = wrap(layout)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ema = ShardedEMA(model, 0.9, **options)
    ema.attach(optimizer)
    before = ema.memory
    teacher = ema.module()
    assert ema.module() is teacher
    assert ema.memory["ideal"] == before["ideal"]
    average = gather(model)
    for index in range(STEPS):
        for part in range(2):
            x = data(2 * index + part)
            alone = isinstance(model, DistributedDataParallel) and part == 0
            with model.no_sync() if alone else nullcontext():
                if order == "teacher first":
                    with torch.no_grad():
                        wanted = teacher(x)
                found = model(x)
                if order == "student first":
                    with torch.no_grad():
                        wanted = teacher(x)
                assert torch.equal(wanted, computed(average, x)), (index, part)
                (found - wanted).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        for name, now in gather(model).items():
            average[name].lerp_(now, 1 - 0.9)
    assert not any(p.requires_grad for p in teacher.parameters())
    assert torch.equal(teacher(data(0)), computed(average, data(0)))
    assert any(not torch.equal(average[n], p) for n, p in gather(model).items())
    full = ema.full_state_dict(rank0_only=False)
    assert all(torch.equal(full[n], average[n]) for n in ema.names)
    used = ema.memory
    ema.close()
    return {"shadow": used["shadow"], "ideal": used["ideal"]}


ORDERS = ["teacher first", "student first"]


@pytest.mark.parametrize("order", ORDERS)
def test_in_one_process(order: str) -> None:
    used = beside_the_student("plain", order)
    assert used["shadow"] == used["ideal"]


@pytest.mark.parametrize(
    ("layout", "size", "order"),
    [
        ("ddp", 2, "student first"),
        ("fsdp2", 2, "student first"),
        ("fsdp2", 3, "teacher first"),
        ("hsdp", 4, "teacher first"),
        ("ddp, shared", 3, "student first"),
        ("hsdp, shared", 4, "teacher first"),
    ],
)
def test_beside_the_student(worlds: Worlds, layout: str, size: int, order: str) -> None:
    for used in worlds[size].run(beside_the_student, layout, order):
        # Uneven shards are padded by fully_shard: at most one row for each.
        assert used["ideal"] <= used["shadow"] <= used["ideal"] + 4 * 60


def under_tensor_parallelism(options: dict[str, Any]) -> None:
    model, mesh = Net(), init_device_mesh("cpu", (world(),))
    # Local outputs of an uneven layer would be taken for those of an even one.
    up = ColwiseParallel(use_local_output=False)
    parallelize_module(model, mesh, {"layers.0.up": up, "layers.0.down": RowwiseParallel()})
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    ema = ShardedEMA(model, 0.9, **options)
    ema.attach(optimizer)
    teacher, average = ema.module(), gather(model)
    for index in range(STEPS):
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(index))
        found = model(x)
        with torch.no_grad():
            wanted = teacher(x)
        torch.testing.assert_close(wanted, computed(average, x), rtol=0, atol=1e-6)
        (found - wanted - 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        for name, now in gather(model).items():
            average[name].lerp_(now, 1 - 0.9)
    assert (teacher(x) - model(x)).abs().max() > 1e-4
    full = ema.full_state_dict(rank0_only=False)
    assert all(torch.equal(full[n], average[n]) for n in ema.names)
    assert ema.memory["shadow"] == ema.memory["ideal"]
    ema.close()


@pytest.mark.parametrize("options", [{}, {"shard_replicas": False}], ids=str)
def test_with_the_plan_of_tensor_parallelism(worlds: Worlds, options: dict[str, Any]) -> None:
    worlds[2].run(under_tensor_parallelism, options)


def one_by_one() -> None:
    """Replicas along two axes of a mesh, from pieces of one, several and no elements."""
    mesh = init_device_mesh("cpu", (2, 2))
    groups = (mesh.get_group(0), mesh.get_group(1))
    wanted = [torch.arange(float(n)) for n in (90, 1, 0, 5)]
    wanted.append(torch.arange(24.0).view(1, 2, 3, 4).to(memory_format=torch.channels_last))
    replicas = Replicas(groups, wanted)
    for index, (tensor, span) in enumerate(zip(wanted, replicas.spans, strict=True)):
        own = tensor.flatten()[span.start : span.stop]
        found = torch.full_like(tensor, -1)
        replicas.gather_one(index, found, tensor if span.numel == tensor.numel() else own)
        assert torch.equal(found, tensor), index


def test_one_tensor_from_replicas_along_two_axes(worlds: Worlds) -> None:
    worlds[4].run(one_by_one)


# ---------------------------------------------------------------------- a swap as teacher


def teach_by_swap(layout: str) -> None:
    """The student's forward comes first, its backward after the swap; as a plain loop has it."""
    model, options = wrap(layout)
    plain, average = Net(), Net()
    optimizers = [
        torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.1)
        for m in (model, plain)
    ]
    ema = ShardedEMA(model, 0.9, **({} if layout == "ddp" else options))
    ema.attach(optimizers[0])
    for index in range(3):
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(index))
        found = model(x)
        with torch.no_grad(), ema.swap():
            wanted = model(x)
        (found - wanted).square().sum().backward()
        with torch.no_grad():
            wanted = average(x)
        (plain(x) - wanted).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            for a, p in zip(average.parameters(), plain.parameters(), strict=True):
                a.lerp_(p, 1 - 0.9)
    now = gather(model)
    for name, p in plain.named_parameters():
        torch.testing.assert_close(now[name], p.detach())
    found = model(data(0))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"), ema.swap():
        found.sum().backward()
    ema.close()


def test_a_swap_between_forward_and_backward() -> None:
    teach_by_swap("plain")


def test_a_swap_between_forward_and_backward_under_ddp(worlds: Worlds) -> None:
    worlds[2].run(teach_by_swap, "ddp")


# ---------------------------------------------------------------------- what it computes in


def test_bf16_weights_with_their_fp32_average() -> None:
    net = Net().bfloat16()
    ema = ShardedEMA(net, 0.9)
    teacher = ema.module()
    with torch.no_grad():
        net.out.weight.add_(1)
    ema.update()
    average = {n: t.bfloat16() for n, t in ema.full_state_dict().items()}
    plain = Net().bfloat16()
    plain.load_state_dict(average)
    x = data(0).bfloat16()
    assert torch.equal(teacher(x), plain(x))
    assert teacher.out.weight.dtype == torch.float32
    assert "weight" not in vars(teacher.out)
    wide = ShardedEMA(net, 0.9).module(dtype=torch.float32)
    assert wide(data(0)).dtype == torch.float32


def mixed(
    mesh_of: tuple[int, ...], param_dtype: torch.dtype | None, asked: torch.dtype | None
) -> None:
    net = Net()
    policy = MixedPrecisionPolicy(param_dtype=param_dtype)
    outermost = MixedPrecisionPolicy(param_dtype=param_dtype, output_dtype=torch.float64)
    mesh = init_device_mesh("cpu", mesh_of, mesh_dim_names=("replicate", "shard")[-len(mesh_of) :])
    for layer in net.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(net, mesh=mesh, mp_policy=outermost)
    ema = ShardedEMA(net, 0.9)
    teacher = ema.module(dtype=asked)
    with torch.no_grad():
        found = teacher(data(0))
        plain = Net()
        plain.to(asked or param_dtype or torch.float32)
        wanted = plain(data(0).to(asked or param_dtype or torch.float32))
        assert found.dtype == torch.float64 and torch.equal(found.to(wanted.dtype), wanted)
    ema.close()


@pytest.mark.parametrize("mesh", [(2,), (2, 1)], ids=["fsdp2", "hsdp, shared"])
@pytest.mark.parametrize(("param_dtype", "asked"), [(torch.bfloat16, None), (None, torch.bfloat16)])
def test_mixed_precision(
    worlds: Worlds,
    mesh: tuple[int, ...],
    param_dtype: torch.dtype | None,
    asked: torch.dtype | None,
) -> None:
    worlds[2].run(mixed, mesh, param_dtype, asked)


class Narrow(nn.Module):
    """Frozen weights in bf16 in one fully_shard call with those that train."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.base = nn.Linear(3, 4, dtype=torch.bfloat16).requires_grad_(False)
        self.top = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x.bfloat16()).float() + self.top(x)


def several_dtypes() -> None:
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    ema = ShardedEMA(fully_shard(Narrow(), mesh=mesh), 0.9)
    teacher = ema.module()
    with torch.no_grad():
        assert torch.equal(teacher(data(0)), Narrow()(data(0)))
    ema.close()


def test_shared_replicas_of_several_dtypes(worlds: Worlds) -> None:
    worlds[2].run(several_dtypes)


def in_parts_and_another_dtype() -> None:
    net = DistributedDataParallel(Net().bfloat16())
    ema = ShardedEMA(net, 0.9)
    teacher = ema.module()
    with torch.no_grad():
        net.module.out.weight.add_(1)
    ema.update()
    average = {n: t.bfloat16() for n, t in ema.full_state_dict(rank0_only=False).items()}
    plain = Net().bfloat16()
    plain.load_state_dict(average)
    x = data(0).bfloat16()
    assert torch.equal(teacher(x), plain(x))
    assert teacher.out.weight.dtype == torch.float32  # as it is kept
    kept = torch.tensor(sum(p.numel() for p in teacher.parameters() if p.dtype == torch.float32))
    dist.all_reduce(kept)
    assert kept == sum(p.numel() for p in net.parameters() if p.requires_grad)
    ema.close()


def test_replicas_that_share_the_average_of_bf16_weights(worlds: Worlds) -> None:
    worlds[2].run(in_parts_and_another_dtype)


def test_buffers_are_its_own_but_averaged_ones() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    net.register_buffer("scratch", torch.ones(2), persistent=False)
    ema = ShardedEMA(net, 0.5, buffers={"*.running_mean": "average"})
    teacher = ema.module(train=True)
    net(torch.randn(8, 3) + 5)
    ema.update()
    assert teacher[1].running_mean.data_ptr() != net[1].running_mean.data_ptr()
    assert torch.equal(teacher[1].running_mean, net[1].running_mean * 0.5)
    assert torch.equal(teacher[1].running_var, torch.ones(4))
    assert "scratch" not in teacher.state_dict() and torch.equal(teacher.scratch, net.scratch)
    teacher(torch.randn(8, 3))
    assert not torch.equal(teacher[1].running_var, net[1].running_var)
    assert not ShardedEMA(nn.Linear(2, 2), 0.9).module().training


def test_each_profile_is_a_module() -> None:
    net = Net()
    ema = ShardedEMA(net, {"fast": 0.5, "slow": 0.9})
    fast, slow = ema.module("fast"), ema.module("slow")
    start = net.out.weight.detach().clone()
    with torch.no_grad():
        net.out.weight.add_(1)
    ema.update()
    assert torch.equal(fast.out.weight, start.lerp(net.out.weight.detach(), 0.5))
    assert torch.equal(slow.out.weight, start.lerp(net.out.weight.detach(), 1 - 0.9))
    with pytest.raises(ConfigError, match="with other arguments"):
        ema.module("fast", train=True)


def test_the_structure_may_be_built() -> None:
    class Odd(nn.Linear):
        def __init__(self) -> None:
            super().__init__(2, 2)
            self.stream = (value for value in ())  # which cannot be copied

    net = Odd()
    ema = ShardedEMA(net, 0.9)
    with pytest.raises(BindError, match=r"a Odd cannot be copied .* pass ema\.module\(build="):
        ema.module()
    with pytest.raises(BindError, match="is another model"):
        ema.module(build=lambda: nn.Identity())
    teacher = ema.module(build=Odd)
    assert teacher.weight.data_ptr() == ema.state_dict()["ema.weight"].data_ptr()


def test_hooks_are_told_of() -> None:
    net = nn.Sequential(nn.Linear(2, 2))
    net[0].register_forward_hook(lambda module, arguments, result: result * 2)
    with pytest.warns(EMAWarning, match=r"modules \(Linear\) have forward hooks"):
        ShardedEMA(net, 0.9).module()


@pytest.mark.parametrize("of", ["average", "teacher"])
def test_shared_with_another_process_it_goes_on_there(of: str) -> None:
    """As a target network that is sent to actors: its memory moves, and the average with it."""
    net = Net()
    ema = ShardedEMA(net, 0.5)
    teacher = ema.module()
    ema.update()
    state = ema.state_dict() if of == "average" else teacher.state_dict()
    for tensor in state.values():
        if tensor.is_floating_point():
            tensor.share_memory_()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(1.0)
    before = teacher.out.weight.detach().clone()
    ema.update()
    expected = torch.lerp(before, net.out.weight.detach(), 0.5)
    teacher(data(0))
    assert torch.equal(teacher.out.weight, expected)
    assert torch.equal(ema.state_dict()["ema.out.weight"], expected)
    ema.close()


# ---------------------------------------------------------------------- what is refused


def test_it_is_not_trained_loaded_or_converted() -> None:
    net = Net()
    ema = ShardedEMA(net, 0.9)
    teacher = ema.module()
    for call, said in (
        (lambda: teacher.to(torch.float64), "moved or converted"),
        (lambda: teacher.half(), "moved or converted"),
        (lambda: teacher.requires_grad_(), "trained"),
        (lambda: teacher.load_state_dict(net.state_dict()), "loaded from a state dict"),
    ):
        with pytest.raises(StateError, match=f"was to be {said}"):
            call()
    optimizer = torch.optim.SGD(teacher.parameters(), lr=0.1, weight_decay=0.1)
    with pytest.raises(StateError, match="an optimizer is about to step"):
        optimizer.step()
    teacher.out.weight.requires_grad_()
    with pytest.raises(StateError, match=r"out\.weight of the module .* has requires_grad=True"):
        teacher(data(0))
    teacher.out.weight.requires_grad_(False)
    teacher(data(0))
    teacher.layers.double()
    with pytest.raises(StateError, match="lies elsewhere than the average"):
        teacher(data(0))
    ema.close()
    with pytest.raises(StateError, match="closed"):
        teacher(data(0))


def test_no_update_within_its_forward() -> None:
    net = Net()
    ema = ShardedEMA(net, 0.9)
    teacher = ema.module()
    handle = teacher.layers[0].register_forward_hook(lambda *_: ema.update())
    with pytest.raises(StateError, match="within a forward of the module of this average"):
        teacher(data(0))
    handle.remove()
    ema.update()
    teacher(data(0))


def moved_between_forward_and_backward(layout: str) -> None:
    model, options = wrap(layout)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    ema = ShardedEMA(model, 0.5, update_every=2, **options)
    ema.attach(optimizer)
    teacher = ema.module()
    for late in (False, True):
        x = data(0).requires_grad_()
        plain = x.detach().clone().requires_grad_()
        copied = Net()
        copied.load_state_dict(ema.full_state_dict(rank0_only=False), strict=False)
        copied(plain).sum().backward()
        found = {"out": [teacher(x)]}
        for _ in range(1 + late):  # every second step moves the average
            model(data(1)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        if late:
            with pytest.raises(StateError, match="has moved since the forward"):
                found["out"][0].sum().backward()
        else:
            found["out"][0].sum().backward()
            assert torch.equal(x.grad, plain.grad)
            optimizer.step()
    ema.module()  # frees what the backward that failed has left gathered
    ema.close()


def test_no_backward_of_another_average(worlds: Worlds) -> None:
    moved_between_forward_and_backward("plain")
    worlds[2].run(moved_between_forward_and_backward, "fsdp2")


def test_not_inside_a_swap() -> None:
    ema = ShardedEMA(Net(), 0.9)
    with ema.swap(), pytest.raises(SwapError, match=r"module\(\) is not allowed"):
        ema.module()


def refused_layouts() -> None:
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))
    both = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    parallelize_module(both[0], mesh["tp"], ColwiseParallel())
    fully_shard(both, mesh=mesh["dp"])
    recurrent = DistributedDataParallel(nn.LSTM(2, 2))
    for target, why, remedy in (
        (both, r"cannot divide 0\.weight .*by tensor parallelism", r"copy_to\(module=it\)"),
        (recurrent, "a LSTM holds .*weight_ih_l0 in its attribute", "shard_replicas=False"),
    ):
        ema = ShardedEMA(target, 0.9)
        with pytest.raises(UnsupportedLayoutError, match=f"{why}.*{remedy}"):
            ema.module()
        ema.close()


def test_layouts_without_a_place_for_it(worlds: Worlds) -> None:
    worlds[2].run(refused_layouts)


# ---------------------------------------------------------------------- saved and resumed


def save_and_resume(layout: str, path: str) -> None:
    model, options = wrap(layout)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    ema = ShardedEMA(model, 0.9, **options)
    ema.attach(optimizer)
    teacher = ema.module()
    for index in range(3):
        model(data(index)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    ema.save(path, step=3)
    with torch.no_grad():
        wanted = teacher(data(9))
    other, options = wrap(layout)
    again = ShardedEMA(other, 0.9, **options)
    resumed = again.module()
    with torch.no_grad():
        resumed(data(9))  # gathered once before
        assert again.load(path) == 3
        assert torch.equal(resumed(data(9)), wanted)
    again.reseed()
    with torch.no_grad():
        assert torch.equal(resumed(data(9)), computed(gather(other), data(9)))
    kept = again.full_state_dict(rank0_only=False)
    with again.swap():
        assert torch.equal(gather(other)["out.weight"], kept["out.weight"])
    ema.close()
    again.close()


@pytest.mark.parametrize(("layout", "size"), [("ddp", 2), ("fsdp2", 3), ("ddp, shared", 2)])
def test_saved_once_and_resumed(worlds: Worlds, tmp_path: Any, layout: str, size: int) -> None:
    worlds[size].run(save_and_resume, layout, str(tmp_path / "step_3"))


def test_a_compiled_student_and_checkpointed_activations() -> None:
    net = Net()
    average = Net()
    ema = ShardedEMA(net, 0.9)
    teacher = ema.module()
    compiled: Callable[..., Tensor] = torch.compile(net, backend="eager")
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
    ema.attach(optimizer)
    for index in range(3):
        x = data(index)
        found = torch.utils.checkpoint.checkpoint(compiled, x, use_reentrant=False)
        with torch.no_grad():
            wanted = teacher(x)
            assert torch.equal(wanted, average(x))
        (found - wanted).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for a, p in zip(average.parameters(), net.parameters(), strict=True):
                a.lerp_(p, 1 - 0.9)


def test_adapters_over_one_frozen_base() -> None:
    peft = pytest.importorskip("peft")
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    model = peft.get_peft_model(net, peft.LoraConfig(target_modules=["0"], r=2))
    ema = ShardedEMA(model, 0.5)
    teacher = ema.module()
    base = dict(model.named_parameters())
    for name, p in teacher.named_parameters():
        assert (p.data_ptr() == base[name].data_ptr()) == ("lora" not in name)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.add_(1)
    ema.update()
    x = torch.randn(3, 4)
    with ema.swap():
        wanted = model(x).detach()
    assert torch.equal(teacher(x), wanted)
    assert not torch.equal(teacher(x), model(x))


# ---------------------------------------------------------------------- modules of all kinds


class Kept(nn.Module):
    """Keeps its weight in a list, too, and computes with what lies there."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.kept = [self.inner.weight]

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.kept[0])


class Head(nn.Module):
    """Reads the weight of an embedding in the forward of another module."""

    def __init__(self) -> None:
        super().__init__()
        self.letters = nn.Embedding(7, 4)
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.inner(x), self.letters.weight)


def wrapped() -> nn.Module:
    return nn.Sequential(checkpoint_wrapper(nn.Linear(4, 4)), nn.Linear(4, 4))


def attention() -> nn.Module:
    return nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0).eval()


FP32, BF16 = torch.float32, torch.bfloat16


@pytest.mark.parametrize(
    ("make", "dtype"),
    [(Kept, FP32), (Head, FP32), (Head, BF16), (wrapped, FP32), (attention, BF16)],
)
def test_modules_that_look_elsewhere(make: Any, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, x = make().to(dtype), torch.randn(3, 4, dtype=dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ema = ShardedEMA(model, 0.5)
    ema.attach(optimizer)
    teacher = ema.module()
    average = [p.detach().float().clone() for p in model.parameters()]
    for _ in range(3):
        model(x).float().square().mean().backward()
        optimizer.step()
        for mean, p in zip(average, model.parameters(), strict=True):
            mean.lerp_(p.detach().float(), 0.5)
    plain = make().to(dtype)
    with torch.no_grad():
        for own, mean in zip(plain.parameters(), average, strict=True):
            own.copy_(mean)
        assert torch.equal(teacher(x), plain(x))
        assert not torch.equal(teacher(x), model(x))
    ema.close()


def before_the_start(layout: str) -> None:
    model, options = wrap(layout)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    ema = ShardedEMA(model, 0.5, start_step=2, **options)
    ema.attach(optimizer)
    teacher, average = ema.module(), {}
    for step in range(4):
        wanted = computed(average if step > 2 else gather(model), data(0))
        with torch.no_grad():
            assert torch.equal(teacher(data(0)), wanted), step
        model(data(step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        now = gather(model)
        average = now if step < 2 else {n: average[n].lerp(now[n], 0.5) for n in now}
    ema.close()


def test_before_the_start_it_is_the_model(worlds: Worlds) -> None:
    before_the_start("plain")
    worlds[2].run(before_the_start, "fsdp2")


def after_a_forward_that_failed() -> None:
    model, _ = wrap("fsdp2")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    ema = ShardedEMA(model, 0.5)
    ema.attach(optimizer)
    teacher, average = ema.module(), gather(model)

    def fail(*arguments: Any) -> None:
        raise ZeroDivisionError

    handle = teacher.layers[1].register_forward_pre_hook(fail)  # type: ignore[index,union-attr]
    with torch.no_grad(), pytest.raises(ZeroDivisionError):
        teacher(data(0))
    handle.remove()
    model(data(0)).square().mean().backward()
    optimizer.step()
    with torch.no_grad(), pytest.raises(StateError, match=r"Call ema\.module\(\) again"):
        teacher(data(0))  # its layers hold what was the average before
    assert ema.module() is teacher
    now = gather(model)
    average = {n: average[n].lerp(now[n], 0.5) for n in now}
    with torch.no_grad():
        assert torch.equal(teacher(data(0)), computed(average, data(0)))
    ema.close()


def test_after_a_forward_that_failed(worlds: Worlds) -> None:
    worlds[2].run(after_a_forward_that_failed)
