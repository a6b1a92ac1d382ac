"""Lightning's ``EMAWeightAveraging``, also for models that no device holds whole.

A callback of the same name and arguments as Lightning's own, over :class:`~sharded_ema.ShardedEMA`:
under DDP, FSDP, ``ModelParallelStrategy`` (FSDP2, tensor parallelism) and DeepSpeed::

    trainer = Trainer(callbacks=[EMAWeightAveraging(decay=0.999)])

The order in which Lightning calls decides when the average is made: under DDP the weights of a
checkpoint are restored before the model is wrapped, under FSDP after ``on_fit_start``, and only in
``on_train_start`` both have happened everywhere. A DeepSpeed engine brings the average from its own
checkpoint, so there it has to exist in ``on_fit_start``.
"""

from __future__ import annotations

import inspect
import os
import tempfile
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.trainer.states import TrainerFn

from sharded_ema.averaging.schedules import Constant, Schedule
from sharded_ema.checkpoint.files import URL, as_location
from sharded_ema.checkpoint.removal import remove
from sharded_ema.ema import ShardedEMA
from sharded_ema.errors import CheckpointNotFoundError, ConfigError, EMAWarning, SwapError, warn
from sharded_ema.integrations.common import claim, warn_of_untested
from sharded_ema.model.steps import MethodWrap

#: Versions of Lightning that the tests have run with.
TESTED = ">=2.6,<2.7"

# What Lightning's own callback writes under these names has the same meaning there.
_RAW, _COUNTS = "current_model_state", "averaging_state"


