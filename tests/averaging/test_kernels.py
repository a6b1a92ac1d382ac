"""Fast kernels against the plain loop, and the plain loop against float64."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from sharded_ema.averaging import kernels
from sharded_ema.averaging.kernels import LerpPlan
from sharded_ema.averaging.kernels.batches import STAGE_NUMEL, make_batches
from sharded_ema.errors import ConfigError

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
WEIGHTS = [0.1, 0.001, 0.7]


def parameters(dtype: torch.dtype) -> list[Tensor]:
    """Odd shapes: empty, 0-d, larger than the stage, strided, with gaps."""
    torch.manual_seed(0)
    shapes = [(3, 5), (0, 4), (), (1,), (STAGE_NUMEL * 2 + 3,), (1500, 1100), (7, 3, 2, 2)]
    found = [torch.randn(shape).to(dtype) for shape in shapes]
    found.append(torch.randn(8, 16, 5, 5).to(dtype).contiguous(memory_format=torch.channels_last))
    found.append(torch.randn(1200, 1400).to(dtype).t())
    found.append(torch.randn(30, 50).to(dtype)[:, :20])
    return found


def shadows(live: list[Tensor]) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    one = [torch.empty_like(p, dtype=torch.float32).normal_(generator=generator) for p in live]
    return [[t.clone() for t in one] for _ in WEIGHTS]


def run_both(live: list[Tensor], *, guard: bool) -> tuple[LerpPlan, LerpPlan]:
    fast = LerpPlan(shadows(live), live, guard=guard)
    plain = LerpPlan(shadows(live), live, guard=guard, impl="reference")
    for _ in range(2):
        fast.run(WEIGHTS)
        plain.run(WEIGHTS)
    for ours, theirs in zip(fast.shadows, plain.shadows, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a, b)
    return fast, plain


@pytest.mark.parametrize("guard", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_reference(dtype: torch.dtype, guard: bool) -> None:
    run_both(parameters(dtype), guard=guard)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_guard_leaves_single_elements_alone(dtype: torch.dtype) -> None:
    live = parameters(dtype)
    live[0][1, 1] = float("nan")
    live[4][STAGE_NUMEL] = float("inf")
    live[5][-1, 1] = -float("inf")
    fast, plain = run_both(live, guard=True)
    assert fast.take_skipped() == plain.take_skipped() == 6
    assert fast.take_skipped() == 0
    assert all(torch.isfinite(t).all() for shadow in fast.shadows for t in shadow)
    assert torch.equal(fast.shadows[0][0][1, 1], shadows(live)[0][0][1, 1])
    assert not torch.equal(fast.shadows[0][0][0, 0], shadows(live)[0][0][0, 0])
    assert fast.nonfinite() == [0, 4, 5]


def test_huge_finite_values_are_not_taken_for_infinite() -> None:
    live = [torch.full((5000,), 3e38)]
    plan = LerpPlan([[torch.zeros(5000)]], live, guard=True)
    plan.run([0.5])
    assert plan.take_skipped() == 0
    assert bool((plan.shadows[0][0] > 1e38).all())


def test_reference_follows_float64() -> None:
    torch.manual_seed(0)
    live = [torch.randn(1000)]
    plan = LerpPlan([[torch.randn(1000)]], live, guard=False, impl="reference")
    exact = plan.shadows[0][0].double()
    for _ in range(50):
        live[0].add_(0.01)
        plan.run([0.01])
        exact = exact + 0.01 * (live[0].double() - exact)
    assert torch.allclose(plan.shadows[0][0].double(), exact, atol=1e-6)


def test_fixed_point_is_exact() -> None:
    live = [torch.randn(4097), torch.randn(33).bfloat16()]
    plan = LerpPlan([[t.float().clone() for t in live]], live, guard=True)
    for _ in range(200):
        plan.run([0.0137])
    assert all(torch.equal(a, b.float()) for a, b in zip(plan.shadows[0], live, strict=True))


def test_bits_do_not_depend_on_where_a_tensor_is_cut() -> None:
    whole, shadow = torch.randn(10_001), torch.randn(10_001)
    plan = LerpPlan([[shadow.clone()]], [whole], guard=False)
    cuts = [0, 1, 17, 4096, 9999, 10_001]
    pieces = [whole[a:b] for a, b in pairwise(cuts)]
    cut = LerpPlan([[shadow[a:b].clone() for a, b in pairwise(cuts)]], pieces, guard=False)
    for _ in range(10):
        plan.run([0.003])
        cut.run([0.003])
    assert torch.equal(plan.shadows[0][0], torch.cat(list(cut.shadows[0])))


@pytest.mark.parametrize("guard", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pieces_that_follow_each_other_are_updated_as_one(dtype: torch.dtype, guard: bool) -> None:
    """Views of two flat buffers: without a gap, empty, after a gap, and each out of turn."""
    one, two = torch.randn(40_000).to(dtype), torch.randn(9_000).to(dtype)
    cuts = [(one, 0, 7), (one, 7, 7), (one, 7, 20_000), (one, 20_004, 40_000)]
    cuts += [(two, 6_000, 9_000), (two, 0, 6_000)]
    live = [tensor[start:stop] for tensor, start, stop in cuts]
    one[3], two[8_000] = float("nan"), float("inf")
    fast, plain = (
        LerpPlan([list(torch.zeros(48_996).split([t.numel() for t in live])) for _ in range(2)],
                 live, guard=guard, impl=impl)
        for impl in ("foreach", "reference")
    )  # fmt: skip
    batches = make_batches(fast.shadows, live, guard=guard)
    assert sum(len(batch.live) for batch in batches) == 4
    for weights in ([0.3, 0.01], [0.1, 0.2]):
        fast.run(weights)
        plain.run(weights)
    for got, want in zip(fast.shadows, plain.shadows, strict=True):
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a.nan_to_num(1e9), b.nan_to_num(1e9))
    assert fast.take_skipped() == plain.take_skipped() == (2 * 2 if guard else 0)
    assert fast.nonfinite() == [0, 4]


def test_no_temporary_beyond_the_stage() -> None:
    live = [torch.zeros(5 * STAGE_NUMEL, dtype=torch.bfloat16), torch.zeros(100)]
    for guard in (False, True):
        batches = make_batches([[torch.zeros(t.shape) for t in live]], live, guard=guard)
        stages = {b.buffer.untyped_storage().data_ptr() for b in batches if b.buffer is not None}
        assert len(stages) == 1
        assert all(b.buffer is None or b.buffer.numel() <= STAGE_NUMEL for b in batches)


def test_implementation_is_chosen_by_argument(monkeypatch: pytest.MonkeyPatch) -> None:
    live, shadows = [torch.ones(3)], [[torch.zeros(3)]]
    calls: list[str] = []
    monkeypatch.setattr(kernels, "lerp_reference", lambda *a, **k: calls.append("reference"))
    monkeypatch.setattr(kernels, "lerp_batch", lambda *a: calls.append("foreach"))
    for impl in (None, "foreach", "reference"):
        LerpPlan(shadows, live, guard=False, impl=impl).run([0.5])
    assert calls == ["foreach", "foreach", "reference"]
    with pytest.raises(ConfigError, match="registered: foreach, reference"):
        LerpPlan(shadows, live, guard=False, impl="cuda")
