"""Ranks that come together in the job's store, before and between collectives.

A process group that only some ranks begin to make breaks the making of all later ones in the whole
job, so nobody begins before all are here. The store may be an old one: a launcher keeps its own
while workers are started again, with all that earlier lives have written. So a key proves nothing;
here the first rank answers for its life with a fresh word, and only who meets under that word is
there. Each rank exchanges a handful of short keys with the store, whatever the number of ranks.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from logging import getLogger
from uuid import uuid4

import torch.distributed as dist
import xxhash

from sharded_ema.errors import AbsentRankError
from sharded_ema.model.internals.pytorch import default_store

logger = getLogger("sharded_ema")

#: Seconds of waiting after which is said, once, for whom.
NOTICE_SECONDS = 5.0
# What the first rank gives out when it invites nobody.
_NO_WORD = "none"
# Seconds after which a rank that waits looks whether the first one has begun anew.
_LOOK_SECONDS = 1.0
# Seconds between two questions of a rank to the store, at most; more where many ranks ask.
_POLL_SECONDS = 0.05
_POLLS_PER_SECOND = 20_000


class Room:
    """Where the ranks of one model meet.

    Args:
        ranks: global ranks, ascending.
        rank: this one.
        timeout: seconds to wait for one of them.
        store: gives the store of the job, which another process group may have made anew.
    """

    def __init__(
        self,
        ranks: Sequence[int],
        rank: int,
        timeout: float,
        store: Callable[[], dist.Store] = default_store,
    ) -> None:
        self._ranks = list(ranks)
        self._rank = rank
        self._store = store
        self._timeout = timeout
        names = ",".join(map(str, self._ranks))
        self._key = f"sharded_ema/{xxhash.xxh3_64_hexdigest(names.encode())}"
        self._word = ""
        self._came = 0

    def gather(self, purpose: str) -> str:
        """Wait for all ranks; returns a word that only they know, and that no one has used before.

        Raises:
            AbsentRankError: some did not come in time, or the store is gone.
        """
        with _reaching_the_store(purpose):
            waiting = _Waiting(purpose, self._rank, len(self._ranks), self._timeout)
            lead = self._rank == self._ranks[0]
            self._word = self._invite(waiting) if lead else self._follow(waiting)
            self._came = 0
            return self._word

    def claim(self, name: str) -> list[int]:
        """Say that these ranks write something; first come, first served, for the job's life.

        Returns:
            The ranks whose it is: these, or those that came before.
        """
        # Another number of ranks is another life of the job, whose claims nobody keeps.
        key = f"sharded_ema/{dist.get_world_size()}/{xxhash.xxh3_64_hexdigest(name.encode())}"
        mine = json.dumps(self._ranks)
        with _reaching_the_store(f"the claim to {name}"):
            return list(json.loads(self._store().compare_set(key, "", mine)))

    def is_broken(self) -> bool:
        """Whether a rank has given up on the group that was made under the last word."""
        with _reaching_the_store("a look at the group of the ranks"):
            return not self._word or bool(self._store().check([self._at("broken")]))

    def break_up(self) -> None:
        """Tell the others that the group which was made under the last word is of no more use."""
        if self._word:
            # Whoever finds no store will know as well; without a process group there is none.
            with suppress(RuntimeError, ValueError):
                self._store().set(self._at("broken"), "1")
            self._word = ""

    @contextmanager
    def arriving(self, purpose: str) -> Iterator[None]:
        """Note that this rank has come to a collective, and tell whom it waits for if that is long.

        Raises:
            AbsentRankError: the store is gone.
        """
        self._came += 1
        with _reaching_the_store(purpose):
            self._store().set(self._at(f"at/{self._rank}"), str(self._came))
        timer = threading.Timer(NOTICE_SECONDS, self._tell, (purpose,))
        timer.daemon = True
        with suppress(RuntimeError):  # no thread starts while the interpreter ends
            timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def late(self) -> list[int]:
        """Ranks that have not come to the last collective that this one came to."""
        store, found = self._store(), []
        for rank in self._ranks:
            key = self._at(f"at/{rank}")
            if not store.check([key]) or int(store.get(key)) < self._came:
                found.append(rank)
        return found

    def _tell(self, purpose: str) -> None:
        with suppress(RuntimeError):
            _tell_of_waiting(purpose, self._rank, self.late())

    def _at(self, name: str) -> str:
        return f"{self._key}/{self._word}/{name}"

    # ------------------------------------------------------------------ coming together

    def _invite(self, waiting: _Waiting) -> str:
        """The first rank's part: give out a word, and wait until all have answered to it."""
        store, word = self._store(), uuid4().hex
        store.set(f"{self._key}/word", word)
        try:
            while not store.check([f"{self._key}/{word}/full"]):
                waiting.go_on(partial(self._missing, store, word))
        finally:
            # Not deleted: who has just seen that the key is there would wait for it to come back.
            store.set(f"{self._key}/word", _NO_WORD)
        store.set(f"{self._key}/{word}/go", "1")
        return word

    def _follow(self, waiting: _Waiting) -> str:
        """Another rank's part: answer to the word, and wait until all have."""
        store, word, stale = self._store(), "", ""
        try:
            while not (word and store.check([f"{self._key}/{word}/go"])):
                # After an answer once in a while only: the first rank may have begun anew.
                given = self._given(store) if not word or waiting.is_time_to_look() else ""
                if given not in ("", word, stale):
                    word, stale = (given, stale) if self._answer(store, given) else ("", given)
                waiting.go_on(partial(self._missing, store, word))
        except BaseException:
            if word:
                with suppress(RuntimeError):
                    self._take_back(store, word)
            raise
        return word

    def _given(self, store: dist.Store) -> str:
        """The word that was last given out; empty if none was, or it has been taken back."""
        key = f"{self._key}/word"
        word = store.get(key).decode() if store.check([key]) else _NO_WORD
        return "" if word == _NO_WORD else word

    def _answer(self, store: dist.Store, word: str) -> bool:
        """Come to the meeting of a word; false if this rank's own ghost has been there."""
        if store.add(f"{self._key}/{word}/{self._rank}", 1) > 1:
            return False
        if store.add(f"{self._key}/{word}/count", 1) == len(self._ranks) - 1:
            store.set(f"{self._key}/{word}/full", "1")
        return True

    def _take_back(self, store: dist.Store, word: str) -> None:
        """Give up before all have come: nobody must count on this rank."""
        store.add(f"{self._key}/{word}/{self._rank}", -1)
        store.add(f"{self._key}/{word}/count", -1)

    def _missing(self, store: dist.Store, word: str) -> list[int]:
        """Who has not answered to a word; without one, the first rank."""
        others = self._ranks[1:] if word else []
        found = [rank for rank in others if not store.check([f"{self._key}/{word}/{rank}"])]
        return found or self._ranks[:1]  # all have answered, and the first one does not go on


