"""The README as a newcomer takes it: its script and commands run, its links lead somewhere."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers import support

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def scripts() -> list[tuple[str, str, str]]:
    """Of each Python block that is a program: its file, how to run it, and its text."""
    found = []
    for text in blocks("python"):
        head = re.match(r"# (\w+\.py): (.*)\n", text)
        assert head is not None, "a block of README that says how it is run"
        found.append((*head.groups(), text))
    return found


@pytest.mark.dist
def test_programs_and_commands_twice(shell: Callable[[str], str], work: Path) -> None:
    """As a newcomer who runs everything, and then everything again."""
    (commands,) = [block for block in blocks("sh") if "sharded-ema inspect" in block]
    for file, _, text in scripts():
        (work / file).write_text(text)
    for _ in range(2):
        for _, command, _ in scripts():
            said = shell(f"{command}\n")
            raw, average = map(float, re.findall(r"(?:raw|average) +([0-9.]+)", said))
            assert average < raw / 3, "the average wins, and clearly"
        shell(commands)
    for exported in ("out", "served/latest"):
        assert (work / exported / "model.safetensors").is_file()


def test_the_first_screen() -> None:
    """What it is, the plot, how to install it, and a program of a few lines, in this order."""
    title, sentence, plot, install, program, *_ = README.split("\n\n")
    assert title == "# sharded-ema" and sentence.count(".") == 1
    assert plot.startswith("![") and "pip install sharded-ema" in install
    assert program.startswith("```python")
    first = scripts()[0][2]
    assert len([line for line in first.splitlines() if line and not line.startswith("#")]) <= 20


def test_the_two_commands_exist() -> None:
    (block,) = [block for block in blocks("sh") if block.startswith("make train ")]
    makefile = (ROOT / "Makefile").read_text()
    for line, name in zip(block.splitlines(), ("train", "test"), strict=True):
        assert line.startswith(f"make {name} ")
        assert re.search(rf"^{name}:", makefile, flags=re.MULTILINE)
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def test_what_was_not_run_is_said_once() -> None:
    assert len(re.findall(r"not (?:been )?run", README, flags=re.IGNORECASE)) == 1


#: Rows of the comparison by the names in launch/bench/peers.py.
PEERS = {
    "sharded-ema": "**sharded-ema**",
    "torch AveragedModel": "`AveragedModel`",
    "timm ModelEmaV3": "`ModelEmaV3`",
    "diffusers EMAModel": "`EMAModel`",
    "torch_ema": "`torch_ema`",
    "ema-pytorch EMA": "`ema-pytorch`",
    "lightning EMAWeightAveraging": "Lightning `EMAWeightAveraging`",
}


@pytest.mark.parametrize("peer", PEERS)
def test_the_comparison_is_what_was_measured(peer: str) -> None:
    """With launch/bench/peers.py, whose last results lie in docs/benchmarks."""
    (row,) = [line for line in README.splitlines() if line.startswith(f"| {PEERS[peer]}")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    of_each = last("peers.csv", "library", peer)["FSDP2, of each rank"].partition(" | ")[0]
    taken = last("peers-update.csv", "row", peer)["ratio_to_baseline"]
    expected = (
        "1/R"
        if of_each.endswith(" bytes")
        else "ends the process"
        if of_each.startswith("SystemExit")
        else "refused: deepcopy"
    )
    assert cells[1].startswith(expected)
    assert cells[-1].startswith(f"{float(taken):.1f} x")


def last(table: str, column: str, value: str) -> dict[str, str]:
    with (ROOT / "docs" / "benchmarks" / table).open(newline="") as stream:
        return [row for row in csv.DictReader(stream) if row[column] == value][-1]


def test_links_lead_to_files() -> None:
    for page in (
        README,
        (ROOT / "CONTRIBUTING.md").read_text(),
        (ROOT / "CHANGELOG.md").read_text(),
    ):
        for target in re.findall(r"\]\(([^)#]+)\)", page):
            if not target.startswith("http"):
                assert (ROOT / target).exists(), target


def test_the_tables_are_those_of_the_tests() -> None:
    listed = [mode for row in support.ROWS for mode in row.modes]
    assert sorted(listed) == sorted(support.worlds()), "every mode belongs to one row"
    assert support.table() in README, "bring it up to date: python -m tests.helpers.support"
    assert support.shares() in README, "bring it up to date: python -m tests.helpers.support"
