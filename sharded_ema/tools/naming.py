"""Output names: substitutions as those of sed, and which names are wanted."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TypeVar

from sharded_ema.errors import CheckpointMismatchError, ConfigError

Value = TypeVar("Value")


def parse_substitution(text: str) -> Callable[[str], str]:
    """A function from ``s/PATTERN/REPLACEMENT/``, or with ``g`` at its end for every occurrence.

    Pattern and replacement are those of :mod:`re`. Any other mark may stand for the slash; with a
    backslash before it, it is meant as such.

    Raises:
        ConfigError: it is none.
    """
    mark = text[1:2]
    if text[:1] != "s" or not mark or mark.isalnum() or mark in "\\ ":
        raise ConfigError(f"rename must be such as 's/^model\\.//', got {text!r}")
    parts = re.split(rf"(?<!\\){re.escape(mark)}", text[2:])
    if len(parts) != 3 or parts[2] not in ("", "g"):
        raise ConfigError(f"rename must be such as 's/^model\\.//', got {text!r}")
    pattern, replacement = (part.replace(f"\\{mark}", mark) for part in parts[:2])
    try:
        compiled = re.compile(pattern)
        compiled.sub(replacement, "")
    except (re.error, IndexError) as error:
        raise ConfigError(f"rename {text!r}: {error}") from None
    count = 0 if parts[2] else 1
    return lambda name: compiled.sub(replacement, name, count=count)


class Renaming:
    """Substitutions, one after the other.

    Args:
        expressions: texts for :func:`parse_substitution`.

    Raises:
        ConfigError: one of them is none.
    """

    def __init__(self, expressions: Sequence[str]) -> None:
        self._steps = {text: parse_substitution(text) for text in expressions}
        self._unused = set(self._steps)

    def __call__(self, name: str) -> str:
        """The new name."""
        for text, step in self._steps.items():
            new = step(name)
            if new != name:
                self._unused.discard(text)
            name = new
        return name

    def check_used(self) -> None:
        """Refuse what has changed no name so far.

        Raises:
            CheckpointMismatchError: there is such.
        """
        for text in self._steps:
            if text in self._unused:
                raise CheckpointMismatchError(f"rename {text!r} changes no name")


def rename_all(pairs: Iterable[tuple[str, Value]], rename: Renaming) -> dict[str, Value]:
    """Values by their new names.

    Raises:
        CheckpointMismatchError: two of them would have one name, or one none.
    """
    found: dict[str, Value] = {}
    origin: dict[str, str] = {}
    for old, value in pairs:
        new = rename(old)
        if not new or new in found:
            both = f"{origin[new]!r} and {old!r}" if new else f"{old!r}"
            raise CheckpointMismatchError(f"rename would name {both} {new!r}")
        found[new], origin[new] = value, old
    return found


def select(
    named: Mapping[str, Value], include: Sequence[str], exclude: Sequence[str]
) -> dict[str, Value]:
    """Those whose name fits a pattern of ``include``, if there is any, and none of ``exclude``.

    Args:
        include, exclude: shell patterns, in which ``*`` also stands for dots.

    Raises:
        CheckpointMismatchError: a pattern fits no name, or nothing is left.
    """
    for option, patterns in (("include", include), ("exclude", exclude)):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in named):
                raise CheckpointMismatchError(
                    f"{option} {pattern!r} fits no tensor; names are such as {next(iter(named))!r}"
                )
    kept = {
        name: value
        for name, value in named.items()
        if (not include or any(fnmatchcase(name, pattern) for pattern in include))
        and not any(fnmatchcase(name, pattern) for pattern in exclude)
    }
    if not kept:
        raise CheckpointMismatchError("include and exclude leave no tensor to write")
    return kept
