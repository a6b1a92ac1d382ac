"""The public names, signatures and flags as a text: changing it is a decision, no accident."""

from __future__ import annotations

import argparse
import inspect
import re
from fnmatch import fnmatch
from pathlib import Path

import pytest

import sharded_ema
from sharded_ema import cli

SNAPSHOT = Path(__file__).with_name("public.txt")
DOCS = Path(__file__).parents[2] / "docs"


def describe() -> str:
    lines = []
    for name in sorted(sharded_ema.__all__):
        thing = getattr(sharded_ema, name)
        if inspect.isclass(thing):
            lines.append(f"class {name}{_signature(thing)}")
            for attribute in sorted(dir(thing)):
                member = inspect.getattr_static(thing, attribute)
                if attribute.startswith("_") or attribute in dir(Exception):
                    continue
                if isinstance(member, property):
                    lines.append(f"  {attribute}: property")
                elif callable(getattr(thing, attribute)):
                    lines.append(f"  {attribute}{_signature(getattr(thing, attribute))}")
        elif callable(thing):
            lines.append(f"def {name}{_signature(thing)}")
    parser = cli.build_parser()
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command, sub in action.choices.items():
                flags = [" ".join(a.option_strings) or a.dest for a in sub._actions]
                lines.append(f"sharded-ema {command}: {', '.join(flags)}")
    return "\n".join(lines) + "\n"


def _signature(thing: object) -> str:
    try:
        text = str(inspect.signature(thing))  # type: ignore[arg-type]
    except ValueError:
        return ""
    text = re.sub(r"Optional\[([\w.]+)\]", r"\1 | None", text)  # as PyTorch wrote it once
    return re.sub(r" at 0x[0-9a-f]+", "", text)


def test_public_api_is_as_agreed() -> None:
    current = describe()
    assert current == SNAPSHOT.read_text(), (
        "the public API changed; if that is meant, note it in CHANGELOG.md and write the text "
        f"below to {SNAPSHOT.name}:\n{current}"
    )


def test_every_public_name_is_documented() -> None:
    text = (DOCS / "api.md").read_text()
    missing = [n for n in sharded_ema.__all__ if n not in text]
    assert not missing


def test_every_public_callable_has_a_docstring() -> None:
    for name in sharded_ema.__all__:
        thing = getattr(sharded_ema, name)
        if inspect.isclass(thing) or callable(thing):
            assert inspect.getdoc(thing), name
            for attribute, member in vars(thing).items() if inspect.isclass(thing) else ():
                if not attribute.startswith("_") and callable(member):
                    assert inspect.getdoc(member), f"{name}.{attribute}"


def test_unknown_names_are_attribute_errors() -> None:
    assert not hasattr(sharded_ema, "ShardedEMAs")
    assert set(sharded_ema.__all__) <= set(dir(sharded_ema))


def test_every_folder_of_tests_is_collected(pytestconfig: pytest.Config) -> None:
    skipped = pytestconfig.getini("norecursedirs")
    folders = [p for p in Path(__file__).parents[1].iterdir() if (p / "__init__.py").exists()]
    wings = {"model", "averaging", "checkpoint", "tools"}
    assert {p.name for p in folders} >= wings | {"launch", "gpu", "contract", "helpers"}
    assert not [p.name for p in folders if any(fnmatch(p.name, s) for s in skipped)]
