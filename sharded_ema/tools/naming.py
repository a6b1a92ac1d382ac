"""Output names: those of an adapter, substitutions as those of sed, and which names are wanted."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TypeVar

from sharded_ema.checkpoint.reading.opened import StoredTensor
from sharded_ema.errors import CheckpointMismatchError, ConfigError
from sharded_ema.tools.contents import Average

Value = TypeVar("Value")

# In training a parameter's name has the adapter's in it, as in
# ``base_model.model.q_proj.lora_A.default.weight``. PEFT's files leave it out, because whoever
# loads one chooses a name.
_ADAPTER_PREFIX = "base_model.model."
_WRAPPED = ".modules_to_save."


def adapter_tensors(average: Average, adapter: str | None) -> dict[str, StoredTensor]:
    """The tensors of one adapter by the names that PEFT gives them in a file.

    Args:
        adapter: its name in training; ``None`` if there was only one.

    Raises:
        CheckpointMismatchError: the average has no such adapter, or several and none was chosen.
    """
    known = average.meta.get("adapters", [])
    if adapter is None and len(known) == 1:
        adapter = known[0]
    if adapter not in known:
        raise CheckpointMismatchError(
            f"the average was made of a model with the adapters {known}, and "
            f"{'none was chosen' if adapter is None else f'{adapter!r} is not one of them'}; pass "
            "adapter (--adapter)"
        )
    found = {}
    for name, tensor in average.tensors.items():
        path = name.split(".")
        if adapter not in path:
            continue
        path.remove(adapter)
        bare = ".".join(path).replace(_WRAPPED, ".")
        # Models that hold adapters without a PeftModel around them have no such prefix.
        found[bare if bare.startswith(_ADAPTER_PREFIX) else _ADAPTER_PREFIX + bare] = tensor
    return found


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
