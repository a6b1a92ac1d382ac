"""Averages of any width after training, from stored ones: which combination, and how near it comes.

Source: Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion Models" (2023),
section 3.2 and algorithm 3. There the profile of a power-function average is the continuous
``t ** gamma``. Here it is what :class:`~sharded_ema.averaging.schedules.Power` really does, which
has a closed form as well: after ``N`` updates the weights taken in at update ``i`` count

    ``w(i) = (i / N) ** (gamma + 1) - ((i - 1) / N) ** (gamma + 1)``,  ``i = 1 .. N``

because the decays ``(1 - 1/n) ** (gamma + 1)`` telescope; the seed counts nothing and the sum is
1. The two agree for many updates; for few, only this one is exact. With ``update_every=k`` the
decays of a window multiply to ``(1 - 1/j) ** (gamma + 1)`` for the ``j``-th update, so the same
form holds with updates in place of steps.

A profile that was not stored is fitted by a combination of those that were, in the sense of least
squares over all updates. The coefficients are held to sum to 1, so that weights which never changed
stay what they are; the paper divides by the sum afterwards. Pure float64, no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sharded_ema.errors import ConfigError

Floats = NDArray[np.float64]

# Updates of which the profiles are held at a time.
_BLOCK = 8192


@dataclass(frozen=True, slots=True)
class Profile:
    """The weighting of a power-function average after some updates.

    Attributes:
        gamma: exponent; see :func:`~sharded_ema.averaging.schedules.gamma_from_sigma_rel`.
        updates: how often the average was moved, at least once.
    """

    gamma: float
    updates: int

    def __post_init__(self) -> None:
        if self.gamma < 0 or self.updates < 1:
            raise ConfigError(f"no average has gamma {self.gamma} and {self.updates} updates")


@dataclass(frozen=True, slots=True)
class Fit:
    """Combinations of stored averages, one row for each that is wanted.

    Attributes:
        coefficients: float64, shape ``(wanted, stored)``; every row sums to 1.
        residuals: norm of what the fitted profile misses over the norm of the wanted one.
        gains: sum of the absolute coefficients: by so much errors of the stored values can grow.
    """

    coefficients: Floats
    residuals: Floats
    gains: Floats


def fit(stored: Sequence[Profile], wanted: Sequence[Profile]) -> Fit:
    """Combine profiles that are there into those that are not.

    Args:
        stored: all different; at least one.
        wanted: of any exponent; their last update should be one at which a profile is stored.

    Raises:
        ConfigError: ``stored`` is empty or has a profile twice.
    """
    if not stored or len(set(stored)) != len(stored):
        raise ConfigError("a fit needs stored profiles, each of them once")
    basis, goals, beyond = _compress(stored, wanted)
    # The sum is 1: the profile that reaches farthest gets what the others leave.
    last = max(range(len(stored)), key=lambda k: stored[k].updates)
    others = np.delete(basis, last, axis=1) - basis[:, [last]]
    scale = np.linalg.norm(others, axis=0)
    solved = np.linalg.lstsq(others / scale, goals - basis[:, [last]], rcond=None)[0].T / scale
    coefficients = np.insert(solved, last, 1.0 - solved.sum(axis=1), axis=1)
    missed = np.sum((basis @ coefficients.T - goals) ** 2, axis=0) + beyond
    whole = np.sum(goals**2, axis=0) + beyond
    return Fit(coefficients, np.sqrt(missed / whole), np.abs(coefficients).sum(axis=1))


def _compress(
    stored: Sequence[Profile], wanted: Sequence[Profile]
) -> tuple[Floats, Floats, Floats]:
    """The same least-squares problem in few rows.

    Between two updates at which profiles end, all stored ones of one exponent are multiples of each
    other. So a stretch of any length shrinks, by QR, to as many rows as there are exponents, and to
    the squared norm of what no stored profile can reach. Unlike with inner products, no digits are
    lost.

    Returns:
        A column for each stored profile, a column for each wanted one, and what is out of reach of
        each wanted one.
    """
    exponents = sorted({p.gamma for p in stored})
    which = [exponents.index(p.gamma) for p in stored]
    basis, goals, beyond = [], [], np.zeros(len(wanted))
    before = 0
    for end in sorted({p.updates for p in (*stored, *wanted)}):
        upper, inside = np.zeros((0, len(exponents))), np.zeros((0, len(wanted)))
        for first in range(before + 1, end + 1, _BLOCK):
            stretch = first, min(end, first + _BLOCK - 1), end
            columns = np.column_stack([_increments(g, *stretch) for g in exponents])
            targets = np.column_stack([_increments(p.gamma, *stretch) for p in wanted])
            unit, upper = np.linalg.qr(np.concatenate([upper, columns]))
            targets = np.concatenate([inside, targets])
            inside = unit.T @ targets
            beyond += np.sum((targets - unit @ inside) ** 2, axis=0) * _shares(wanted, end) ** 2
        basis.append(upper[:, which] * _shares(stored, end))
        goals.append(inside * _shares(wanted, end))
        before = end
    return np.concatenate(basis), np.concatenate(goals), beyond


def _increments(gamma: float, first: int, last: int, end: int) -> Floats:
    """What updates ``first`` to ``last`` count in an average of ``end`` updates."""
    steps = np.arange(first, last + 1, dtype=np.float64)
    power = gamma + 1.0
    with np.errstate(divide="ignore", under="ignore"):
        # x**p - (x - 1)**p without cancellation; the first update replaces the seed.
        found: Floats = (steps / end) ** power * -np.expm1(power * np.log1p(-1.0 / steps))
    return found


def _shares(profiles: Sequence[Profile], end: int) -> Floats:
    """How much of each average the first ``end`` updates make up; 0 if it has had fewer."""
    return np.array(
        [(end / p.updates) ** (p.gamma + 1.0) if end <= p.updates else 0.0 for p in profiles]
    )
