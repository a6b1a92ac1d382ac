"""Every error the library raises: one class per way of failing, all under :class:`EMAError`.

A message says what went wrong, where (parameter name, rank, path) and how to mend it. When
ranks fail differently, all of them raise one error of the first failing rank's class; its
``failures`` maps each failing rank to that rank's own message. What is no failure but makes an
average useless is warned of by :func:`warn`, at the line of the user's program.
"""

from __future__ import annotations

import importlib
import inspect
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import FrameType
from typing import Any, NamedTuple


class EMAError(Exception):
    """Base of all errors of this library."""

    failures: dict[int, str]

    def __init__(self, message: str, failures: dict[int, str] | None = None) -> None:
        super().__init__(message)
        self.failures = failures or {}


class ConfigError(EMAError, ValueError):
    """A setting is out of range, unknown, or contradicts another one."""


class BindError(EMAError):
    """The model cannot be averaged as it stands: nothing matched, a size-0 or meta tensor."""


class UnsupportedLayoutError(BindError):
    """A parameter is sharded in a way that this version does not support."""


class FrameworkVersionError(EMAError):
    """PyTorch or DeepSpeed lacks a private member that this library relies on."""


class OptimizerError(EMAError):
    """An optimizer cannot drive the average, for example because it owns none of its parameters."""


class SwapError(EMAError):
    """Weights must not be replaced or used now, mostly because an average stands in for them."""


class StateError(EMAError):
    """The shadow cannot be used: closed, or left half-written by a load that failed."""


class NonFiniteError(EMAError):
    """A parameter holds NaN or Inf and ``nonfinite="raise"`` was asked for."""


class AbsentRankError(EMAError):
    """A rank did not take part in a collective call within the timeout."""


class RanksDifferError(EMAError):
    """Ranks that must count, call or be set alike do not."""


class MissingPackageError(EMAError, ImportError):
    """A package that this call needs is not installed."""


class CheckpointError(EMAError):
    """Base of everything that goes wrong with a checkpoint on disk."""


class CheckpointUnreachableError(CheckpointError):
    """A store does not answer, or refuses: whether anything is there, and whole, is not known."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """There is no checkpoint at the path."""


class CheckpointGoneError(CheckpointNotFoundError):
    """The checkpoint was removed or replaced while it was read."""


class CheckpointExistsError(CheckpointError, FileExistsError):
    """A save would overwrite something that is already there."""


class CheckpointUncommittedError(CheckpointError):
    """The directory holds a save that never finished."""


class CheckpointCorruptError(CheckpointError):
    """The bytes on disk are not the bytes that were written."""


class CheckpointMismatchError(CheckpointError):
    """The checkpoint is whole but belongs to another model, layout or schedule."""


class CheckpointWriteError(CheckpointError):
    """A rank could not write its part; nothing was committed."""


class EMAWarning(UserWarning):
    """Something is legal but makes the average useless; the text names the remedy."""


def require_torch(what: str) -> None:
    """Refuse what needs PyTorch where it is not installed.

    Args:
        what: needs it.

    Raises:
        MissingPackageError: it cannot be imported.
    """
    try:
        importlib.import_module("torch")
    except ImportError as error:
        raise MissingPackageError(
            f"{what} needs PyTorch ({error}): pip install sharded-ema, which brings it; "
            "sharded-ema-core alone has the tools that do without"
        ) from error


# ---------------------------------------------------------------------- who has called

# Packages that lie between a user's line and this library: they run hooks, and wrap what is called.
_BETWEEN = {
    "sharded_ema",
    "torch",
    "deepspeed",
    "accelerate",
    "transformers",
    "trl",
    "lightning",
    "lightning_fabric",
    "pytorch_lightning",
    "contextlib",
    "copy",
    "functools",
}


class Line(NamedTuple):
    """A line of a program, as :func:`warnings.warn_explicit` wants it."""

    file: str
    number: int
    module: str
    registry: dict[Any, Any]


_speaking_for: ContextVar[Line | None] = ContextVar("line", default=None)


def user_line() -> Line:
    """The line of the user's program that has called the library, however far away that is."""
    known = _speaking_for.get()
    if known is not None:
        return known
    frame = inspect.currentframe()
    assert frame is not None  # as CPython has them
    while frame.f_back is not None and _is_between(frame):
        frame = frame.f_back
    return Line(
        frame.f_code.co_filename,
        frame.f_lineno,
        frame.f_globals.get("__name__", frame.f_code.co_filename),
        frame.f_globals.setdefault("__warningregistry__", {}),
    )


def is_called_from(package: str) -> bool:
    """Whether code of a package, or of one of its modules, has called, however far away that is."""
    frame = inspect.currentframe()
    while frame is not None:
        if f"{_module(frame)}.".startswith(f"{package}."):
            return True
        frame = frame.f_back
    return False


def caller_among(modules: Iterable[str]) -> str | None:
    """The first of these modules, or packages, that has the line which called the library.

    Unlike :func:`is_called_from` this does not look further: a program that a framework has
    launched is not the framework.
    """
    frame = inspect.currentframe()
    while frame is not None and f"{_module(frame)}.".startswith("sharded_ema."):
        frame = frame.f_back
    called = f"{_module(frame)}." if frame is not None else ""
    return next((name for name in modules if called.startswith(f"{name}.")), None)


def _is_between(frame: FrameType) -> bool:
    return _module(frame).partition(".")[0] in _BETWEEN


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__"))


@contextmanager
def speaking_for(line: Line) -> Iterator[None]:
    """What is warned of in the block belongs to a line that has asked for it before."""
    token = _speaking_for.set(line)
    try:
        yield
    finally:
        _speaking_for.reset(token)


def warn(message: str, category: type[Warning] = EMAWarning, line: Line | None = None) -> None:
    """Warn at the user's line.

    Args:
        line: to blame; the one that has called the library if ``None``.
    """
    file, number, module, registry = line or user_line()
    warnings.warn_explicit(message, category, file, number, module, registry)


def error_classes() -> dict[str, type[EMAError]]:
    """All classes of the tree by name, so that a rank can raise what another rank met."""
    found: dict[str, type[EMAError]] = {}
    pending: list[type[EMAError]] = [EMAError]
    while pending:
        cls = pending.pop()
        found[cls.__name__] = cls
        pending += cls.__subclasses__()
    return found
