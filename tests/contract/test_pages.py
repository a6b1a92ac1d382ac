"""The pages: errors have their place, symptoms are what is said, programs run as they stand."""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from sharded_ema.errors import EMAWarning, error_classes

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
TROUBLESHOOTING = (DOCS / "troubleshooting.md").read_text()


def module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = found  # as dataclasses want it
    spec.loader.exec_module(found)
    return found


def test_the_index_of_errors_is_complete() -> None:
    errors = module(DOCS / "errors.py")
    assert errors.updated(TROUBLESHOOTING) == TROUBLESHOOTING, "run python docs/errors.py"
    for name in [*error_classes(), EMAWarning.__name__]:
        assert f"`{name}`" in errors.index()
        assert name in errors._SECTIONS or f"\n### {name}\n" in TROUBLESHOOTING, name


def test_the_pictures_are_up_to_date() -> None:
    for name, make in module(DOCS / "figures.py").FIGURES.items():
        assert (DOCS / name).read_text() == make().draw(), "run python docs/figures.py"
        assert f"]({name})" in (DOCS / "concepts.md").read_text()


def texts() -> str:
    """All that the library may say, with a blank for what is filled in."""
    found = []
    for path in (ROOT / "sharded_ema").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [v.value if isinstance(v, ast.Constant) else " " for v in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def symptoms() -> Iterator[str]:
    """What the page quotes: first cells of its tables, and the sentences after "Symptom:"."""
    for line in TROUBLESHOOTING.partition("## No error, but")[0].splitlines():
        if line.startswith("| `"):
            yield from re.findall(r"`([^`]+)`", line.split(" | ")[0])
    for told in re.findall(r"Symptom: (.*?)Cause:", TROUBLESHOOTING, flags=re.DOTALL):
        yield from re.findall(r"`([^`]+)`", " ".join(told.split()))


def test_symptoms_are_what_the_library_says() -> None:
    """Of each quotation some three words in a row are in a message, so that one finds it."""
    said, quoted = texts(), list(symptoms())
    strange = [quote for quote in quoted if not any(run in said for run in runs(quote, 3))]
    assert len(quoted) > 150 and not strange


def runs(quote: str, length: int) -> list[str]:
    """So many words in a row; all where there are fewer between what is filled in."""
    found = []
    for part in re.split(r"\.\.\.|\b[MNPS]\b%?|'[^']*'|\d+|_meta|manifest\.json", quote):
        words = part.split()
        found += [" ".join(words[i : i + length]) for i in range(max(1, len(words) - length + 1))]
    return [run for run in found if run.strip(" ,;:")]


def test_links_between_pages_lead_to_headings() -> None:
    for page in DOCS.glob("*.md"):
        for target, anchor in re.findall(r"\]\((\w+\.md)?(?:#([\w-]+))?\)", page.read_text()):
            other = DOCS / target if target else page
            assert other.is_file(), f"{page.name}: {target}"
            if anchor:
                assert anchor in headings(other.read_text()), f"{page.name}: {target}#{anchor}"


def headings(text: str) -> set[str]:
    """Anchors as MyST makes them."""
    titles = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_every_page_is_in_the_contents() -> None:
    index = (DOCS / "index.md").read_text()
    listed = [
        name
        for block in re.findall(r"```\{toctree\}(.*?)```", index, re.S)
        for name in block.split()
    ]
    pages = {page.stem for page in DOCS.glob("*.md")} - {"index"}
    assert pages == {name for name in listed if not name.startswith(":")} & pages


COMPARED = ("raw", "average")


@pytest.mark.dist
@pytest.mark.slow
def test_the_programs_of_the_pages_twice(shell: Callable[[str], str], work: Path) -> None:
    """In the order of the pages, as their first lines say, in one directory; then once more.

    What the tutorial shows of their output is what they print.
    """
    programs = []
    for name in ("tutorial.md", "resume.md", "stacks.md", "handing-out.md", "teachers.md"):
        for text in re.findall(r"```python\n(.*?)```", (DOCS / name).read_text(), re.S):
            head = re.match(r"# (\w+)\.py(?:: (.*\.py))?(?:, .*)?\n", text)
            if head is None:
                continue
            (work / f"{head[1]}.py").write_text(text)
            programs.append(head[2] or f"python {head[1]}.py")
    assert len(programs) >= 5
    said = "".join(shell(f"{command}\n") for command in programs)
    for command in programs:
        if ".save" in (work / command.split()[-1]).read_text():  # and so finds what it has left
            shell(f"{command}\n")
    commands = re.findall(r"```sh\n(.*?)```", (DOCS / "tutorial.md").read_text(), re.S)
    said += shell("".join(commands))
    shown = re.findall(r"```text\n(.*?)```", (DOCS / "tutorial.md").read_text(), re.S)
    lines = "".join(shown).splitlines()
    assert len(lines) > 15 and not [line for line in lines if not printed(line, said)]
    raw, average = (float(re.findall(rf"^{what} +(\S+)$", said, re.M)[0]) for what in COMPARED)
    assert raw > 1.5 * average, "half the error, as the page says"


def printed(line: str, said: str) -> bool:
    """Whether a line, in which ``...`` stands for anything, is one of those that were printed.

    Ranks print at the same time, so that a line of one may begin in that of another.
    """
    pattern = ".*".join(map(re.escape, line.split("...")))
    pattern = pattern if line.startswith("rank ") else f"^{pattern}$"
    return re.search(pattern, said, re.MULTILINE) is not None


def test_a_line_that_was_not_printed_is_told() -> None:
    assert printed("raw  0.0...", "a\nraw  0.01\nb")
    assert not printed("raw  0.0...", "a\nraw  0.11\nb") and not printed("raw", "raw  0.01")
    assert printed("rank 1 keeps 2 bytes", "rank 0 keeps 1 bytesrank 1 keeps 2 bytes\n\n")
