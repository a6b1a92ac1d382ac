"""What a user sets of an average beside its schedules (no torch)."""

from __future__ import annotations

from dataclasses import dataclass

from sharded_ema.errors import ConfigError

DEFAULT_PROFILE = "ema"

_CHOICES = {
    "buffers": ("copy", "average", "ignore"),
    "frozen": ("save", "skip"),
    "nonfinite": ("skip", "raise", "allow"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Validated settings of one :class:`~sharded_ema.ShardedEMA`.

    Attributes:
        update_every: applied optimizer steps between two updates of the shadow.
        start_step: applied optimizer step at which averaging starts.
        buffers: ``"copy"`` (as they are), ``"average"`` (floating ones) or ``"ignore"``.
        frozen: ``"save"`` stores frozen parameters in checkpoints, ``"skip"`` does not.
        nonfinite: ``"skip"`` elements, ``"raise"``, or ``"allow"``.
        total_steps: planned optimizer steps, for warnings; ``None`` if unknown.
    """

    update_every: int
    start_step: int
    buffers: str
    frozen: str
    nonfinite: str
    total_steps: int | None

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ConfigError(
                    f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}"
                )
        for name in ("update_every", "start_step", "total_steps"):
            value = getattr(self, name)
            if value is not None and type(value) is not int:
                raise ConfigError(f"{name} counts optimizer steps, so it must be an int: {value!r}")
        if self.update_every < 1:
            raise ConfigError(f"update_every must be at least 1 step, got {self.update_every}")
        if self.start_step < 0:
            raise ConfigError(f"start_step must not be negative, got {self.start_step}")
        if self.total_steps is not None and self.total_steps < 1:
            raise ConfigError(f"total_steps must be at least 1, got {self.total_steps}")
