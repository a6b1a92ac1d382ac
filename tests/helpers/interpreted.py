"""Compares the Triton kernel, interpreted on the CPU, with the plain loop; run as a program.

Triton decides when it is imported whether it interprets, and PyTorch when it starts which
instructions it takes. NumPy, which interprets, has no fused multiply-add, so PyTorch is to do
without as well: TRITON_INTERPRET=1 ATEN_CPU_CAPABILITY=default. That the compiled kernel has it is
seen in its PTX.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from sharded_ema.averaging.kernels import LerpPlan, launches
from sharded_ema.averaging.kernels.launches import StepWeights

BLOCK = 2048
SIZES = (1, 2, 3, 5, 127, 1000, *range(BLOCK - 2, BLOCK + 3), *range(4093, 4101), 9001)
WEIGHTS = (1e-3, 0.3, 0.5 - 2.0**-30, 0.5, 0.75, 1.0, 0.0, 1 - 2.0**-24)


def parameters(dtype: torch.dtype) -> list[Tensor]:
    """All sizes, and views that start at odd elements."""
    torch.manual_seed(0)
    live = [torch.randn(n).to(dtype) for n in SIZES]
    whole = torch.randn(3 * 5000).to(dtype)
    live += [whole[1:2050], whole[5003:9999]]
    live[4][3], live[7][BLOCK - 4], live[-1][4000] = float("nan"), float("inf"), -float("inf")
    return live


def compare(
    live: list[Tensor], weights: list[float], *, guard: bool, shadow: torch.dtype = torch.float32
) -> None:
    """One update by the kernel, whose rows are short, and one by the loop."""
    seeds = [[torch.randn(t.shape, dtype=shadow) for t in live] for _ in weights]
    if not guard:
        live = [t.nan_to_num(0.0, 1.0, -1.0) for t in live]
    kernel = LerpPlan([[t.clone() for t in s] for s in seeds], live, guard=guard, impl="fused")
    plain = LerpPlan(seeds, live, guard=guard, impl="reference")
    assert kernel.num_pieces == len(live) and not kernel._batches, "all go through the kernel"
    kernel.run(weights)
    plain.run(weights)
    for ours, theirs in zip(kernel.shadows, plain.shadows, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a, b), (a.shape, weights, guard)
    assert kernel.take_skipped() == plain.take_skipped() == (3 * guard)


def main(dtype: torch.dtype) -> None:
    """Several numbers of profiles, with the guard and without."""
    launches.DEVICES = {"cpu"}
    launches.ROW_NUMEL = 2 * BLOCK
    for profiles, guard in ((1, True), (1, False), (3, True), (8, False)):
        compare(parameters(dtype), list(WEIGHTS[:profiles]), guard=guard)
    compare(parameters(dtype), [1.0], guard=True)
    compare(parameters(dtype), list(WEIGHTS[-3:]), guard=True, shadow=torch.float64)
    compare(parameters(dtype), [0.3], guard=False, shadow=torch.float64)
    mixed = parameters(torch.float32)[:6] + parameters(dtype)[-6:] + parameters(torch.half)[4:5]
    mixed[0] = torch.full((2,), float("nan"))
    compare_mixed(mixed)
    live = parameters(dtype)
    few = [live[4], live[7], *live[-2:]]
    for profiles, guard, shadow in (
        (8, True, torch.float32), (3, False, torch.float32), (3, True, torch.float64),
    ):  # fmt: skip
        compare_by_step(few, profiles, guard=guard, shadow=shadow)


def compare_by_step(live: list[Tensor], profiles: int, *, guard: bool, shadow: torch.dtype) -> None:
    """Weights that lie where the kernel counts steps, also past their end."""
    if not guard:
        live = [t.nan_to_num(0.0, 1.0, -1.0) for t in live]
    rows = [[-1.0] * profiles, list(WEIGHTS[:profiles]), [-1.0] * profiles]
    rows.append([0.25 / (k + 1) for k in range(profiles)])
    by_step = StepWeights(torch.tensor([0, 11]), torch.tensor(rows, dtype=torch.float64), 2)
    seeds = [[torch.randn(t.shape, dtype=shadow) for t in live] for _ in range(profiles)]
    seeds[0][2][0] = float("nan")  # which heals
    fused = [[t.clone() for t in s] for s in seeds]
    kernel = LerpPlan(fused, live, guard=guard, by_step=by_step)
    plain = LerpPlan(seeds, live, guard=guard, impl="reference")
    assert not kernel.not_launched
    for step, row in (
        (0, 0),
        (11, 0),
        (12, 1),
        (13, 2),
        (14, 3),
        (15, 2),
        (16, 3),
        (18, 3),
        (19, 2),
    ):
        by_step.counter[0] = step
        kernel.run_by_step()
        if rows[row][0] >= 0.0:
            if guard:
                plain.heal(range(len(live)))
            plain.run(rows[row])
        for ours, theirs in zip(kernel.shadows, plain.shadows, strict=True):
            for a, b in zip(ours, theirs, strict=True):
                assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)), (step, a.shape, guard)
    assert kernel.take_skipped() == plain.take_skipped() == (4 * 3 * guard)


def compare_mixed(live: list[Tensor]) -> None:
    """Several dtypes in one launch."""
    started: list[int] = []
    right = launches.launch

    def counted(*args: object, **options: object) -> None:
        started.append(1)
        right(*args, **options)  # type: ignore[arg-type]

    launches.launch = counted
    seed = [torch.randn(t.shape) for t in live]
    kernel = LerpPlan([[t.clone() for t in seed]], live, guard=True, impl="fused")
    plain = LerpPlan([seed], live, guard=True, impl="reference")
    started.clear()
    kernel.run([0.25])
    plain.run([0.25])
    assert started == [1]
    assert all(map(torch.equal, kernel.shadows[0], plain.shadows[0]))
    assert kernel.take_skipped() == plain.take_skipped() > 0


if __name__ == "__main__":
    main(getattr(torch, sys.argv[1]))
