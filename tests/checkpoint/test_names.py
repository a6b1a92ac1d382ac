"""Names on disk: what is made is recognised, and what is only like it is not removed."""

from __future__ import annotations

from pathlib import Path
from uuid import uuid4

import pytest

from sharded_ema.checkpoint import names

PLACE = Path("run/step_100")


def test_marks_are_recognised_and_taken_off() -> None:
    temporary, aside = names.temporary(PLACE), names.set_aside(PLACE)
    assert names.is_temporary(temporary.name) and not names.is_set_aside(temporary.name)
    assert names.is_set_aside(aside.name) and not names.is_temporary(aside.name)
    for marked in (temporary, aside):
        assert marked.parent == PLACE.parent and names.is_marked(marked.name)
        assert names.without_mark(marked.name) == PLACE.name
    both = names.temporary(aside)
    assert names.is_temporary(both.name) and names.without_mark(both.name) == aside.name
    assert names.temporary(PLACE, "0" * 32).name == f"step_100.tmp-{'0' * 32}"


def test_digits_tell_whose_a_name_is() -> None:
    marked = [names.temporary(PLACE), names.set_aside(PLACE), names.doomed(names.temporary(PLACE))]
    for path, mark in zip(marked, (".tmp-", ".old-", ".tmp-dead-"), strict=True):
        parsed = names.parse_marked(path.name)
        assert parsed is not None
        assert (parsed.name, parsed.mark, parsed.is_own) == (PLACE.name, mark, True)
        assert names.is_marked(path.name)
    for _ in range(100):
        stranger = names.parse_marked(f"data.tmp-{uuid4().hex}")
        assert stranger is not None and not stranger.is_own
    assert names.new_uuid("0" * 32) == names.new_uuid("0" * 24 + "12345678")


@pytest.mark.parametrize(
    ("name", "unread"),
    [
        ("step_100", False),
        ("step_100.tmp", False),
        ("step_100.old-1", False),
        (f"step_100.tmp-{'g' * 32}", False),
        (f"step_100.tmp-{'0' * 32}.bak", False),
        ("step_100.tmp-123", True),
        (f"step_100.tmp-{'0' * 31}", True),
        (f"step_100.tmp-{'0' * 33}", True),
    ],
)
def test_what_is_like_a_mark_may_not_be_read_and_is_never_removed(name: str, unread: bool) -> None:
    assert not names.is_temporary(name) and not names.is_set_aside(name)
    assert names.looks_temporary(name) == names.is_marked(name) == unread
    assert names.without_mark(name) == name


def test_parts_of_a_checkpoint() -> None:
    ours = ["manifest.json", "chunks.safetensors", names.shard_name(0), names.shard_name(123456)]
    theirs = [".metadata", ".metadata.tmp", "__0_0.distcp", "__12_3.distcp"]
    assert all(map(names.is_part, [*ours, *theirs]))
    others = ["model.safetensors", "shard-0-model-1-of-1.safetensors", "latest", "notes.txt"]
    assert not any(map(names.is_part, others))


def test_exports_of_one_checkpoint() -> None:
    assert names.without_number(names.numbered("step_1", 12)) == "step_1"
    assert names.without_number("step_1") == "step_1"
