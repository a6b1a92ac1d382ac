"""Writes the index of all named errors into docs/troubleshooting.md: ``python docs/errors.py``.

Each class of :mod:`sharded_ema.errors` is listed under the class that it is a kind of, with what
its docstring says of it and a link to its section. A test fails when the page is not up to date,
and another when a class has no section.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from pathlib import Path

PAGE = Path(__file__).with_name("troubleshooting.md")
sys.path.insert(0, str(PAGE.parents[1]))

from sharded_ema.errors import EMAError, EMAWarning  # noqa: E402

BEGIN, END = "<!-- begin index: python docs/errors.py -->\n", "<!-- end index -->\n"
# Sections that are not named as the class: those of whole groups.
_SECTIONS = {"EMAError": "", "CheckpointError": "checkpoints", "EMAWarning": "warnings"}


def classes(cls: type[Exception] = EMAError, depth: int = 0) -> Iterator[tuple[type, int]]:
    """The tree of errors in the order of their definition, with their depth in it."""
    yield cls, depth
    for sub in cls.__subclasses__():
        if sub.__module__ == cls.__module__:
            yield from classes(sub, depth + 1)


def index() -> str:
    """The index in Markdown."""
    lines = ["| error | when |", "|---|---|"]
    for cls, depth in [*classes(), (EMAWarning, 0)]:
        name = cls.__name__
        section = _SECTIONS.get(name, name.lower())
        shown = f"[`{name}`](#{section})" if section else f"`{name}`"
        doc = inspect.getdoc(cls) or ""
        what = " ".join(doc.split("\n\n")[0].split()).replace("``", "`")
        lines.append(f"| {'&nbsp;&nbsp;' * depth}{shown} | {what} |")
    return BEGIN + "".join(f"{line}\n" for line in lines) + END


def updated(text: str) -> str:
    """The page with the index as it should be."""
    before, _, rest = text.partition(BEGIN)
    return before + index() + rest.partition(END)[2]


if __name__ == "__main__":
    PAGE.write_text(updated(PAGE.read_text()))
