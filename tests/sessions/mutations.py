"""Mistakes that somebody could make in the library, to be planted on the ranks of a session."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

from sharded_ema.averaging.average import Average
from sharded_ema.averaging.clock import Clock
from sharded_ema.averaging.schedules import Schedule
from sharded_ema.checkpoint import snapshot
from sharded_ema.model import agreement
from sharded_ema.model.sources import protocol
from sharded_ema.model.sources.fsdp2 import FSDP2Shards
from tests.sessions.players import Session, play


def window_of_one_step(self: Clock, schedule: Schedule) -> float:
    return schedule.decay(self.num_updates)


def restore_but_one(self: protocol.InPlace, backup: protocol.Backup) -> None:
    self.settle()
    for target, original in backup[:-1]:
        protocol.copy_into([target], [original])


def counters_stay(self: Clock, counters: dict[str, Any]) -> None:
    pass


def weights_for_averages(model: Any, average: Average) -> dict[str, Any]:
    values = model.reader.stored([t.detach().float().clone() for t in model.live()])
    return {
        f"{profile}.{shard.name.fqn}": value
        for profile in average.profiles
        for shard, value in zip(model.reader.shards, values, strict=True)
    }


def nothing(*args: Any, **kwargs: Any) -> None:
    pass


#: Mistakes by what becomes of them, as patches.
MUTATIONS: dict[str, Callable[[], Any]] = {
    "decays between two updates are not multiplied": lambda: patch.object(
        Clock, "window_decay", window_of_one_step
    ),
    "one tensor stays the average after a swap": lambda: patch.object(
        protocol.InPlace, "restore", restore_but_one
    ),
    "a load keeps the counters": lambda: patch.object(Clock, "go_on_from", counters_stay),
    "an interrupted update counts as whole": lambda: patch.object(
        Average, "_whole", lambda self, what: nullcontext()
    ),
    "a checkpoint holds the weights": lambda: patch.object(
        snapshot, "make_averages", weights_for_averages
    ),
    "what is gathered is swapped over": lambda: patch.object(FSDP2Shards, "settle", nothing),
    "the ranks are not compared": lambda: patch.object(agreement, "_refuse_differing", nothing),
}


def play_with(mistake: str, session: Session, folder: str) -> str | None:
    """Play a session with a mistake in the library."""
    with MUTATIONS[mistake]():
        return play(session, folder)
