"""Ranks that come together in the job's store: each a thread here, on a store that is kept."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
import torch.distributed as dist

from sharded_ema.errors import AbsentRankError
from sharded_ema.model import meeting
from sharded_ema.model.meeting import Room

RANKS = [0, 2, 5]


def together(calls: Sequence[Callable[[], Any]]) -> list[Any]:
    """Results of calls that run at once, or what they raised."""
    found: list[Any] = [None] * len(calls)

    def work(index: int) -> None:
        try:
            found[index] = calls[index]()
        except BaseException as error:
            found[index] = error

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.fixture
def store() -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def client(store: dist.TCPStore) -> dist.TCPStore:
    """Another connection to a store, as each rank has one."""
    return dist.TCPStore("127.0.0.1", store.port, is_master=False, wait_for_workers=False)


def room(store: dist.TCPStore, rank: int, ranks: Sequence[int], timeout: float = 30.0) -> Room:
    connection = client(store)
    return Room(ranks, rank, timeout, lambda: connection)


def rooms(store: dist.TCPStore, ranks: Sequence[int] = RANKS, timeout: float = 30.0) -> list[Room]:
    return [room(store, rank, RANKS, timeout) for rank in ranks]


def gather(members: Sequence[Room], purpose: str = "it") -> list[Any]:
    """The words that rooms are told when all gather at once, or their errors."""
    return together([partial(member.gather, purpose) for member in members])


def test_all_get_one_word_that_is_new_each_time(store: dist.TCPStore) -> None:
    members = rooms(store)
    words = []
    for _ in range(3):
        told = gather(members)
        assert len(set(told)) == 1
        words.append(told[0])
    assert len(set(words)) == 3


def test_lives_on_a_kept_store_never_meet_their_ghosts(store: dist.TCPStore) -> None:
    """Each life leaves what it wrote, and one rank of it dies while the others wait."""
    for life in range(4):
        dead = RANKS[life % 3]
        alive = [rank for rank in RANKS if rank != dead]
        for answer in gather(rooms(store, alive, timeout=0.2)):
            assert isinstance(answer, AbsentRankError)
        told = gather(rooms(store))
        assert len(set(told)) == 1 and isinstance(told[0], str)


def test_who_is_missing_is_named(store: dist.TCPStore) -> None:
    first, third = gather(rooms(store, [0, 5], timeout=0.2), "ema.attach()")
    for error in (first, third):
        assert isinstance(error, AbsentRankError)
    assert "not every rank came to ema.attach() within 0.2 s (this is rank 0)" in str(first)
    assert "Ranks [2] are missing" in str(first)
    (alone,) = gather(rooms(store, [2], timeout=0.2))
    assert "Ranks [0] are missing" in str(alone)


def test_a_rank_that_came_too_late_is_met_at_the_next_try(store: dist.TCPStore) -> None:
    (failed,) = gather(rooms(store, [0], timeout=0.2))
    assert isinstance(failed, AbsentRankError)
    told = gather(rooms(store))
    assert len(set(told)) == 1


def test_a_group_that_one_rank_gives_up_is_broken_for_all(store: dist.TCPStore) -> None:
    members = rooms(store)
    gather(members)
    assert not any(member.is_broken() for member in members)
    members[1].break_up()
    assert all(member.is_broken() for member in members)


def test_late_are_those_that_have_not_come_to_the_last_collective(store: dist.TCPStore) -> None:
    members = rooms(store)
    gather(members)
    for member in members:
        with member.arriving("one"):
            pass
    with members[0].arriving("two"):
        assert members[0].late() == [2, 5]
        with members[2].arriving("two"):
            assert members[0].late() == [2]


def test_a_long_wait_says_once_for_whom(
    store: dist.TCPStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(meeting, "NOTICE_SECONDS", 0.05)
    monkeypatch.setattr(meeting, "_LOOK_SECONDS", 0.02)
    members = rooms(store, timeout=60.0)
    release = threading.Event()

    def late(member: Room) -> str:
        release.wait(30)
        return member.gather("ema.save()")

    def tell_then_release() -> None:
        while not caplog.records and not release.is_set():
            release.wait(0.01)
        release.set()

    told = together([
        lambda: members[0].gather("ema.save()"), lambda: late(members[1]),
        lambda: late(members[2]), tell_then_release,
    ])  # fmt: skip
    assert len(set(told[:3])) == 1
    (record,) = [r for r in caplog.records if r.name == "sharded_ema" and "rank 0" in r.message]
    assert "in ema.save() for ranks [2, 5]" in record.message


def test_what_a_rank_exchanges_does_not_grow_with_their_number() -> None:
    """The members are simulated: the store answers as if the others had done the same."""

    class Crowd(dist.Store):  # type: ignore[misc]
        def __init__(self, size: int) -> None:
            super().__init__()
            self.size, self.passed, self.calls = size, 0, 0
            self.real = dist.HashStore()

        def note(self, *passed: str | bytes) -> None:
            self.passed += sum(map(len, passed))
            self.calls += 1

        def set(self, key: str, value: str) -> None:
            self.note(key, value)
            self.real.set(key, value)

        def get(self, key: str) -> bytes:
            value: bytes = self.real.get(key)
            self.note(key, value)
            return value

        def check(self, keys: list[str]) -> bool:
            self.note(*keys)
            return True

    spent = []
    for size in (8, 4096):
        crowd = Crowd(size)
        Room(list(range(size)), 0, 30.0, lambda crowd=crowd: crowd).gather("it")  # type: ignore[misc]
        spent.append((crowd.passed, crowd.calls))
    assert spent[0] == spent[1]


def test_nobody_waits_for_a_word_that_is_taken_back(
    store: dist.TCPStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank sees that there is a word, and before it reads it the meeting is over."""
    monkeypatch.setattr(meeting, "_LOOK_SECONDS", 0.0)
    seen, over = threading.Event(), threading.Event()

    class Between(dist.Store):  # type: ignore[misc]
        def __init__(self, leads: bool) -> None:
            super().__init__()
            self.real, self.leads, self.answered = client(store), leads, False
            self.real.set_timeout(timedelta(seconds=5))

        def check(self, keys: list[str]) -> bool:
            if self.leads and keys[0].endswith("/full"):
                assert seen.wait(30)
            found = bool(self.real.check(keys))
            if found and self.answered and keys[0].endswith("/word"):
                seen.set()
                assert over.wait(30)
            return found

        def add(self, key: str, value: int) -> int:
            return int(self.real.add(key, value))

        def set(self, key: str, value: str) -> None:
            self.real.set(key, value)
            self.answered = not self.leads  # the last one to come says so

        def get(self, key: str) -> bytes:
            return bytes(self.real.get(key))

        def delete_key(self, key: str) -> bool:
            return bool(self.real.delete_key(key))

    def gather(rank: int) -> str:
        between = Between(leads=not rank)
        try:
            return Room([0, 1], rank, 30.0, lambda: between).gather("it")
        finally:
            if not rank:
                over.set()

    words = together([partial(gather, rank) for rank in (0, 1)])
    assert words[0] == words[1] and isinstance(words[0], str), words


def test_a_claim_is_the_first_ones(store: dist.TCPStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "get_world_size", lambda: 6)
    mine, other = rooms(store)[0], room(store, 1, [1, 3])
    assert mine.claim("runs/step_1") == RANKS
    assert other.claim("runs/step_1") == RANKS
    assert other.claim("runs/step_2") == [1, 3]
    assert mine.claim("runs/step_1") == RANKS
    monkeypatch.setattr(dist, "get_world_size", lambda: 5)  # another life of the job
    assert other.claim("runs/step_1") == [1, 3]