class _Waiting:
    """One wait for other ranks: how long still, and who was missing.

    It asks the store again and again, at longer and longer intervals. The store could be waited
    for, but reports every such wait that ends early on stderr, and one that does not end early
    would not notice that the first rank has begun anew.

    Args:
        purpose: for messages.
        rank: this one.
        size: how many ranks ask the store at the same time.
        timeout: seconds until it is too long.
    """

    def __init__(self, purpose: str, rank: int, size: int, timeout: float) -> None:
        self._purpose = purpose
        self._rank = rank
        self._timeout = timeout
        self._longest = max(_POLL_SECONDS, size / _POLLS_PER_SECOND)
        self._pause = 0.001
        self._began = self._looked = time.monotonic()
        self._told = False

    def is_time_to_look(self) -> bool:
        """Whether it is some time since this was true."""
        now = time.monotonic()
        due = now - self._looked >= _LOOK_SECONDS
        if due:
            self._looked = now
        return due

    def go_on(self, missing: Callable[[], list[int]]) -> None:
        """Pause. Say for whom it waits if that is long, and end the wait if it is too long.

        Args:
            missing: who has not come.

        Raises:
            AbsentRankError: see above.
        """
        waited = time.monotonic() - self._began
        if waited >= self._timeout:
            raise AbsentRankError(absence(self._purpose, self._rank, self._timeout, missing()))
        if waited >= NOTICE_SECONDS and not self._told:
            self._told = True
            _tell_of_waiting(self._purpose, self._rank, missing())
        time.sleep(min(self._pause, self._timeout - waited))
        self._pause = min(2 * self._pause, self._longest)


@contextmanager
def _reaching_the_store(purpose: str) -> Iterator[None]:
    try:
        yield
    except dist.DistNetworkError as error:
        raise AbsentRankError(
            f"the store of the job cannot be reached any more in {purpose}: the process that keeps "
            f"it, rank 0 or the launcher, is gone ({str(error).strip().splitlines()[0]})"
        ) from error


def _tell_of_waiting(purpose: str, rank: int, ranks: Sequence[int]) -> None:
    if ranks:
        logger.warning(
            "rank %d has waited %g s in %s for ranks %s, which have not come yet; all ranks must "
            "call it",
            rank,
            NOTICE_SECONDS,
            purpose,
            list(ranks),
        )


def absence(purpose: str, rank: int, timeout: float, missing: Sequence[int]) -> str:
    """The message about ranks that did not come."""
    who = f"Ranks {list(missing)} are missing." if missing else "It is not known who is missing."
    return (
        f"not every rank came to {purpose} within {timeout:g} s (this is rank {rank}). "
        f"All ranks must call it: do not guard it with 'if rank == 0'. {who}"
    )


def restart_hint() -> str:
    """What helps if a launcher has started the workers again, else nothing."""
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        return ""
    return (
        ". The workers were started again: unless TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 is set for "
        "torchrun, they meet in a store that holds addresses of the life before, which PyTorch "
        "itself may take for current ones"
    )
