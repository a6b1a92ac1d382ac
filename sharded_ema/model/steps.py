"""What counts as an applied optimizer step.

``torch.optim`` runs post-step hooks after the parameters changed, with three catches that are
handled here: a subclass whose ``step()`` calls its parent's runs them twice; a fused optimizer
under ``GradScaler`` runs them although the step was skipped; and an accelerate wrapper has no hooks
of its own. What has no hooks at all, such as a DeepSpeed engine, is followed by wrapping a method
of the one object (:class:`MethodWrap`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol
from weakref import WeakKeyDictionary, WeakMethod, WeakSet

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from sharded_ema.errors import OptimizerError, StateError, warn
from sharded_ema.model.devices import is_capturing
from sharded_ema.model.internals.pytorch import is_nested_step, runs_own_hooks

# Where wrappers come from whose step() is that of the optimizer inside, or nothing.
_TRANSPARENT = ("accelerate.", "lightning.", "lightning_fabric.", "pytorch_lightning.")


@dataclass(frozen=True, slots=True)
class StepListener:
    """Who is told of steps.

    Attributes:
        before: called before parameters change; may raise to prevent it.
        applied: called once for every applied step.
        removed: called when the steps are no longer followed.
    """

    before: Callable[[], None]
    applied: Callable[[], None]
    removed: Callable[[], None]


class StepHooks(Protocol):
    """Tells a listener of every applied optimizer step, until removed.

    Attributes:
        trainer: what applies the steps; it may write checkpoints of its own.
        skipped_steps: steps seen that changed nothing, for example because gradients overflowed.
    """

    trainer: Any
    skipped_steps: int

    def end_round(self) -> None:
        """Tell of what was applied and not told yet, because others have still to step."""
        ...

    def remove(self) -> None:
        """Detach, once; the round is ended first."""
        ...


class OptimizerSteps:
    """Tells once when every attached optimizer has applied a step.

    With several optimizers that is after the last of them; if one is about to step again before
    the others have, the pending step is told of first.

    Args:
        optimizers: torch optimizers, or wrappers that hold one as ``.optimizer``.
        parameters: ids of the averaged parameters, with their names.
        listener: who is told.

    Raises:
        OptimizerError: no optimizer, one without hooks, or one that owns no averaged parameter.
    """

    def __init__(
        self, optimizers: Sequence[Any], parameters: dict[int, str], listener: StepListener
    ) -> None:
        if not optimizers:
            raise OptimizerError("attach() needs the optimizer (or all of them) of the model")
        self._optimizers = [_unwrap(optimizer) for optimizer in optimizers]
        _check_ownership(self._optimizers, parameters)
        self.trainer = self._optimizers
        self.skipped_steps = 0
        self._listener = listener
        self._depth = dict.fromkeys(map(id, self._optimizers), 0)
        self._turns: list[int] = []
        self._leader: int | None = None
        self._pending = False
        self._handles: list[Any] = []
        # A compiled step() would be compiled together with the average, which would then be rounded
        # in another way. (An optimizer has imported the compiler anyway, so this costs nothing.)
        pre, post = torch.compiler.disable(self._pre), torch.compiler.disable(self._post)
        for optimizer in self._optimizers:
            self._handles.append(optimizer.register_step_pre_hook(pre))
            self._handles.append(optimizer.register_step_post_hook(post))

    def _pre(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        key = id(optimizer)
        if self._depth[key] and not is_nested_step(optimizer):
            self._depth[key] = 0  # the last step() raised and its post hook never ran
        if not self._depth[key]:
            # A new round begins: with this optimizer's second turn, or with the one that began
            # the last round, when another was left out (an unfused GradScaler skip is not seen).
            if key in self._turns or key == self._leader:
                self.end_round()
            self._listener.before()
        self._depth[key] += 1

    def _post(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        key = id(optimizer)
        self._depth[key] = max(0, self._depth[key] - 1)
        if self._depth[key]:
            return
        # GradScaler leaves found_inf on a fused optimizer, which then skips inside its kernel.
        # Reading it is the one host sync that fp16 training pays here.
        found_inf = getattr(optimizer, "found_inf", None)
        if isinstance(found_inf, torch.Tensor) and is_capturing(found_inf.device):
            raise StateError(
                "a GradScaler steps the optimizer while the current stream records a graph: "
                "whether the step is applied is known only on the device, at each replay. Call "
                "scaler.step() outside of the graph"
            )
        if found_inf is not None and float(found_inf) > 0:
            self.skipped_steps += 1
        else:
            self._pending = True
        self._turns.append(key)
        if len(self._turns) == len(self._optimizers):
            self._leader = self._turns[0]
            self.end_round()

    def end_round(self) -> None:
        self._turns.clear()
        if self._pending:
            self._pending = False
            self._listener.applied()

    def remove(self) -> None:
        if not self._handles:
            return
        self.end_round()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._listener.removed()


class StepWatch:
    """Calls back before every step of an optimizer that trains something.

    Whether it is attached or not: what the weights are then is what the last forward ran with, and
    before the first step what training starts from. Compiled steps are not seen.

    Args:
        trains: tells of an optimizer whether it does.
        call: a bound method; its object is not kept alive.
    """

    # All of them share one hook of PyTorch's, which must not be removed while it runs.
    _watching: ClassVar[WeakSet[StepWatch]] = WeakSet()
    _hook: ClassVar[Any] = None

    def __init__(self, trains: Callable[[Optimizer], bool], call: Callable[[], None]) -> None:
        self._trains = trains
        self._call = WeakMethod(call)
        self._owners: WeakKeyDictionary[Optimizer, bool] = WeakKeyDictionary()
        self._watching.add(self)
        if StepWatch._hook is None:
            StepWatch._hook = register_optimizer_step_pre_hook(StepWatch._look)

    @staticmethod
    def _look(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if torch.compiler.is_compiling():
            return
        for each in list(StepWatch._watching):
            call = each._call()
            if call is not None and each._concerns(optimizer):
                call()

    def _concerns(self, optimizer: Optimizer) -> bool:
        if optimizer not in self._owners:
            self._owners[optimizer] = self._trains(optimizer)
        return self._owners[optimizer]

    def remove(self) -> None:
        """Stop watching; harmless if done before, but not to be called from the callback."""
        self._watching.discard(self)
        if not self._watching and StepWatch._hook is not None:
            StepWatch._hook.remove()
            StepWatch._hook = None


def _unwrap(optimizer: Any) -> Optimizer:
    """The torch optimizer inside wrappers such as accelerate's."""
    inner = optimizer
    while not runs_own_hooks(inner) and hasattr(inner, "optimizer"):
        if type(inner).__module__.startswith("deepspeed."):
            raise OptimizerError(
                f"{type(inner).__name__} is the optimizer of a DeepSpeed engine, and the average "
                "is of a module that has none: it was made before deepspeed.initialize() or "
                "accelerator.prepare(). After these, make the ShardedEMA of the engine that they "
                "return: model, optimizer = accelerator.prepare(model, optimizer); ema = "
                "ShardedEMA(model, ...); ema.attach()"
            )
        if hasattr(inner, "step") and not type(inner).__module__.startswith(_TRANSPARENT):
            raise OptimizerError(
                f"{type(inner).__name__} wraps an optimizer and has no step hooks of its own; its "
                "step() may change weights after the one inside has, as Lookahead does. If it does "
                "not, attach its .optimizer; else call ema.update() after each applied step"
            )
        inner = inner.optimizer
    if not isinstance(inner, Optimizer) or not runs_own_hooks(inner):
        raise OptimizerError(
            f"{type(optimizer).__name__} is no torch.optim.Optimizer with step hooks and holds "
            "none; call ema.update() after each applied step instead of attaching"
        )
    return inner


