"""The C extension against torch.lerp, bit for bit, and that it reads no memory that has gone."""

from __future__ import annotations

import gc
import logging
import os
import shutil
import subprocess
import sys
from array import array
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sharded_ema import ShardedEMA
from sharded_ema.averaging.kernels import LerpPlan, fused
from sharded_ema.averaging.kernels.fused import FusedTable, extension, takes
from sharded_ema.averaging.shadow import Shadow
from sharded_ema.errors import StateError

needs_extension = pytest.mark.skipif(
    extension() is None,
    reason="the C extension was not built, as where there is no C compiler",
)

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# On both sides of 0.5, of what rounds to it in fp32, and of what rounds to 1.
WEIGHTS = (0.0, 1e-9, 1e-3, 0.4999, 0.5 - 2.0**-30, 0.5, 0.75, 1 - 1e-6, 1 - 2.0**-30, 1.0)
# Where blocks and chunks of the loops end, and what no vector divides.
SIZES = (*range(1, 70), *range(2045, 2052), *range(4093, 4101), *range(65534, 65539), 200_001)


def loop(shadow: Tensor, live: Tensor, weight: float, *, guard: bool) -> Tensor:
    """What the element becomes, by torch.lerp alone."""
    value = live.to(shadow.dtype)
    whole = torch.tensor(weight, dtype=shadow.dtype) == 1
    moved = value if whole else torch.lerp(shadow, value, weight)
    return torch.where(torch.isfinite(value), moved, shadow) if guard else moved


def spoil(live: list[Tensor]) -> int:
    """Make some elements NaN or Inf; returns how many."""
    spoiled = 0
    for i, tensor in enumerate(live):
        for bad, at in ((float("nan"), i), (float("inf"), 3 * i), (-float("inf"), 7 * i)):
            if i % 3 == 0 and at < tensor.numel():
                tensor[at] = bad
        spoiled += int((~torch.isfinite(tensor)).sum())
    return spoiled


def check(
    live: list[Tensor], weights: list[float], *, guard: bool, shadow: torch.dtype, bad: int
) -> None:
    torch.manual_seed(1)
    seeds = [[torch.randn(t.shape).to(shadow) for t in live] for _ in weights]
    plan = LerpPlan([[t.clone() for t in s] for s in seeds], live, guard=guard, impl="fused")
    assert not plan._batches
    plan.run(weights)
    for got, seed, weight in zip(plan.shadows, seeds, weights, strict=True):
        for ours, start, parameter in zip(got, seed, live, strict=True):
            want = loop(start, parameter, weight, guard=guard)
            assert torch.equal(ours, want), (parameter.shape, weight)
    assert plan.take_skipped() == (bad if guard else 0)


@needs_extension
@pytest.mark.parametrize("guard", [False, True])
@pytest.mark.parametrize("shadow", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_torch_lerp_at_every_weight(
    dtype: torch.dtype, shadow: torch.dtype, guard: bool
) -> None:
    torch.manual_seed(0)
    live = [torch.randn(n).to(dtype) for n in SIZES]
    bad = spoil(live) if guard else 0
    for weight in WEIGHTS:
        check(live, [weight], guard=guard, shadow=shadow, bad=bad)


@needs_extension
@pytest.mark.parametrize("profiles", range(1, 9))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_torch_lerp_with_several_profiles(dtype: torch.dtype, profiles: int) -> None:
    torch.manual_seed(0)
    live = [torch.randn(n).to(dtype) for n in SIZES]
    bad = spoil(live)
    weights = list(WEIGHTS[1 : 1 + profiles])
    check(live, weights, guard=True, shadow=torch.float32, bad=bad)


@needs_extension
def test_equals_torch_lerp_at_every_size() -> None:
    torch.manual_seed(0)
    live = [torch.randn(n) for n in range(1, 4101)]
    check(live, [0.01], guard=True, shadow=torch.float32, bad=spoil(live))


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_may_start_at_any_element(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    whole = torch.randn(40 * 5000).to(dtype)
    live = [whole[5000 * i + i :][: 4000 + i] for i in range(1, 35)]
    check(live, [0.3, 0.9], guard=True, shadow=torch.float32, bad=spoil(live))


@needs_extension
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("flushed", [False, True])
def test_every_number_of_two_bytes_is_read_as_torch_reads_it(
    dtype: torch.dtype, flushed: bool
) -> None:
    live = [torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)]
    want = live[0].float()
    plan = LerpPlan([[torch.zeros(1 << 16)]], live, guard=False, impl="fused")
    torch.set_flush_denormal(flushed)
    plan.run([1.0])
    torch.set_flush_denormal(False)
    got = plan.shadows[0][0]
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.nan_to_num(), want.nan_to_num())


