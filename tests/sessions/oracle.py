"""What an average must be: a loop over whole tensors that shares no line with the library."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor

Tensors = dict[str, Tensor]

#: Schedules as the library is given them, with the decay at the n-th step since the start.
SCHEDULES: dict[str, Callable[[int], float]] = {
    "0.9": lambda n: 0.9,
    "half_life:3": lambda n: 2.0 ** (-1.0 / 3.0),
    "warmup:0.95": lambda n: max(0.0, min(0.95, (1 + n) / (10 + n))),
}


class Oracle:
    """Averages of whole tensors in fp32.

    Args:
        schedules: keys of :data:`SCHEDULES` by profile.
        weights: what is trained.
    """

    def __init__(
        self, schedules: dict[str, str], update_every: int, start_step: int, weights: Tensors
    ) -> None:
        self.decays = {name: SCHEDULES[text] for name, text in schedules.items()}
        self.update_every = update_every
        self.start_step = start_step
        self.applied = 0
        self.seeded: int | None = None
        self.taken = 0
        self.averages: dict[str, Tensors] = {}
        self.reseed(weights)

    def reseed(self, weights: Tensors) -> None:
        """The average becomes the weights, and counts from here if it has begun."""
        if self.seeded is not None or self.start_step == 0:
            self.seeded = self.taken = self.applied
        self.copy(weights)

    def copy(self, weights: Tensors) -> None:
        self.averages = {
            name: {k: v.float().clone() for k, v in weights.items()} for name in self.decays
        }

    def step(self, weights: Tensors) -> None:
        """An optimizer step was applied, and these are the weights after it."""
        self.applied += 1
        if self.seeded is None:
            self.copy(weights)
            if self.applied >= self.start_step:
                self.seeded = self.taken = self.applied
        elif self.applied - self.taken >= self.update_every:
            steps = range(self.taken - self.seeded + 1, self.applied - self.seeded + 1)
            for name, decay in self.decays.items():
                self._lerp(self.averages[name], weights, 1.0 - math.prod(map(decay, steps)))
            self.taken = self.applied

    @staticmethod
    def _lerp(average: Tensors, weights: Tensors, weight: float) -> None:
        for key, value in weights.items():
            moved = torch.lerp(average[key], value.float(), weight)
            average[key] = torch.where(torch.isfinite(value), moved, average[key])

    @property
    def num_updates(self) -> int:
        return 0 if self.seeded is None else self.applied - self.seeded

    def look(self, weights: Tensors) -> None:
        """Somebody looks: before it has begun the average is the weights."""
        if self.seeded is None:
            self.copy(weights)

    def remembered(self) -> Oracle:
        """As it is now, to come back to."""
        return copy.deepcopy(self)
