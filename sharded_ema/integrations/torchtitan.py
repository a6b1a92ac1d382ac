"""The average as a component of torchtitan, in its checkpoints and its validation.

torchtitan's configuration names both, in Python or on the command line, and no program changes::

    --override.imports \
        'sharded_ema.integrations.torchtitan.averaged={"schedule": "warmup:0.9999"}' \
        sharded_ema.integrations.torchtitan.validated

Its checkpoint manager is what is built of the model parts and the optimizers before the weights are
loaded, and what knows which checkpoint that was. So there the average is made, follows the
optimizers, and is one more of the states that torch.distributed.checkpoint saves and reshards.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any, ClassVar
from weakref import WeakKeyDictionary, ref

from torch import nn
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.stateful import Stateful
from torchtitan.components.checkpointer.dcp import CheckpointManager
from torchtitan.components.optimizer import OptimizersContainer
from torchtitan.components.validate import Validator
from torchtitan.config import Configurable, derive, override
from torchtitan.tools import filesystem

from sharded_ema.ema import ShardedEMA
from sharded_ema.errors import ConfigError, warn
from sharded_ema.integrations.common import claim, warn_of_untested

#: Versions of torchtitan that the tests have run with.
TESTED = ">=0.3,<0.4"
#: The key of the average among the checkpointer's states, as ``exclude_from_loading`` names it.
EMA_STATE = "ema"


class EMA(Configurable, Stateful):
    """An average of the model parts of this rank that follows their optimizers.

    Args:
        config: what it is.
        model_parts: sharded and materialised; several are the stages of a pipeline.
        optimizers: what trains them.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Configurable.Config):
        schedule: str | dict[str, str] = "warmup:0.9999"
        """A decay or schedule as text (``"half_life:2000"``), or several by profile name."""

        profile: str | None = None
        """Which of several is validated."""

        options: dict[str, Any] = field(default_factory=dict)
        """Further arguments of ``sharded_ema.ShardedEMA``, by their names."""

    _of: ClassVar[WeakKeyDictionary[nn.Module, ref[EMA]]] = WeakKeyDictionary()

    def __init__(
        self, config: Config, *, model_parts: list[nn.Module], optimizers: OptimizersContainer
    ) -> None:
        warn_of_untested("torchtitan", version("torchtitan"), TESTED)
        self.profile = config.profile
        self.average = ShardedEMA(model_parts, config.schedule, **config.options)
        self.average.attach(optimizers)
        self.was_loaded = False
        for part in model_parts:
            self._of[part] = ref(self)

    @classmethod
    def of(cls, model_parts: Sequence[nn.Module]) -> EMA:
        """That of a model.

        Raises:
            ConfigError: none was made.
        """
        kept = cls._of.get(model_parts[0])
        found = kept() if kept is not None else None
        if found is None:
            raise ConfigError(
                "this model has no average: set checkpoint=EMACheckpointManager.Config(...), or "
                "name sharded_ema.integrations.torchtitan.averaged in override.imports"
            )
        return found

    def state_dict(self) -> dict[str, Any]:
        """What torch.distributed.checkpoint saves, and loads in place."""
        return self.average.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what it has loaded."""
        self.average.load_state_dict(state_dict)
        self.was_loaded = True

    def swap(self) -> Any:
        """Let the average stand in for the weights; all ranks."""
        return self.average.swap(self.profile)


class EMACheckpointManager(CheckpointManager):
    """torchtitan's checkpoint manager, with an average of the weights among its states.

    Without an average in a checkpoint, or with ``"ema"`` in ``exclude_from_loading``, or where the
    model alone is loaded, the average starts anew from the loaded weights. Where the last
    checkpoint has the model alone (``last_save_model_only``), it lies in ``step-N/ema`` beside it.

    Args:
        config: that of torchtitan's, and of the average.
        parts: whatever torchtitan builds a checkpoint manager of.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(CheckpointManager.Config):
        ema: EMA.Config = field(default_factory=EMA.Config)
        """The average."""

    def __init__(
        self,
        config: Config,
        *,
        model_parts: list[nn.Module],
        optimizers: OptimizersContainer,
        states: dict[str, Any],
        **parts: Any,
    ) -> None:
        if EMA_STATE in states:
            raise ConfigError(f"the checkpointer has a state {EMA_STATE!r} already")
        self._release = claim(optimizers, EMA_STATE, "EMACheckpointManager")
        self.ema = config.ema.build(model_parts=model_parts, optimizers=optimizers)
        states[EMA_STATE] = self.ema
        super().__init__(
            config, model_parts=model_parts, optimizers=optimizers, states=states, **parts
        )

    def load(self, step: int = -1) -> bool:
        """Load as torchtitan does; then the average is of these weights, one way or another."""
        self.ema.was_loaded = False
        loaded = super().load(step)
        if loaded and not self.ema.was_loaded:
            self.ema.average.reseed()
        return loaded

    def dcp_load(
        self, state_dict: dict[str, Any], checkpoint_id: str, from_hf: bool, from_quantized: bool
    ) -> None:
        """Load a checkpoint, also one without an average where one was asked for."""
        expected = EMA_STATE in state_dict and not from_hf
        if not expected or _holds_average(checkpoint_id):
            super().dcp_load(state_dict, checkpoint_id, from_hf, from_quantized)
            return
        rest = {name: state for name, state in state_dict.items() if name != EMA_STATE}
        super().dcp_load(rest, checkpoint_id, from_hf, from_quantized)
        warn(
            f"{checkpoint_id} has no average, so it starts anew from the loaded weights. If one "
            "lies elsewhere, such as in the last step-N/ema of a run, checkpointer.ema.average"
            f".load(path) brings it; exclude_from_loading=[{EMA_STATE!r}] makes this silent"
        )

    def save(self, curr_step: int, last_step: bool = False) -> bool:
        """Save as torchtitan does, and the average also where it saves the model alone."""
        saved = super().save(curr_step, last_step)
        if saved and last_step and self.last_save_model_only:
            path = filesystem.join(self.folder, f"step-{curr_step}/{EMA_STATE}")
            remote = filesystem.is_remote(path)
            self.ema.average.save(path, step=curr_step, latest=False, replace=not remote)
        return saved

    def close(self) -> None:
        """Release what both hold."""
        super().close()
        self.ema.average.close()
        self._release()

    def __del__(self) -> None:
        # As torchtitan's, whose parts need no process group for it.
        super().close()


