"""What a user sets of an average beside its schedules (no torch)."""

from __future__ import annotations

import json
import operator
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

from sharded_ema.errors import ConfigError

DEFAULT_PROFILE = "ema"
#: Bytes of a GPU that its parameters pass through to a shadow on the host.
OFFLOAD_BUFFER = 128 << 20

#: What may become of buffers: for all of them, or by patterns of names, of which the first counts.
Buffers = str | Mapping[str, str]

# Below this, copies are so small that their number costs more than their bytes.
_LEAST_BUFFER = 1 << 20
_BUFFERS = ("copy", "average", "ignore")
_CHOICES = {
    "frozen": ("save", "skip"),
    "nonfinite": ("skip", "raise", "allow"),
    "decay_per": ("step", "update"),
}


def as_whole(value: object, what: str, *, least: int | None = None) -> int:
    """A whole number that a user has given: Python's, or one of numpy or PyTorch.

    Args:
        what: its name, for the message.
        least: what it must be at least.

    Raises:
        ConfigError: it is something else, ``True`` above all, or too small.
    """
    if "bool" not in str(getattr(value, "dtype", type(value).__name__)):
        with suppress(TypeError):
            number = operator.index(value)  # type: ignore[arg-type]
            if least is None or number >= least:
                return number
            raise ConfigError(f"{what} must be at least {least}, got {number}")
    raise ConfigError(f"{what} must be an int, got {value!r}")


def dtype_name(dtype: object) -> str:
    """The name of a dtype, such as ``"float32"``: of PyTorch's, numpy's, or a text."""
    return (dtype.__name__ if isinstance(dtype, type) else str(dtype)).removeprefix("torch.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Validated settings of one :class:`~sharded_ema.ShardedEMA`.

    Attributes:
        update_every: applied optimizer steps between two updates of the shadow.
        start_step: applied optimizer step at which averaging starts.
        decay_per: what a decay is of, ``"step"`` or ``"update"``.
        buffers: ``"copy"`` (as they are), ``"average"`` (floating ones) or ``"ignore"``; or one of
            these for each pattern of names.
        frozen: ``"save"`` stores frozen parameters in checkpoints, ``"skip"`` does not.
        nonfinite: ``"skip"`` elements, ``"raise"``, or ``"allow"``.
        total_steps: planned optimizer steps, for warnings; ``None`` if unknown.
        offload_buffer: bytes of a GPU that its parameters pass through to a shadow on the host.
        overlap: let a GPU update the average beside the next step: ``True``, ``False``, or
            ``"auto"`` where hooks say when weights change.
        capturable: whether updates may be recorded in a graph.
    """

    update_every: int
    start_step: int
    buffers: Buffers
    frozen: str
    nonfinite: str
    total_steps: int | None
    offload_buffer: int = OFFLOAD_BUFFER
    overlap: bool | str = False
    capturable: bool = False
    decay_per: str = "step"

    def __post_init__(self) -> None:
        for pattern, choice in buffer_rules(self.buffers):
            if choice not in _BUFFERS:
                of = "" if isinstance(self.buffers, str) else f" for {pattern!r}"
                raise ConfigError(
                    f"buffers must be one of {', '.join(_BUFFERS)}, or a dict with one of them for "
                    f"each pattern of names, got {choice!r}{of}"
                )
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ConfigError(
                    f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}"
                )
        for name in ("update_every", "start_step", "total_steps"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, as_whole(getattr(self, name), name))
        if type(self.overlap) is not bool and self.overlap != "auto":
            raise ConfigError(f"overlap must be 'auto', True or False, got {self.overlap!r}")
        if type(self.capturable) is not bool:
            raise ConfigError(f"capturable must be True or False, got {self.capturable!r}")
        for name, value in (("overlap", True), ("nonfinite", "raise")):
            if self.capturable and getattr(self, name) == value:
                raise ConfigError(
                    f"capturable=True does not go with {name}={value!r}, which takes the host at "
                    "every step"
                )
        if type(self.offload_buffer) is not int or self.offload_buffer < _LEAST_BUFFER:
            raise ConfigError(
                f"offload_buffer must be at least {_LEAST_BUFFER:,} bytes, "
                f"got {self.offload_buffer!r}"
            )
        if self.update_every < 1:
            raise ConfigError(f"update_every must be at least 1 step, got {self.update_every}")
        if self.start_step < 0:
            raise ConfigError(f"start_step must not be negative, got {self.start_step}")
        if self.total_steps is not None and self.total_steps < 1:
            raise ConfigError(f"total_steps must be at least 1, got {self.total_steps}")

    @property
    def buffers_text(self) -> str:
        """What becomes of buffers as a checkpoint says it: the word, or the dict as JSON."""
        if isinstance(self.buffers, str):
            return self.buffers
        return json.dumps(dict(self.buffers))


def buffer_rules(buffers: Buffers) -> tuple[tuple[str, str], ...]:
    """Patterns of names, each with what becomes of the buffers that it is the first to match.

    Raises:
        ConfigError: it is neither a word nor a dict of words by pattern, or the dict is empty.
    """
    if isinstance(buffers, str):
        return (("*", buffers),)
    if (
        not isinstance(buffers, Mapping)
        or not buffers
        or not all(isinstance(text, str) for pair in buffers.items() for text in pair)
    ):
        raise ConfigError(
            f"buffers must be one of {', '.join(_BUFFERS)}, or a dict with one of them for each "
            f'pattern of names, such as {{"*.running_*": "average", "*": "copy"}}, got {buffers!r}'
        )
    return tuple(buffers.items())
