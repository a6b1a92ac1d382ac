"""The truths of the CPU tests on one CUDA device, and what only holds there: nothing waits.

World size 1 over NCCL: the parameters are DTensors as in any ``fully_shard`` training, and every
shard is whole, so that results can be compared without a second GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile, record_function

from sharded_ema import ShardedEMA
from sharded_ema.averaging.kernels import LerpPlan
from sharded_ema.errors import NonFiniteError
from sharded_ema.model.pieces import FlatShard
from tests.helpers.layouts import Ragged, as_float, assert_equal, reference_step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA device here"),
    pytest.mark.skipif(not dist.is_nccl_available(), reason="this PyTorch was built without NCCL"),
    # The driver, NCCL and PyTorch's debug mode warn of themselves; our own warnings have tests
    # that run everywhere.
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

DEVICE = "cuda:0"
MODES = ("plain", "plain_bf16", "fsdp2", "fsdp2_bf16")
# Calls of the CUDA runtime that make the host wait for the device.
WAITS = {"cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy"}


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DeviceMesh]:
    """A world of one rank over NCCL."""
    torch.cuda.set_device(DEVICE)
    store = tmp_path_factory.mktemp("nccl") / "store"
    dist.init_process_group("nccl", init_method=f"file://{store}", rank=0, world_size=1)
    yield init_device_mesh("cuda", (1,))
    dist.destroy_process_group()


@dataclass
class Run:
    """The ragged model in training on the GPU."""

    model: Ragged
    optimizer: torch.optim.Optimizer

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    def step(self, index: int) -> None:
        """One optimizer step on data that depends on ``index`` alone."""
        generator = torch.Generator().manual_seed(index)
        x = torch.randn(4, 7, generator=generator).to(DEVICE, self.dtype)
        self.model(x).float().square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def evaluate(self) -> Tensor:
        x = torch.linspace(-1, 1, 21, device=DEVICE).view(3, 7).to(self.dtype)
        with torch.no_grad():
            return self.model(x).detach().clone()

    def live(self) -> dict[str, Tensor]:
        """The trainable parameters themselves, not copies, as they lie on the GPU."""
        found = {}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                sharded = isinstance(parameter, DTensor)
                found[name] = parameter.detach().to_local() if sharded else parameter.detach()
        return found

    def copies(self) -> dict[str, Tensor]:
        return {name: tensor.detach().clone() for name, tensor in self.live().items()}


def build(mode: str, mesh: DeviceMesh, seed: int = 0) -> Run:
    torch.manual_seed(seed)
    model = Ragged()
    if mode.endswith("_bf16"):
        model = model.bfloat16()
    model = model.to(DEVICE)
    if mode.startswith("fsdp2"):
        # fully_shard refuses strided and 0-d parameters; its users leave them replicated.
        plain = {model.transposed, model.conv.weight, model.scalar}
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh, ignored_params=plain)
    trained = [p for p in model.parameters() if p.requires_grad]
    # Not foreach, which takes either DTensors or plain tensors, but no mixture.
    return Run(model, torch.optim.AdamW(trained, lr=1e-2, foreach=False))


def averages(ema: ShardedEMA, profile: str = "ema") -> dict[str, Tensor]:
    """The averages by name, where they lie; not copies."""
    found = {}
    for key, value in ema.state_dict().items():
        if key.startswith(f"{profile}."):
            if isinstance(value, FlatShard):
                ((_, piece),) = value.pieces
                value = piece.view(value.shape) if piece.is_contiguous() else piece
            found[key.removeprefix(f"{profile}.")] = (
                value.to_local() if isinstance(value, DTensor) else value
            )
    return found


def copies_of(ema: ShardedEMA) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in averages(ema).items()}


@pytest.mark.parametrize("nonfinite", ["skip", "allow"])
@pytest.mark.parametrize("mode", MODES)
def test_equals_plain_loop_on_the_gpu(mesh: DeviceMesh, mode: str, nonfinite: str) -> None:
    run = build(mode, mesh)
    ema = ShardedEMA(run.model, 0.9, nonfinite=nonfinite)
    ema.attach(run.optimizer)
    expected = as_float(run.live())
    for index in range(10):
        run.step(index)
        reference_step(expected, run.live(), 1 - 0.9)
    assert ema.num_updates == 10
    got = averages(ema)
    assert {str(tensor.device) for tensor in got.values()} == {DEVICE}
    assert {tensor.dtype for tensor in got.values()} == {torch.float32}
    assert_equal(got, expected)
    assert any(not torch.equal(got[name], live.float()) for name, live in run.live().items())
    ema.close()


@pytest.mark.parametrize("profiles", [1, 3, 8])
@pytest.mark.parametrize("guard", [True, False])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str
)
def test_one_launch_equals_the_plain_loop(dtype: torch.dtype, guard: bool, profiles: int) -> None:
    """Around the ends of blocks and rows, and from addresses that are no multiples of 16."""
    torch.manual_seed(0)
    whole = torch.randn(200_000, device=DEVICE).to(dtype)
    sizes = (1, 3, 2047, 2048, 2049, 4100, 65_535, 65_536, 65_537, 150_000)
    live = [torch.randn(n, device=DEVICE).to(dtype) for n in sizes] + [whole[1:9000], whole[9003:]]
    if guard:
        live[2][5], live[-1][-1] = float("nan"), float("inf")
    weights = [1e-3, 0.3, 0.4999, 0.5, 0.75, 1.0, 0.0, 1 - 2.0**-24][:profiles]
    wide = torch.promote_types(dtype, torch.float32)
    seeds = [[torch.randn(t.shape, dtype=wide, device=DEVICE) for t in live] for _ in weights]
    fused, plain = (
        LerpPlan([[t.clone() for t in s] for s in seeds], live, guard=guard, impl=impl)
        for impl in ("fused", "reference")
    )
    fused.run(weights)
    plain.run(weights)
    for ours, theirs in zip(fused.shadows, plain.shadows, strict=True):
        assert all(map(torch.equal, ours, theirs))
    assert fused.take_skipped() == plain.take_skipped() == 2 * guard


def test_several_profiles_in_one_pass(mesh: DeviceMesh) -> None:
    decays = {"fast": 0.5, "middle": 0.9, "slow": 0.99}
    run = build("fsdp2_bf16", mesh)
    ema = ShardedEMA(run.model, decays)
    ema.attach(run.optimizer)
    expected = {name: as_float(run.live()) for name in decays}
    for index in range(5):
        run.step(index)
        for name, decay in decays.items():
            reference_step(expected[name], run.live(), 1 - decay)
    for name in decays:
        assert_equal(averages(ema, name), expected[name])
    ema.close()


@pytest.mark.parametrize("mode", MODES)
def test_each_replay_of_a_graph_is_an_update(mesh: DeviceMesh, mode: str) -> None:
    """Of a recorded step of the optimizer with the average, whose decays change at every step."""
    run = build(mode, mesh)
    run.step(0)
    trained = [p for p in run.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, foreach=False, capturable=True)
    ema = ShardedEMA(run.model, "warmup:0.9999", capturable=True)
    ema.attach(optimizer)
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    expected = as_float(run.live())
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for n in (1, 2, 3):
            optimizer.step()
            reference_step(expected, run.live(), 1 - (1 + n) / (10 + n))
    torch.cuda.current_stream().wait_stream(side)
    assert ema.num_updates == 3
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    assert ema.num_updates == 3
    for n in (4, 5, 6, 7):
        graph.replay()
        reference_step(expected, run.live(), 1 - (1 + n) / (10 + n))
        assert ema.num_updates == n
    assert_equal(averages(ema), expected)
    assert ema.metrics()["ema/decay/ema"] == 8 / 17
    ema.close()


# ---------------------------------------------------------------------- update() never waits


@pytest.mark.parametrize("nonfinite", ["skip", "allow"])
@pytest.mark.parametrize("mode", MODES)
def test_update_passes_the_sync_debug_mode(mesh: DeviceMesh, mode: str, nonfinite: str) -> None:
    run = build(mode, mesh)
    run.step(0)
    ema = ShardedEMA(run.model, 0.9, nonfinite=nonfinite)
    probe = torch.ones((), device=DEVICE)
    torch.cuda.set_sync_debug_mode("error")
    try:
        ema.update()
        ema.update()
        with pytest.raises(RuntimeError, match="synchroniz"):
            probe.item()  # else this mode would prove nothing
    finally:
        torch.cuda.set_sync_debug_mode("default")
    ema.close()


def host_waits(work: Callable[[], object]) -> tuple[list[str], bool]:
    """What made the host wait while ``work`` ran, and whether calls of the runtime were seen."""
    torch.cuda.synchronize()
    both = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with profile(activities=both) as profiler, record_function("sharded_ema_work"):
        work()
    # The profiler waits for the device when it stops, and its own waiting is in the record as
    # well: only what lies inside the range counts.
    events = [e for e in profiler.events() if e.device_type == DeviceType.CPU]
    (span,) = [e.time_range for e in events if e.name == "sharded_ema_work"]
    inside = [e.name for e in events if span.start <= e.time_range.start < span.end]
    copies = [e.name for e in profiler.events() if "Memcpy DtoH" in e.name]
    seen = any(name.startswith(("cudaLaunch", "cuLaunch", "cudaMemcpy")) for name in inside)
    return [name for name in inside if name in WAITS] + copies, seen


@pytest.mark.parametrize("nonfinite", ["skip", "allow"])
@pytest.mark.parametrize("mode", MODES)
def test_update_issues_no_wait_and_no_copy_to_the_host(
    mesh: DeviceMesh, mode: str, nonfinite: str
) -> None:
    run = build(mode, mesh)
    run.step(0)
    ema = ShardedEMA(run.model, 0.9, nonfinite=nonfinite)
    ema.update()
    probe = torch.ones(3, device=DEVICE)
    # Twice: the first profile of a process may begin to record late.
    for _ in range(2):
        control, seen = host_waits(lambda: probe.sum().item())
    if not seen:
        pytest.skip("the profiler does not see calls of the CUDA runtime here (CUPTI is missing)")
    assert control, "reading a number back was not seen as a wait: this test would prove nothing"
    waits, seen = host_waits(ema.update)
    assert seen
    assert waits == []
    ema.close()


# ---------------------------------------------------------------------- swap and checkpoints


@pytest.mark.parametrize("mode", MODES)
def test_swap_restores_the_parameters_exactly(mesh: DeviceMesh, mode: str) -> None:
    run = build(mode, mesh)
    ema = ShardedEMA(run.model, 0.5)
    ema.attach(run.optimizer)
    for index in range(3):
        run.step(index)
    before, output = run.copies(), run.evaluate()
    with ema.swap():
        inside = run.evaluate()
        standing_in = {name: average.to(run.dtype) for name, average in averages(ema).items()}
        # Evaluating has gathered the parameters; named_parameters() shows the shards only after.
        ema.state_dict()
        assert_equal(run.copies(), standing_in)
    assert_equal(run.copies(), before)
    assert torch.equal(run.evaluate(), output)
    assert not torch.equal(inside, output)
    ema.state_dict()
    with pytest.raises(KeyError), ema.swap():
        raise KeyError("in the middle of an evaluation")
    assert_equal(run.copies(), before)
    run.step(3)
    assert ema.num_updates == 4
    ema.close()


@pytest.mark.parametrize("format", ["safetensors", "dcp"])
@pytest.mark.parametrize("mode", MODES)
def test_save_and_load(mesh: DeviceMesh, mode: str, format: str, tmp_path: Path) -> None:
    run = build(mode, mesh)
    ema = ShardedEMA(run.model, 0.9)
    ema.attach(run.optimizer)
    for index in range(3):
        run.step(index)
    ema.save(tmp_path / "ema", step=3, format=format).result()
    saved = copies_of(ema)
    ema.close()

    other = build(mode, mesh, seed=1)
    loaded = ShardedEMA(other.model, 0.9)
    assert any(not torch.equal(value, saved[name]) for name, value in averages(loaded).items())
    assert loaded.load(tmp_path / "ema", verify=True) == 3
    got = averages(loaded)
    assert_equal(got, saved)
    assert {str(tensor.device) for tensor in got.values()} == {DEVICE}
    assert loaded.num_updates == 3
    loaded.close()


@pytest.mark.parametrize("mode", MODES)
def test_asynchronous_save_is_the_state_of_the_call(
    mesh: DeviceMesh, mode: str, tmp_path: Path
) -> None:
    """The copies are only begun in the call; what the device does next must not reach them."""
    run = build(mode, mesh)
    ema = ShardedEMA(run.model, 0.9)
    ema.attach(run.optimizer)
    for number in range(2):  # the second one uses the buffer again
        for index in range(3):
            run.step(index)
        saved = copies_of(ema)
        handle = ema.save(tmp_path / f"step_{number}", step=number, asynchronous=True)
        for index in range(10):
            run.step(index)
        handle.staged()
        handle.result()
        assert ema._store._staging._buffer is not None and ema._store._staging._buffer.is_pinned()
        assert ema.load(tmp_path / f"step_{number}", verify=True) == number
        assert_equal(averages(ema), saved)
    ema.close()


# ---------------------------------------------------------------------- a shadow on the host


@pytest.mark.parametrize("mode", MODES)
def test_shadow_on_the_cpu(mesh: DeviceMesh, mode: str) -> None:
    run = build(mode, mesh)
    ema = ShardedEMA(run.model, 0.9, device="cpu")
    ema.attach(run.optimizer)
    expected = {name: live.float().cpu() for name, live in run.copies().items()}
    for index in range(5):
        run.step(index)
        now = {name: live.cpu() for name, live in run.live().items()}
        reference_step(expected, now, 1 - 0.9)
    got = averages(ema)
    assert {tensor.device.type for tensor in got.values()} == {"cpu"}
    assert_equal(got, expected)
    assert ema.memory["host"] == ema.memory["shadow"] == ema.memory["ideal"]
    with ema.swap():
        average = {name: tensor.to(DEVICE, run.dtype) for name, tensor in got.items()}
        assert_equal(run.copies(), average)
    ema.close()


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("device", ["cpu", None])
@pytest.mark.parametrize("mode", ["plain_bf16", "fsdp2"])
def test_what_goes_on_behind_the_call(
    mesh: DeviceMesh, mode: str, device: str | None, overlap: bool
) -> None:
    """Steps follow each other as fast as the host can begin them, and no element is torn."""
    run = build(mode, mesh)
    ema = ShardedEMA(run.model, 0.9, device=device, overlap=overlap)
    ema.attach(run.optimizer)
    seen = [run.copies()]
    for index in range(20):
        run.step(index)
        seen.append(run.copies())
    first, *others = [{n: t.to(device or DEVICE) for n, t in each.items()} for each in seen]
    expected = as_float(first)
    for each in others:
        reference_step(expected, each, 1 - 0.9)
    assert_equal(averages(ema), expected)
    ema.close()


@pytest.mark.parametrize("overlap", [False, True])
def test_parameters_change_right_after_they_are_read(overlap: bool) -> None:
    """Each chunk takes a while, and what comes after it on the stream writes the next ones."""
    model = nn.Module()
    model.weight = nn.Parameter(torch.zeros(1 << 26, device=DEVICE))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    ema = ShardedEMA(model, 0.5, device="cpu", overlap=overlap, offload_buffer=1 << 20)
    ema.attach(optimizer)
    expected = 0.0
    for index in range(5):
        model.weight.grad = torch.full_like(model.weight, -1.0)
        optimizer.step()
        expected += 0.5 * (index + 1 - expected)
        if not overlap:  # else nothing may change them before the next step
            with torch.no_grad():
                model.weight.add_(100.0).sub_(100.0)
    assert ema.memory["transfer"] == (1 << 20) + model.weight.nbytes
    assert bool((ema.state_dict()["ema.weight"] == expected).all())
    ema.close()


def test_update_to_the_host_passes_the_sync_debug_mode(mesh: DeviceMesh) -> None:
    run = build("fsdp2_bf16", mesh)
    run.step(0)
    ema = ShardedEMA(run.model, 0.9, device="cpu")
    ema.update()
    ema.metrics()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ema.update()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    ema.close()


# ---------------------------------------------------------------------- NaN and Inf


def poison(run: Run) -> dict[str, Tensor]:
    """Put one NaN and one Inf into two parameters; a mask of what is still finite, by name."""
    live = run.live()
    with torch.no_grad():
        live["out.weight"][1, 2] = float("nan")
        live["inp.bias"][3] = float("-inf")
    return {name: torch.isfinite(tensor) for name, tensor in live.items()}


@pytest.mark.parametrize("mode", MODES)
def test_nonfinite_elements_are_skipped_and_counted(mesh: DeviceMesh, mode: str) -> None:
    run = build(mode, mesh)
    ema = ShardedEMA(run.model, 0.9)
    run.step(0)
    ema.update()
    before = copies_of(ema)
    run.step(1)
    finite = poison(run)
    expected = {name: tensor.clone() for name, tensor in before.items()}
    reference_step(expected, run.live(), 1 - 0.9)
    expected = {n: torch.where(finite[n], value, before[n]) for n, value in expected.items()}
    ema.update()
    assert_equal(averages(ema), expected)
    assert ema.metrics()["ema/nonfinite_elements"] == 2
    ema.update()
    assert ema.metrics()["ema/nonfinite_elements"] == 4
    ema.close()


@pytest.mark.parametrize("mode", ["fsdp2", "plain_bf16"])
def test_nonfinite_raise_leaves_the_shadow(mesh: DeviceMesh, mode: str) -> None:
    run = build(mode, mesh)
    ema = ShardedEMA(run.model, 0.9, nonfinite="raise")
    run.step(0)
    ema.update()
    before = copies_of(ema)
    poison(run)
    with pytest.raises(NonFiniteError, match=r"out\.weight|inp\.bias"):
        ema.update()
    assert_equal(averages(ema), before)
    assert ema.num_updates == 1
    ema.close()


# ---------------------------------------------------------------------- memory


@pytest.mark.parametrize("profiles", [1, 3])
@pytest.mark.parametrize("mode", MODES)
def test_shadow_takes_four_bytes_per_element(mesh: DeviceMesh, mode: str, profiles: int) -> None:
    run = build(mode, mesh)
    ema = ShardedEMA(run.model, {f"p{k}": 0.9 for k in range(profiles)})
    elements = sum(tensor.numel() for tensor in run.live().values())
    assert ema.memory["ideal"] == 4 * elements * profiles
    gaps = ema.memory["shadow"] - ema.memory["ideal"]  # up to 16 bytes behind each tensor
    assert 0 <= gaps < 16 * len(ema.names) * profiles
    assert ema.memory["host"] == 0
    ema.close()


@pytest.mark.parametrize("nonfinite", ["skip", "allow"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_update_allocates_nothing_of_the_size_of_the_model(
    dtype: torch.dtype, nonfinite: str
) -> None:
    torch.cuda.set_device(DEVICE)
    side, count = 3000, 4
    model = nn.Module()
    for number in range(count):
        weight = torch.ones(side, side, dtype=dtype, device=DEVICE)
        model.register_parameter(f"w{number}", nn.Parameter(weight))
    shadow, small = 4 * count * side * side, 1 << 24
    before = torch.cuda.memory_allocated(DEVICE)
    ema = ShardedEMA(model, 0.9, nonfinite=nonfinite)
    ema.update()
    held = torch.cuda.memory_allocated(DEVICE) - before
    assert shadow <= held <= shadow + small
    torch.cuda.reset_peak_memory_stats(DEVICE)
    ema.update()
    # A temporary of the size of one parameter would take more than twice that.
    assert torch.cuda.max_memory_allocated(DEVICE) - before <= held + small
    ema.close()
