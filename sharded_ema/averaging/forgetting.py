"""How much of an average is still the weights it was seeded with, and when that is gone.

The share of the seed after ``n`` applied steps is the product of their decays. An average that has
not forgotten its seed is for the most part the weights of a model that was never trained.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sharded_ema.averaging.schedules import Constant, Cosine, HalfLife, Linear, Schedule, Warmup

#: The share of the seed above which an average is called unfit for use.
MUCH_LEFT = 0.05
# A share below this is nothing, and no step brings it back.
_NOTHING = 1e-12
# Steps that are looked at one by one; whoever needs more forgets too slowly to be waited for.
_FAR = 1_000_000


def share_left(schedule: Schedule, steps: int, *, after: int = 0) -> float:
    """Share of what was there after step ``after`` that is left after ``steps`` more.

    >>> round(share_left(Constant(0.9999), 300), 2)
    0.97
    >>> share_left(Warmup(0.9999), 10) < 1e-4
    True
    """
    left = 1.0
    for n, decay, for_ever in _decays(schedule, after):
        if n > after + steps or left < _NOTHING:
            break
        if for_ever:
            return left * decay ** (after + steps - n + 1)
        left *= decay
    return left


def steps_to_forget(
    schedule: Schedule, share: float, *, left: float = 1.0, after: int = 0
) -> int | None:
    """Steps from step ``after`` on until no more than ``share`` is left of the seed.

    Args:
        left: share that is left after step ``after``.

    Returns:
        ``None`` if it never is, or only after millions of steps of a schedule whose sum is unknown.

    >>> steps_to_forget(HalfLife(100), 0.5)
    100
    """
    for n, decay, for_ever in _decays(schedule, after):
        if left <= share:
            return n - 1 - after
        if for_ever:
            if decay >= 1.0:
                return None
            more = math.log(share / left) / math.log(decay) if decay > 0.0 else 1.0
            return n - 1 - after + math.ceil(more - 1e-9)
        if n - after > _FAR:
            return None
        left *= decay
    raise AssertionError("decays have no end")


def _decays(schedule: Schedule, after: int) -> Iterator[tuple[int, float, bool]]:
    """The steps after ``after``: number, decay, and whether it is known to stay so for ever."""
    n = after
    while True:
        n += 1
        decay = schedule.decay(n)
        match schedule:
            case Constant() | HalfLife():
                for_ever = True
            case Warmup():
                for_ever = decay == schedule.max_decay
            case Linear() | Cosine():
                for_ever = n >= schedule.steps
            case _:
                for_ever = False
        yield n, decay, for_ever


@dataclass(frozen=True, slots=True)
class _AtUpdates:
    """Decays of updates as those of steps: nothing is forgotten in between."""

    of_updates: Schedule
    update_every: int

    def decay(self, n: int) -> float:
        return 1.0 if n % self.update_every else self.of_updates.decay(n)

    def to_dict(self) -> dict[str, Any]:
        return self.of_updates.to_dict()


def per_step(schedule: Schedule, decay_per: str, update_every: int) -> Schedule:
    """The schedule by which steps are forgotten, whatever its decays are of.

    >>> round(share_left(per_step(Constant(0.5), "update", 10), 35), 3)
    0.125
    """
    return schedule if decay_per == "step" else _AtUpdates(schedule, update_every)


def describe_seed(profile: str, steps: int, left: float, more: int | None) -> str:
    """That much of an average is its seed, in a sentence without an end.

    Args:
        steps: applied since the seed.
        left: share of the seed.
        more: steps until little is left, ``None`` if that is far.
    """
    then = (
        f"less than {MUCH_LEFT:.0%} are left after {more:,} more steps"
        if more is not None
        else "it takes too many steps to forget them"
    )
    return (
        f"after {steps:,} steps {left:.0%} of the average {profile!r} is still the weights it was "
        f"seeded with, which are random unless trained ones were loaded; {then}"
    )
