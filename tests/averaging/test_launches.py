"""The Triton kernel without a GPU: interpreted, compiled, and its launches counted."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sharded_ema import ShardedEMA
from sharded_ema.averaging.kernels import LerpPlan, launches
from sharded_ema.averaging.shadow import Shadow
from sharded_ema.errors import ConfigError

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="there is no Triton for this machine; it is a test dependency on x86-64 Linux",
)


@needs_triton
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_interpreted_it_equals_the_plain_loop(dtype: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.helpers.interpreted", dtype],
        env=os.environ | {"TRITON_INTERPRET": "1", "ATEN_CPU_CAPABILITY": "default"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------------- compiled


def ptx(
    capability: int,
    kinds: int,
    profiles: int,
    *,
    guard: bool = True,
    by_step: bool = False,
    double: bool = False,
) -> str:
    """The kernel as it is compiled for a GPU that need not be there."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from sharded_ema.averaging.kernels import triton_lerp

    constants = {"K": profiles, "GUARD": guard, "KINDS": kinds}
    signature = {"table": "*i64", "skipped": "*i64"}
    kernel = triton_lerp.fused_lerp_double if double else triton_lerp.fused_lerp
    if by_step:
        kernel, constants = triton_lerp.fused_lerp_by_step, {"DOUBLE": double, **constants}
        signature |= {"counter": "*i64", "weights": "*fp64", "steps": "i32", "period": "i32"}
    elif double:
        signature |= {f"b{k}": "i64" for k in range(8)}
    else:
        signature |= {f"w{k}": "fp32" for k in range(8)}
    signature |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs=constants,
        attrs={(0,): [["tt.divisibility", 16]], (1,): [["tt.divisibility", 16]]},
    )
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": triton_lerp.NUM_WARPS},
    )
    text: str = compiled.asm["ptx"]
    return text


def accesses(text: str, what: str) -> tuple[int, int]:
    """Accesses of global memory of 128 bits, and all others."""
    found = re.findall(rf"\b{what}\.global[\w.:]*", text)
    wide = [access for access in found if re.search(r"\.v4\.[bfu]32$|\.v2\.[bfu]64$", access)]
    assert not [access for access in found if ".v" in access and access not in wide]
    return len(wide), len(found) - len(wide)


