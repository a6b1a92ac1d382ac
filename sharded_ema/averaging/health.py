"""Signs that an average is useless: it does not move, cannot forget its start, or met NaN.

Each warning is given once, with the remedy. Nothing here runs in ``update()``: the checks read
small samples when the user saves, swaps, asks for metrics or closes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from sharded_ema.averaging.average import Average
from sharded_ema.averaging.forgetting import (
    MUCH_LEFT,
    describe_seed,
    share_left,
    steps_to_forget,
)
from sharded_ema.averaging.schedules import horizon
from sharded_ema.errors import warn
from sharded_ema.model.holdings import Record, find_differing
from sharded_ema.model.precision import real_view

# A sample for the question whether anything moved: a few elements of a few tensors.
_PROBE_TENSORS = 32
_PROBE_ELEMENTS = 64
# Updates after which the weights are looked at: so many at first, and then one in so many.
_FIRST_LOOKS = 3
_SELDOM = 1000
# Before the average has taken in this share of the weights seen, fp32 may rightly stand still.
_EXPECTED_MOVE = 1e-2
# Steps before which the seed in an average that is only logged is no news.
_EARLY = 100
_REMEDY = (
    "the schedule out (warmup:0.9999 forgets its seed within four steps), or take a lower decay: "
    "`sharded-ema advise --steps N` says which for a run of N"
)


class Health:
    """Remembers how the weights looked when averaging began, and what was warned of.

    Args:
        total_steps: planned optimizer steps of the run; ``None`` if unknown.
    """

    def __init__(self, total_steps: int | None = None) -> None:
        self._total_steps = total_steps
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
        self._updates_seen = 0
        self._after_update: Tensor | None = None
        self._statistics_at_start = torch.empty(0, device="cpu")

    def warn_once(self, topic: str, message: str) -> None:
        """Warn with :class:`~sharded_ema.errors.EMAWarning`, once per topic."""
        if topic not in self._warned:
            self._warned.add(topic)
            warn(message)

    def begin(self, average: Average, live: Sequence[Tensor], *, loaded: bool = False) -> None:
        """Averaging starts here, or goes on after a load.

        Args:
            live: this rank's parts of the averaged parameters.
        """
        self._steps_at_start = average.clock.applied_steps
        self._updates_at_start = average.num_updates
        self._seed_weight_at_start = dict(average.seed_weights)
        self._live_at_start = _probe(live)
        views = average.shadow.views
        self._shadow_at_start = {name: _probe(tensors) for name, tensors in views.items()}
        self._updates_seen = 0
        self.note_weights(average, live)
        # Weights that go with a loaded average may be loaded after it.
        self._uncounted = -1 if loaded else 0

    def warn_of_seed(self, bad: Sequence[str]) -> None:
        """Warn of parameters that hold NaN or Inf as their average starts."""
        if bad:
            self.warn_once(
                "nonfinite seed",
                f"{len(bad)} parameters hold NaN or Inf as their average starts, among them "
                f"{list(bad[:3])}; initialise or load the weights before making the average. Until "
                "then such elements of the average are no numbers; the first finite weights that "
                "an update finds take their place",
            )

    def warn_of_loaded(self, bad: Sequence[str]) -> None:
        """Warn of an average that was loaded with NaN or Inf."""
        if bad:
            self.warn_once(
                "nonfinite load",
                f"the average that was loaded holds NaN or Inf for {len(bad)} parameters, among "
                f"them {list(bad[:3])}; such elements start anew from the weights at the next "
                "update",
            )

    def note_weights(self, average: Average, live: Sequence[Tensor]) -> None:
        """What the weights are now needs no explanation."""
        self._after_update = None
        self._remember(average, live)

    def _remember(self, average: Average, live: Sequence[Tensor]) -> None:
        self._seen_steps = average.clock.applied_steps
        self._seen_live = _probe(live)
        self._seen_dtypes = [tensor.dtype for tensor in live]

    def check_counted(
        self, average: Average, live: Sequence[Tensor], *, attached: bool, closing: bool = False
    ) -> None:
        """Warn if the weights have moved and no step was counted. Waits for the device.

        Args:
            attached: the steps are counted by hooks. Otherwise the user may look between a step
                and its ``update()``, so that one such sight proves nothing yet.
            closing: no ``update()`` can follow.
        """
        before, dtypes = self._seen_live, self._seen_dtypes
        applied_steps = average.clock.applied_steps
        counted = applied_steps != self._seen_steps
        self._remember(average, live)
        assert before is not None and self._seen_live is not None
        if counted:
            self._uncounted = 0
        elif dtypes == self._seen_dtypes and not torch.equal(before, self._seen_live):
            self._uncounted += 1
        never = closing and applied_steps == self._steps_at_start
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
                f"{applied_steps}, so the average stands still: {remedy} ema.update() after "
                "each applied step. If you loaded or edited weights, make the ShardedEMA after it",
            )

    def note_update(self, average: Average, live: Callable[[], Sequence[Tensor]]) -> None:
        """Remember a few elements after some of the updates, for :meth:`check_unedited`.

        The first updates after a start are looked at, then one in a thousand: a look waits for the
        device.

        Args:
            live: gives this rank's parts of the averaged parameters.
        """
        self._updates_seen += 1
        if self._updates_seen <= _FIRST_LOOKS or self._updates_seen % _SELDOM == 0:
            self._after_update = _probe(live())

    def check_unedited(self, average: Average, live: Callable[[], Sequence[Tensor]]) -> None:
        """Warn, before a step, of weights that are not those that the last update has taken in."""
        before, self._after_update = self._after_update, None
        if before is None:
            return
        now = _probe(live())
        if before.shape == now.shape and not torch.equal(before, now):
            self.warn_once(
                "edited",
                f"the weights were changed between step {average.clock.applied_steps}, after which "
                "the average took them in, and the next one (normalised, clipped, loaded): the "
                "average is of weights that the model did not run with. Attach no optimizer and "
                "call ema.update() after the change, which is exact",
            )

    def check_moving(self, average: Average, live: Sequence[Tensor]) -> None:
        """Warn if the weights have moved and an average has not. Waits for the device."""
        if self._live_at_start is None or average.num_updates < self._updates_at_start + 10:
            return
        if torch.equal(_probe(live), self._live_at_start):
            return
        for name, views in average.shadow.views.items():
            # Every decay so far was 1 if nothing was forgotten; a weight of 0 has no share to lose.
            before = self._seed_weight_at_start[name]
            share = 1.0 - average.seed_weights[name] / before if before else 1.0
            moved = not torch.equal(_probe(views), self._shadow_at_start[name])
            if moved or 0.0 < share < _EXPECTED_MOVE:
                continue
            reason = (
                "its decay is 1, so it never will"
                if share == 0.0
                else f"its dtype {views[0].dtype} rounds every update away; use a float32 shadow"
                if views[0].dtype.itemsize < 4
                else "check that the optimizer you attached is the one that trains this model"
            )
            self.warn_once(
                f"still {name}",
                f"after {average.num_updates} updates the average {name!r} is still the initial "
                f"weights although the weights have moved: {reason}",
            )

    def see_statistics(self, statistics: Sequence[Tensor]) -> None:
        """Remember the running statistics that are not averaged, as the average is made."""
        self._statistics_at_start = _probe(statistics)

    def check_statistics(self, statistics: Sequence[Tensor]) -> None:
        """Warn if running statistics move that are those of the weights and not of the average.

        Those of layers in evaluation mode stand still, and those of none are none.
        """
        if torch.equal(_probe(statistics), self._statistics_at_start):
            return
        self.warn_once(
            "statistics",
            f"the model has {len(statistics)} buffers with running statistics, as of BatchNorm, "
            "which the average would be evaluated and stored with as its raw weights have left "
            'them (buffers="copy"); that is often worse than either. Pass buffers="average" (or '
            '{"*.running_*": "average", "*": "copy"}), or recompute them inside a swap with '
            "torch.optim.swa_utils.update_bn and save there",
        )

    def check_plan(self, average: Average) -> None:
        """Warn if the average would still hold much of its seed at the end of the planned run."""
        if self._total_steps is None:
            return
        steps = max(0, self._total_steps - average.clock.start_step)
        for name, schedule in average.per_step.items():
            left = share_left(schedule, steps)
            if left > MUCH_LEFT:
                decay = average.profiles[name].decay(max(1, steps))
                spans = average.clock.steps_per_decay * horizon(decay)
                self.warn_once(
                    f"seed {name}",
                    f"average {name!r} spans {spans:,.0f} steps but the run has {steps:,} "
                    f"after start_step: at its end {left:.0%} of the average would be the initial "
                    f"weights. Leave {_REMEDY}",
                )

    def check_seed(
        self,
        average: Average,
        names: Iterable[str] | None = None,
        *,
        logged: bool = False,
        closing: bool = False,
    ) -> None:
        """Warn if much of an average is still its seed as it is used; once for each.

        It is silent where the plan says that the seed will be gone by the end.

        Args:
            names: profiles that are used; ``None`` for all.
            logged: it is only written to a log, where the first steps say nothing yet.
            closing: no step follows, whatever was planned.
        """
        steps, start_step = average.num_updates, average.clock.start_step
        if not steps or (logged and steps < _EARLY):
            return
        for name in average.profiles if names is None else names:
            left, schedule = average.seed_weights[name], average.per_step[name]
            if left <= MUCH_LEFT or self._warned & {f"seed {name}", f"still {name}"}:
                continue
            if self._total_steps is not None and not closing:
                ahead = max(0, self._total_steps - start_step - steps)
                if left * share_left(schedule, ahead, after=steps) <= MUCH_LEFT:
                    continue
            more = steps_to_forget(schedule, MUCH_LEFT, left=left, after=steps)
            self.warn_once(
                f"seed {name}",
                f"{describe_seed(name, steps, left, more)}. Use it then (with total_steps= nothing "
                f"is said in a run that is long enough), or leave {_REMEDY}",
            )

    def warn_of_all(self, warned: Iterable[tuple[str, str]]) -> None:
        """Warn of several things; topics and messages."""
        for topic, message in warned:
            self.warn_once(topic, message)

    def check_equal(self, records: Sequence[Record], ranks: Sequence[int]) -> None:
        """Warn if ranks differ by now in what they should hold alike.

        Args:
            records: of every rank.
            ranks: their global numbers.
        """
        found = find_differing(records)
        if found is not None:
            name, first, second = found
            self.warn_once(
                "apart",
                f"parameter {name} is not sharded but differs between rank {ranks[first]} and rank "
                f"{ranks[second]} by now; a checkpoint keeps one of the two. They were equal at "
                "first; are their gradients averaged? If they are meant to differ (experts), "
                "shard them over a mesh or leave them out with exclude=",
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
def _probe(tensors: Sequence[Tensor]) -> Tensor:
    """A few elements of a few tensors, fp64 on the CPU; NaN as 0, so that it equals itself."""
    filled = [t for t in tensors if t.numel()]
    chosen = filled[:: max(1, len(filled) // _PROBE_TENSORS)]
    parts = []
    for tensor in chosen:
        plain = real_view(tensor.detach().resolve_conj())
        flat = plain.reshape(-1) if plain.is_contiguous() else plain[:1].reshape(-1)
        step = max(1, flat.numel() // _PROBE_ELEMENTS)
        parts.append(flat[::step][:_PROBE_ELEMENTS].cpu().double())
    return torch.cat(parts).nan_to_num() if parts else torch.empty(0, device="cpu")