def _check_ownership(optimizers: Sequence[Optimizer], parameters: dict[int, str]) -> None:
    owned: set[int] = set()
    for optimizer in optimizers:
        mine = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not mine & parameters.keys():
            raise OptimizerError(
                f"{type(optimizer).__name__} owns none of the {len(parameters)} averaged "
                "parameters, so the average would never move. fully_shard makes new parameters, "
                "as FullyShardedDataParallel does with use_orig_params=False: create the optimizer "
                "after wrapping, from the same model"
            )
        owned |= mine
    orphans = [name for key, name in parameters.items() if key not in owned]
    if orphans:
        warn(
            f"{len(orphans)} averaged parameters belong to no attached optimizer, among them "
            f"{orphans[:3]}; attach every optimizer of the model in one call, or exclude them"
        )


class MethodWrap:
    """Runs ``around(original, *args, **kwargs)`` in place of one object's method.

    The class and other objects stay as they are.

    Args:
        owner: the object.
        name: of its method.
        around: what to run; it gets the method as it was.
    """

    def __init__(self, owner: Any, name: str, around: Callable[..., Any]) -> None:
        self._owner, self._name = owner, name
        self._before = owner.__dict__.get(name)
        original = getattr(owner, name)
        self._active = True

        @functools.wraps(original)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if not self._active:
                return original(*args, **kwargs)
            return around(original, *args, **kwargs)

        self._wrapped = wrapped
        owner.__dict__[name] = wrapped

    def remove(self) -> None:
        """Put things back; if others have wrapped the method since, become transparent."""
        self._active = False
        if self._owner.__dict__.get(self._name) is not self._wrapped:
            return
        if self._before is None:
            del self._owner.__dict__[self._name]
        else:
            self._owner.__dict__[self._name] = self._before
