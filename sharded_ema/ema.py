"""``ShardedEMA``: the averages of a sharded model, with their checkpoints and metrics."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor

from sharded_ema import snapshot
from sharded_ema.averager import Averager
from sharded_ema.checkpoint.reader import SafetensorsStorageReader
from sharded_ema.checkpoint.transfer import check_target, load_state, save_state
from sharded_ema.config import check_schedules
from sharded_ema.engine_checkpoint import EngineCheckpoints
from sharded_ema.errors import CheckpointNotFoundError, ConfigError
from sharded_ema.health import squared_distance
from sharded_ema.hooks import StepHooks
from sharded_ema.schedules import horizon


@dataclass(frozen=True, slots=True)
class SaveHandle:
    """A save under way or done.

    Attributes:
        path: directory of the checkpoint.
        step: the step it was saved under.
    """

    path: Path
    step: int

    def staged(self) -> None:
        """Return once the average may be updated again without touching what is saved."""

    def result(self) -> Path:
        """Return the path once the checkpoint is durable and committed."""
        return self.path


class ShardedEMA(Averager):
    """Exponential moving averages of a model's weights, each rank keeping its own shard.

    Every profile keeps ``shadow = decay * shadow + (1 - decay) * parameter`` in fp32 for this
    rank's part of each trainable parameter, updated in place after every applied optimizer step
    without communication, host synchronisation or full-size temporaries. Exponential averaging of
    iterates: Polyak and Juditsky (1992); Tarvainen and Valpola (2017), equation 1.

    Args:
        target: a plain module, a DistributedDataParallel or FullyShardedDataParallel module, one
            whose parameters are DTensors (``fully_shard``, HSDP, tensor and expert parallelism),
            or a DeepSpeed engine; wrap and materialise it first.
        schedule: a decay per optimizer step in ``[0, 1]``, a schedule, its text
            (``"half_life:2000"``), or a dict of several by profile name.
        update_every: applied optimizer steps between updates; the decays of the steps between are
            multiplied, so that the average does not depend on it but for what it did not see.
        start_step: applied optimizer step at which the shadow becomes the parameters and averaging
            starts. Before it, the average is the parameters.
        include, exclude: shell-style patterns over parameter names.
        buffers: ``"copy"`` stores buffers as they are, ``"average"`` averages floating ones,
            ``"ignore"`` leaves them out. Integer buffers are never averaged.
        frozen: ``"save"`` stores parameters without gradient in checkpoints, ``"skip"`` does not;
            default ``"save"``, but ``"skip"`` for a model with PEFT adapters.
        shadow_dtype: dtype of the shadow; below fp32 it must be forced with ``force_dtype``.
        device: where the shadow lies; default each parameter's own device. Elsewhere, an update
            copies between devices and waits for it.
        shard_replicas: of parameters that R ranks hold alike (DDP, DeepSpeed without ZeRO, axes of
            a mesh that replicate, plain parameters beside DTensors) keep 1/R on each.
        nonfinite: NaN and Inf in parameters: ``"skip"`` these elements and count them, ``"raise"``
            before the shadow is touched (reads the parameters twice and waits for the device), or
            ``"allow"``.
        impl: ``"foreach"`` or ``"reference"``.
        total_steps: planned optimizer steps of the run; only used for warnings.
        force_dtype: accept a shadow below fp32, which rounds small updates away.
        timeout: seconds after which a rank that does not come to a swap or save counts as absent.

    Raises:
        ConfigError: a setting is out of range.
        BindError: nothing to average, or a meta or size-0 parameter.
        UnsupportedLayoutError: a parameter is sharded in an unsupported way.
    """

    _engine_checkpoints: EngineCheckpoints | None = None

    # ------------------------------------------------------------------ checkpoints

    def attach(self, *optimizers: Any, checkpoint: bool = True, strict: bool = False) -> StepHooks:
        """Update after every step that the optimizers apply; all of them in one call.

        The ranks check here once that they hold the same replicated parameters, and under
        DeepSpeed that the weights of the model are its masters, rounded.

        Args:
            optimizers: every optimizer that trains the model; with several, one update follows
                the last of them. None for a DeepSpeed engine, which knows its own.
            checkpoint: for an engine: its ``save_checkpoint(dir, tag)`` writes the average to
                ``dir/<tag>/ema``, and its ``load_checkpoint`` brings it back.
            strict: for an engine: refuse to load a checkpoint that has no average. Else the
                average starts anew from the loaded weights, with a warning.

        Returns:
            A handle; its ``remove()`` detaches.

        Raises:
            OptimizerError: no optimizer given, or one that owns no averaged parameter.
            BindError: what the ranks hold contradicts itself; the parameter is named.
            StateError: already attached.
        """
        hooks = self._attach(optimizers)
        if self._source.engine is not None and checkpoint:
            self._engine_checkpoints = EngineCheckpoints(
                self._source.engine,
                refuse=self._refuse_in_swap,
                save=lambda path, step: self.save(path, step=step, replace=True),
                loaded=lambda path: self._loaded_by_engine(path, strict=strict),
            )
        return hooks

    def _detached(self) -> None:
        super()._detached()
        if self._engine_checkpoints is not None:
            self._engine_checkpoints.remove()
            self._engine_checkpoints = None

    def _loaded_by_engine(self, path: Path | None, *, strict: bool) -> None:
        if path is None:
            self._reseed()
            return
        try:
            step = self.load(path)
        except CheckpointNotFoundError:
            if strict:
                raise
            self._reseed()
            self._health.warn_once(
                "no average",
                f"{path} does not exist, so the average starts anew from the loaded weights; if "
                "it lies elsewhere, load it with ema.load(path). attach(strict=True) makes this "
                "an error",
            )
            return
        if step != self._source.engine.global_steps:
            self._health.warn_once(
                "other step",
                f"{path} was saved at step {step} and the engine's state at step "
                f"{self._source.engine.global_steps}; they belong to different checkpoints",
            )

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
        format: str = "safetensors",
        replace: bool = False,
    ) -> SaveHandle:
        """Write a committed, durable checkpoint; all ranks call it. Also inside a swap.

        Args:
            path: directory that the checkpoint will be.
            step: training step to record.
            format: ``"safetensors"``, or ``"dcp"`` for PyTorch's own distributed format.
            replace: replace a checkpoint that is at ``path``.

        Raises:
            CheckpointExistsError: ``path`` is taken; nothing was written.
            CheckpointWriteError: a rank could not write; nothing was committed.
        """
        target = Path(path)
        if not isinstance(step, int):
            raise ConfigError(f"step must be an int, got {step!r}")
        self._agree_once()

        def check() -> None:
            self._prepare()
            check_target(target, format=format, replace=replace)

        self._ranks.agree(check, f"ema.save({target})")
        partial = self._distances(sampled=True) if self._swapped is None else {}
        gathered = self._ranks.gather((self._shadow.collect_skipped(), partial), "ema.save()")
        meta = snapshot.make_meta(self._settings, self._clock, self._shadow, self._source)
        meta["step"] = step
        meta["nonfinite_elements"] = sum(skipped for skipped, _ in gathered)
        distances = {name: _relative([parts[name] for _, parts in gathered]) for name in partial}
        # JSON has no NaN; a parameter that is not finite has no distance.
        meta["sampled_distance"] = {
            name: value if math.isfinite(value) else None for name, value in distances.items()
        }
        state = snapshot.make_state(self._source, self._shadow, meta)
        save_state(state, target, format=format, replace=replace, ranks=self._ranks)
        self._check_health()
        return SaveHandle(target, step)

    def load(self, path: str | PathLike[str], *, strict: bool = True, verify: bool = False) -> int:
        """Load a checkpoint of any sharding; all ranks call it.

        Args:
            path: directory of a committed checkpoint, ours or one of DCP with an average in it.
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
        for name in self._settings.profiles:
            if name in meta["profiles"]:
                self._shadow.seed_weight[name] = meta["profiles"][name]["seed_weight"]
        self._unusable = None
        self._health.begin(self._clock, self._shadow, self._weights(), loaded=True)

    # ------------------------------------------------------------------ looking at it

    @property
    def num_updates(self) -> int:
        """Applied optimizer steps since the seed, the ``n`` of ``schedule.decay(n)``."""
        return self._clock.num_updates

    @property
    def decay(self) -> dict[str, float]:
        """Decay per optimizer step in force, by profile."""
        n = max(1, self.num_updates)
        return {name: s.decay(n) for name, s in self._settings.profiles.items()}

    @property
    def memory(self) -> dict[str, int]:
        """Bytes on this rank.

        ``shadow``: allocated for the averages; ``ideal``: elements owned times their size;
        ``host``: the part of ``shadow`` on the CPU; ``swap_backup``: held while a swap is active.
        """
        allocated = self._shadow.num_bytes
        views = [v for views in self._shadow.views.values() for v in views]
        return {
            "shadow": sum(allocated.values()),
            "ideal": sum(v.numel() * v.element_size() for v in views),
            "host": sum(n for device, n in allocated.items() if device.type == "cpu"),
            "swap_backup": self._backup_bytes,
        }

    @property
    def names(self) -> list[str]:
        """Names of the averaged tensors, as in the bare model's ``state_dict()``."""
        return list(self._names)

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

    def metrics(self, *, distance: bool = False) -> dict[str, float]:
        """Numbers to log; waits for the device.

        ``num_updates``, ``applied_steps``, ``skipped_steps`` (seen by the hooks),
        ``nonfinite_elements`` (on this rank) and for each profile ``decay/<p>``,
        ``horizon_steps/<p>`` (``1 / (1 - decay)``) and ``seed_weight/<p>`` (share of the average
        that is still the initial weights).

        Args:
            distance: add ``distance/<p>``, the norm of average minus parameters over that of the
                parameters, exact over all ranks; every rank must then call.
        """
        self._prepare(settle=distance)  # else one rank alone may call this, as loggers do
        self._check_health()
        found: dict[str, float] = {
            "num_updates": self.num_updates,
            "applied_steps": self._clock.applied_steps,
            "skipped_steps": self._hooks.skipped_steps if self._hooks else 0,
            "nonfinite_elements": self._shadow.collect_skipped(),
        }
        for name, decay in self.decay.items():
            found[f"decay/{name}"] = decay
            found[f"horizon_steps/{name}"] = horizon(decay)
            found[f"seed_weight/{name}"] = self._shadow.seed_weight[name]
        if distance:
            self._refuse_in_swap("metrics(distance=True)")
            partial = self._distances(sampled=False)
            gathered = self._ranks.gather(partial, "ema.metrics(distance=True)")
            for name in partial:
                found[f"distance/{name}"] = _relative([parts[name] for parts in gathered])
        return {name: float(value) for name, value in found.items()}


def _relative(parts: Sequence[tuple[float, float]]) -> float:
    """Relative distance from the ranks' partial sums."""
    apart, norm = sum(a for a, _ in parts), sum(n for _, n in parts)
    return math.sqrt(apart / norm) if norm else 0.0
