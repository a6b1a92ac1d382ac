"""transformers' ``Trainer`` and every subclass of it: ``trainer = with_ema(trainer, 0.9999)``.

Methods are wrapped on the object, so that the order of subclasses does not matter:

train            remembers what is resumed from, which callbacks are not told
on_train_begin   comes after Trainer has wrapped the model and restored weights and optimizer, on
                 every backend: here the average is made, attached and loaded
log              comes before trainer_state.json and every tracker; a callback's on_log after them
evaluate         the weights first, then each average inside a swap
save_model       with ``_internal_call=True`` is the first thing that a checkpoint is made of: what
                 is written here is there before the rotation and the push to the hub
on_train_end     comes after load_best_model_at_end
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import transformers
from transformers import ProgressCallback, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

from sharded_ema.averaging.schedules import Schedule, as_profiles
from sharded_ema.ema import ShardedEMA
from sharded_ema.errors import CheckpointNotFoundError, ConfigError, StateError, warn
from sharded_ema.integrations.common import claim, warn_of_untested
from sharded_ema.model.steps import MethodWrap

TESTED = ">=5.23,<5.24"
FOLDER = "ema"

AnyTrainer = TypeVar("AnyTrainer", bound=transformers.Trainer)


def with_ema(
    trainer: AnyTrainer,
    schedule: float | str | Schedule | Mapping[str, float | str | Schedule] = "warmup:0.9999",
    *,
    prefix: str = "ema/",
    evaluate: bool | Sequence[str] = True,
    **options: Any,
) -> AnyTrainer:
    """Keep an average of the weights in a Trainer: in its logs, evaluations and checkpoints.

    The average is ``trainer.ema`` from the moment training begins (``None`` before), and afterwards
    until the next ``train()``, which begins another.

    ``evaluate()`` gives ``eval_ema_loss`` beside ``eval_loss``, and so with every metric
    (``eval_ema_<profile>_...`` if there are several averages); ``metric_for_best_model`` can be one
    of these. ``checkpoint-N/ema`` holds the average, and is found by ``resume_from_checkpoint``.
    With ``load_best_model_at_end`` the average is that of the best checkpoint, as the weights.
    ``trainer.save_model(directory, average=True, profile=None)`` writes a model that
    ``from_pretrained`` opens, whose weights are the average.

    Args:
        trainer: before its ``train()``.
        schedule: as of :class:`~sharded_ema.ShardedEMA`.
        prefix: what the names of ``ema.metrics()`` begin with in the logs of training.
        evaluate: whether ``evaluate()`` evaluates the averages; or names of those that it does.
        options: of :class:`~sharded_ema.ShardedEMA`; ``total_steps`` is Trainer's ``max_steps``.

    Returns:
        The trainer.

    Raises:
        ConfigError: the trainer has an average already, or trains; or a setting is out of range.
    """
    warn_of_untested("transformers", transformers.__version__, TESTED)
    if isinstance(schedule, ShardedEMA):
        raise ConfigError(
            "with_ema() was given a ShardedEMA, which was made before Trainer wraps the model and "
            "would not be of its shards; give it the schedule, as in trainer = with_ema(trainer, "
            "0.9999), and it makes the average once the model is wrapped"
        )
    names = list(as_profiles(schedule))
    chosen = list(names if evaluate is True else evaluate or ())
    if not set(chosen) <= set(names):
        raise ConfigError(f"evaluate={evaluate!r} names averages that are not among {names}")
    inspect.signature(ShardedEMA).bind(trainer.model, schedule, **options)
    if trainer.is_in_train:
        raise ConfigError(
            "with_ema() was called while the trainer trains, too late to find the average that it "
            "resumes with; call it before trainer.train()"
        )
    claim(trainer, f"{PREFIX_CHECKPOINT_DIR}-N/{FOLDER}", "with_ema()")
    watched: Any = trainer  # which has an attribute more from now on
    watched.ema = None
    tags = {n: FOLDER if len(names) == 1 else f"{FOLDER}_{n}" for n in chosen}
    averaging = _Averaging(
        watched,
        lambda steps: ShardedEMA(
            watched.model_wrapped, schedule, **{"total_steps": steps, **options}
        ),
    )
    evaluating = _Evaluating(watched, tags)

    def log(original: Any, logs: dict[str, float], *args: Any, **kwargs: Any) -> Any:
        if watched.ema is not None and "loss" in logs:
            logs.update(watched.ema.metrics(prefix=prefix))
        return original(logs, *args, **kwargs)

    MethodWrap(trainer, "train", averaging.train)
    MethodWrap(trainer, "save_model", averaging.save_model)
    MethodWrap(trainer, "evaluate", evaluating.evaluate)
    MethodWrap(trainer, "log", log)
    trainer.add_callback(averaging)
    return trainer


class _Averaging(TrainerCallback):
    """The life of a trainer's average: made, saved, resumed, loaded with the best model.

    Args:
        make: the average of the wrapped model, given the steps that are planned.
    """

    def __init__(self, trainer: Any, make: Callable[[int], ShardedEMA]) -> None:
        self._trainer = trainer
        self._make = make
        self._resumed: str | None = None
        self._run_folder = Path(trainer.args.output_dir)

    def train(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        given = _argument(original, args, kwargs, "resume_from_checkpoint")
        folder = self._trainer.args.output_dir
        self._resumed = get_last_checkpoint(folder) if given is True else given or None
        self._run_folder = Path(folder)
        return original(*args, **kwargs)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self._trainer
        if trainer.ema is not None:  # of an earlier train()
            trainer.ema.close()
        trainer.ema = self._make(state.max_steps)
        if trainer.is_deepspeed_enabled:
            # The engine's own hook would write a second copy, below global_stepN.
            trainer.ema.attach(checkpoint=False)
        else:
            trainer.ema.attach(trainer.optimizer)
        if self._resumed is None:
            return
        try:
            trainer.ema.load(Path(self._resumed, FOLDER))
        except CheckpointNotFoundError:
            warn(
                f"{self._resumed}, from which Trainer resumes, has no average ({FOLDER}/): it "
                "starts anew from the weights of that checkpoint. If one lies elsewhere, load it "
                "with trainer.ema.load(path) in a callback's on_step_begin"
            )

    def save_model(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        profile, average = kwargs.pop("profile", None), kwargs.pop("average", False)
        folder = Path(
            _argument(original, args, kwargs, "output_dir") or self._trainer.args.output_dir
        )
        if average:
            return self._write_average(folder, profile)
        result = original(*args, **kwargs)
        step = self._trainer.state.global_step
        # A push to the hub has the model saved in this way, too, beside the checkpoints.
        internal = _argument(original, args, kwargs, "_internal_call")
        is_checkpoint = internal and folder.name == f"{PREFIX_CHECKPOINT_DIR}-{step}"
        if self._trainer.ema is not None and is_checkpoint:
            self._run_folder = folder.parent
            # DeepSpeed keeps a file `latest` of its own there.
            self._trainer.ema.save(folder / FOLDER, step=step, latest=False, replace=True)
        return result

    def _write_average(self, folder: Path, profile: str | None) -> None:
        trainer = self._trainer
        if trainer.ema is None:
            raise StateError(
                "save_model(average=True) before training: the average is made when trainer.train()"
                " begins"
            )
        model = trainer.accelerator.unwrap_model(trainer.model)
        state = trainer.ema.full_state_dict(profile, dtype=getattr(model, "dtype", None))
        if trainer.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            if hasattr(model, "save_pretrained"):
                model.save_pretrained(folder, state_dict=state)
            else:
                safetensors.torch.save_file(
                    state, folder / "model.safetensors", metadata={"format": "pt"}
                )
            if trainer.processing_class is not None:
                trainer.processing_class.save_pretrained(folder)
        trainer.accelerator.wait_for_everyone()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not args.load_best_model_at_end or not state.best_global_step:
            return
        # best_model_checkpoint is None on ranks that do not see the folder.
        name = f"{PREFIX_CHECKPOINT_DIR}-{state.best_global_step}"
        best = Path(state.best_model_checkpoint or self._run_folder / name)
        try:
            self._trainer.ema.load(best / FOLDER)
        except CheckpointNotFoundError:
            if state.best_model_checkpoint is None:
                return  # nor were its weights loaded
            self._trainer.ema.reseed()
            warn(
                f"the best checkpoint, {best}, has no average ({FOLDER}/): after training "
                "trainer.ema is not the average of the last steps but the weights of that "
                "checkpoint, as load_best_model_at_end=True asks for"
            )


class _Evaluating:
    """Evaluates the weights, then each average, as if it were one evaluation.

    Names of metrics are changed on the way out, so that whatever evaluates or logs needs to know
    nothing of it: ``eval_loss`` of an average becomes ``eval_ema_loss``.

    Args:
        tags: what to put behind ``eval_``, by average.
    """

    def __init__(self, trainer: Any, tags: Mapping[str, str]) -> None:
        self._trainer, self._tags = trainer, tags
        self._active = False

    def evaluate(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        trainer = self._trainer
        # Trainer.evaluate() calls itself for each of several data sets; overrides may as well.
        if self._active or trainer.ema is None or not self._tags:
            return original(*args, **kwargs)
        prefix = _argument(original, args, kwargs, "metric_key_prefix") or "eval"
        self._active = True
        try:
            with self._renaming(lambda name: name) as events:
                metrics = original(*args, **kwargs)
            seen = [events]
            for profile, tag in self._tags.items():
                rename = _renaming(prefix, tag)
                with trainer.ema.swap(profile), self._renaming(rename) as events:
                    metrics = metrics | _renamed(original(*args, **kwargs), rename)
                seen.append(events)
        finally:
            self._active = False
        # EarlyStoppingCallback wants its metric in each event, whether it is an average's or not.
        for together in zip_longest(*seen, fillvalue={}):
            merged = {name: value for part in together for name, value in part.items()}
            trainer.control = trainer.callback_handler.on_evaluate(
                trainer.args, trainer.state, trainer.control, merged
            )
        return metrics

    @contextmanager
    def _renaming(self, rename: Callable[[str], str]) -> Iterator[list[dict[str, float]]]:
        """Rename what is logged, and collect the metrics of ``on_evaluate`` instead of firing it.

        TRL's trainers add metrics of their own inside ``log``: only what callbacks are handed is
        complete.
        """
        trainer, held = self._trainer, list[dict[str, float]]()

        def on_log(original: Any, args: Any, state: Any, control: Any, logs: Any) -> Any:
            state.log_history[-1] = _renamed(state.log_history[-1], rename)
            return original(args, state, control, _renamed(logs, rename))

        def on_evaluate(original: Any, args: Any, state: Any, control: Any, metrics: Any) -> Any:
            held.append(_renamed(metrics, rename))
            for callback in trainer.callback_handler.callbacks:
                if isinstance(callback, ProgressCallback):  # whose bar ends with each evaluation
                    callback.on_evaluate(args, state, control)
            return control

        with ExitStack() as stack:
            for name, around in (("on_log", on_log), ("on_evaluate", on_evaluate)):
                stack.callback(MethodWrap(trainer.callback_handler, name, around).remove)
            yield held


def _renaming(prefix: str, tag: str) -> Callable[[str], str]:
    def rename(name: str) -> str:
        # TRL's own metrics have eval_ whatever the prefix is.
        for start in (f"{prefix}_", "eval_"):
            if name.startswith(start):
                return f"{start}{tag}_{name.removeprefix(start)}"
        return name

    return rename


def _renamed(metrics: Mapping[str, Any], rename: Callable[[str], str]) -> dict[str, Any]:
    return {rename(name): value for name, value in metrics.items()}


def _argument(
    function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], name: str
) -> Any:
    """What a call gives for a parameter, if the function has it; else ``None``."""
    given = inspect.signature(function).bind(*args, **kwargs).arguments
    return given.get(name, kwargs.get(name))
