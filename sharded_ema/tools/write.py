"""Writing models as safetensors files, several at a time, and publishing them.

A file is made of the blocks of its tensors, whichever way these come about: copied out of one
checkpoint, or summed over many. Of sums, several models of one shape are written side by side.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, as_completed, wait
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy
import xxhash

from sharded_ema.checkpoint import durable
from sharded_ema.checkpoint.names import temporary
from sharded_ema.checkpoint.reading.chunks import Chunk
from sharded_ema.checkpoint.reading.models import ADAPTER_STEM, STEMS
from sharded_ema.checkpoint.removal import remove_files
from sharded_ema.checkpoint.safetensors import build_header
from sharded_ema.errors import CheckpointWriteError, EMAError
from sharded_ema.tools.assembly import Output, Reading, readings
from sharded_ema.tools.casting import Bytes, caster, widen
from sharded_ema.tools.contents import Average
from sharded_ema.tools.huggingface import (
    Model,
    copy_description,
    copy_pipeline,
    pipeline_bytes,
    write_index,
)
from sharded_ema.tools.plan import Plan, group_bytes
from sharded_ema.tools.provenance import sign, with_room, write_sidecar
from sharded_ema.tools.workplace import Workplace, check_space

Result = TypeVar("Result")


@dataclass(slots=True)
class Tally:
    """What has to be said of values that were written, beyond that they were.

    Attributes:
        unchecked: chunks without a checksum among those that went into them.
        overflowed: finite elements that float16 has no room for, so that they are infinite in it.
    """

    unchecked: int = 0
    overflowed: int = 0

    def add(self, other: Tally) -> None:
        """Count what another one has counted."""
        self.unchecked += other.unchecked
        self.overflowed += other.overflowed

    def see_chunks(self, chunks: Sequence[Chunk]) -> None:
        """Count those that nothing can be compared with."""
        self.unchecked += sum(c.digest is None and c.crc32 is None for c in chunks)

    def see_cast(self, block: Bytes, source: str, written: Bytes, target: str) -> None:
        """Count what has become infinite; the other types reach as far as fp32.

        Args:
            block: elements of the dtype ``source``, as uint8.
            written: what they became, of the dtype ``target``.
        """
        if target == "F16":
            infinite = (written.view("<u2") & 0x7FFF) == 0x7C00
            if infinite.any():
                with numpy.errstate(invalid="ignore"):  # of signalling NaN
                    before = widen(block, source)[infinite]
                self.overflowed += int(numpy.isfinite(before).sum())

    def notes(self) -> list[str]:
        """A line for each thing that was met."""
        lines = []
        if self.unchecked:
            lines.append(
                f"{self.unchecked} chunks carry no checksum, so their bytes were not checked"
            )
        if self.overflowed:
            lines.append(
                f"{self.overflowed} elements are beyond float16's 65504 and were written as "
                "infinite; bfloat16 has room for them (--dtype bfloat16)"
            )
        return lines


#: The bytes of outputs, block by block; of each block, those of every model that is written.
Blocks = Callable[[Sequence[Output], Tally], Iterator[Sequence[Bytes]]]


def copied(outputs: Sequence[Output], tally: Tally) -> Iterator[Sequence[Bytes]]:
    """The :data:`Blocks` of one model: tensors as they are stored, but for their dtypes.

    Raises:
        CheckpointCorruptError: a chunk is not what was written.
    """
    for reading in readings(outputs):
        for block in converted(reading, tally):
            yield (block,)


def converted(reading: Reading, tally: Tally) -> Iterator[Bytes]:
    """What is read, in the dtypes of the outputs.

    Raises:
        CheckpointCorruptError: a chunk is not what was written.
    """
    stored = reading.tensor.dtype
    chunks, first = reading.chunks()
    tally.see_chunks(chunks)
    for block, dtype in reading.blocks(chunks, first):
        cast = caster(stored, dtype)
        if cast is None:
            yield block
            continue
        data = cast(block)
        tally.see_cast(block, stored, data, dtype)
        yield data


@dataclass(frozen=True, slots=True)
class Written:
    """What became of a plan.

    Attributes:
        taken_over: how many files a killed call had finished.
        copied: names of what was copied from the model to be like.
        tally: of all files.
    """

    taken_over: int
    copied: list[str]
    tally: Tally


@contextmanager
def as_write_error(what: str) -> Iterator[None]:
    """Turn what the disk says inside into an error of ours.

    Raises:
        CheckpointWriteError: ``what``, and why.
    """
    try:
        yield
    except EMAError:  # some of which are OSErrors as well
        raise
    except OSError as error:
        raise CheckpointWriteError(f"{what}: {error}") from error


def write_models(
    plan: Plan,
    target: Path,
    blocks: Blocks,
    *,
    inputs: Sequence[Average],
    like: Model | None,
    what: str,
    jobs: int,
    progress: bool,
    resume: bool = False,
    gather: Callable[[Workplace, Path], None] | None = None,
    format: str = "safetensors",
) -> Written:
    """Write the models of a plan and make all of them ``target`` by one rename.

    Args:
        inputs: to check for damage in what is not read as a tensor.
        like: whose description goes beside the weights.
        what: is done, for the progress bar.
        jobs: files of a model written at a time.
        resume: go on with what a killed call has left; else it is removed.
        gather: puts files that others have finished into a workplace and the folder of a model
            there, before the rest is written.
        format: of the files in the end; see :func:`sharded_ema.consolidate`.

    Raises:
        CheckpointCorruptError: an input is damaged.
        CheckpointExistsError, CheckpointWriteError: the target is taken, or the disk is full.
        OSError: a file cannot be written.
    """
    with Workplace(target, plan.digest(format) if resume else None) as place:
        folders = {place.model / name: texts for name, texts in plan.headers.items()}
        for folder in folders:
            if folder != place.model:
                folder.mkdir()
            if gather is not None:
                gather(place, folder)
        finished = list(place.finished.values())
        needed = plan.num_bytes * (1 if format == "safetensors" else 2) + pipeline_bytes(like)
        check_space(target, needed - sum(line.bytes for line in finished))
        for average in inputs:
            average.verify_rest()
        tally = _write_files(
            plan, place, folders, blocks, what=what, jobs=jobs, progress=progress, format=format
        )
        names: list[str] = []
        for folder, texts in folders.items():
            if format == "safetensors":
                write_index(folder, plan.files, plan.stem)
            else:
                _convert(plan, folder, format)
                write_sidecar(folder, texts)
            names = copy_description(like, folder, plan.dtype) if like is not None else []
            durable.fsync(folder)
        if like is not None:
            names += copy_pipeline(like, place.model)
            durable.fsync(place.model)
        place.publish()
    for line in finished:
        tally.add(Tally(line.unchecked, line.overflowed))
    return Written(len(finished), names, tally)


def _write_files(
    plan: Plan,
    place: Workplace,
    folders: Mapping[Path, Mapping[str, str]],
    blocks: Blocks,
    *,
    what: str,
    jobs: int,
    progress: bool,
    format: str,
) -> Tally:
    """Write the files that are not finished yet; the tally of these."""
    sizes = {name: len(folders) * group_bytes(group) for name, group in plan.files.items()}
    tallies = run_jobs(
        [
            partial(write_file, name, group, place, folders, blocks, format)
            for name, group in plan.files.items()
            if name not in place.finished
        ],
        total=sum(sizes.values()),
        initial=sum(sizes[name] for name in place.finished),
        what=what,
        jobs=jobs,
        progress=progress,
    )
    total = Tally()
    for tally in tallies:
        total.add(tally)
    return total


def write_file(
    name: str,
    group: Sequence[Output],
    place: Workplace,
    folders: Mapping[Path, Mapping[str, str]],
    blocks: Blocks,
    format: str,
    advance: Callable[[int], None],
) -> Tally:
    """Write one file of every model, and note that it is finished."""
    tally = Tally()
    described = [output.described(format) for output in group]
    files: list[_NewFile] = []
    with ExitStack() as stack:
        for folder, texts in folders.items():
            header, _ = build_header(described, with_room(texts))
            new, size = temporary(folder / name), len(header) + group_bytes(group)
            write = stack.enter_context(durable.new_file(new, size))
            files.append(_NewFile(new, size, header, write))
            files[-1].add(memoryview(header))
        for block in blocks(group, tally):
            for file, data in zip(files, block, strict=True):
                file.add(data.data.cast("B"))
                advance(data.nbytes)
    for file in files:
        sign(file.path, file.header, file.digest())
        # The name says that the file is whole, so it comes last.
        os.rename(file.path, file.path.with_name(name))
        durable.fsync(file.path.parent)
        place.record(name, file.size, file.digest(), tally.unchecked, tally.overflowed)
    return tally


class _NewFile:
    """A file while it is written, under a temporary name.

    Args:
        path: where it is written.
        size: in bytes, once it is whole.
        header: its first bytes.
        write: writes the next bytes.
    """

    def __init__(
        self, path: Path, size: int, header: bytes, write: Callable[[memoryview], None]
    ) -> None:
        self.path = path
        self.size = size
        self.header = header
        self._write = write
        self._digest = xxhash.xxh3_128()

    def add(self, data: memoryview) -> None:
        """Write the next bytes, which are hashed while they are in cache."""
        self._digest.update(data)
        self._write(data)

    def digest(self) -> str:
        """xxh3-128 in hex of what was written."""
        return str(self._digest.hexdigest())


def run_jobs(
    tasks: Sequence[Callable[[Callable[[int], None]], Result]],
    *,
    total: int,
    initial: int = 0,
    what: str,
    jobs: int,
    progress: bool,
) -> list[Result]:
    """Run tasks in threads under a progress bar; the first failure, or Ctrl-C, stops them all.

    Args:
        tasks: each is given what to call with the number of bytes that it has just done.
        total, initial: bytes in all, and those done before.

    Returns:
        What the tasks return, in the order in which they ended.
    """
    stopped = threading.Event()
    running: list[Future[Result]] = []
    with _bar(what, total, initial, shown=progress) as bar:

        def advance(count: int) -> None:
            if stopped.is_set():  # nobody waits for the rest of this file
                raise CancelledError
            if bar is not None:
                bar.update(count)

        pool = ThreadPoolExecutor(max_workers=jobs)
        try:
            for task in tasks:
                running.append(pool.submit(task, advance))
            return [done.result() for done in as_completed(running)]
        finally:
            stopped.set()
            # The threads are not joined: a KeyboardInterrupt in Thread.join() leaves a thread that
            # runs for one that has ended, at which the end of the interpreter stumbles (Python
            # 3.11 and 3.12). Once its task has ended a thread has nothing to wait for.
            pool.shutdown(wait=False, cancel_futures=True)
            wait([done for done in running if not done.cancelled()])


def _bar(what: str, total: int, initial: int, *, shown: bool) -> AbstractContextManager[Any]:
    """A progress bar on standard error; ``None`` where there is no place or no tqdm for one."""
    if not shown or sys.stderr is None:  # which may have been closed
        return nullcontext()
    try:
        from tqdm import tqdm  # which the tools do without
    except ImportError:
        return nullcontext()
    bar: AbstractContextManager[Any] = tqdm(
        total=total, initial=initial, unit="B", unit_scale=True, desc=what
    )
    return bar


def _convert(plan: Plan, folder: Path, format: str) -> None:
    """Replace safetensors files by those of PyTorch."""
    from sharded_ema.checkpoint.writing.torch_files import write_dcp, write_torch  # imports PyTorch

    written = [folder / name for name in plan.files]
    if format == "dcp":
        write_dcp(written, folder)
    else:
        stem = plan.stem if plan.stem in (STEMS[1], ADAPTER_STEM) else "pytorch_model"
        write_torch(written, folder / f"{stem}.bin", plan.shared)
    remove_files(written)
