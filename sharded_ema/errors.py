"""Every error the library raises: one class per way of failing, all under :class:`EMAError`.

A message says what went wrong, where (parameter name, rank, path) and how to mend it. When
ranks fail differently, all of them raise one error of the first failing rank's class; its
``failures`` maps each failing rank to that rank's own message.
"""

from __future__ import annotations


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


class CheckpointError(EMAError):
    """Base of everything that goes wrong with a checkpoint on disk."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """There is no checkpoint at the path."""


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


def error_classes() -> dict[str, type[EMAError]]:
    """All classes of the tree by name, so that a rank can raise what another rank met."""
    found: dict[str, type[EMAError]] = {}
    pending: list[type[EMAError]] = [EMAError]
    while pending:
        cls = pending.pop()
        found[cls.__name__] = cls
        pending += cls.__subclasses__()
    return found
