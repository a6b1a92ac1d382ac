"""What Ctrl-C does to a command: once it abandons what is under way, twice it ends the process."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import Self


class Interruption:
    """A block in which the first Ctrl-C is ``KeyboardInterrupt``, and the next one the end.

    What was interrupted waits for threads that still write, and a ``KeyboardInterrupt`` in that
    wait is a traceback of its own. Who presses again does not want to wait, and what lies on the
    disk then is what any kill leaves. Where somebody else has decided about SIGINT, as ``nohup``
    does, and in a thread, nothing changes.

    Args:
        said: the line about it on standard error, which is printed once.
        status: what the process ends with.
        ends: whether it ends after the block, so that the second Ctrl-C may come after it.
    """

    def __init__(self, said: str, status: int, *, ends: bool) -> None:
        self._said = f"{said}\n"
        self._status = status
        self._ends = ends
        self._pressed = False
        self._handles = False

    def __enter__(self) -> Self:
        in_main = threading.current_thread() is threading.main_thread()
        self._handles = in_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if self._handles:
            signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if self._handles and not (self._ends and self._pressed):
            signal.signal(signal.SIGINT, signal.default_int_handler)

    @contextmanager
    def by_termination(self) -> Iterator[None]:
        """SIGTERM is the same inside the block."""
        before = signal.signal(signal.SIGTERM, self._interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def say(self) -> None:
        """Print the line, unless it is there."""
        said, self._said = self._said, ""
        if said and sys.stderr is not None:
            # Past the stream, in whose midst the interruption may have come.
            with suppress(OSError, ValueError):
                os.write(sys.stderr.fileno(), said.encode())

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if self._pressed:
            self.say()
            os._exit(self._status)
        self._pressed = True
        raise KeyboardInterrupt