class EMAValidator(Validator):
    """torchtitan's validator, which validates the average as well.

    Its loss is logged as ``ema/validation_loss``, with the metrics of the average.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Validator.Config):
        prefix: str = "ema/"
        """What the names begin with that are logged of the average."""

    metrics_processor: Any

    def validate(self, model_parts: list[nn.Module], step: int) -> None:
        """Validate the weights, then the average."""
        super().validate(model_parts, step)
        ema = EMA.of(model_parts)
        with self._listening() as heard, ema.swap():
            super().validate(model_parts, step)
        prefix = self.config.prefix
        found = ema.average.metrics(prefix=prefix) | {f"{prefix}validation_loss": heard.losses[-1]}
        self.metrics_processor.logger.log(found, step)

    @contextmanager
    def _listening(self) -> Iterator[_Heard]:
        """Hear what would be logged under the names of the weights' own validation."""
        processor = self.metrics_processor
        heard = _Heard(processor)
        self.metrics_processor = heard
        try:
            yield heard
        finally:
            self.metrics_processor = processor


class _Heard:
    """Stands in for a metrics processor, and keeps the losses of validations."""

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        self.losses: list[float] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._processor, name)

    def log_validation(self, loss: float, step: int, extra_metrics: Any = None) -> None:
        self.losses.append(loss)


@override(
    target=CheckpointManager.Config,
    exact=True,
    description="an average of the weights in the checkpoints",
)
def averaged(cfg: CheckpointManager.Config, **settings: Any) -> EMACheckpointManager.Config:
    """For ``override.imports``: the settings are those of :class:`EMA.Config`."""
    return derive(cfg, EMACheckpointManager.Config, ema=EMA.Config(**settings))


@override(
    target=Validator.Config, exact=True, description="validation of the average of the weights"
)
def validated(cfg: Validator.Config, **settings: Any) -> EMAValidator.Config:
    """For ``override.imports``: the settings are those of :class:`EMAValidator.Config`."""
    return derive(cfg, EMAValidator.Config, **settings)


def _holds_average(checkpoint_id: str) -> bool:
    """Whether a checkpoint of torch.distributed.checkpoint has it, as far as one can look."""
    if filesystem.is_remote(checkpoint_id):
        return True
    names = FileSystemReader(checkpoint_id).read_metadata().state_dict_metadata
    return any(name.startswith(f"{EMA_STATE}.") for name in names)
