"""Saves that go on in a thread of their own, one at a time."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future

from sharded_ema.checkpoint.files import Location
from sharded_ema.errors import EMAError, speaking_for, user_line

logger = logging.getLogger("sharded_ema")


class SaveHandle:
    """A save under way or done.

    Attributes:
        path: directory of the checkpoint, or its URL.
        step: the step it was saved under.
    """

    def __init__(self, path: Location, step: int, staged: Callable[[], None] | None = None) -> None:
        self.path = path
        self.step = step
        self._wait_for_copies = staged
        self._future: Future[None] = Future()
        self._told = False

    def staged(self) -> None:
        """Return once what is saved no longer depends on the average or the model.

        ``save()`` returns as soon as the copies are begun; on a CPU they are complete by then, and
        what a GPU does afterwards waits for them. So nobody needs to call this before training on.
        """
        if self._wait_for_copies is not None:
            self._wait_for_copies()

    def done(self) -> bool:
        """Whether the save has ended, well or not. Other ranks may see its end at another time."""
        return self._future.done()

    def result(self, timeout: float | None = None) -> Location:
        """Wait until the checkpoint is durable and committed.

        Args:
            timeout: seconds to wait; ``None`` for as long as it takes.

        Returns:
            Its directory or URL.

        Raises:
            CheckpointError: the save failed; on every rank the same.
            TimeoutError: it has not ended yet.
        """
        try:
            self._future.result(timeout)
        finally:
            self._told = self._told or self._future.done()
        return self.path

    def _run(self, write: Callable[[], object]) -> None:
        try:
            write()
        except BaseException as error:  # whatever it is, it belongs to who asks for the result
            self._future.set_exception(error)
        else:
            self._future.set_result(None)


class Background:
    """Runs saves in a thread, at most one at a time."""

    def __init__(self) -> None:
        self._last: SaveHandle | None = None

    def start(self, handle: SaveHandle, write: Callable[[], object]) -> None:
        """Begin ``write()``, and return at once. The last one must have been waited for."""
        line = user_line()

        def work() -> None:
            with speaking_for(line):
                handle._run(write)
            error = handle._future.exception()
            if error is not None:  # seen now by who reads logs, raised later by who comes next
                logger.error("the save of %s failed in the background: %s", handle.path, error)

        self._last = handle
        # The interpreter waits for threads that are no daemons before it exits.
        threading.Thread(target=work, name=f"save {handle.path}").start()

    @staticmethod
    def run(handle: SaveHandle, write: Callable[[], object]) -> None:
        """Do ``write()`` here and now, and raise what goes wrong."""
        handle._run(write)
        handle.result()

    def wait(self) -> None:
        """Wait for the save under way.

        Raises:
            CheckpointError: it failed, or an earlier one did, and nobody was told of it yet.
        """
        handle = self._last
        if handle is None:
            return
        told = handle._told
        try:
            handle.result()
        except EMAError:
            if not told:
                raise
        finally:
            if handle.done():  # else the wait was interrupted
                self._last = None
