"""What the tools say: the same facts as text for people and as a dict for programs.

The dict is described in docs/reports.schema.json. The text is at most a screen: of what is long it
shows the beginning and the end, and what takes one line stands on one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

#: What a program finds out first: a key that goes, or means something else, raises the number.
SCHEMA = {"name": "sharded-ema.report", "version": 1}

# What a flag has asked for is shown whole.
_ASKED_FOR = "list"
# Rows of anything else that is long, and problems.
_ROWS = 10
# Characters of what stands on one line beside its name, and of a row of a table.
_LINE = 84
_TABLE = 120
# Names longer than that do not move what stands beside the others.
_NAMES = 36


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
        error: why there is no result, if so: ``class``, ``message`` and ``exit_status``.
    """

    action: str
    path: str
    ok: bool = True
    facts: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    verdict: str = ""
    error: dict[str, Any] | None = None

    @classmethod
    def of_error(cls, action: str, path: str, error: str, message: str, status: int) -> Report:
        """The report of a tool that has ended with an error.

        Args:
            error: its class.
            status: what the command ends with.
        """
        said = {"class": error, "message": message, "exit_status": status}
        return cls(action, path, ok=False, error=said)

    def fail(self, problem: str) -> None:
        """Record a failed check."""
        self.ok = False
        self.problems.append(problem)

    def to_dict(self) -> dict[str, Any]:
        """All of it, for ``--json``."""
        return {
            "schema": dict(SCHEMA),
            "action": self.action,
            "path": self.path,
            "ok": self.ok,
            "verdict": self._judgement(),
            "facts": self.facts,
            "problems": self.problems,
            "notes": self.notes,
            "error": self.error,
        }

    def _judgement(self) -> str:
        if self.error is not None:
            return f"FAILED: {self.error['message']}"
        if not self.ok:
            count = len(self.problems)
            return f"FAILED: {count} checks did not pass" if count != 1 else _ONE_FAILED
        return f"ok: {self.verdict}" if self.verdict else ""

    def text(self) -> str:
        """A few readable lines; the last one is the verdict."""
        lines = [f"{self.action} {self.path}", *_block(self.facts, 2)]
        lines += [f"  note: {note}" for note in self.notes]
        lines += _shortened([f"  FAILED: {problem}" for problem in self.problems], "  ")
        lines.append(self._judgement())
        return "\n".join(printable(line) for line in lines if line)


_ONE_FAILED = "FAILED: a check did not pass"


def printable(text: str) -> str:
    """A text on one line, as names from a checkpoint may not be.

    What a terminal takes for a command, or for the end of a line, is written as an escape.
    """
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def size(num_bytes: int) -> str:
    """In decimal units, as file systems and ``--max-shard-size`` count.

    >>> size(26_843_545_600)
    '26.8 GB'
    """
    value, unit = float(num_bytes), "B"
    for larger in ("kB", "MB", "GB", "TB", "PB"):
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    return f"{value:.3g} {unit}"


# ---------------------------------------------------------------------- blocks


def _block(values: Mapping[str, Any], indent: int) -> list[str]:
    """A line for each value, or several; what is empty is left out."""
    space = " " * indent
    short = {name: _on_one_line(name, value) for name, value in values.items()}
    labels = [name for name, line in short.items() if line is not None and len(name) <= _NAMES]
    width = max(map(len, labels), default=0) + 1
    lines = []
    for name, value in values.items():
        label, line = f"{name.replace('_', ' ')}:", short[name]
        if line is not None:
            lines.append(f"{space}{label:<{width}} {line}")
        elif value:
            lines += [f"{space}{label}", *_on_several(name, value, indent + 2)]
    return lines


def _on_one_line(name: str, value: Any) -> str | None:
    """A value as it stands beside its name; ``None`` if it is empty or takes several lines."""
    if not isinstance(value, dict | list):
        return _shown(name, value)
    if not value:
        return None
    if isinstance(value, dict):
        if "type" in value:
            return _as_call(value)
        if not all(_is_flat(inner) for inner in value.values()):
            return None
        line = ", ".join(
            f"{key.replace('_', ' ')} {_shown(key, inner)}"
            for key, inner in value.items()
            if inner != []
        )
    elif not all(_is_flat(item) for item in value):
        return None
    else:
        line = ", ".join(_shown(name, item) for item in value)
    return line if len(line) <= _LINE else None


def _on_several(name: str, value: Any, indent: int) -> list[str]:
    space = " " * indent
    if isinstance(value, dict):
        return _shortened(_block(value, indent), space)
    if not all(isinstance(item, dict) for item in value):
        return _shortened([f"{space}{_shown(name, item)}" for item in value], space)
    if all(map(_is_row, value)):
        head, *rows = _table(value)
        if name == _ASKED_FOR or max(map(len, (head, *rows))) <= _TABLE:
            rows = rows if name == _ASKED_FOR else _shortened(rows, "")
            return [f"{space}{row}" for row in (head, *rows)]
    return [line for item in value for line in _item(item, indent)]


def _item(item: Mapping[str, Any], indent: int) -> list[str]:
    """An element of a list on several lines, of which the first has a dash."""
    lines = _block(item, indent + 2)
    return [f"{' ' * indent}- {lines[0].strip()}", *lines[1:]] if lines else []


def _shortened(lines: Sequence[str], space: str) -> list[str]:
    """The first and the last ones of many lines."""
    if len(lines) <= _ROWS:
        return list(lines)
    half = _ROWS // 2
    left = len(lines) - 2 * half
    return [*lines[:half], f"{space}... {left:,} more (--json has them all)", *lines[-half:]]


# ---------------------------------------------------------------------- tables


def _table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line of names and one for each row; a yes stands for itself, a no for nothing."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = []
    for name in names:
        values = [row.get(name) for row in rows]
        cells = [_cell(name, value) for value in values]
        wide = max(len(name), *map(len, cells))
        right = all(_is_number(value) or value is None for value in values)
        title = name.replace("_", " ")
        columns.append([c.rjust(wide) if right else c.ljust(wide) for c in (title, *cells)])
    return ["  ".join(cells).rstrip() for cells in zip(*columns, strict=True)]


def _cell(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return name.replace("_", " ") if value else ""
    return printable(_as_call(value) if isinstance(value, dict) else _shown(name, value))


def _is_row(item: Mapping[str, Any]) -> bool:
    return all(_is_flat(v) or (isinstance(v, dict) and "type" in v) for v in item.values())


def _is_flat(value: Any) -> bool:
    """Whether it is a scalar, or a list of such."""
    if isinstance(value, list):
        return not any(isinstance(item, dict | list) for item in value)
    return not isinstance(value, dict)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


# ---------------------------------------------------------------------- values


def _as_call(value: Mapping[str, Any]) -> str:
    """What has a type, such as a schedule, as one would write it in Python."""
    said = _pairs((name, inner) for name, inner in value.items() if name != "type")
    return f"{value['type']}({said})"


def _pairs(values: Iterable[tuple[str, Any]]) -> str:
    return ", ".join(
        f"{name}={value:.6g}" if isinstance(value, float) else f"{name}={value}"
        for name, value in values
        if value is not None
    )


def _shown(name: str, value: Any) -> str:
    match value:
        case None:
            return "none"
        case bool() | str():
            return str(value)
        case float():
            return f"{value:,.6g}"
        case int():
            return size(value) if name.endswith("bytes") else f"{value:,}"
    return str(value)
