"""What counts as an applied optimizer step.

``torch.optim`` runs post-step hooks after the parameters changed, with three catches that are
handled here: a subclass whose ``step()`` calls its parent's runs them twice; a fused optimizer
under ``GradScaler`` runs them although the step was skipped; and an accelerate wrapper has no hooks
of its own.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from torch.optim import Optimizer

from sharded_ema.errors import EMAWarning, OptimizerError


class OptimizerHooks:
    """Calls back once when every attached optimizer has applied a step.

    With several optimizers the callback comes after the last of them; if one is about to step
    again before the others have, the pending callback comes first.

    Args:
        optimizers: torch optimizers, or wrappers that hold one as ``.optimizer``.
        parameters: ids of the averaged parameters, with their names.
        before_step: called before an optimizer changes parameters; may raise to prevent it.
        applied: called once per applied step.
        removed: called when the hooks have been removed.
    """

    def __init__(
        self,
        optimizers: Sequence[Any],
        parameters: dict[int, str],
        *,
        before_step: Callable[[], None],
        applied: Callable[[], None],
        removed: Callable[[], None],
    ) -> None:
        if not optimizers:
            raise OptimizerError("attach() needs the optimizer (or all of them) of the model")
        self._optimizers = [_unwrap(optimizer) for optimizer in optimizers]
        _check_ownership(self._optimizers, parameters)
        self._before_step = before_step
        self._applied = applied
        self._removed = removed
        self._depth = dict.fromkeys(map(id, self._optimizers), 0)
        self._turns: list[int] = []
        self._leader: int | None = None
        self._pending = False
        self.skipped_steps = 0
        self._handles: list[Any] = []
        for optimizer in self._optimizers:
            self._handles.append(optimizer.register_step_pre_hook(self._pre))
            self._handles.append(optimizer.register_step_post_hook(self._post))

    def _pre(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        key = id(optimizer)
        if self._depth[key] and not _is_nested(optimizer):
            self._depth[key] = 0  # the last step() raised and its post hook never ran
        if not self._depth[key]:
            self._before_step()
            # A new round begins: with this optimizer's second turn, or with the one that began
            # the last round, when another was left out (an unfused GradScaler skip is not seen).
            if key in self._turns or key == self._leader:
                self.flush()
        self._depth[key] += 1

    def _post(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        key = id(optimizer)
        self._depth[key] = max(0, self._depth[key] - 1)
        if self._depth[key]:
            return
        # GradScaler leaves found_inf on a fused optimizer, which then skips inside its kernel.
        # Reading it is the one host sync that fp16 training pays here.
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None and float(found_inf) > 0:
            self.skipped_steps += 1
        else:
            self._pending = True
        self._turns.append(key)
        if len(self._turns) == len(self._optimizers):
            self._leader = self._turns[0]
            self.flush()

    def flush(self) -> None:
        """Call back now if some optimizer has applied a step since the last callback."""
        self._turns.clear()
        if self._pending:
            self._pending = False
            self._applied()

    def remove(self) -> None:
        """Detach from all optimizers, once; a pending step is counted first."""
        if not self._handles:
            return
        self.flush()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._removed()


def _unwrap(optimizer: Any) -> Optimizer:
    """The torch optimizer inside wrappers such as accelerate's."""
    inner = optimizer
    while not hasattr(inner, "_optimizer_step_post_hooks") and hasattr(inner, "optimizer"):
        inner = inner.optimizer
    if not isinstance(inner, Optimizer):
        raise OptimizerError(
            f"{type(optimizer).__name__} is no torch.optim.Optimizer and holds none; call "
            "ema.update() after each applied step instead of attaching"
        )
    return inner


def _check_ownership(optimizers: Sequence[Optimizer], parameters: dict[int, str]) -> None:
    owned: set[int] = set()
    for optimizer in optimizers:
        mine = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not mine & parameters.keys():
            raise OptimizerError(
                f"{type(optimizer).__name__} owns none of the {len(parameters)} averaged "
                "parameters, so the average would never move. fully_shard makes new parameters: "
                "create the optimizer after it, from the same model"
            )
        owned |= mine
    orphans = [name for key, name in parameters.items() if key not in owned]
    if orphans:
        warnings.warn(
            f"{len(orphans)} averaged parameters belong to no attached optimizer, among them "
            f"{orphans[:3]}; attach every optimizer of the model in one call, or exclude them",
            EMAWarning,
            stacklevel=4,
        )


def _is_nested(optimizer: Optimizer) -> bool:
    """Whether a ``step()`` of this optimizer is running inside another one of its own."""
    code = getattr(type(optimizer).step, "__code__", None)
    running = 0
    frame = sys._getframe()
    while frame is not None:
        # All of torch's step() wrappers share this code object and unpack `self` the same way.
        if frame.f_code is code and frame.f_locals.get("self") is optimizer:
            running += 1
        frame = frame.f_back  # type: ignore[assignment]
    return running > 1
