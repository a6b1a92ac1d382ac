"""Writes the tables of docs/reports.md from the schema of reports: ``python docs/reports.py``.

A test fails when the page is not up to date, and another when a report does not fit the schema.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PAGE = Path(__file__).with_name("reports.md")
SCHEMA = json.loads(Path(__file__).with_name("report.schema.json").read_text())
BEGIN, END = "<!-- begin fields: python docs/reports.py -->\n", "<!-- end fields -->\n"


def fields(thing: dict[str, Any], above: str = "") -> Iterator[tuple[str, str, str]]:
    """Path, type and meaning of every field below an object, a list or a map."""
    thing = resolved(thing)
    for name, inner in thing.get("properties", {}).items():
        path = f"{above}.{name}" if above else name
        yield path, kind(inner), resolved(inner).get("description", "")
        for part in (inner, *inner.get("oneOf", [])):
            yield from fields(part, path)
    if isinstance(thing.get("additionalProperties"), dict):
        yield from fields(thing["additionalProperties"], f"{above}.NAME")
    if "items" in thing:
        yield from fields(thing["items"], f"{above}[]")


def resolved(thing: dict[str, Any]) -> dict[str, Any]:
    """A part of the schema in place of a reference to it."""
    if "$ref" not in thing:
        return thing
    return {**SCHEMA["$defs"][thing["$ref"].rpartition("/")[2]], **thing}


def kind(thing: dict[str, Any]) -> str:
    """The type of a value, in words."""
    thing = resolved(thing)
    if "oneOf" in thing:
        return " or ".join(map(kind, thing["oneOf"]))
    if "const" in thing or "enum" in thing:
        return " or ".join(f"`{json.dumps(v)}`" for v in thing.get("enum", [thing.get("const")]))
    if thing["type"] == "array":
        return f"list of {kind(thing['items'])}"
    if isinstance(thing.get("additionalProperties"), dict):
        return f"object of {kind(thing['additionalProperties'])} by name"
    types = thing["type"] if isinstance(thing["type"], list) else [thing["type"]]
    return " or ".join(types)


def table(thing: dict[str, Any]) -> list[str]:
    """Every field of an object in Markdown."""
    rows = [f"| `{path}` | {kind} | {text} |" for path, kind, text in fields(thing)]
    return ["| field | type | meaning |", "|---|---|---|", *rows, ""]


def tables() -> str:
    """The fields that all reports have, and the facts of each command."""
    lines = ["## Of every command", "", *table(SCHEMA)]
    for case in SCHEMA["allOf"]:
        command = case["if"]["properties"]["action"]["const"]
        facts = case["then"]["properties"]["facts"]
        lines += [f"## Facts of {command}", "", *table(facts)]
    return BEGIN + "".join(f"{line}\n" for line in lines) + END


def updated(text: str) -> str:
    """The page with the tables as they should be."""
    before, _, rest = text.partition(BEGIN)
    return before + tables() + rest.partition(END)[2]


if __name__ == "__main__":
    PAGE.write_text(updated(PAGE.read_text()))
