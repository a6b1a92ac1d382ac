"""accelerate: the average goes along in ``accelerator.save_state()`` and ``load_state()``.

Both call their hooks on all ranks. What FSDP and DeepSpeed keep is written or read before the
hook, DDP's weights, optimizers and random numbers after it; the average depends on none of them.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import accelerate
from accelerate.utils import DistributedType

from sharded_ema.ema import ShardedEMA
from sharded_ema.errors import CheckpointNotFoundError, ConfigError, warn
from sharded_ema.integrations.common import claim, warn_of_untested

TESTED = ">=1.15,<1.16"
FOLDER = "ema"


class Registration:
    """A place in an accelerator's checkpoints.

    Args:
        undo: takes it back.
    """

    def __init__(self, undo: Callable[[], None]) -> None:
        self._undo = undo

    def remove(self) -> None:
        """Neither save nor load the average any more; may be called twice."""
        self._undo()


def register(
    accelerator: accelerate.Accelerator, ema: ShardedEMA, folder: str = FOLDER
) -> Registration:
    """Save and load an average with everything else that the accelerator saves and loads.

    ``accelerator.save_state(directory)`` writes it to ``directory/ema``, from where
    ``load_state(directory)`` brings it back on any number of ranks. A directory without one is
    warned of, and the average starts anew from the weights of that directory. DeepSpeed's engine,
    whose own checkpoints could carry the average, then does not.

    Args:
        ema: made after ``accelerator.prepare()``, of the model that it returned.
        folder: below the directory; another for each of several models.

    Returns:
        A handle; its ``remove()`` takes the average out of what is saved and loaded.

    Raises:
        ConfigError: another average is saved there already, or this one was made before the model
            was prepared.
    """
    warn_of_untested("accelerate", accelerate.__version__, TESTED)
    _refuse_unprepared(accelerator, ema)
    release = claim(accelerator, folder, "register()")

    def save(models: Any, weights: Any, directory: str) -> None:
        ema.save(Path(directory, folder), step=ema.num_updates, latest=False, replace=True)

    def load(models: Any, directory: str) -> None:
        try:
            ema.load(Path(directory, folder))
        except CheckpointNotFoundError:
            ema.reseed()  # from weights that may be loaded only now; the first step looks again
            warn(
                f"{directory} has no average ({folder}/), so it starts anew from the weights that "
                "are there. If it lies elsewhere, load it with ema.load(path) after load_state()"
            )

    ema.leave_engine_checkpoints()
    undo = ExitStack()
    undo.callback(release)
    undo.callback(accelerator.register_save_state_pre_hook(save).remove)
    undo.callback(accelerator.register_load_state_pre_hook(load).remove)
    return Registration(undo.close)


def _refuse_unprepared(accelerator: accelerate.Accelerator, ema: ShardedEMA) -> None:
    """Refuse an average of a module that prepare() has wrapped only afterwards."""
    kinds = {DistributedType.FSDP: "fsdp", DistributedType.DEEPSPEED: "zero"}
    kind = kinds.get(accelerator.distributed_type, "")
    alone = ema.layout == "plain" and accelerator.num_processes > 1
    if alone or not ema.layout.startswith(kind):
        raise ConfigError(
            f"the ShardedEMA is of a model laid out as {ema.layout!r}, and this accelerator trains "
            f"with {accelerator.distributed_type.value}: it was made before accelerator.prepare(), "
            "or of what unwrap_model() returns. Make it of what prepare() returns: model, "
            "optimizer = accelerator.prepare(model, optimizer); ema = ShardedEMA(model, ...)"
        )