@needs_triton
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("profiles", [1, 3])
@pytest.mark.parametrize("by_step", [False, True], ids=["", "by_step"])
@pytest.mark.parametrize(("number", "size"), [(0, 4), (1, 2), (2, 2)], ids=["fp32", "bf16", "fp16"])
def test_whole_blocks_move_in_128_bits(
    number: int, size: int, by_step: bool, profiles: int, capability: int, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Of its 2,048 elements each of 128 threads has 16: those are so many accesses of 16 bytes."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    text = ptx(capability, 1 << (2 * number + 1), profiles, by_step=by_step)
    wide, narrow = accesses(text, "ld")
    # Only the tail of a row, which is masked, has others: 16 per thread and tensor, and the table.
    assert wide == 16 * size // 16 + profiles * 16 * 4 // 16
    assert narrow <= 16 * (1 + profiles) + 3 + 2 * profiles + by_step * (2 + profiles)
    assert accesses(text, "st") == (profiles * 16 * 4 // 16, profiles * 16)
    assert ".local" not in text
    assert len(re.findall(r"\bfma\.rn(?:\.ftz)?\.f32", text)) >= 2 * 16 * profiles
    # What starts anywhere has no wide accesses to memory that it might not be aligned for.
    unaligned = ptx(capability, 1 << (2 * number), profiles, by_step=by_step)
    assert accesses(unaligned, "st")[0] == 0


@needs_triton
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("by_step", [False, True], ids=["", "by_step"])
@pytest.mark.parametrize(("number", "size"), [(0, 4), (3, 8)], ids=["fp32", "fp64"])
def test_whole_blocks_of_fp64_shadows_too(
    number: int, size: int, by_step: bool, capability: int, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    text = ptx(capability, 1 << (2 * number + 1), 1, by_step=by_step, double=True)
    wide, narrow = accesses(text, "ld")
    assert wide == 16 * size // 16 + 16 * 8 // 16
    assert narrow <= 16 * 2 + 3 + 2 + by_step * 3
    assert accesses(text, "st") == (16 * 8 // 16, 16)
    assert ".local" not in text
    assert len(re.findall(r"\bfma\.rn\.f64", text)) >= 2 * 16


@needs_triton
def test_weights_of_fp64_shadows_are_of_one_type() -> None:
    """A weight of 0, with which the kernel is tried out, would be an int32 and compile another."""
    from sharded_ema.averaging.kernels import triton_lerp

    parameters = triton_lerp.fused_lerp_double.params
    types = {p.name: p.annotation_type for p in parameters if p.name.startswith("b")}
    assert types == {f"b{k}": "i64" for k in range(8)}
    assert all(p.do_not_specialize for p in parameters if p.name in types)


@needs_triton
def test_subnormal_numbers_are_not_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    assert ".ftz" not in ptx(90, 0b10, 1)


# ---------------------------------------------------------------------- dispatched


class Operators(TorchDispatchMode):
    """What PyTorch is asked to compute."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class Launches:
    """Stands in for the GPU and notes what was launched: tables, and how many weights."""

    def __init__(self) -> None:
        self.seen: list[tuple[Tensor, int]] = []

    def __call__(
        self, table: Tensor, skipped: Tensor, weights: Any, *, guard: bool, kinds: int, double: bool
    ) -> None:
        assert guard and skipped.dtype is torch.int64
        self.seen.append((table, len(weights) * (2 if double else 1)))

    @property
    def bytes(self) -> list[int]:
        """What each launch would move."""
        size = torch.tensor([4, 4, 2, 2, 2, 2, 8, 8])
        return [int((t[:, 1] * (size[t[:, 2]] + 8 * k)).sum()) for t, k in self.seen]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Launches:
    """The CPU in the place of a GPU."""
    launcher = Launches()
    monkeypatch.setattr(launches, "DEVICES", {"cpu"})
    monkeypatch.setattr(launches, "launch", launcher)
    monkeypatch.setattr(launches, "triton_module", lambda: SimpleNamespace(FAILURES=()))
    return launcher


@pytest.mark.parametrize("profiles", [1, 3])
@pytest.mark.parametrize("count", [10, 3000])
@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)], ids=["fp32", "bf16"]
)
def test_an_update_is_one_launch_of_the_least_bytes(
    started: Launches, dtype: torch.dtype, size: int, count: int, profiles: int
) -> None:
    """With the settings that users get."""
    model = nn.Module()
    model.weights = nn.ParameterList(
        [torch.zeros(1 + 7 * i % 900, dtype=dtype) for i in range(count)]
    )
    model.weights.append(torch.zeros(200_000, dtype=dtype))
    elements = sum(p.numel() for p in model.parameters())
    ema = ShardedEMA(model, {f"p{k}": 0.9 for k in range(profiles)})
    for _ in range(4):  # at the first three its health is looked at, and at one in 1,000
        ema.update()
    for _ in range(3):
        started.seen.clear()
        with Operators() as operators:
            ema.update()
        assert started.bytes == [elements * (size + 8 * profiles)]
        assert operators.seen == []
    ema.close()


@pytest.mark.usefixtures("started")
def test_what_overflows_in_the_shadow_is_not_finite() -> None:
    live = [torch.full((9,), 1e40, dtype=torch.float64), torch.ones(9, dtype=torch.float64)]
    plan = LerpPlan([[torch.zeros(9), torch.zeros(9)]], live, guard=True)
    assert plan.num_pieces == 2 and not plan.not_launched
    assert plan.nonfinite() == [0]
    live[0].fill_(3e38)
    assert plan.nonfinite() == []


@pytest.mark.usefixtures("started")
def test_whether_all_is_finite_is_asked_of_all_tensors_at_once() -> None:
    """Also of fp64 over fp32, where it is looked for what overflows."""
    live = [torch.ones(9, dtype=torch.float64) for _ in range(50)] + [torch.ones(9).bfloat16()]
    plan = LerpPlan([[torch.zeros(9) for _ in live]], live, guard=True)
    with Operators() as operators:
        assert plan.nonfinite() == []
    assert sum("_local_scalar_dense" in name for name in operators.seen) == 1


def test_each_kind_goes_its_way(started: Launches) -> None:
    live = [torch.ones(5), torch.ones(6).bfloat16(), torch.ones(3, dtype=torch.float64)]
    live += [torch.ones(8, 8)[:, :3], torch.ones(7, dtype=torch.float64)]
    shadows = [torch.zeros(t.shape) for t in live[:-1]] + [torch.zeros(7, dtype=torch.float64)]
    plan = LerpPlan([shadows], live, guard=True)
    started.seen.clear()
    plan.run([0.5])
    assert started.bytes == [5 * 12 + 6 * 10 + 3 * 16, 7 * 24]
    assert [float(s.sum()) for s in plan.shadows[0]] == [0.0, 0.0, 0.0, 12.0, 0.0]
    assert plan.nonfinite() == []
    live[1][0] = float("nan")
    assert plan.nonfinite() == [1]


def test_every_shadow_starts_aligned(started: Launches) -> None:
    live = [torch.randn(n) for n in (1, 7, 4, 33)] + [torch.randn(5, dtype=torch.float64)]
    shadow = Shadow(["a", "b"], live, list("vwxyz"), dtype=None, device=None, guard=True, impl=None)
    for views in shadow.views.values():
        assert not any(view.data_ptr() % 16 for view in views)
    assert shadow.num_bytes == 2 * (4 * 45 + 8 * 5)
    assert sum(shadow.allocated.values()) == 2 * (4 * (4 + 8 + 4 + 36) + 8 * 6)


def test_addresses_are_noted_again_when_memory_moves(started: Launches) -> None:
    live = [torch.ones(5), torch.ones(6)]
    shadow = Shadow(["a"], live, ["x", "y"], dtype=None, device=None, guard=True, impl=None)
    shadow.copy_live(keep_nonfinite=False)
    plan = shadow._plan
    shadow.follow(live)
    assert shadow._plan is plan
    live[1].data = torch.full((6,), 3.0)
    shadow.follow(live)
    assert shadow._plan is not plan and shadow._plan is not None
    (table,) = shadow._plan._launches
    assert table._table[:, 0].tolist() == [t.data_ptr() for t in live]


# ---------------------------------------------------------------------- without it


def test_a_kernel_that_fails_is_told_of_and_done_without(
    started: Launches, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*args: Any, **options: Any) -> None:
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(launches, "launch", broken)
    monkeypatch.setattr(
        launches, "triton_module", lambda: SimpleNamespace(FAILURES=(RuntimeError,))
    )
    live = [torch.ones(5)]
    plan = LerpPlan([[torch.zeros(5)]], live, guard=True)
    plan.run([0.5])
    assert plan.shadows[0][0].tolist() == [0.5] * 5
    (line,) = caplog.messages
    assert "no kernel image" in line and "cpu go through PyTorch's kernels" in line
    with pytest.raises(ConfigError, match="fails on cpu: no kernel image"):
        LerpPlan([[torch.zeros(5)]], live, guard=True, impl="fused")


def test_without_triton_batches_serve(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def missing(name: str) -> None:
        raise ImportError("No module named 'triton'")

    monkeypatch.setattr(launches, "DEVICES", {"cpu"})
    monkeypatch.setattr(launches, "import_module", missing)
    launches.triton_module.cache_clear()
    try:
        with caplog.at_level(logging.DEBUG, "sharded_ema"):
            plan = LerpPlan([[torch.zeros(5)]], [torch.ones(5)], guard=True)
        plan.run([0.5])
        assert plan.shadows[0][0].tolist() == [0.5] * 5
        assert "many launches" in caplog.text
        with pytest.raises(ConfigError, match="there is no Triton"):
            LerpPlan([[torch.zeros(5)]], [torch.ones(5)], guard=True, impl="fused")
    finally:
        launches.triton_module.cache_clear()
