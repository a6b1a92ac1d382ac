"""The fit of profiles, against weightings that are counted out step by step."""

from __future__ import annotations

import numpy as np
import pytest

from sharded_ema.averaging.posthoc import Profile, fit
from sharded_ema.averaging.schedules import Power, gamma_from_sigma_rel
from sharded_ema.errors import ConfigError

WIDTHS = [0.05, 0.06, 0.07, 0.085, 0.10, 0.13, 0.2]


def counted(profile: Profile, length: int, every: int = 1) -> np.ndarray:
    """What each step counts, by running the average on unit vectors."""
    schedule = Power(gamma=profile.gamma)
    shadow = np.zeros(length)
    for update in range(1, profile.updates + 1):
        n = update * every
        decay = np.prod([schedule.decay(m) for m in range(n - every + 1, n + 1)])
        shadow *= decay
        shadow[n - 1] += 1 - decay
    return shadow


def solved(stored: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The least squares under the condition that the sum be 1, in a basis of its null space."""
    count = stored.shape[1]
    start = np.full(count, 1 / count)
    basis = np.linalg.qr(np.column_stack([np.ones(count), np.eye(count)[:, 1:]]))[0][:, 1:]
    free = np.linalg.lstsq(stored @ basis, wanted - (stored @ start)[:, None], rcond=None)[0]
    return (start[:, None] + basis @ free).T


@pytest.mark.parametrize("snapshots", [2, 5, 20])
def test_coefficients_are_those_of_the_full_problem(snapshots: int) -> None:
    length = 600
    ends = np.linspace(length / snapshots, length, snapshots).astype(int).tolist()
    stored = [Profile(gamma_from_sigma_rel(s), end) for end in ends for s in (0.05, 0.10)]
    wanted = [Profile(gamma_from_sigma_rel(s), length) for s in WIDTHS]
    basis = np.column_stack([counted(p, length) for p in stored])
    goals = np.column_stack([counted(p, length) for p in wanted])
    found = fit(stored, wanted)
    assert np.allclose(found.coefficients, solved(basis, goals), rtol=0, atol=1e-9)
    missed = np.linalg.norm(basis @ found.coefficients.T - goals, axis=0)
    assert np.allclose(found.residuals, missed / np.linalg.norm(goals, axis=0), atol=1e-9)
    assert np.allclose(found.coefficients.sum(axis=1), 1, rtol=0, atol=1e-12)
    assert np.allclose(found.gains, np.abs(found.coefficients).sum(axis=1))


def test_normal_equations_say_the_same() -> None:
    stored = [Profile(g, n) for n in (40, 100) for g in (17.0, 7.0)]
    wanted = [Profile(11.0, 100)]
    basis = np.column_stack([counted(p, 100) for p in stored])
    goal = counted(wanted[0], 100)
    ones = np.ones((4, 1))
    system = np.block([[basis.T @ basis, ones], [ones.T, np.zeros((1, 1))]])
    answer = np.linalg.solve(system, np.append(basis.T @ goal, 1.0))[:4]
    assert np.allclose(fit(stored, wanted).coefficients[0], answer, rtol=0, atol=1e-9)


def test_a_stored_profile_is_itself() -> None:
    stored = [Profile(g, n) for n in (30, 60, 90) for g in (16.97, 6.94)]
    found = fit(stored, [stored[-1], stored[0]])
    assert np.allclose(found.coefficients, np.eye(6)[[5, 0]], atol=1e-9)
    assert (found.residuals < 1e-9).all()
    alone = fit(stored[-1:], [Profile(6.94, 90), Profile(10.0, 90)])
    assert alone.coefficients.tolist() == [[1.0], [1.0]]
    assert alone.residuals[0] < 1e-12 < 0.1 < alone.residuals[1]


@pytest.mark.parametrize("every", [2, 10])
def test_updates_in_windows_have_the_same_form(every: int) -> None:
    profile = Profile(6.94, 30)
    windows = counted(profile, 30 * every, every)
    assert np.allclose(windows[every - 1 :: every], counted(profile, 30), rtol=1e-12)
    assert np.count_nonzero(windows) == 30


def published(stored: list[Profile], wanted: list[Profile], *, divide: bool) -> np.ndarray:
    """Algorithm 3 of Karras et al., with its closed form for inner products of ``t ** gamma``.

    The sum is made 1 by dividing, as there, or by a Lagrange multiplier.
    """

    def inner(a: Profile, b: Profile) -> float:
        if a.updates > b.updates:
            a, b = b, a
        ratio = (a.updates / b.updates) ** b.gamma
        scale = (a.gamma + 1) * (b.gamma + 1) / (a.gamma + b.gamma + 1)
        return scale * ratio / b.updates

    # All in units of the last update, so that the condition on the sum weighs as much.
    last = wanted[0].updates
    matrix = np.array([[inner(a, b) * last for b in stored] for a in stored])
    right = np.array([[inner(a, b) * last for b in wanted] for a in stored])
    if divide:
        answer = np.linalg.solve(matrix, right)
        return (answer / answer.sum(axis=0)).T
    ones = np.ones((len(stored), 1))
    system = np.block([[matrix, ones], [ones.T, np.zeros((1, 1))]])
    right = np.concatenate([right, np.ones((1, len(wanted)))])
    return np.linalg.solve(system, right)[:-1].T


def test_a_long_run_gives_the_published_coefficients() -> None:
    length = 2_000_000
    ends = [length // 5 * k for k in range(1, 6)]
    stored = [Profile(gamma_from_sigma_rel(s), n) for n in ends for s in (0.05, 0.10)]
    wanted = [Profile(gamma_from_sigma_rel(s), length) for s in (0.06, 0.07, 0.12)]
    found = fit(stored, wanted).coefficients
    assert np.allclose(found, published(stored, wanted, divide=False), rtol=0, atol=1e-6)
    # Dividing is not the best that a sum of 1 allows, but close to it.
    assert np.allclose(found, published(stored, wanted, divide=True), rtol=0, atol=1e-2)


def test_more_snapshots_come_nearer() -> None:
    residuals = []
    for count in (2, 4, 8, 16, 32):
        ends = np.linspace(640 / count, 640, count).astype(int).tolist()
        stored = [Profile(g, n) for n in ends for g in (16.97, 6.94)]
        residuals.append(fit(stored, [Profile(11.0, 640)]).residuals[0])
    assert residuals == sorted(residuals, reverse=True)
    assert residuals[0] > 0.03 and residuals[-1] < 0.002


def test_narrow_profiles_do_not_overflow() -> None:
    stored = [Profile(g, n) for n in (500_000, 1_000_000) for g in (300.0, 100.0)]
    found = fit(stored, [Profile(150.0, 1_000_000)])
    assert np.isfinite(found.coefficients).all() and found.residuals[0] < 0.2


def test_wrong_use() -> None:
    with pytest.raises(ConfigError):
        fit([], [Profile(1.0, 1)])
    with pytest.raises(ConfigError):
        fit([Profile(1.0, 1), Profile(1.0, 1)], [Profile(1.0, 1)])
    with pytest.raises(ConfigError):
        Profile(1.0, 0)
