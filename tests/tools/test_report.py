"""What --json prints follows the schema of the pages; the text fits on a screen."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from safetensors.numpy import save_file

from sharded_ema.cli import COMMANDS, main
from sharded_ema.tools.consolidate import consolidate
from sharded_ema.tools.report import Report, size
from tests.helpers.checkpoints import flip, make, meta, rows

DOCS = Path(__file__).parents[2] / "docs"
SCHEMA = json.loads((DOCS / "report.schema.json").read_text())
SCREEN = 24


def strict() -> dict[str, Any]:
    """The schema, in which what it does not name is an error."""
    schema = deepcopy(SCHEMA)
    pending = [schema]
    while pending:
        part = pending.pop()
        if "properties" in part and "if" not in part:
            free = "type" in part["properties"].keys() & part.get("required", [])  # schedules
            part.setdefault("additionalProperties", free)
        pending += [inner for inner in part.values() if isinstance(inner, dict)]
        pending += [i for v in part.values() if isinstance(v, list) for i in v if type(i) is dict]
    for case in schema["allOf"]:
        for part in (case["if"], case["then"]):
            part["additionalProperties"] = True
    return schema


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints with a power-function average each, raw weights, a damaged one, an export."""
    folder = tmp_path_factory.mktemp("reports")
    schedule = {"type": "Power", "gamma": 6.94, "sigma_rel": None}
    profiles = {"ema": {"schedule": schedule, "decay": 0.9, "seed_weight": 0.0}}
    for step in (100, 200):
        said = meta(profiles=profiles, step=step, num_updates=step, last_lerp_step=step,
                    aliases={"w": ["tied"]}, sampled_distance={"ema": 0.25})  # fmt: skip
        tensors = {"ema.w": np.full((60, 50), step, "f4"), "_frozen.f": np.ones(5, "f4")}
        make(folder / f"run/step_{step}", tensors, rows(3), metas={"": said}, uuid=f"{step:032x}")
    save_file({"w": np.zeros((60, 50), "f4")}, folder / "raw.safetensors")
    make(folder / "damaged", {"ema.w": np.ones(30, "f4")})
    flip(folder / "damaged" / "shard-00000.safetensors", 4096)
    consolidate(folder / "run/step_100", folder / "export", dtype="float16", progress=False)
    return folder


#: Arguments by exit status; directories are those of the fixture, OUT is a new one.
CASES: tuple[tuple[int, str], ...] = (
    (0, "inspect run"),
    (0, "inspect run/step_100 --tensors"),
    (0, "inspect raw.safetensors"),
    (0, "verify run/step_100 --model raw.safetensors"),
    (1, "verify damaged"),
    (0, "verify export"),
    (0, "diff run/step_100 run/step_100 --tensors"),
    (1, "diff run/step_100 run/step_200"),
    (1, "diff run/step_100 raw.safetensors"),
    (0, "consolidate run/step_100 OUT --no-progress"),
    (0, "consolidate run/step_100 OUT --plan --max-shard-size 5kB"),
    (1, "consolidate damaged OUT --no-progress"),
    (2, "consolidate nothing OUT"),
    (2, "consolidate run/step_100 OUT --jobs many"),
    (2, "average run/step_100 nothing --out OUT"),
    (0, "average run/step_100 run/step_200 --out OUT --no-progress"),
    (0, "synthesize run --sigma-rel 0.1 --out OUT --no-progress --max-residual 9"),
    (0, "watch run --out OUT --once"),
    (0, "advise --steps 3000 --batch 20 --unit tokens"),
    (1, "advise --steps 30 --decay 0.9999"),
    (0, "env"),
)


