"""Signs that an average is useless: it does not move, cannot forget its start, or met NaN.

Each warning is given once, with the remedy. Nothing here runs in ``update()``: the checks read
small samples when the user saves, swaps, asks for metrics or closes.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from sharded_ema.averaging.schedules import Schedule, horizon
from sharded_ema.averaging.shadow import Clock, Shadow
from sharded_ema.errors import BindError, EMAWarning
from sharded_ema.model.agreement import refuse_differing
from sharded_ema.model.layout import Box

# Elements of a rank that a sampled distance looks at.
SAMPLE_NUMEL = 1 << 18
# A sample for the question whether anything moved: a few elements of a few tensors.
_PROBE_TENSORS = 32
_PROBE_ELEMENTS = 64
# Before the average has taken in this share of the weights seen, fp32 may rightly stand still.
_EXPECTED_MOVE = 1e-2


class Health:
    """Remembers how the weights looked when averaging began, and what was warned of."""

    def __init__(self) -> None:
        self._warned: set[str] = set()
        self._live_at_start: Tensor | None = None
        self._shadow_at_start: dict[str, Tensor] = {}
        self._seed_weight_at_start: dict[str, float] = {}
        self._updates_at_start = 0
        self._steps_at_start = 0
        self._seen_steps = 0
        self._seen_live: Tensor | None = None
        self._seen_dtypes: list[torch.dtype] = []
        self._uncounted = 0

    def warn_once(self, topic: str, message: str) -> None:
        """Warn with :class:`EMAWarning`, once per topic."""
        if topic not in self._warned:
            self._warned.add(topic)
            warnings.warn(message, EMAWarning, stacklevel=4)

    def begin(
        self, clock: Clock, shadow: Shadow, live: Sequence[Tensor], *, loaded: bool = False
    ) -> None:
        """Averaging starts here, or goes on after a load."""
        self._steps_at_start = clock.applied_steps
        self._updates_at_start = clock.num_updates
        self._seed_weight_at_start = dict(shadow.seed_weight)
        self._live_at_start = _probe(live)
        self._shadow_at_start = {name: _probe(views) for name, views in shadow.views.items()}
        self.accept(clock, live)
        # Weights that go with a loaded average may be loaded after it.
        self._uncounted = -1 if loaded else 0

    def accept(self, clock: Clock, live: Sequence[Tensor]) -> None:
        """What the weights are now needs no explanation."""
        self._seen_steps = clock.applied_steps
        self._seen_live = _probe(live)
        self._seen_dtypes = [tensor.dtype for tensor in live]

    def check_counted(
        self, clock: Clock, live: Sequence[Tensor], *, attached: bool, closing: bool = False
    ) -> None:
        """Warn if the weights have moved and no step was counted. Waits for the device.

        Args:
            attached: the steps are counted by hooks. Otherwise the user may look between a step
                and its ``update()``, so that one such sight proves nothing yet.
            closing: no ``update()`` can follow.
        """
        before, dtypes = self._seen_live, self._seen_dtypes
        counted = clock.applied_steps != self._seen_steps
        self.accept(clock, live)
        assert before is not None and self._seen_live is not None
        if counted:
            self._uncounted = 0
        elif dtypes == self._seen_dtypes and not torch.equal(before, self._seen_live):
            self._uncounted += 1
        never = closing and clock.applied_steps == self._steps_at_start
        if self._uncounted > (0 if attached or never else 1):
            remedy = (
                "the attached optimizer is not what trains this model (it was replaced, copied or "
                "unpickled after attach()), or steps without running its hooks (in the backward, "
                "through step.__wrapped__). Attach the optimizer that steps, or attach none and "
                "call"
                if attached
                else "attach the optimizer, or call"
            )
            self.warn_once(
                "uncounted",
                f"the weights have changed and no optimizer step was counted after step "
                f"{clock.applied_steps}, so the average stands still: {remedy} ema.update() after "
                "each applied step. If you loaded or edited weights, make the ShardedEMA after it",
            )

    def check_moving(self, clock: Clock, shadow: Shadow, live: Sequence[Tensor]) -> None:
        """Warn if the weights have moved and an average has not. Waits for the device."""
        if self._live_at_start is None or clock.num_updates < self._updates_at_start + 10:
            return
        if torch.equal(_probe(live), self._live_at_start):
            return
        for name, views in shadow.views.items():
            # Every decay so far was 1 if nothing was forgotten; a weight of 0 has no share to lose.
            before = self._seed_weight_at_start[name]
            share = 1.0 - shadow.seed_weight[name] / before if before else 1.0
            moved = not torch.equal(_probe(views), self._shadow_at_start[name])
            if moved or 0.0 < share < _EXPECTED_MOVE:
                continue
            reason = (
                "its decay is 1, so it never will"
                if share == 0.0
                else f"its dtype {views[0].dtype} rounds every update away; use a float32 shadow"
                if views[0].dtype != torch.float32
                else "check that the optimizer you attached is the one that trains this model"
            )
            self.warn_once(
                f"still {name}",
                f"after {clock.num_updates} updates the average {name!r} is still the initial "
                f"weights although the weights have moved: {reason}",
            )

    def check_horizon(
        self, profiles: Mapping[str, Schedule], total_steps: int | None, start_step: int
    ) -> None:
        """Warn if at the end of the planned run the initial weights would still count most."""
        if total_steps is None:
            return
        for name, schedule in profiles.items():
            left = 1.0
            for n in range(1, total_steps - start_step + 1):
                left *= schedule.decay(n)
                if left <= 0.5:
                    break
            else:
                decay = schedule.decay(max(1, total_steps - start_step))
                self.warn_once(
                    f"horizon {name}",
                    f"average {name!r} spans {horizon(decay):,.0f} steps but the run has "
                    f"{total_steps - start_step:,} after start_step: at its end {left:.0%} of the "
                    "average would be the initial weights. Use a lower decay, HalfLifeFraction, "
                    "Warmup or Power",
                )

    def check_forgotten(self, clock: Clock, shadow: Shadow) -> None:
        """Warn at the end of a run if most of an average is still its seed."""
        for name, left in shadow.seed_weight.items():
            if clock.num_updates and left > 0.5:
                self.warn_once(
                    f"horizon {name}",
                    f"after {clock.num_updates} steps {left:.0%} of the average {name!r} is still "
                    "the weights it was seeded with; use a lower decay, HalfLifeFraction, Warmup "
                    "or Power, or a later start_step",
                )

    def check_complete(self, left_out: Iterable[tuple[str, str]]) -> None:
        """Warn of what the average does not know; topics and messages."""
        for topic, message in left_out:
            self.warn_once(topic, message)

    def check_equal(self, records: Sequence[Mapping[str, tuple[Box, str]]]) -> None:
        """Warn if ranks differ by now in what they should hold alike.

        Args:
            records: of every rank, see :func:`~sharded_ema.model.agreement.refuse_differing`.
        """
        try:
            refuse_differing(records)
        except BindError as error:
            self.warn_once(
                "apart", f"{error}. They were equal at first; are their gradients averaged?"
            )

    def check_finite(self, skipped_elements: int) -> None:
        """Warn if non-finite parameters were kept out of the average."""
        if skipped_elements:
            self.warn_once(
                "nonfinite",
                f"{skipped_elements} times a NaN or Inf in the parameters was kept out of the "
                "average on this rank; look at the loss and the gradient norm, or pass "
                'nonfinite="raise" to stop at once',
            )


@torch.no_grad()
def squared_distance(
    views: Sequence[Tensor], live: Sequence[Tensor], *, sampled: bool
) -> tuple[float, float]:
    """``(sum (shadow - live)**2, sum live**2)`` over this rank's elements, in float64.

    Args:
        sampled: look at no more than about 2**18 elements, at a fixed stride.
    """
    total = sum(t.numel() for t in live)
    stride = max(1, math.ceil(total / SAMPLE_NUMEL)) if sampled else 1
    sums: dict[torch.device, list[Tensor]] = {}
    for view, parameter in zip(views, live, strict=True):
        if parameter.numel():
            a = view.reshape(-1)[::stride].double()
            b = parameter.detach().reshape(-1)[::stride].to(a.device).double()
            pair = torch.stack([(a - b).square().sum(), b.square().sum()])
            sums.setdefault(a.device, []).append(pair)
    # One wait for each device, not for each tensor.
    totals = [torch.stack(pairs).sum(0).tolist() for pairs in sums.values()]
    return sum(apart for apart, _ in totals), sum(norm for _, norm in totals)


@torch.no_grad()
def _probe(tensors: Sequence[Tensor]) -> Tensor:
    """A few elements of a few tensors, fp32 on the CPU; NaN as 0, so that it equals itself."""
    filled = [t for t in tensors if t.numel()]
    chosen = filled[:: max(1, len(filled) // _PROBE_TENSORS)]
    parts = []
    for tensor in chosen:
        flat = (
            tensor.detach().reshape(-1)
            if tensor.is_contiguous()
            else tensor.detach()[:1].reshape(-1)
        )
        step = max(1, flat.numel() // _PROBE_ELEMENTS)
        parts.append(flat[::step][:_PROBE_ELEMENTS].float().cpu())
    return torch.cat(parts).nan_to_num() if parts else torch.empty(0, device="cpu")
