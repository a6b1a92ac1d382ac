"""``ShardedEMA``: the averages of a sharded model, with their checkpoints and metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sharded_ema.averaging.schedules import horizon
from sharded_ema.checkpoint.engine import EngineCheckpoints
from sharded_ema.checkpoint.store import Checkpointing, relative_distance
from sharded_ema.errors import CheckpointNotFoundError
from sharded_ema.model.steps import StepHooks


class ShardedEMA(Checkpointing):
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
    _not_copied = (*Checkpointing._not_copied, "_engine_checkpoints")

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
                save=lambda path, step: self.save(path, step=step, replace=True, latest=False),
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
            self.reseed()
            return
        try:
            step = self.load(path)
        except CheckpointNotFoundError:
            if strict:
                raise
            self.reseed()
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
        ``host``: the part of ``shadow`` on the CPU; ``swap_backup``: held while a swap is active;
        ``staging``: host memory that asynchronous saves copy to, kept from the first one on.
        """
        allocated = self._shadow.num_bytes
        views = [v for views in self._shadow.views.values() for v in views]
        return {
            "shadow": sum(allocated.values()),
            "ideal": sum(v.numel() * v.element_size() for v in views),
            "host": sum(n for device, n in allocated.items() if device.type == "cpu"),
            "swap_backup": self._backup_bytes,
            "staging": self._staging.num_bytes,
        }

    @property
    def names(self) -> list[str]:
        """Names of the averaged tensors, as in the bare model's ``state_dict()``."""
        return list(self._names)

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
                found[f"distance/{name}"] = relative_distance([parts[name] for parts in gathered])
        return {name: float(value) for name, value in found.items()}
