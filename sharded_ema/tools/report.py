"""What the tools say: the same facts as text for people and as a dict for programs."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(slots=True)
class Report:
    """The result of one tool.

    Attributes:
        action: the name of the tool.
        path: what it was about.
        ok: whether every check passed.
        verdict: what is true if it is ok, as the last line of the text says it; empty for tools
            that check nothing.
        facts: results by name; JSON types only.
        problems: what failed, one sentence each.
        notes: what a user should know although nothing failed.
    """

    action: str
    path: str
    ok: bool = True
    facts: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    verdict: str = ""

    def fail(self, problem: str) -> None:
        """Record a failed check."""
        self.ok = False
        self.problems.append(problem)

    def to_dict(self) -> dict[str, Any]:
        """All fields, for ``--json``."""
        return asdict(self)

    def _count(self) -> str:
        count = len(self.problems)
        return f"{count} checks did not pass" if count != 1 else "a check did not pass"

    def text(self) -> str:
        """A few readable lines."""
        lines = [f"{self.action} {self.path}"]
        for name, value in self.facts.items():
            lines += _lines(name.replace("_", " "), value, indent=2)
        lines += [f"  note: {note}" for note in self.notes]
        lines += [f"  FAILED: {problem}" for problem in self.problems]
        if self.verdict:
            lines.append(f"ok: {self.verdict}" if self.ok else f"FAILED: {self._count()}")
        return "\n".join(map(printable, lines))


def printable(text: str) -> str:
    """A text on one line, as names from a checkpoint may not be.

    What a terminal takes for a command, or for the end of a line, is written as an escape.
    """
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _lines(name: str, value: Any, *, indent: int) -> list[str]:
    space = " " * indent
    if isinstance(value, dict) and value:
        return [f"{space}{name}:"] + [
            line for key, inner in value.items() for line in _lines(key, inner, indent=indent + 2)
        ]
    if isinstance(value, list) and value:
        return [f"{space}{name}:"] + [f"{space}  {_inline(item)}" for item in value]
    size = f" ({_size(value)})" if name.endswith("bytes") and _is_large(value) else ""
    return [f"{space}{name}: {'none' if value in ([], {}) else _shown(value)}{size}"]


def _is_large(value: Any) -> bool:
    return isinstance(value, int) and value >= 10_000


def _size(num_bytes: int) -> str:
    """In decimal units, as file systems and ``--max-shard-size`` count.

    >>> _size(26_843_545_600)
    '26.8 GB'
    """
    value, unit = float(num_bytes), "B"
    for unit in ("kB", "MB", "GB", "TB", "PB"):  # noqa: B007
        value /= 1000
        if value < 999.5:
            break
    return f"{value:.3g} {unit}"


def _inline(item: Any) -> str:
    """An element of a list on one line; a yes stands for itself, a no for nothing."""
    if not isinstance(item, dict):
        return str(item)
    (_, name), *rest = item.items()
    shown = [k if v is True else f"{k} {_shown(v)}" for k, v in rest if v is not False]
    return f"{name}: {', '.join(shown)}"


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, float):
        return f"{value:,.6g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
