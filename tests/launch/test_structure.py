"""How the training program hangs together, and that it uses the library as anyone could."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter

import pytest

from tests.launch.programs import LAUNCH

FILES = {
    ".".join(path.relative_to(LAUNCH).with_suffix("").parts).removesuffix(".__init__"): path
    for path in [*LAUNCH.glob("*.py"), *(LAUNCH / "training").rglob("*.py")]
}
# What the program takes of the library beside its public names.
PRIVATE = {
    ("training.flags", "sharded_ema.averaging.schedules", "parse_schedule"),
    ("training.display", "sharded_ema.averaging.schedules", "horizon"),
}


def imports(source: str) -> set[tuple[str, str]]:
    """Modules and the names taken of them."""
    return {
        (node.module or "", alias.name)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


def graph(sources: dict[str, str]) -> dict[str, set[str]]:
    """Which file imports which."""
    found = {}
    for name, source in sources.items():
        taken = {(m, f"{m}.{thing}") for m, thing in imports(source)}
        found[name] = {whole if whole in sources else module for module, whole in taken}
    return {name: {m for m in modules if m in sources} for name, modules in found.items()}


def test_imports_make_no_circle() -> None:
    sources = {name: path.read_text() for name, path in FILES.items()}
    order = list(TopologicalSorter(graph(sources)).static_order())
    assert len(order) == len(FILES) > 15
    with pytest.raises(CycleError):
        sources["training.options"] += "from training.flags import parse_options\n"
        TopologicalSorter(graph(sources)).prepare()


def test_what_is_only_shown_is_not_needed_to_run() -> None:
    users = graph({name: path.read_text() for name, path in FILES.items()})
    for shown in ("training.display", "training.plotting"):
        found = {name for name, used in users.items() if shown in used}
        assert found <= {"train", "sweep_sigma", "compare_runs"}


def test_the_library_is_used_by_its_public_names() -> None:
    found = {
        (name, module, thing)
        for name, path in FILES.items()
        for module, thing in imports(path.read_text())
        if module.startswith("sharded_ema.")
    }
    assert found == PRIVATE