@needs_extension
@pytest.mark.parametrize("threads", [2, 3, 7])
def test_threads_change_nothing(threads: int) -> None:
    torch.manual_seed(0)
    live = [torch.randn(n) for n in (1_000_003, 5, 300_000, 1)]
    bad, before = spoil(live), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check(live, [0.1, 0.01], guard=True, shadow=torch.float32, bad=bad)
        assert FusedTable([live], live).is_finite() is False
        assert FusedTable([live[1:]], live[1:]).is_finite()
    finally:
        torch.set_num_threads(before)


@needs_extension
def test_threads_treat_subnormal_numbers_as_their_caller_does() -> None:
    live, before = [torch.zeros(1 << 20)], torch.get_num_threads()
    plan = LerpPlan([[torch.full((1 << 20,), 2e-38)]], live, guard=True, impl="fused")
    torch.set_num_threads(4)
    torch.set_flush_denormal(True)
    try:
        plan.run([0.45])
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(before)
    assert not plan.shadows[0][0].any()


@needs_extension
def test_a_forked_process_has_threads_too() -> None:
    live, before = [torch.ones(1 << 20)], torch.get_num_threads()
    plan = LerpPlan([[torch.zeros(1 << 20)]], live, guard=True, impl="fused")
    torch.set_num_threads(2)
    try:
        plan.run([0.5])
        child = os.fork()
        if not child:
            plan.run([0.5])
            # Not a sum: PyTorch's own threads are not there, and it would wait for them.
            os._exit(0 if plan.shadows[0][0][:: 1 << 12].tolist() == [0.75] * (1 << 8) else 1)
        assert os.waitpid(child, 0)[1] == 0
    finally:
        torch.set_num_threads(before)


FORKED = """
import os, torch
from sharded_ema.averaging.kernels import LerpPlan
torch.set_num_threads(2)
torch.zeros(1 << 20).add_(1)  # by threads that the child has not
live, shadow = torch.ones(1 << 20), torch.zeros(1 << 20)
child = os.fork()
if not child:
    plan = LerpPlan([[shadow]], [live], guard=True, impl="fused")
    plan.run([0.5])
    os._exit(0 if shadow[:: 1 << 12].tolist() == [0.5] * (1 << 8) else 1)
assert os.waitpid(child, 0)[1] == 0
"""


@needs_extension
def test_a_forked_process_may_be_the_first_to_average() -> None:
    subprocess.run([sys.executable, "-c", FORKED], check=True, timeout=120)


TEAM = """
import os, re, threading, torch
from pathlib import Path
from sharded_ema.averaging.kernels import LerpPlan

def slept():
    texts = [Path(f"/proc/self/task/{name}/status").read_text() for name in team]
    return sum(int(re.search(r"^voluntary_ctxt_switches:\\s+(\\d+)", t, re.M)[1]) for t in texts)

def wakes(plan):
    # Once they may go to sleep late, after what was before.
    before = slept()
    for _ in range(100):
        plan.run([0.5])
    return slept() - before > 50

torch.set_num_threads(2)
plan = LerpPlan([[torch.zeros(1 << 20)]], [torch.ones(1 << 20)], guard=True, impl="fused")
small = LerpPlan([[torch.zeros(1 << 16)]], [torch.ones(1 << 16)], guard=True, impl="fused")
torch.zeros(1 << 20).add_(1)
tasks = os.listdir("/proc/self/task")
team = set(tasks) - {str(os.getpid())}
print("first thread", wakes(plan), os.listdir("/proc/self/task") == tasks)
print("little work", wakes(small))
def elsewhere():
    print("another thread", wakes(plan))
    left = set(os.listdir("/proc/self/task")) - set(tasks) - {str(threading.get_native_id())}
    print("left", len(left))
thread = threading.Thread(target=elsewhere)
thread.start()
thread.join()
assert plan.shadows[0][0].eq(1.0).all()
"""


