"""Draws docs/architecture.svg: the wings of the library and who imports whom, from the imports.

``python docs/diagram.py`` writes the picture; a test fails when it is not up to date. A wing is
drawn above all that it imports. The number at an arrow counts the names that modules of one wing
import from the other.
"""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path
from typing import NamedTuple
from xml.sax.saxutils import escape

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "sharded_ema"
PICTURE = ROOT / "docs" / "architecture.svg"


class Wing(NamedTuple):
    """A part of the library.

    Attributes:
        name: a folder or a module of the package.
        says: what it is for.
    """

    name: str
    says: str


#: From the top to the ground; wings of one row never import each other.
ROWS: tuple[tuple[Wing, ...], ...] = (
    (Wing("cli", "the command"),),
    (Wing("integrations", "a file for each training stack that people already have"),),
    (
        Wing("ema", "the face: ShardedEMA holds the parts below"),
        Wing("tools", "open, find the average, plan, write, publish (no torch)"),
    ),
    (
        Wing(
            "checkpoint",
            "what lies on disk: names, reading (no torch), writing, removal, store",
        ),
    ),
    (Wing("averaging", "when and how far: schedules, clock, shadow, kernels, health"),),
    (Wing("model", "whose shards: geometry, inventory, frameworks, steps, agreement of ranks"),),
    (Wing("config", "what a user sets"),),
    (Wing("errors", "one tree of named errors"), Wing("version", "one number")),
)
#: Rows that all others stand on; arrows to them would only be a tangle.
GROUND = 2

WIDTH, MARGIN, GAP, LINE = 980, 16, 44, 17
INK, PAPER, BOX, ROOM, ARROW = "#1f2933", "#ffffff", "#eef3f8", "#ffffff", "#5b7083"
# Beside the wings runs a lane for each arrow that passes other wings: room for them on either side.
LEFT, RIGHT = 84, 104


def modules() -> dict[str, Path]:
    """All modules by their dotted names below the package."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts != ("__init__",) and parts != ("__main__",):
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path) -> list[tuple[str, str]]:
    """What a module takes from others of the package: dotted names below it, and the name taken."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sharded_ema"):
            module = (node.module or "").removeprefix("sharded_ema").removeprefix(".")
            found += [(module or alias.name, alias.name) for alias in node.names]
    return found


def arrows() -> Counter[tuple[str, str]]:
    """How many names one wing imports from another."""
    found: Counter[tuple[str, str]] = Counter()
    for name, path in modules().items():
        home = name.partition(".")[0]
        for module, _ in imports(path):
            there = module.partition(".")[0]
            if there != home:
                found[home, there] += 1
    return found


def rooms(wing: str) -> list[tuple[str, list[str]]]:
    """The folders in a wing with their files; its own files come first, under an empty name."""
    own: list[str] = []
    inner: dict[str, list[str]] = {}
    for name, path in modules().items():
        first, *rest = name.split(".")
        if first != wing or not rest:
            continue
        if len(rest) > 1:
            inner.setdefault(rest[0], []).append(rest[-1])
        elif path.name == "__init__.py":
            inner.setdefault(rest[0], [])
        else:
            own.append(rest[0])
    return ([("", own)] if own else []) + sorted(inner.items())


def draw() -> str:
    """The picture as SVG."""
    places: dict[str, tuple[float, float, float, float]] = {}
    shapes: list[str] = []
    y = float(MARGIN)
    for row in ROWS:
        width = (WIDTH - LEFT - RIGHT - GAP / 2 * (len(row) - 1)) / len(row)
        lefts = [LEFT + i * (width + GAP / 2) for i in range(len(row))]
        drawn = [_wing(wing, x, y, width) for wing, x in zip(row, lefts, strict=True)]
        height = max(h for _, h in drawn)
        for wing, x, (inside, _) in zip(row, lefts, drawn, strict=True):
            shapes.append(_box(x, y, width, height, BOX, ARROW))
            shapes += inside
            places[wing.name] = (x, y, width, height)
        y += height + GAP
    height = y - GAP + MARGIN
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" '
            'font-family="system-ui, sans-serif" font-size="13" role="img">',
            "<title>The wings of sharded_ema and what they import</title>",
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
            'markerHeight="7" orient="auto">'
            f'<path d="M0 0L8 4L0 8z" fill="{ARROW}"/></marker></defs>',
            f'<rect width="{WIDTH}" height="{height:.0f}" fill="{PAPER}"/>',
            *shapes,
            *_lines(places),
            "</svg>\n",
        ]
    )


