"""The stored part of an average: its state, saves and loads."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from os import PathLike
from typing import Any

from torch import Tensor

from sharded_ema.averaging.average import Averager
from sharded_ema.averaging.health import squared_distance
from sharded_ema.checkpoint import snapshot
from sharded_ema.checkpoint.files import as_location
from sharded_ema.checkpoint.storage_reader import SafetensorsStorageReader
from sharded_ema.checkpoint.transfer import check_target, load_state, save_state
from sharded_ema.checkpoint.writing.background import Background, SaveHandle
from sharded_ema.checkpoint.writing.staging import Staging
from sharded_ema.config import check_schedules
from sharded_ema.errors import ConfigError
from sharded_ema.model.agreement import Ranks


class Checkpointing(Averager):
    """What :class:`~sharded_ema.ShardedEMA` is without engines and metrics; see there."""

    _not_copied = (*Averager._not_copied, "_background", "_staging", "_writers")

    @cached_property
    def _background(self) -> Background:
        return Background()

    @cached_property
    def _staging(self) -> Staging:
        return Staging()

    @cached_property
    def _writers(self) -> Ranks:
        """The ranks again, in a group that only the thread of a save talks in."""
        return Ranks(self._source.ranks, self._timeout)

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors that ``torch.distributed.checkpoint`` saves and loads in place; no collective.

        Keys are ``<profile>.<name>``, ``_frozen.<name>``, ``_buffers.<name>`` and ``_meta`` (uint8,
        canonical JSON). Averages alias the shadow; frozen parameters and buffers are written by a
        save but never overwritten by a load.
        """
        self._prepare()
        return snapshot.make_state(
            self._source,
            self._shadow,
            snapshot.make_meta(self._settings, self._clock, self._shadow, self._source),
        )

    def load_state_dict(self, state: Mapping[str, Any], *, strict: bool = True) -> None:
        """Take over a state: tensors loaded in place by DCP, or full tensors by the same keys.

        Args:
            strict: refuse missing or unknown names and a changed schedule.

        Raises:
            CheckpointMismatchError: names, shapes or schedules do not fit.
        """
        self._refuse_in_swap("load_state_dict()")
        # Not seeded first: what lies in the shadow may have been loaded in place just before.
        self._prepare(usable=False, seed=False)
        own = snapshot.make_averages(self._source, self._shadow)
        before = self._unusable
        if snapshot.shares_memory(own, state):
            self._unusable = "a state that does not fit was loaded in place"
        meta = snapshot.read_meta(state)
        if strict:
            check_schedules(meta, self._settings.profiles)
        others = self._source.elsewhere
        snapshot.check_names(own, state, meta, elsewhere=others, strict=strict)
        self._unusable = before or "load_state_dict() failed midway"
        snapshot.copy_state(own, state)
        self._take_meta(meta)

    def save(
        self,
        path: str | PathLike[str],
        *,
        step: int,
        asynchronous: bool = False,
        format: str = "safetensors",
        replace: bool = False,
        latest: bool = True,
        keep_last: int | None = None,
    ) -> SaveHandle:
        """Write a committed, durable checkpoint; all ranks call it. Also inside a swap.

        What killed saves have left beside ``path`` is removed first.

        Args:
            path: directory that the checkpoint will be, or a URL that fsspec has a driver for
                (``s3://bucket/run/step_1000``), where ``replace`` and ``format="dcp"`` are refused.
            step: training step to record.
            asynchronous: copy what is saved to host memory, return, and write it in a thread. The
                next save, load and ``close()`` wait for it, and raise what went wrong in it.
            format: ``"safetensors"``, or ``"dcp"`` for PyTorch's own distributed format.
            replace: replace a checkpoint that is at ``path``.
            latest: let the file ``latest`` beside ``path`` name this checkpoint. A file of that
                name which something else has put there is left alone.
            keep_last: after the commit, remove all but so many checkpoints beside ``path`` whose
                names differ from its name in digits only. The new one always stays.

        Returns:
            A handle; its ``result()`` is the path, once committed.

        Raises:
            CheckpointExistsError: ``path`` is taken; nothing was written.
            CheckpointWriteError: a rank could not write, now or in the asynchronous save before;
                what could not be written was not committed.
        """
        target = as_location(path)
        if not isinstance(step, int):
            raise ConfigError(f"step must be an int, got {step!r}")
        if keep_last is not None and (type(keep_last) is not int or keep_last < 1):
            raise ConfigError(f"keep_last must be at least 1, got {keep_last!r}")
        self._agree_once()

        def check() -> None:
            self._background.wait()
            self._prepare()
            check_target(target, format=format, replace=replace)

        self._ranks.agree(check, f"ema.save({target})")
        partial, drift = {}, {}
        if self._swapped is None:
            partial = self._distances(sampled=True)
            drift = self._source.drift_record() if self._ranks.size > 1 else {}
        gathered = self._ranks.gather(
            (self._shadow.collect_skipped(), partial, drift), "ema.save()"
        )
        self._health.check_equal([drift for _, _, drift in gathered])
        meta = snapshot.make_meta(self._settings, self._clock, self._shadow, self._source)
        meta["step"] = step
        meta["nonfinite_elements"] = sum(skipped for skipped, _, _ in gathered)
        distances = {
            name: relative_distance([parts[name] for _, parts, _ in gathered]) for name in partial
        }
        # JSON has no NaN; a parameter that is not finite has no distance.
        meta["sampled_distance"] = {
            name: value if math.isfinite(value) else None for name, value in distances.items()
        }
        state = snapshot.make_state(self._source, self._shadow, meta)
        ranks, wait = self._ranks, None
        if asynchronous:
            ranks, wait = self._writers, self._staging.wait
            ranks.barrier("ema.save()")  # makes the group, which no thread could
            state = self._staging.copy(state)
        handle = SaveHandle(target, step, wait)

        def write() -> None:
            handle.staged()
            save_state(
                state, target, format=format, replace=replace, ranks=ranks,
                latest=latest, keep_last=keep_last,
            )  # fmt: skip

        if asynchronous:
            self._background.start(handle, write)
        else:
            self._background.run(handle, write)
        self._check_health()
        return handle

    def load(self, path: str | PathLike[str], *, strict: bool = True, verify: bool = False) -> int:
        """Load a checkpoint of any sharding; all ranks call it.

        Args:
            path: directory of a committed checkpoint, ours or one of DCP with an average in it;
                or the file ``latest`` that names one.
            strict: refuse missing or unknown names and a changed schedule; else keep what the
                checkpoint lacks and go on with this object's schedule.
            verify: check the digest of every chunk that is loaded before copying it.

        Returns:
            The step it was saved under.

        Raises:
            CheckpointNotFoundError, CheckpointUncommittedError, CheckpointCorruptError,
            CheckpointMismatchError: on all ranks together. If data could not be read midway the
            average refuses use until a load succeeds.
        """
        self._refuse_in_swap("load()")
        self._agree_once()
        reader = SafetensorsStorageReader(path, verify=verify)
        profiles = self._settings.profiles if strict else None
        own: dict[str, Tensor] = {}
        plans: list[snapshot.LoadPlan] = []

        def check() -> None:
            self._background.wait()
            self._prepare(usable=False)
            own.update(snapshot.make_averages(self._source, self._shadow))
            others = self._source.elsewhere
            plan = snapshot.plan_load(
                reader.catalog, own, profiles, elsewhere=others, strict=strict
            )
            plans.append(plan)

        self._ranks.agree(check, f"ema.load({path})")
        (plan,) = plans
        self._unusable = f"loading {path} failed midway"
        load_state({plan.prefix + key: own[key] for key in plan.keys}, reader, ranks=self._ranks)
        self._take_meta(plan.meta)
        return int(plan.meta["step"])

    def _take_meta(self, meta: Mapping[str, Any]) -> None:
        self._clock.applied_steps = meta["applied_steps"]
        self._clock.seed_step = meta["seed_step"]
        self._clock.last_lerp_step = meta["last_lerp_step"]
        stored = meta["profiles"]
        for name in self._settings.profiles.keys() & stored.keys():
            self._shadow.seed_weight[name] = stored[name]["seed_weight"]
        self._unusable = None
        fresh = sorted(self._settings.profiles.keys() - stored.keys())
        if fresh:
            self._shadow.seed(keep_nonfinite=False, profiles=fresh)
            self._health.warn_once(
                "fresh profiles",
                f"the checkpoint has no average {', '.join(fresh)}, which starts anew from the "
                "weights as they are now; its schedule goes on with the checkpoint's counters",
            )
        self._health.begin(self._clock, self._shadow, self._weights(), loaded=True)

    def close(self) -> None:
        """Wait for a save under way, detach, give last warnings and release the process groups.

        Call it before ``torch.distributed.destroy_process_group()``; the object cannot be used
        afterwards.

        Raises:
            CheckpointWriteError: an asynchronous save failed and nobody was told of it yet.
        """
        try:
            self._background.wait()
        finally:
            super().close()
            self._writers.close()

    def _distances(self, *, sampled: bool) -> dict[str, tuple[float, float]]:
        """This rank's part of every average's distance; what all ranks hold is counted once."""
        live = self._source.live()
        mine = [i for i, shard in enumerate(self._source.shards) if shard.writes]
        return {
            name: squared_distance(
                [views[i] for i in mine], [live[i] for i in mine], sampled=sampled
            )
            for name, views in self._shadow.views.items()
        }


def relative_distance(parts: Sequence[tuple[float, float]]) -> float:
    """Relative distance from the ranks' partial sums."""
    apart, norm = sum(a for a, _ in parts), sum(n for _, n in parts)
    return math.sqrt(apart / norm) if norm else 0.0