@needs_extension
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="there is no /proc here")
@pytest.mark.skipif(not torch.backends.openmp.is_available(), reason="PyTorch has no OpenMP here")
def test_pytorchs_own_threads_do_the_work() -> None:
    """They keep a core busy while they wait for more, unless told to sleep, which is seen here."""
    done = subprocess.run(
        [sys.executable, "-c", TEAM],
        env=os.environ | {"OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == [
        "first thread True True",
        "little work False",
        "another thread False",
        "left 0",
    ]


PRELOADED = r"""
#include <unistd.h>
void GOMP_parallel(void (*work)(void *), void *data, unsigned threads, unsigned flags) {
    (void)threads, (void)flags;
    (void)!write(1, "asked\n", 6);
    work(data);
}
"""
ASK = """
import os, torch
from sharded_ema.averaging.kernels import LerpPlan
torch.set_num_threads(2)
plan = LerpPlan([[torch.zeros(1 << 20)]], [torch.ones(1 << 20)], guard=True, impl="fused")
os.write(1, b"an update\\n")
plan.run([0.5])
assert plan.shadows[0][0][:: 1 << 12].tolist() == [0.5] * (1 << 8)
"""


@needs_extension
@pytest.mark.skipif(not torch.backends.openmp.is_available(), reason="PyTorch has no OpenMP here")
@pytest.mark.skipif(sys.platform != "linux", reason="the team is asked for on Linux alone")
@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler here")
def test_the_team_is_of_the_library_that_was_loaded_before_all_else(tmp_path: Path) -> None:
    """As Intel's OpenMP in the place of GNU's, which PyTorch is then bound to."""
    (tmp_path / "openmp.c").write_text(PRELOADED)
    library = tmp_path / "openmp.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, tmp_path / "openmp.c"], check=True)
    done = subprocess.run(
        [sys.executable, "-c", ASK],
        env=os.environ | {"LD_PRELOAD": str(library)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "an update\nasked\n" in done.stdout


COMPARE = """
import torch
from sharded_ema.averaging.kernels import LerpPlan
torch.manual_seed(0)
for dtype in (torch.float32, torch.float64):
    live, seed = torch.randn(70001, dtype=dtype), torch.randn(70001, dtype=dtype)
    for weight in (1e-3, 0.3, 0.5, 0.77):
        plan = LerpPlan([[seed.clone()]], [live], guard=True, impl="fused")
        plan.run([weight])
        assert torch.equal(plan.shadows[0][0], torch.lerp(seed, live, weight)), (dtype, weight)
"""


@needs_extension
@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_rounds_as_torch_does_with_the_same_instructions(capability: str) -> None:
    """Without fused multiply-add PyTorch rounds twice, and so does the extension."""
    done = subprocess.run(
        [sys.executable, "-c", COMPARE],
        env=os.environ | {"ATEN_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------------- what it takes


def test_what_it_takes() -> None:
    plain, transposed = torch.randn(6, 4), torch.randn(6, 4).t()
    last = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    odd = torch.frombuffer(bytearray(41), dtype=torch.float32, offset=1, count=10)
    gone = torch.ones(5)
    gone.untyped_storage().resize_(0)
    for live in (plain, transposed, last, plain.double(), plain.half(), plain[:0].new_ones(1, 1)):
        assert takes(live, [torch.empty_like(live, dtype=torch.float32)]), live.stride()
    refused = [plain[:, :2], plain[:0], plain.int(), odd, gone, plain.to("meta")]
    refused.append(torch.complex(plain, plain).conj().imag)
    for live in refused:
        assert not takes(live, [torch.zeros(live.shape)]), (live.dtype, live.shape)
    assert not takes(transposed, [torch.zeros(4, 6)])
    assert not takes(plain, [torch.zeros(6, 4, dtype=torch.bfloat16)])


@needs_extension
def test_all_that_it_does_not_take_goes_through_batches() -> None:
    torch.manual_seed(0)
    live = [torch.randn(30, 40)[:, :20], torch.randn(9000), torch.randn(7, dtype=torch.complex64)]
    live[0][1, 1] = float("nan")
    seeds = [torch.zeros_like(t) for t in live]
    plan = LerpPlan([seeds], live, guard=True)
    assert plan.num_pieces == 3 and len(plan._batches) == 1
    assert plan.nonfinite() == [0]
    plan.run([0.25])
    live[0][1, 1] = 0.0
    for got, parameter in zip(seeds, live, strict=True):
        assert torch.equal(got, parameter * 0.25)
    assert plan.take_skipped() == 1


def test_a_module_that_does_not_load_is_told_of_and_does_without(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(name: str) -> None:
        raise ImportError("libc.so.6: version `GLIBC_9' not found")

    monkeypatch.setattr(fused, "import_module", broken)
    extension.cache_clear()
    try:
        with caplog.at_level(logging.DEBUG, "sharded_ema"):
            live = [torch.ones(3)]
            plan = LerpPlan([[torch.zeros(3)]], live, guard=True)
            plan.run([0.5])
            LerpPlan([[torch.zeros(3)]], live, guard=True)
        assert plan.shadows[0][0].tolist() == [0.5] * 3
        (line,) = caplog.messages
        assert "go through PyTorch's kernels" in line and "GLIBC_9" in line
    finally:
        extension.cache_clear()


@needs_extension
def test_tables_that_are_none_are_refused() -> None:
    module, weights = extension(), array("d", [0.5])
    assert module is not None
    with pytest.raises(ValueError, match="24 bytes has no rows of 5 columns"):
        module.lerp(array("q", [1, 2, 3]), weights, True, 1, 0)
    for row in ([8, 1, 5, 0, 8], [8, 0, 0, 0, 8], [8, 0, 5, 8, 8], [8, 0, 5, -1, 8]):
        with pytest.raises(ValueError, match="row 0 of the table"):
            module.lerp(array("q", row), weights, True, 1, 0)
    with pytest.raises(ValueError, match="one for each profile"):
        module.lerp(array("q"), array("d"), True, 1, 0)
    assert module.lerp(array("q"), weights, True, 1, 0) == 0


# ---------------------------------------------------------------------- memory that has gone


def other_data(model: nn.Linear) -> None:
    model.weight.data = torch.randn(64, 64)


def converted(model: nn.Linear) -> None:
    model.to(torch.float64)


def resized(model: nn.Linear) -> None:
    storage = model.weight.untyped_storage()
    storage.resize_(4 * storage.nbytes())
    model.weight.data.normal_()


def replaced(model: nn.Linear) -> None:
    model.weight.data.set_(torch.randn(64, 64))  # type: ignore[call-overload]


@needs_extension
@pytest.mark.parametrize("change", [other_data, converted, resized, replaced])
def test_no_update_reads_an_address_that_was(
    change: Callable[[nn.Linear], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever becomes of a parameter between two updates, and of the memory that it had."""
    used: list[set[int]] = []
    right = FusedTable.lerp

    def noted(table: FusedTable, *args: object, **options: object) -> int:
        columns = 4 + table._profiles
        used.append(set(table._table[0::columns]))
        return right(table, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(FusedTable, "lerp", noted)
    model = nn.Linear(64, 64)
    ema = ShardedEMA(model, 0.5)
    for index in range(3):
        if index:
            change(model)
            gc.collect()
        live, views = ema._model.live(), ema._average.shadow.views["ema"]
        expected = [
            torch.lerp(view, t.detach().float(), 0.5) for view, t in zip(views, live, strict=True)
        ]
        ema.update()
        assert used[-1] == {t.data_ptr() for t in ema._model.live()}
        assert all(torch.equal(*pair) for pair in zip(views, expected, strict=True)), index
    ema.close()


@pytest.mark.parametrize("impl", ["fused", "foreach"])
def test_an_average_that_is_shared_with_a_process_goes_on_there(impl: str) -> None:
    """As through a queue of torch.multiprocessing, which moves it into shared memory."""
    if impl == "fused" and extension() is None:
        pytest.skip("the C extension was not built, as where there is no C compiler")
    model = nn.Linear(1024, 1024)
    ema = ShardedEMA(model, 0.5, impl=impl)
    ema.update()
    before = ema.state_dict()["ema.bias"]
    pointer = before.data_ptr()
    before.share_memory_()
    assert before.data_ptr() != pointer
    with torch.no_grad():
        model.bias.add_(1.0)
    expected = torch.lerp(before, model.bias.detach(), 0.5)
    ema.update()
    assert torch.equal(ema.state_dict()["ema.bias"], expected)
    assert torch.equal(before, expected)
    ema.close()


@needs_extension
def test_a_parameter_whose_memory_was_given_back_is_refused() -> None:
    live = [torch.ones(9), torch.ones(5000)]
    shadow = Shadow(["ema"], live, ["a", "b"], dtype=None, device=None, guard=True, impl=None)
    shadow.copy_live(keep_nonfinite=False)
    live[1].untyped_storage().resize_(0)
    with pytest.raises(StateError, match="parameter b has given back its memory"):
        shadow.follow(live)