class EMAWeightAveraging(Callback):
    """Keeps an average of the weights, evaluates it, and stores it with every checkpoint.

    Validation, and evaluation of a checkpoint, see the average; sanity checking and training see
    the weights, which an exception brings back as well. After training the model *is* the average.
    It lies beside every checkpoint, in ``<path>.ema`` (under DeepSpeed within it), goes when that
    is rotated out, and ``fit(ckpt_path=...)`` goes on with it.

    With ``decay`` everything is counted as in Lightning's own callback: an update has this decay,
    however many steps lie between two of them, and the first one copies the weights. With
    ``schedule`` everything is counted as in :class:`~sharded_ema.ShardedEMA`.

    Args:
        device: where the average lies; default beside each parameter.
        use_buffers: average floating buffers too, as Lightning's own does by default; else they
            are stored as they are.
        decay: of one update, in ``[0, 1]``.
        update_every_n_steps: optimizer steps between two updates; 0 for none after steps.
        update_starting_at_step: index of the first step, from 0, that may be followed by an
            update. Before it the average is the weights (Lightning's is the initial ones).
        update_starting_at_epoch: update also at the end of each epoch from this one on. Then an
            update is what is counted, not a step, and DeepSpeed is refused.
        schedule: in place of ``decay``: whatever ShardedEMA takes, also several by name.
        profile: which of several averages is evaluated, and stays in the model.
        prefix: of the names of the metrics that are logged; ``None`` logs none.
        options: of ShardedEMA, by its names.

    Attributes:
        ema: the average; from the start of training on, and after it until the next one.

    Raises:
        ConfigError: settings contradict each other, or there is no such option; and in ``fit``, if
            another callback keeps an average in the same place.
    """

    ema: ShardedEMA | None

    def __init__(
        self,
        device: torch.device | str | int | None = None,
        use_buffers: bool = True,
        decay: float = 0.999,
        update_every_n_steps: int = 1,
        update_starting_at_step: int | None = None,
        update_starting_at_epoch: int | None = None,
        *,
        schedule: float | str | Schedule | Mapping[str, float | str | Schedule] | None = None,
        profile: str | None = None,
        prefix: str | None = "ema/",
        **options: Any,
    ) -> None:
        if schedule is not None and decay != 0.999:
            raise ConfigError(f"decay={decay} and schedule={schedule!r} were given; pass one")
        self.update_every_n_steps = update_every_n_steps
        self.update_starting_at_step = update_starting_at_step
        self.update_starting_at_epoch = update_starting_at_epoch
        self.ema = None
        self._profile, self._prefix = profile, prefix
        # Whether this callback asks should_update() and updates, and not the optimizer's hooks.
        self._asks = (
            update_starting_at_epoch is not None
            or type(self).should_update is not EMAWeightAveraging.should_update
        )
        if update_every_n_steps < 1 and not self._asks:
            raise ConfigError(
                f"update_every_n_steps={update_every_n_steps} means no update after any step, so "
                "pass update_starting_at_epoch as well"
            )
        _check_options(options)
        if device is not None:
            options["device"] = torch.device(device)
        self._settings = {
            "schedule": Constant(decay) if schedule is None else schedule,
            "buffers": "average" if use_buffers else "copy",
            **options,
        }
        if self._asks:
            self._settings["start_step"] = int(schedule is None)
        elif schedule is not None:
            self._settings["start_step"] = update_starting_at_step or 0
            self._settings["update_every"] = update_every_n_steps
        else:  # index i, from 0, is followed by an update if n divides it
            n, first = update_every_n_steps, update_starting_at_step or 0
            self._settings["schedule"] = Constant(decay ** (1 / n))
            self._settings["start_step"] = -(-first // n) * n + 1
            self._settings["update_every"] = n
        self._latest_step = 0
        self._whole: tuple[dict[str, Any], int] | None = None  # as it lay in a checkpoint
        self._evaluation: ExitStack | None = None
        self._wraps: list[MethodWrap] = []
        self._release: Callable[[], None] | None = None

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """Whether to update now; may be overridden, as Lightning's own.

        An override is asked after every optimizer step and every epoch, and what it agrees to is
        what a schedule counts.

        Args:
            step_idx: of the step, from 0, if one has been applied.
            epoch_idx: of the epoch, from 0, if one has ended.
        """
        if step_idx is not None:
            begun = step_idx >= (self.update_starting_at_step or 0)
            n = self.update_every_n_steps
            if begun and n > 0 and step_idx % n == 0:
                return True
        first = self.update_starting_at_epoch
        return epoch_idx is not None and first is not None and epoch_idx >= first

    # ------------------------------------------------------------------ the run of a trainer

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stand beside every checkpoint that is saved or removed from now on."""
        if stage != "fit":
            return
        self._unwrap()  # after an exception
        self._whole = None
        warn_of_untested("lightning", lightning.__version__, TESTED)
        self._release = claim(trainer, "<checkpoint>.ema", "EMAWeightAveraging")
        if _is_deepspeed(trainer) and self._asks:
            raise ConfigError(
                "updates at the end of epochs, or where should_update() says so, are not possible "
                "under DeepSpeed, whose engine counts steps; leave out update_starting_at_epoch "
                "and should_update()"
            )
        self._trainer = trainer
        arounds: dict[str, Callable[..., Any]] = {"save_checkpoint": self._around_save}
        if not _is_deepspeed(trainer):
            arounds["remove_checkpoint"] = self._around_remove
        self._wraps = [
            MethodWrap(trainer.strategy, name, around) for name, around in arounds.items()
        ]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the average of a DeepSpeed engine, which loads its checkpoint after this."""
        if self.ema is not None:  # of the run before
            self.ema.close()
            self.ema = None
        if _is_deepspeed(trainer):
            self._make(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the average of what has been wrapped and restored, or go on with a stored one."""
        self._latest_step = trainer.global_step
        if not _is_deepspeed(trainer):
            self._make(trainer)
            if trainer.ckpt_path is not None:
                self._resume(trainer)
            self._whole = None

    def _make(self, trainer: Trainer) -> None:
        # Not pl_module: only what is around it knows of the other ranks.
        self.ema = ShardedEMA(trainer.model, **self._settings)
        if not self._asks:
            self.ema.attach(*([] if _is_deepspeed(trainer) else trainer.optimizers))

    def _resume(self, trainer: Trainer) -> None:
        assert self.ema is not None and trainer.ckpt_path is not None
        path = _beside_loaded(trainer)
        try:
            step = self.ema.load(path)
        except CheckpointNotFoundError:
            if self._whole is not None:
                self._take_over(trainer, *self._whole)
                return
            warn(
                f"{path} does not exist, so the average starts anew from the weights of "
                f"{trainer.ckpt_path}; if it lies elsewhere, move it there"
            )
            return
        if step != trainer.global_step:
            warn(
                f"{path} was saved at step {step} and {trainer.ckpt_path} at step "
                f"{trainer.global_step}; they belong to different checkpoints"
            )

    def _take_over(self, trainer: Trainer, average: dict[str, Any], num_updates: int) -> None:
        """Go on with what Lightning's own callback has saved, or what was moved without .ema."""
        assert self.ema is not None
        name = f"sharded-ema-{uuid.uuid4().hex}.pt"
        path = Path(trainer.strategy.broadcast(str(Path(tempfile.gettempdir(), name))))
        try:
            if trainer.local_rank == 0:
                torch.save(average, path)
            trainer.strategy.barrier()
            self.ema.load(path, num_updates=num_updates)
        finally:
            if trainer.local_rank == 0:
                path.unlink(missing_ok=True)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update, if this callback has to, and log what there is to say."""
        assert self.ema is not None
        step = trainer.global_step
        if self._asks and step > self._latest_step and self.should_update(step_idx=step - 1):
            self.ema.update()
            self._latest_step = step
        # metrics() waits for the device, so only where Lightning passes on what is logged.
        every = trainer.log_every_n_steps
        if self._prefix is not None and every and step % every == 0:
            with self._between_updates():
                found = self.ema.metrics(prefix=self._prefix)
            self.log_dict(found, on_step=True, on_epoch=False)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Update, if this callback has to."""
        assert self.ema is not None
        if self._asks and self.should_update(epoch_idx=trainer.current_epoch):
            self.ema.update()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the average in the model."""
        assert self.ema is not None
        with self._between_updates():
            self.ema.copy_to(self._profile)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Bring the weights back, if the average stood in for them.

        ModelCheckpoint, which comes last, may save now; Lightning does not call ``teardown()``.
        """
        self._leave(exception)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the strategy as it was; the average stays usable."""
        self._unwrap()

    @contextmanager
    def _between_updates(self) -> Iterator[None]:
        """Steps that this callback lets pass without an update are none that nobody counted."""
        with warnings.catch_warnings():
            if self._asks:
                uncounted = "the weights have changed and no optimizer step was counted"
                warnings.filterwarnings("ignore", uncounted, EMAWarning)
            yield

    def _unwrap(self) -> None:
        for wrap in self._wraps:
            wrap.remove()
        self._wraps = []
        if self._release is not None:
            self._release()
            self._release = None

    # ------------------------------------------------------------------ evaluation

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the average stand in for the weights."""
        self._enter(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Bring the weights back, before ModelCheckpoint saves them: it is called last."""
        self._leave()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the average stand in for the weights of a checkpoint."""
        self._enter(trainer)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Bring them back."""
        self._leave()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the average stand in for the weights of a checkpoint."""
        self._enter(trainer)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Bring them back."""
        self._leave()

    def _enter(self, trainer: Trainer) -> None:
        if trainer.sanity_checking:
            return
        with ExitStack() as stack:
            if trainer.state.fn == TrainerFn.FITTING:
                ema = self.ema
            else:
                ema = self._of_checkpoint(trainer, stack)
            if ema is not None:
                with self._between_updates():
                    stack.enter_context(ema.swap(self._profile))
                self._evaluation = stack.pop_all()

    def _of_checkpoint(self, trainer: Trainer, stack: ExitStack) -> ShardedEMA | None:
        """The average of the checkpoint that is evaluated, if its weights are not it already."""
        if trainer.ckpt_path is None or not trainer.strategy.restore_checkpoint_after_setup:
            return None
        if _is_deepspeed(trainer):
            warn(
                "outside of fit() no average is loaded from a checkpoint of DeepSpeed, so its raw "
                "weights are evaluated; make a model of the average with 'sharded-ema consolidate "
                f"{trainer.ckpt_path}/checkpoint/ema', or validate within fit()"
            )
            return None
        ema = ShardedEMA(trainer.model, **self._settings)
        stack.callback(ema.close)
        path = _beside_loaded(trainer)
        try:
            ema.load(path)
        except CheckpointNotFoundError:
            warn(f"{path} does not exist, so the weights of {trainer.ckpt_path} are evaluated")
            return None
        return ema

    def _leave(self, failure: BaseException | None = None) -> None:
        if self._evaluation is not None:
            evaluation, self._evaluation = self._evaluation, None
            evaluation.__exit__(
                type(failure) if failure else None,
                failure,
                failure.__traceback__ if failure else None,
            )

    # ------------------------------------------------------------------ checkpoints

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Put the average where Lightning's own callback does, if the file holds a whole model.

        Strategies that shard read ``state_dict`` into the model themselves, so there it stays the
        weights.
        """
        if self.ema is None or trainer.strategy.restore_checkpoint_after_setup:
            return
        self._refuse_in_evaluation()
        with self._between_updates(), self.ema.swap(self._profile):
            whole = trainer.strategy.lightning_module_state_dict()
            average = {
                name: value.detach().to("cpu", copy=True)
                for name, value in whole.items()
                if trainer.is_global_zero  # which alone writes
            }
        checkpoint[_RAW] = checkpoint["state_dict"]
        checkpoint["state_dict"] = average
        checkpoint[_COUNTS] = {"n_averaged": torch.tensor(self.ema.num_updates + 1)}

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Train on from the raw weights; what is evaluated stays the average."""
        if trainer.state.fn == TrainerFn.FITTING and {_RAW, _COUNTS} <= checkpoint.keys():
            pl_module.load_state_dict(checkpoint[_RAW])
            # The first update, which copies, is counted there and not here.
            updates = max(0, int(checkpoint[_COUNTS]["n_averaged"]) - 1)
            self._whole = checkpoint["state_dict"], updates

    def _refuse_in_evaluation(self) -> None:
        if self._evaluation is not None:
            raise SwapError(
                "a checkpoint would be saved while the average stands in for the weights, which "
                "would be missing in it. Save after validation: in a callback that stands behind "
                "EMAWeightAveraging, or where Lightning's ModelCheckpoint does"
            )

    def _around_save(
        self, original: Callable[..., Any], checkpoint: Any, filepath: Any, *args: Any, **more: Any
    ) -> Any:
        """The average goes first, so that no checkpoint of this run is without it."""
        if self.ema is not None:
            self._refuse_in_evaluation()
            if not _is_deepspeed(self._trainer):
                path = _beside(self._trainer.strategy.broadcast(filepath))
                replace = not isinstance(as_location(path), URL)
                with self._between_updates():
                    self.ema.save(
                        path, step=self._trainer.global_step, latest=False, replace=replace
                    )
        return original(checkpoint, filepath, *args, **more)

    def _around_remove(self, original: Callable[..., Any], filepath: Any) -> None:
        original(filepath)
        if self._trainer.is_global_zero:
            problem = remove(as_location(_beside(filepath)))
            if problem:
                warn(f"of the average of {filepath} something is left: {problem}")


def _is_deepspeed(trainer: Trainer) -> bool:
    return isinstance(trainer.strategy, DeepSpeedStrategy)


def _beside(path: Any) -> str:
    return f"{os.fspath(path)}.ema"


def _beside_loaded(trainer: Trainer) -> str:
    """Where the average of the checkpoint lies that was loaded; all ranks ask."""
    path: Path | str = os.fspath(trainer.ckpt_path)
    # ModelCheckpoint(save_last="link") has last.ckpt point to what has the average beside it.
    if Path(path).is_symlink():
        path = Path(path).resolve()
    return str(trainer.strategy.broadcast(_beside(path)))


def _check_options(options: Mapping[str, Any]) -> None:
    ours = {"start_step": "update_starting_at_step", "update_every": "update_every_n_steps"}
    for name, theirs in ours.items():
        if name in options:
            raise ConfigError(f"{name} is called {theirs} here")
    known = inspect.signature(ShardedEMA).parameters.keys() - {"target", "schedule", *ours}
    unknown = sorted(options.keys() - known)
    if unknown:
        raise ConfigError(
            f"EMAWeightAveraging has no option {', '.join(unknown)}; beside its own arguments it "
            f"takes those of ShardedEMA: {', '.join(sorted(known))}"
        )