@pytest.mark.parametrize(("status", "line"), CASES, ids=[line for _, line in CASES])
def test_reports_fit_the_schema(
    run: Path,
    tmp_path: Path,
    status: int,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(run)
    arguments = [str(tmp_path / "out") if word == "OUT" else word for word in line.split()]
    try:
        ended = main([*arguments, "--json"])
    except SystemExit as exit:
        ended = int(exit.code or 0)
    captured = capsys.readouterr()
    assert ended == status
    told = captured.out.splitlines() if arguments[0] == "watch" else [captured.out]
    for report in map(json.loads, told):
        jsonschema.validate(report, strict())
        assert report["action"] == arguments[0] and report["ok"] == (status == 0)
        assert not list(prose(report["facts"])), "numbers stand in fields of their own"
        assert bool(report["error"]) == ("error: " in captured.err)
        if report["error"]:
            assert report["error"]["exit_status"] == status


def prose(value: object) -> Iterator[str]:
    """Texts with a number and a unit in them."""
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from prose(inner)
    elif isinstance(value, str) and re.search(r"\d (tensors|bytes|files|steps|[kMGT]?B)\b", value):
        yield value


def test_every_command_is_in_the_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    named = {case["if"]["properties"]["action"]["const"] for case in SCHEMA["allOf"]}
    assert named == set(COMMANDS) == {line.split()[0] for _, line in CASES}


@pytest.mark.parametrize(
    "change",
    [
        lambda report: report.pop("schema"),
        lambda report: report["facts"].update(bytes="12 bytes"),
        lambda report: report["facts"].update(elsewhere=1),
        lambda report: report.update(elsewhere=1),
    ],
)
def test_the_schema_can_refuse(change: Callable[[dict[str, Any]], object]) -> None:
    report = Report("inspect", "x", facts={"bytes": 12}).to_dict()
    jsonschema.validate(report, strict())
    change(report)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(report, strict())


def test_the_page_is_up_to_date() -> None:
    spec = importlib.util.spec_from_file_location("reports", DOCS / "reports.py")
    assert spec is not None and spec.loader is not None
    reports = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reports)
    page = (DOCS / "reports.md").read_text()
    assert reports.updated(page) == page, "run python docs/reports.py"
    assert "`averages[].profiles[].decay`" in page and "`error.message`" in page


# ---------------------------------------------------------------------- text


def test_sizes_have_units() -> None:
    shown = {0: "0 B", 999: "999 B", 1000: "1 kB", 26_843_545_600: "26.8 GB", 10**12: "1 TB"}
    assert {number: size(number) for number in shown} == shown
    text = Report("inspect", "x", facts={"num_bytes": 5_000_000, "tensors": 5_000_000}).text()
    assert "num bytes: 5 MB" in text and "tensors:   5,000,000" in text


def test_columns_are_aligned() -> None:
    rows = [
        {"name": "a", "bytes": 7, "latest": True},
        {"name": "long", "bytes": 7_000_000, "latest": False},
    ]
    head, first, second = Report("inspect", "x", facts={"rows": rows}).text().splitlines()[2:]
    assert head.split() == ["name", "bytes", "latest"]
    assert first.endswith("  7 B  latest") and second.endswith(" 7 MB")
    assert first.index("7 B") + 3 == second.index("7 MB") + 4 == head.index("bytes") + 5


def test_a_screen_whatever_there_is_to_say() -> None:
    report = Report("verify", "x", verdict="no damage was found")
    report.facts |= {
        "checkpoints": [{"name": f"step_{i}", "step": i} for i in range(500)],
        "by_tensor": {f"layer.{i}.weight": i / 7 for i in range(500)},
    }
    for i in range(500):
        report.fail(f"file-{i} is damaged")
    lines = report.text().splitlines()
    assert len(lines) <= 2 * SCREEN and lines[-1] == "FAILED: 500 checks did not pass"
    for name in ("step_0", "step_499", "file-0", "file-499", "... 490 more"):
        assert any(name in line for line in lines)


def test_few_rows_with_much_in_them_are_turned() -> None:
    rows = [{f"a_rather_long_name_{i}": i * k for i in range(9)} for k in (1, 10)]
    lines = Report("inspect", "x", facts={"rows": rows}).text().splitlines()[2:]
    assert len(lines) == 9 and lines[8].split() == ["a", "rather", "long", "name", "8", "8", "80"]
    assert len({line.rindex("  ") for line in lines}) == 1


def test_an_average_is_told_on_a_screen(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for line in ("inspect run", "inspect run/step_100", "verify run/step_100"):
        command, path = line.split()
        assert main([command, str(run / path)]) == 0
        assert len(capsys.readouterr().out.splitlines()) < 40


def test_what_was_asked_for_is_whole() -> None:
    facts = {"list": [{"name": f"layer.{i}", "bytes": i} for i in range(500)]}
    assert len(Report("inspect", "x", facts=facts).text().splitlines()) > 500


def test_names_stay_on_their_lines() -> None:
    facts = {"list": [{"name": "a\nok: all is well", "bytes": 1}], "layouts": {"b\nc": 1}}
    text = Report("inspect", "x", facts=facts).text()
    assert "\\nok: all" in text and "\nok" not in text and "b\\nc" in text