def _wing(wing: Wing, x: float, y: float, width: float) -> tuple[list[str], float]:
    """The inside of a wing, and its height."""
    found = [_text(x + 12, y + 22, wing.name, weight="600", size=15)]
    top = y + 22
    for line in _wrapped(wing.says, width - 24):
        top += LINE
        found.append(_text(x + 12, top, line, fill=ARROW))
    top += 10
    inside = rooms(wing.name)
    if not inside:
        return found, top - y + 2
    room_width = (width - 24 - 10 * (len(inside) - 1)) / len(inside)
    bottom = top
    for i, (name, files) in enumerate(inside):
        left = x + 12 + i * (room_width + 10)
        lines = _wrapped(", ".join(files), room_width - 16)
        tall = 14 + LINE * (len(lines) + bool(name))
        found.append(_box(left, top, room_width, tall, ROOM, "#c5d1dc"))
        line_y = top + 4
        if name:
            line_y += LINE
            found.append(_text(left + 8, line_y, f"{name}/", weight="600"))
        for line in lines:
            line_y += LINE
            found.append(_text(left + 8, line_y, line))
        bottom = max(bottom, top + tall)
    return found, bottom - y + 12


def _lines(places: dict[str, tuple[float, float, float, float]]) -> list[str]:
    """The arrows: straight to the row below, by a lane at the side past other rows."""
    order = {wing.name: number for number, row in enumerate(ROWS) for wing in row}
    ground = {wing.name for row in ROWS[-GROUND:] for wing in row}
    found = []
    lanes = {"left": 0, "right": 0}
    for (home, there), count in sorted(arrows().items(), key=lambda a: (order[a[0][0]], a[0][1])):
        if there in ground:
            continue
        x, y, width, height = places[home]
        x2, y2, width2, _ = places[there]
        if order[there] - order[home] == 1:
            middle = max(x, x2) + min(width, width2) / 2
            found.append(_path(f"M{middle:.0f} {y + height:.0f}V{y2 - 2:.0f}"))
            found.append(_text(middle + 6, (y + height + y2) / 2 + 5, str(count), fill=ARROW))
            continue
        side = "left" if x + width < x2 + width2 else "right"
        lanes[side] += 1
        lane = lanes[side]
        start, end = y + 14 + lane * 6, y2 + 10 + lane * 9
        if side == "left":
            at, label, begin, stop = LEFT - 8 - lane * 20, -18, x, x2 - 2
        else:
            at, label, begin, stop = WIDTH - RIGHT + 8 + lane * 20, 3, x + width, x2 + width2 + 2
        found.append(_path(f"M{begin:.0f} {start:.0f}H{at:.0f}V{end:.0f}H{stop:.0f}"))
        found.append(_text(at + label, start - 4, str(count), fill=ARROW))
    return found


def _wrapped(text: str, width: float) -> list[str]:
    lines: list[str] = []
    for word in text.split(" "):
        # The mean width of a character of this size.
        if lines and (len(lines[-1]) + 1 + len(word)) * 6.7 <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines if text else []


def _box(x: float, y: float, width: float, height: float, fill: str, stroke: str) -> str:
    return (
        f'<rect x="{x:.0f}" y="{y:.0f}" width="{width:.0f}" height="{height:.0f}" rx="6" '
        f'fill="{fill}" stroke="{stroke}"/>'
    )


def _text(
    x: float, y: float, text: str, *, fill: str = INK, weight: str = "400", size: int = 13
) -> str:
    return (
        f'<text x="{x:.0f}" y="{y:.0f}" fill="{fill}" font-weight="{weight}" '
        f'font-size="{size}">{escape(text)}</text>'
    )


def _path(route: str) -> str:
    return (
        f'<path d="{route}" fill="none" stroke="{ARROW}" stroke-width="1.4" '
        'marker-end="url(#tip)"/>'
    )


if __name__ == "__main__":
    PICTURE.write_text(draw())
