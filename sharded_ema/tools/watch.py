"""``watch``: every new checkpoint of a run as a model directory, for an evaluator or a server.

The directory of exports is the only memory: which save an export is of stands in the header of its
safetensors files. So a watch that was killed goes on where it was, and whatever it shows under a
name, ``latest`` included, is whole at every moment.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Protocol

from sharded_ema.checkpoint import removal
from sharded_ema.checkpoint.durable import fsync
from sharded_ema.checkpoint.files import URL, Location, as_location, exists, identity
from sharded_ema.checkpoint.holding import Hold
from sharded_ema.checkpoint.names import (
    LATEST_NAME,
    MANIFEST_NAME,
    is_temporary,
    new_uuid,
    numbered,
    temporary,
    without_number,
)
from sharded_ema.checkpoint.run import Committed, committed_at, read_run
from sharded_ema.checkpoint.safetensors import read_header
from sharded_ema.config import DEFAULT_PROFILE, as_whole
from sharded_ema.errors import (
    CheckpointError,
    CheckpointExistsError,
    CheckpointNotFoundError,
    CheckpointWriteError,
    ConfigError,
)
from sharded_ema.model.layout import Shape
from sharded_ema.tools.casting import parse_dtypes
from sharded_ema.tools.consolidate import consolidate
from sharded_ema.tools.huggingface import has_description, read_like
from sharded_ema.tools.report import Report

# Of the directory by which a watch holds that of its exports.
_WATCH_DIGITS = "0" * 32


class Stop(Protocol):
    """What ends a watch, such as a :class:`threading.Event`."""

    def is_set(self) -> bool:
        """Whether to end before the next export."""
        ...

    def wait(self, timeout: float) -> bool:
        """Wait so many seconds, or less; whether to end."""
        ...


def watch(
    run: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    dtype: str | Sequence[str] | None = None,
    profile: str = DEFAULT_PROFILE,
    like: str | os.PathLike[str] | None = None,
    trust_code: bool = False,
    keep: int = 2,
    interval: float = 10.0,
    once: bool = False,
    stop: Stop | None = None,
) -> Generator[Report]:
    """Consolidate each newly committed checkpoint of a run; an iterator that ends when told.

    ``out`` belongs to the watch: it holds the exports of the last ``keep`` checkpoints that could
    be exported, under their names, and a relative symbolic link ``latest`` to the newest. Older
    exports are removed, also those of checkpoints that are gone, so readers of ``latest`` have
    until ``keep`` more have come. If a checkpoint was replaced under its name it is exported anew,
    as ``<name>~1``, and the old export goes. So it is after a change of ``profile``, ``dtype`` or
    the files of ``like``, which are compared once for each export.

    Args:
        run: directory of checkpoints side by side (``run/step_100``), or with each in the directory
            of its step (``run/step_100/ema``), or either in ``run/checkpoints``. It may be missing
            yet, unless ``once``.
        out: directory for the exports; made if it is missing. One watch at a time.
        dtype, profile, like, trust_code: see :func:`~sharded_ema.consolidate`.
        keep: number of exports; there is one more while it is written.
        interval: seconds between two looks.
        once: look once, export what is missing, end.
        stop: ends the watch, after the export under way.

    Yields:
        A report for each checkpoint met: exported (its fact ``output`` says where to); with ``ok``
        false if that failed, once for each damaged save, at every look for a disk that is full;
        or with a note if it was removed meanwhile. With ``once`` also a note if there is none.

    Raises:
        ConfigError: an argument is out of range, ``run`` is itself a checkpoint, or another watch
            is at work in ``out``.
        CheckpointNotFoundError: there is no model at ``like``, or with ``once`` no ``run``.
        CheckpointExistsError: ``latest`` in ``out`` is something else than a link.
    """
    run, out = os.fspath(run), os.fspath(out)
    parse_dtypes(dtype)
    keep = as_whole(keep, "keep", least=1)
    if not interval > 0:
        raise ConfigError(f"interval must be a positive number of seconds, got {interval}")
    place = Path(out).resolve()
    if isinstance(as_location(out), URL) or place == Path(run).resolve():
        raise ConfigError(f"out must be a directory of its own on this machine, got {out}")
    if any((folder / MANIFEST_NAME).is_file() for folder in (place, *place.parents)):
        raise ConfigError(f"{out} lies inside a checkpoint, which must not change")
    read_like(like, {}, trust_code=trust_code)
    _check_run(as_location(run), once=once)
    link = Path(out, LATEST_NAME)
    if os.path.lexists(link) and not link.is_symlink():
        raise CheckpointExistsError(f"{link} is no symbolic link; move it elsewhere")
    stop = stop or threading.Event()
    watcher = _Watcher(run, Path(out), dtype, profile, like, trust_code, keep, stop)
    return watcher.run(None if once else interval)


def _check_run(run: Location, *, once: bool) -> None:
    if exists(run / MANIFEST_NAME):
        raise ConfigError(f"{run} is a checkpoint; watch the directory that holds it")
    if (once and not exists(run)) or (isinstance(run, Path) and run.is_file()):
        raise CheckpointNotFoundError(f"there is no run at {run}")


@dataclass(frozen=True, slots=True)
class _Export:
    """A model directory that a watch has made, as its files say.

    Attributes:
        source: uuid of the save.
        step: of the checkpoint.
        wanted: whether profile, dtype and description are those asked for.
    """

    path: Path
    source: str
    step: int
    wanted: bool

    @property
    def of(self) -> str:
        """Name of the checkpoint."""
        return without_number(self.path.name)


class _Watcher:
    def __init__(
        self,
        run: str | os.PathLike[str],
        out: Path,
        dtype: str | Sequence[str] | None,
        profile: str,
        like: str | os.PathLike[str] | None,
        trust_code: bool,
        keep: int,
        stop: Stop,
    ) -> None:
        self._run = run
        self._out = out
        self._dtype = dtype
        self._profile = profile
        self._like = like
        self._trust_code = trust_code
        self._keep = keep
        self._stop = stop
        # Saves that cannot be exported with the state of their files, and damaged manifests, so
        # that each is reported once; but one that was still being copied is tried again.
        self._refused: dict[str, object] = {}
        # By export, as its files are read only once.
        self._alike: dict[tuple[Path, str], bool] = {}
        self._headers: dict[tuple[Path, object], tuple[dict[str, str], dict[str, Shape]]] = {}

    def run(self, interval: float | None) -> Generator[Report]:
        self._out.mkdir(parents=True, exist_ok=True)
        with _alone(self._out) as hold:
            while True:
                # First, so that a consolidation which was killed is gone on with.
                yield from self._look(once=interval is None)
                removal.sweep(self._out, hold.place)
                if interval is None or self._stop.is_set() or self._stop.wait(interval):
                    return

    def _look(self, *, once: bool) -> Iterator[Report]:
        """Export what is missing, as the run stands now."""
        try:
            run = read_run(self._run)
            self._tidy(run.checkpoints)
        except OSError as error:
            yield _failure(str(self._run), error)
            return
        if once and not run.checkpoints:
            report = Report("watch", str(self._run))
            report.notes.append("no committed checkpoint of an average is in it")
            yield report
        for name, problem in run.damaged.items():
            if problem not in self._refused:
                self._refused[problem] = None
                yield _failure(name, problem)
        met: set[str] = set()
        while not self._stop.is_set():
            able = [c for c in run.checkpoints if not self._is_refused(c)]
            done = {export.source for export in self._exports() if export.wanted} | met
            checkpoint = next((c for c in able[-self._keep :] if c.uuid not in done), None)
            if checkpoint is None:
                return
            met.add(checkpoint.uuid)
            try:
                report = self._export(checkpoint)
                self._tidy(run.checkpoints)
            except (CheckpointError, OSError) as error:
                if not _is_there(checkpoint):
                    report = Report("watch", str(checkpoint.path))
                    report.notes.append("was removed or replaced while it was read")
                    run.checkpoints.remove(checkpoint)
                else:
                    report = _failure(str(checkpoint.path), error)
                    # What is wrong with the disk to write to may pass.
                    if not isinstance(error, OSError | CheckpointWriteError):
                        self._refuse(checkpoint)
            yield report

    def _refuse(self, checkpoint: Committed) -> None:
        self._refused[checkpoint.uuid] = _state(checkpoint.path)

    def _is_refused(self, checkpoint: Committed) -> bool:
        uuid = checkpoint.uuid
        return uuid in self._refused and self._refused[uuid] == _state(checkpoint.path)

    def _export(self, checkpoint: Committed) -> Report:
        report = consolidate(
            checkpoint.path,
            self._free(checkpoint.name),
            profile=self._profile,
            dtype=self._dtype,
            like=self._like,
            trust_code=self._trust_code,
            progress=False,
        )
        report.action = "watch"
        report.facts["step"] = checkpoint.step
        if not report.ok:
            self._refuse(checkpoint)
        return report

    def _free(self, name: str) -> Path:
        """A path that is not taken yet; the link's name always is."""
        others = (self._out / numbered(name, number) for number in count(1))
        first = self._out / name
        if name != LATEST_NAME and not os.path.lexists(first):
            return first
        return next(path for path in others if not os.path.lexists(path))

    def _exports(self) -> list[_Export]:
        paths = sorted(self._out.iterdir())
        there = set(paths)
        self._headers = {k: v for k, v in self._headers.items() if there & set(k[0].parents)}
        found = [self._read(path) for path in paths]
        return [export for export in found if export is not None]

    def _read(self, path: Path) -> _Export | None:
        """What an entry of the directory is an export of; ``None`` if it is none."""
        if path.is_symlink() or not path.is_dir() or is_temporary(path.name):
            return None
        # Those of a pipeline lie in the directory of a component, beside others.
        for file in sorted([*path.glob("*.safetensors"), *path.glob("*/*.safetensors")]):
            with suppress(CheckpointError):
                header, shapes = self._header(file)
                if header.get("kind") != "ema" or "source" not in header:
                    continue
                step = header.get("step", "")
                return _Export(
                    path,
                    header["source"],
                    int(step) if step.isdecimal() else 0,
                    header.get("profile") == self._profile
                    and header.get("dtype", "") == str(parse_dtypes(self._dtype))
                    and self._is_alike(path, header["source"], shapes),
                )
        return None

    def _header(self, file: Path) -> tuple[dict[str, str], dict[str, Shape]]:
        """What a file says of itself, and the shapes of its tensors; read once."""
        known = (file, identity(file))
        if known not in self._headers:
            tensors, header, _ = read_header(file)
            self._headers[known] = header, {name: t.shape for name, t in tensors.items()}
        return self._headers[known]

    def _is_alike(self, path: Path, source: str, shapes: Mapping[str, Shape]) -> bool:
        known = (path, source)
        if known not in self._alike:
            model = read_like(self._like, shapes, trust_code=self._trust_code)
            self._alike[known] = model is None or has_description(path, model)
        return self._alike[known]

    def _tidy(self, checkpoints: list[Committed]) -> None:
        """Let ``latest`` name the newest export, and remove those that are too many."""
        place = {checkpoint.uuid: number for number, checkpoint in enumerate(checkpoints)}
        exports = sorted(self._exports(), key=lambda e: (e.wanted, place.get(e.source, -1), e.step))
        # The last one of each name is what the name stands for now.
        last = {export.of: export for export in exports}
        kept = [export for export in exports if last[export.of] is export][-self._keep :]
        if kept:
            self._point_to(kept[-1].path.name)
        for export in exports:
            if export not in kept:
                removal.remove(export.path)

    def _point_to(self, name: str) -> None:
        link = self._out / LATEST_NAME
        if link.is_symlink() and link.readlink() == Path(name):
            return
        new = temporary(link)
        new.symlink_to(name)
        new.replace(link)
        fsync(self._out)


