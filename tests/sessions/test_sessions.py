"""Random sessions: layouts as rows, what users do as actions, a plain loop as the judge.

``make test`` plays the same sessions every time, for about a minute; ``make test-long`` plays
others for an hour. Of a session that goes wrong the shortest form is printed.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.helpers.pool import WorkerPool
from tests.sessions import players
from tests.sessions.mutations import MUTATIONS, play_with
from tests.sessions.oracle import SCHEDULES
from tests.sessions.players import ENGINES, LAYOUTS, Session

Worlds = dict[int, WorkerPool]
SECONDS = int(os.environ.get("SESSION_SECONDS", "3600"))
EXAMPLES = 60

# What users do most comes first, and more often.
OFTEN = ("step", "step", "step", "swap", "save")
ACTIONS = (
    "step", "evaluate", "gather_ahead", "poison", "look", "swap", "leave_by_error",
    "refused_in_swap", "second_average", "reseed", "edit", "edit_at_first", "copy_to", "save",
    "save_in_swap", "load", "resume", "export", "interrupt", "fall_apart", "other_paths",
    "fail_on_one",
)  # fmt: skip


@st.composite
def sessions(draw: st.DrawFn, layouts: tuple[str, ...] = tuple(LAYOUTS)) -> Session:
    names = draw(st.sampled_from([("ema",), ("ema",), ("long", "short")]))
    action = st.tuples(st.sampled_from(OFTEN + ACTIONS), st.integers(0, 11))
    return Session(
        layout=draw(st.sampled_from(layouts)),
        schedules=tuple((name, draw(st.sampled_from(list(SCHEDULES)))) for name in names),
        update_every=draw(st.sampled_from([1, 1, 3])),
        start_step=draw(st.sampled_from([0, 0, 2])),
        optimizers=draw(st.sampled_from([0, 1, 1, 2])),
        actions=tuple(draw(st.lists(action, min_size=4, max_size=14))),
    )


class Stage:
    """Plays sessions on worlds of ranks."""

    def __init__(self, worlds: Worlds, engine_worlds: Worlds) -> None:
        self._worlds = worlds
        self._engines = engine_worlds

    def play(self, session: Session, mistake: str | None = None) -> str | None:
        """What was wrong.

        Args:
            mistake: planted in the library before, see :mod:`tests.sessions.mutations`.
        """
        folder = tempfile.mkdtemp(prefix="session-")
        play: Callable[..., str | None] = partial(play_with, mistake) if mistake else players.play
        try:
            if LAYOUTS[session.layout][0] == 1:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    return play(session, folder)
            worlds = self._engines if session.layout in ENGINES else self._worlds
            return worlds[LAYOUTS[session.layout][0]].run(play, session, folder)[0]
        except AssertionError as error:  # a rank that failed, or hangs
            return str(error)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def stage(worlds: Worlds, engine_worlds: Worlds) -> Stage:
    return Stage(worlds, engine_worlds)


ALWAYS = settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def test_sessions(stage: Stage) -> None:
    @settings(ALWAYS)
    @given(sessions())
    def run(session: Session) -> None:
        wrong = stage.play(session)
        assert wrong is None, wrong

    run()


@pytest.mark.long
@pytest.mark.timeout(SECONDS + 1800)
def test_sessions_for_long(stage: Stage) -> None:
    """Other sessions than those above, and others each time."""
    end = time.monotonic() + SECONDS
    played = 0
    while time.monotonic() < end:

        @settings(ALWAYS, max_examples=100, derandomize=False)
        @given(sessions())
        def run(session: Session) -> None:
            nonlocal played
            played += 1
            wrong = stage.play(session)
            assert wrong is None, wrong

        run()
    print(f"{played} sessions")


@pytest.mark.long
@pytest.mark.parametrize("mistake", MUTATIONS)
def test_mistakes_are_found(stage: Stage, mistake: str) -> None:
    """Each of these goes unnoticed only if no session of so many meets it."""

    @settings(ALWAYS, max_examples=200, phases=[Phase.generate])
    @given(sessions(("plain", "fsdp2", "ddp")))
    def run(session: Session) -> None:
        wrong = stage.play(session, mistake)
        assert wrong is None, wrong

    with pytest.raises(AssertionError):
        run()
