"""Fast kernels against the plain loop, and the plain loop against float64."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from sharded_ema.averaging import kernels
from sharded_ema.averaging.kernels import LerpPlan
from sharded_ema.averaging.kernels.batches import STAGE_NUMEL, make_batches
from sharded_ema.averaging.kernels.fused import FusedTable
from sharded_ema.errors import ConfigError
from sharded_ema.model.precision import average_dtype

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


def run_both(
    live: list[Tensor], fast_impl: str, *, guard: bool, dtype: torch.dtype = torch.float32
) -> tuple[LerpPlan, LerpPlan]:
    fast, plain = (
        LerpPlan([[t.to(dtype) for t in s] for s in shadows(live)], live, guard=guard, impl=impl)
        for impl in (fast_impl, "reference")
    )
    for _ in range(2):
        fast.run(WEIGHTS)
        plain.run(WEIGHTS)
    for ours, theirs in zip(fast.shadows, plain.shadows, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a, b)
    return fast, plain


@pytest.mark.parametrize("impl", ["fused", "foreach"])
@pytest.mark.parametrize("guard", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_reference(dtype: torch.dtype, guard: bool, impl: str) -> None:
    run_both(parameters(dtype), impl, guard=guard)


@pytest.mark.parametrize("impl", ["fused", "foreach"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_guard_leaves_single_elements_alone(dtype: torch.dtype, impl: str) -> None:
    live = parameters(dtype)
    live[0][1, 1] = float("nan")
    live[4][STAGE_NUMEL] = float("inf")
    live[5][-1, 1] = -float("inf")
    fast, plain = run_both(live, impl, guard=True)
    assert fast.take_skipped() == plain.take_skipped() == 6
    assert fast.take_skipped() == 0
    assert all(torch.isfinite(t).all() for shadow in fast.shadows for t in shadow)
    assert torch.equal(fast.shadows[0][0][1, 1], shadows(live)[0][0][1, 1])
    assert not torch.equal(fast.shadows[0][0][0, 0], shadows(live)[0][0][0, 0])
    assert fast.nonfinite() == [0, 4, 5]


@pytest.mark.parametrize("impl", ["fused", "foreach"])
def test_huge_finite_values_are_not_taken_for_infinite(impl: str) -> None:
    live = [torch.full((5000,), 3e38)]
    plan = LerpPlan([[torch.zeros(5000)]], live, guard=True, impl=impl)
    plan.run([0.5])
    assert plan.take_skipped() == 0
    assert bool((plan.shadows[0][0] > 1e38).all())


@pytest.mark.parametrize("impl", ["fused", "foreach"])
@pytest.mark.parametrize("guard", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_float64_shadow_equals_reference(dtype: torch.dtype, guard: bool, impl: str) -> None:
    run_both(parameters(dtype), impl, guard=guard, dtype=torch.float64)


@pytest.mark.parametrize("impl", ["fused", "foreach"])
@pytest.mark.parametrize("guard", [False, True])
def test_shadows_of_several_dtypes_in_one_plan(guard: bool, impl: str) -> None:
    """fp64, bf16, fp32 and complex parameters in turn, as a model may have them."""
    live = [t for d in DTYPES for t in parameters(d)[:4]]
    live += [torch.randn(5000).to(d) for d in DTYPES]
    live += [torch.randn(3, 4, dtype=torch.complex128), torch.randn(1 << 19, dtype=torch.complex64)]
    live += [torch.randn(40, 30, dtype=torch.complex64).t()]
    torch.manual_seed(1)
    seeds = [torch.randn_like(t, dtype=average_dtype(t.dtype, None)) for t in live]
    plan = LerpPlan([[s.clone() for s in seeds]], live, guard=guard, impl=impl)
    plan.run([0.3])
    for shadow, seed, parameter in zip(plan.shadows[0], seeds, live, strict=True):
        want, value = seed, parameter.to(seed.dtype)
        if seed.is_complex():
            want, value = torch.view_as_real(want), torch.view_as_real(value)
        assert torch.equal(shadow, torch.lerp(want, value, 0.3))
        wide = want.double() + 0.3 * (value.double() - want.double())
        exact = parameter.dtype in (torch.float64, torch.complex128)
        assert torch.allclose(shadow.double(), wide, rtol=0, atol=1e-15 if exact else 1e-6)


@pytest.mark.parametrize("impl", ["fused", "foreach", "reference"])
@pytest.mark.parametrize("guard", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weight", [1.0, 1.0 - 2.0**-30, 1.0 - 2.0**-24])
def test_what_is_left_of_a_shadow_that_is_not_finite(
    dtype: torch.dtype, guard: bool, impl: str, weight: float
) -> None:
    """A decay of 0, or one that rounds to 0, leaves nothing of it; of a huge one neither."""
    live = [torch.full((n,), 2.0).to(dtype) for n in (3, 5000)]
    live[1][0] = math.nan
    for bad in (math.nan, math.inf, -math.inf, -3e38):
        shadows = [torch.full(t.shape, bad) for t in live]
        LerpPlan([shadows], live, guard=guard, impl=impl).run([weight])
        for shadow, parameter in zip(shadows, live, strict=True):
            finite = torch.isfinite(parameter)
            gone = weight > 1.0 - 2.0**-25
            if gone:
                assert bool((shadow[finite] == 2.0).all())
            elif bad != -3e38:
                assert not bool(torch.isfinite(shadow).any())
            if guard and math.isfinite(bad):
                assert bool((shadow[~finite] == torch.tensor(bad)).all())
        wide = [torch.full(t.shape, bad, dtype=torch.float64) for t in live]
        LerpPlan([wide], live, guard=guard, impl=impl).run([weight])
        left = torch.isfinite(wide[0]).all() and bool((wide[0] == 2.0).all())
        assert left == (weight == 1.0)


@pytest.mark.parametrize("impl", ["fused", "foreach", "reference"])
def test_a_step_of_the_whole_range_is_a_copy(impl: str) -> None:
    """lerp would take the difference, which overflows."""
    plan = LerpPlan([[torch.full((3,), -3e38)]], [torch.full((3,), 3e38)], guard=True, impl=impl)
    plan.run([1.0])
    assert torch.equal(plan.shadows[0][0], plan.live[0])


@pytest.mark.parametrize("impl", ["fused", "foreach"])
def test_finite_values_are_those_of_torch_lerp_at_every_weight(impl: str) -> None:
    torch.manual_seed(0)
    live, seed = [torch.randn(7000), torch.randn(30)], [torch.randn(7000), torch.randn(30)]
    for weight in (0.0, 1e-9, 0.25, 0.4999, 0.5, 0.75, 1 - 1e-6, 1 - 2.0**-25, 1.0):
        plan = LerpPlan([[t.clone() for t in seed]], live, guard=True, impl=impl)
        plan.run([weight])
        for shadow, start, end in zip(plan.shadows[0], seed, live, strict=True):
            assert torch.equal(shadow, torch.lerp(start, end, weight))


@pytest.mark.parametrize("impl", ["fused", "foreach"])
def test_elements_that_are_not_finite_are_healed_one_by_one(impl: str) -> None:
    live = [torch.arange(6.0).view(2, 3).t(), torch.randn(STAGE_NUMEL + 9).bfloat16()]
    views = [[torch.zeros(t.shape), torch.ones(t.shape)] for t in live]
    plan = LerpPlan([list(pair) for pair in zip(*views, strict=True)], live, guard=True, impl=impl)
    plan.shadows[0][0][2, 1], plan.shadows[1][1][-1] = math.nan, math.inf
    live[0][0, 1] = math.nan
    plan.shadows[1][0][0, 1] = -math.inf  # whose parameter is not finite either
    plan.heal([0, 1])
    assert plan.shadows[0][0][2, 1] == live[0][2, 1] and plan.shadows[0][0].sum() == live[0][2, 1]
    assert plan.shadows[1][1][-1] == live[1][-1]
    assert bool((plan.shadows[1][1][:-1] == 1).all())
    assert not bool(torch.isfinite(plan.shadows[1][0][0, 1]))


@pytest.mark.parametrize("impl", ["fused", "foreach"])
def test_what_overflows_in_the_shadow_counts_as_not_finite(impl: str) -> None:
    live = [torch.full((9,), 1e300, dtype=torch.float64), torch.ones(9, dtype=torch.float64)]
    plan = LerpPlan([[torch.zeros(9), torch.zeros(9)]], live, guard=True, impl=impl)
    plan.run([0.5])
    assert plan.nonfinite() == [0] and plan.take_skipped() == 9
    assert plan.shadows[0][0].tolist() == [0.0] * 9


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


@pytest.mark.parametrize("impl", ["fused", "foreach"])
def test_fixed_point_is_exact(impl: str) -> None:
    live = [torch.randn(4097), torch.randn(33).bfloat16()]
    plan = LerpPlan([[t.float().clone() for t in live]], live, guard=True, impl=impl)
    for _ in range(200):
        plan.run([0.0137])
    assert all(torch.equal(a, b.float()) for a, b in zip(plan.shadows[0], live, strict=True))


@pytest.mark.parametrize("impl", ["fused", "foreach"])
def test_bits_do_not_depend_on_where_a_tensor_is_cut(impl: str) -> None:
    whole, shadow = torch.randn(10_001), torch.randn(10_001)
    plan = LerpPlan([[shadow.clone()]], [whole], guard=False, impl=impl)
    cuts = [0, 1, 17, 4096, 9999, 10_001]
    pieces = [whole[a:b] for a, b in pairwise(cuts)]
    cut = LerpPlan(
        [[shadow[a:b].clone() for a, b in pairwise(cuts)]], pieces, guard=False, impl=impl
    )
    for _ in range(10):
        plan.run([0.003])
        cut.run([0.003])
    assert torch.equal(plan.shadows[0][0], torch.cat(list(cut.shadows[0])))


@pytest.mark.parametrize("guard", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fast_impl", ["fused", "foreach"])
def test_pieces_that_follow_each_other_are_updated_as_one(
    dtype: torch.dtype, guard: bool, fast_impl: str
) -> None:
    """Views of two flat buffers: without a gap, empty, after a gap, and each out of turn."""
    one, two = torch.randn(40_000).to(dtype), torch.randn(9_000).to(dtype)
    cuts = [(one, 0, 7), (one, 7, 7), (one, 7, 20_000), (one, 20_004, 40_000)]
    cuts += [(two, 6_000, 9_000), (two, 0, 6_000)]
    live = [tensor[start:stop] for tensor, start, stop in cuts]
    one[3], two[8_000] = float("nan"), float("inf")
    fast, plain = (
        LerpPlan([list(torch.zeros(48_996).split([t.numel() for t in live])) for _ in range(2)],
                 live, guard=guard, impl=impl)
        for impl in (fast_impl, "reference")
    )  # fmt: skip
    assert fast.num_pieces == 4
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


@pytest.mark.parametrize("built", ["fused", "not built"])
def test_implementation_is_chosen_by_argument(monkeypatch: pytest.MonkeyPatch, built: str) -> None:
    live, shadows = [torch.ones(3)], [[torch.zeros(3)]]
    calls: list[str] = []
    monkeypatch.setattr(kernels, "lerp_reference", lambda *a, **k: calls.append("reference"))
    monkeypatch.setattr(kernels, "lerp_batch", lambda *a: calls.append("foreach"))
    monkeypatch.setattr(FusedTable, "lerp", lambda *a, **k: calls.append("fused") or 0)
    if built == "not built":
        monkeypatch.setattr(kernels.fused, "extension", lambda: None)
    for impl in (None, "foreach", "reference"):
        LerpPlan(shadows, live, guard=False, impl=impl).run([0.5])
    assert calls == ["foreach" if built == "not built" else "fused", "foreach", "reference"]
    with pytest.raises(ConfigError, match="registered: fused, foreach, reference"):
        LerpPlan(shadows, live, guard=False, impl="cuda")
    if built == "not built":
        with pytest.raises(ConfigError, match="install sharded-ema from source where there is a C"):
            LerpPlan(shadows, live, guard=False, impl="fused")