def _failure(path: str, problem: Exception | str) -> Report:
    report = Report("watch", path)
    report.fail(str(problem))
    return report


def _state(path: Location) -> object:
    """What changes when a file of a checkpoint does; nothing, where a store cannot tell."""
    if isinstance(path, URL):
        return None
    try:
        found = [(entry.name, entry.stat()) for entry in os.scandir(path)]
    except OSError:  # removed just now
        return None
    return sorted((name, status.st_size, status.st_mtime_ns) for name, status in found)


def _is_there(checkpoint: Committed) -> bool:
    """Whether the checkpoint is still the one that was found."""
    try:
        now = committed_at(checkpoint.path)
    except CheckpointError:
        return False
    return now is not None and now.uuid == checkpoint.uuid


@contextmanager
def _alone(out: Path) -> Iterator[Hold]:
    """Keep other watches out, and leave nothing half-written behind."""
    place = temporary(out / ".watch", new_uuid(_WATCH_DIGITS))
    found = removal.occupy(place, out / ".watch")
    if not isinstance(found, Hold):
        raise ConfigError(
            f"another watch is at work in {out}"
            f"{f' ({found.holder})' if found.holder else f': {found.foreign} ({place})'}; give "
            "each a directory of its own"
        )
    try:
        yield found
    finally:
        removal.sweep(out, place)
        removal.discard(found)
