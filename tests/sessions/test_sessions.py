"""Random sessions: layouts as rows, what users do as actions, a plain loop as the judge.

``make test`` plays the same sessions every time, for about a minute; ``make test-long`` plays
others for an hour. Of a session that goes wrong the shortest form is printed.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sharded_ema.errors import EMAWarning
from tests.helpers.pool import WorkerPool
from tests.sessions import players
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

    def play(self, session: Session) -> str | None:
        """What was wrong."""
        folder = tempfile.mkdtemp(prefix="session-")
        size = LAYOUTS[session.layout][0]
        try:
            if size == 1:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", EMAWarning)
                    return players.play(session, folder)
            worlds = self._engines if session.layout in ENGINES else self._worlds
            return worlds[size].run(players.play, session, folder)[0]
        except AssertionError as error:  # a rank that failed, or hangs
            return str(error)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def stage(worlds: Worlds, engine_worlds: Worlds) -> Stage:
    return Stage(worlds, engine_worlds)


CHECKS = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


@pytest.mark.dist
def test_sessions(stage: Stage) -> None:
    @settings(
        max_examples=EXAMPLES, deadline=None, database=None, derandomize=True,
        suppress_health_check=CHECKS,
    )  # fmt: skip
    @given(sessions())
    def run(session: Session) -> None:
        wrong = stage.play(session)
        assert wrong is None, wrong

    run()
