"""Draws the pictures of docs/concepts.md: ``python docs/figures.py``.

Each is a sequence: a column for each party, time going down, boxes for what one does, arrows for
what goes over, and bars across columns for what all of them must come to.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from html import escape
from pathlib import Path

DOCS = Path(__file__).parent
COLUMN, ROW, TOP, GAP = 190, 46, 56, 14
STYLE = """text { font: 12px sans-serif; fill: #1f2328; }
.party { font-weight: bold; font-size: 13px; }
.box { fill: #ffffff; stroke: #57606a; }
.all { fill: #ddf4ff; stroke: #0969da; }
.never { fill: #dafbe1; stroke: #1a7f37; }
line { stroke: #57606a; } .life { stroke: #d0d7de; }"""


@dataclass
class Figure:
    """One picture.

    Attributes:
        parties: names of the columns.
        parts: the SVG elements so far.
        row: how many rows are taken.
    """

    parties: tuple[str, ...]
    parts: list[str] = field(default_factory=list)
    row: int = 0

    def does(self, what: dict[int, str], kind: str = "box") -> Figure:
        """What parties do at the same time, each in its column; ``|`` parts two lines."""
        for column, text in what.items():
            self._box(column, column, text, kind)
        self.row += 1
        return self

    def all(self, text: str, first: int = 0, last: int = -1) -> Figure:
        """What a row of parties does together: none goes on before all have come."""
        self._box(first, last % len(self.parties), text, "all")
        self.row += 1
        return self

    def sends(self, source: int, target: int, text: str) -> Figure:
        """What goes from one party to another."""
        y, start, stop = self._y() + ROW - 12, self._middle(source), self._middle(target)
        self.parts.append(
            f'<line x1="{start}" y1="{y}" x2="{stop}" y2="{y}" marker-end="url(#head)"/>'
        )
        middle = f'x="{(start + stop) // 2}" y="{y - 6}" text-anchor="middle"'
        self.parts.append(f"<text {middle}>{escape(text)}</text>")
        self.row += 1
        return self

    def draw(self) -> str:
        """The SVG."""
        width, height = COLUMN * len(self.parties), TOP + ROW * self.row + 10
        lines = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'width="{width}" height="{height}">',
            f"<style>{STYLE}</style>",
            '<defs><marker id="head" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8" '
            'markerHeight="8" orient="auto"><path d="M0 0 L8 4 L0 8 z" fill="#57606a"/></marker>'
            "</defs>",
            f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        ]
        for column, name in enumerate(self.parties):
            x = self._middle(column)
            lines.append(f'<text class="party" x="{x}" y="28" text-anchor="middle">{name}</text>')
            lines.append(
                f'<line class="life" x1="{x}" y1="{TOP - 16}" x2="{x}" y2="{height - 8}"/>'
            )
        return "\n".join([*lines, *self.parts, "</svg>\n"])

    def _box(self, first: int, last: int, text: str, kind: str) -> None:
        x, width = first * COLUMN + GAP // 2, (last - first + 1) * COLUMN - GAP
        y = self._y()
        self.parts.append(
            f'<rect class="{kind}" x="{x}" y="{y}" width="{width}" height="{ROW - 8}" rx="4"/>'
        )
        lines = text.split("|")
        for number, line in enumerate(lines):
            at = y + 23 + 15 * number - (8 if len(lines) > 1 else 0)
            self.parts.append(
                f'<text x="{x + width // 2}" y="{at}" text-anchor="middle">{escape(line)}</text>'
            )

    def _y(self) -> int:
        return TOP + ROW * self.row

    def _middle(self, column: int) -> int:
        return column * COLUMN + COLUMN // 2


def life() -> Figure:
    """A shard from the optimizer's step to ``from_pretrained``."""
    figure = Figure(("rank 0", "rank 1", "storage", "anywhere, no torch"))
    step = "optimizer.step()|changes its shard"
    figure.does({0: step, 1: step})
    moved = "shadow = d shadow +|(1 - d) shard"
    figure.does({0: moved, 1: moved}, "never")
    figure.all("ema.save(): the ranks agree on what each writes", 0, 1)
    figure.sends(0, 2, "shard-00000.safetensors")
    figure.sends(1, 2, "shard-00001.safetensors")
    figure.sends(0, 2, "manifest.json, rename")
    figure.sends(2, 3, "blocks of 4 MiB, digests checked")
    figure.does({3: "sharded-ema consolidate|export/model.safetensors"})
    return figure.does({3: "from_pretrained(export)"})


def swap() -> Figure:
    """Who waits for whom in a swap."""
    figure = Figure(("FSDP2, each rank", "DDP, rank 0", "DDP, rank 1"))
    figure.does(dict.fromkeys(range(3), "with ema.swap():|the model is brought to rest"))
    figure.does({0: "keep the shard,|copy the shadow in"}, "never")
    figure.row -= 1
    figure.all("one gather: each has kept half of the average", 1, 2)
    figure.does({1: "keep the weights,|copy the average in", 2: "keep the weights,|copy it in"})
    figure.does({0: "evaluate: a forward|communicates", 1: "evaluate(model.module)", 2: "leave"})
    leave = "weights back, bit for bit;|waits for nobody"
    return figure.does(dict.fromkeys(range(3), leave), "never")


def save() -> Figure:
    """A save on four ranks."""
    figure = Figure(("rank 0", "rank 1", "rank 2", "rank 3"))
    figure.all("agree: path, step, counters, settings; who has what (a verdict is raised on all)")
    figure.all("what each rank could write, to rank 0")
    figure.does({0: "make x.tmp-<uuid>,|hold it"})
    figure.all("which rank writes which block, to every rank")
    written = "write its shard,|hash, fsync"
    figure.does(dict.fromkeys(range(4), written))
    figure.all("sizes and digests to rank 0")
    figure.does({0: "is all there? chunks,|manifest.json, fsync"})
    figure.does({0: "rename to x: committed"})
    figure.all("the result, or one error of the first rank that failed")
    return figure.does({0: "latest, keep_last"})


FIGURES = {"life.svg": life, "swap.svg": swap, "save.svg": save}

if __name__ == "__main__":
    for name, make in FIGURES.items():
        (DOCS / name).write_text(make().draw())
