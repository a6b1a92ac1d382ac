"""The decays of steps to come, on the device: for updates that are recorded in a graph.

What is recorded is repeated without the host, which then neither counts nor computes a decay. So
the device counts, and finds the weights of a step in a table that was made before. The host does
the same sums when it looks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from sharded_ema.averaging.clock import Clock
from sharded_ema.averaging.kernels.launches import StepWeights
from sharded_ema.averaging.schedules import Schedule
from sharded_ema.errors import ConfigError, warn
from sharded_ema.model.devices import is_capturing

#: Steps whose decays lie on the device.
STEPS_AHEAD = 1 << 16


class StepsAhead:
    """Counts applied steps on a device, and has the weights of the next of them there.

    It has them once :meth:`go_on_from` was called. Its memory stays where it is, since a graph
    knows it by address.

    Args:
        profiles: schedules by name.
        clock: whose settings count; how far it is :meth:`go_on_from` takes up.
        device: where.

    Attributes:
        weights: of the steps, for a launch.

    Raises:
        ConfigError: averaging would start, or go on, beyond the table.
    """

    def __init__(
        self, profiles: Mapping[str, Schedule], clock: Clock, device: torch.device
    ) -> None:
        if clock.start_step + 2 * clock.update_every > STEPS_AHEAD:
            raise ConfigError(
                f"capturable=True has the decays of {STEPS_AHEAD:,} steps on the device, in which "
                f"start_step={clock.start_step} and two updates of update_every="
                f"{clock.update_every} must lie"
            )
        self._profiles = dict(profiles)
        with torch.inference_mode(False):  # whose tensors could never be counted up
            self.weights = StepWeights(
                counter=torch.zeros(2, dtype=torch.int64, device=device),
                rows=torch.zeros(STEPS_AHEAD, len(profiles), dtype=torch.float64, device=device),
                period=clock.update_every,
            )
        self._first, self._last = 1, list[dict[str, float]]()

    @torch.no_grad()
    def go_on_from(self, clock: Clock) -> None:
        """Begin anew behind the steps of a clock. Waits for the device."""
        ahead, nothing = replace(clock), [-1.0] * len(self._profiles)
        decays = [self._step(ahead) for _ in range(STEPS_AHEAD)]
        self._first = clock.applied_steps + 1
        self._last = decays[-self.weights.period :]
        # Rounded once, in the kernel.
        rows = [[1.0 - decay for decay in each.values()] or nothing for each in decays]
        self.weights.rows.copy_(torch.tensor(rows, dtype=torch.float64, device="cpu"))
        counter = torch.tensor([clock.applied_steps, self._first], device="cpu")
        self.weights.counter.copy_(counter)

    def _step(self, clock: Clock) -> dict[str, float]:
        """Count a step: decays by which an average moves then, 0 at its start; empty for none."""
        clock.applied_steps += 1
        if clock.starts:
            clock.seeded()
            return dict.fromkeys(self._profiles, 0.0)
        decays = clock.decays_due(self._profiles)
        if decays:
            clock.taken_in()
        return decays

    @property
    def is_recorded(self) -> bool:
        """Whether what is done now will be done when a graph is replayed."""
        return is_capturing(self.weights.counter.device)

    @torch.no_grad()
    def count(self) -> None:
        """One more step, on the device."""
        self.weights.counter[0].add_(1)

    def catch_up(self, clock: Clock, seed_weights: dict[str, float]) -> None:
        """Bring a clock, and the shares of the seed, to where the device is. Waits for it."""
        steps, end = int(self.weights.counter[0]), self._first + STEPS_AHEAD
        wrong = 0
        while clock.applied_steps < steps:
            decays = self._step(clock)
            if clock.applied_steps >= end:
                # What the kernel takes there.
                taken = self._last[(clock.applied_steps - end) % len(self._last)]
                wrong += decays != taken
                decays = taken
            if clock.num_updates == 0:
                seed_weights.update(dict.fromkeys(decays, 1.0))
                continue
            for name, decay in decays.items():
                seed_weights[name] *= decay
        if wrong:
            warn(
                f"a recorded update was replayed past the {STEPS_AHEAD:,} steps whose decays lie "
                f"on the device: {wrong} steps up to {steps} had the decay of step {end - 1}. "
                "Look at the average more often (ema.metrics(), ema.save()), which brings the next "
                "ones there"
            )
        if steps - self._first > STEPS_AHEAD // 2:
            self.go_on_from(clock)
