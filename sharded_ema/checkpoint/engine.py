"""The average travels in a DeepSpeed engine's own checkpoints.

``engine.save_checkpoint(dir, tag)`` writes it to ``dir/<tag>/ema`` before DeepSpeed writes
``latest``, so that no checkpoint that ``latest`` names is without its average.
``engine.load_checkpoint`` brings it back.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from sharded_ema.checkpoint.names import ENGINE_DIRECTORY
from sharded_ema.model.steps import MethodWrap


@runtime_checkable
class WritesCheckpoints(Protocol):
    """What trains a model and writes checkpoints of its own, as a DeepSpeed engine."""

    global_steps: int

    def save_checkpoint(self, save_dir: str, tag: str | None = None) -> Any:
        """Write ``save_dir/<tag>``."""
        ...

    def load_checkpoint(self, load_dir: str, tag: str | None = None) -> Any:
        """Read ``load_dir/<tag>``."""
        ...


@dataclass(frozen=True, slots=True)
class Traveller:
    """What goes along in somebody else's checkpoints.

    Attributes:
        refuse: called with the name of what is about to happen; may raise to prevent it.
        save: called with the directory to write and the trainer's step, before it saves.
        load: called with the directory to read and the trainer's step, after it has loaded its own
            state; with ``None`` for the directory if the user asked for weights only.
        unknown: called with the trainer's step if it is past its first and nobody saw from where.
    """

    refuse: Callable[[str], None]
    save: Callable[[Path, int], object]
    load: Callable[[Path | None, int], None]
    unknown: Callable[[int], None]


class EngineCheckpoints:
    """Wraps ``save_checkpoint`` and ``load_checkpoint`` of one engine until removed.

    Until there is something to carry it only notes where the engine is loaded from.

    Args:
        engine: a DeepSpeed engine; whatever else writes no checkpoints is left alone.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._traveller: Traveller | None = None
        self._came_from: list[Path | None] = []
        self._wraps: list[MethodWrap] = []
        self._wrap()

    def _wrap(self) -> None:
        if isinstance(self._engine, WritesCheckpoints) and not self._wraps:
            self._wraps = [
                MethodWrap(self._engine, "save_checkpoint", self._around_save),
                MethodWrap(self._engine, "load_checkpoint", self._around_load),
            ]

    def carry(self, traveller: Traveller, *, fresh: bool) -> None:
        """Take something along from now on.

        Args:
            fresh: it has not begun yet; so it is looked for where the engine was loaded from.
        """
        self._wrap()
        if not self._wraps:
            return
        self._traveller = traveller
        step = self._engine.global_steps
        if fresh and self._came_from:
            traveller.load(self._came_from[-1], step)
        elif fresh and step:
            traveller.unknown(step)

    def remove(self) -> None:
        """Detach from the engine."""
        self._traveller = None
        for wrap in reversed(self._wraps):
            wrap.remove()
        self._wraps.clear()

    def _around_save(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._traveller is None:
            return original(*args, **kwargs)
        self._traveller.refuse("engine.save_checkpoint()")
        given = inspect.signature(original).bind(*args, **kwargs).arguments
        tag = given.get("tag")
        if tag is None:  # as DeepSpeed names it
            tag = f"global_step{self._engine.global_steps}"
        if given["save_dir"]:  # else DeepSpeed refuses
            directory = Path(given["save_dir"], str(tag), ENGINE_DIRECTORY)
            self._traveller.save(directory, self._engine.global_steps)
        return original(*args, **kwargs)

    def _around_load(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._traveller is not None:
            self._traveller.refuse("engine.load_checkpoint()")
        given = inspect.signature(original).bind(*args, **kwargs).arguments
        tag = given.get("tag")
        if tag is None:  # read before: it is the tag that DeepSpeed is about to load
            universal = self._engine.load_universal_checkpoint()
            latest = Path(given["load_dir"], "latest_universal" if universal else "latest")
            tag = latest.read_text().strip() if latest.is_file() else None
        result = original(*args, **kwargs)
        if tag is not None and result[0] is not None:
            weights_only = given.get("load_module_only", False)
            directory = Path(given["load_dir"], str(tag), ENGINE_DIRECTORY)
            found = None if weights_only else directory
            if self._traveller is None:
                self._came_from.append(found)
            else:
                self._traveller.load(found, self._engine.global_steps)
        return result
