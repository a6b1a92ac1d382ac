"""Settings of an average and what a checkpoint says of it (no torch)."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sharded_ema.averaging.schedules import Schedule, as_schedule
from sharded_ema.errors import CheckpointMismatchError, ConfigError

DEFAULT_PROFILE = "ema"

_PROFILE_NAME = re.compile(r"[A-Za-z0-9-][A-Za-z0-9_-]*")
_CHOICES = {
    "buffers": ("copy", "average", "ignore"),
    "frozen": ("save", "skip"),
    "nonfinite": ("skip", "raise", "allow"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Validated settings of one :class:`~sharded_ema.ShardedEMA`.

    Attributes:
        profiles: schedules by profile name.
        update_every: applied optimizer steps between two updates of the shadow.
        start_step: applied optimizer step at which averaging starts.
        buffers: ``"copy"`` (as they are), ``"average"`` (floating ones) or ``"ignore"``.
        frozen: ``"save"`` stores frozen parameters in checkpoints, ``"skip"`` does not.
        nonfinite: ``"skip"`` elements, ``"raise"``, or ``"allow"``.
        total_steps: planned optimizer steps, for warnings; ``None`` if unknown.
    """

    profiles: Mapping[str, Schedule]
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


def is_profile_name(name: str) -> bool:
    """Whether a profile may be called so: its name begins the keys of its tensors."""
    return bool(_PROFILE_NAME.fullmatch(name))


def as_profiles(
    schedule: float | str | Schedule | Mapping[str, float | str | Schedule],
) -> dict[str, Schedule]:
    """Profiles from what the user passed; a single schedule is named ``"ema"``.

    Raises:
        ConfigError: a name may not stand in a key, or a schedule is none.
    """
    if not isinstance(schedule, Mapping):
        return {DEFAULT_PROFILE: as_schedule(schedule)}
    if not schedule:
        raise ConfigError("at least one profile is needed, got an empty dict")
    for name in schedule:
        if not is_profile_name(name):
            raise ConfigError(
                f"profile name {name!r} must consist of letters, digits, '_' and '-' and must not "
                "begin with '_'"
            )
    return {name: as_schedule(value) for name, value in schedule.items()}


def as_patterns(patterns: str | Sequence[str] | None) -> tuple[str, ...] | None:
    """Name patterns as a tuple; one string is one pattern."""
    if patterns is None:
        return None
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


def check_schedules(meta: Mapping[str, Any], profiles: Mapping[str, Schedule]) -> None:
    """Refuse to continue an average under another schedule.

    Raises:
        CheckpointMismatchError: profiles or schedules differ from the checkpoint's.
    """
    stored = meta["profiles"]
    if set(stored) != set(profiles):
        raise CheckpointMismatchError(
            f"the checkpoint holds the profiles {sorted(stored)}, this average has "
            f"{sorted(profiles)}; use the same names, or load with strict=False"
        )
    for name, schedule in profiles.items():
        # Through JSON, as the stored one went, which has lists for tuples.
        if stored[name]["schedule"] != json.loads(json.dumps(schedule.to_dict())):
            raise CheckpointMismatchError(
                f"profile {name} was saved with the schedule {stored[name]['schedule']} and is "
                f"loaded with {schedule.to_dict()}; use the same schedule, or load with "
                "strict=False to continue under the new one"
            )
