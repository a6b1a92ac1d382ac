"""Writing planned output files, several at a time, every chunk's checksum verified on the way."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from functools import partial
from typing import TypeVar

import xxhash
from tqdm import tqdm

from sharded_ema.checkpoint import durable, removal
from sharded_ema.checkpoint.location import Location
from sharded_ema.checkpoint.reading.opened import Catalog
from sharded_ema.checkpoint.reading.stream import (
    SourceFiles,
    stream_tensor,
    verify_chunk,
    verify_file,
)
from sharded_ema.checkpoint.safetensors import ITEMSIZE, build_header
from sharded_ema.config import META_KEY
from sharded_ema.tools.casting import caster
from sharded_ema.tools.contents import Average
from sharded_ema.tools.plan import Output
from sharded_ema.tools.tally import Tally
from sharded_ema.tools.workplace import Workplace

Files = Sequence[tuple[str, Sequence[Output]]]
Result = TypeVar("Result")


def verify_rest(catalog: Catalog, average: Average) -> None:
    """Check what the export does not read but depends on, or cannot check as it streams.

    Raises:
        CheckpointCorruptError: it is not what was written.
    """
    if average.meta:
        key = average.prefix + META_KEY
        for chunk in catalog.chunks(key):
            verify_chunk(catalog.path, chunk, key)
    if catalog.format == "dcp" and catalog.manifest is not None:
        # Between the tensors of a .distcp file lie bytes that no checksum of a tensor covers.
        for record in catalog.manifest.files:
            verify_file(catalog.path / record.name, record.digest)


def write_files(
    files: Files, place: Workplace, metadata: Mapping[str, str], *, jobs: int, progress: bool
) -> None:
    """Write the output files that are not finished yet.

    Args:
        metadata: texts for the header of each.
        jobs: files at a time.
        progress: show a bar with rate and remaining time on standard error.

    Raises:
        CheckpointCorruptError: a chunk is not what was written.
        OSError: a file cannot be written.
    """
    sizes = {name: sum(output.num_bytes for output in group) for name, group in files}
    run_jobs(
        [
            partial(_write_file, group, place, name, metadata)
            for name, group in files
            if name not in place.finished
        ],
        total=sum(sizes.values()),
        initial=sum(sizes[name] for name in place.finished),
        what="consolidate",
        jobs=jobs,
        progress=progress,
    )


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
    shown = progress and sys.stderr is not None  # which may have been closed
    with (
        tqdm(
            total=total, initial=initial, unit="B", unit_scale=True, desc=what, disable=not shown
        ) as bar,
        ThreadPoolExecutor(max_workers=jobs) as pool,
    ):
        stopped = threading.Event()

        def advance(count: int) -> None:
            if stopped.is_set():  # nobody waits for the rest of this file
                raise CancelledError
            bar.update(count)

        running = [pool.submit(task, advance) for task in tasks]
        try:
            return [done.result() for done in as_completed(running)]
        finally:
            stopped.set()
            for waiting in running:
                waiting.cancel()


def _write_file(
    outputs: Sequence[Output],
    place: Workplace,
    name: str,
    metadata: Mapping[str, str],
    advance: Callable[[int], None],
) -> None:
    header, _ = build_header([(o.name, o.dtype, o.source.shape) for o in outputs], dict(metadata))
    path = place.model / name
    new = removal.temporary(path)
    size = len(header) + sum(output.num_bytes for output in outputs)
    tally, digest = Tally(), xxhash.xxh3_128(header)
    with ExitStack() as stack, durable.new_file(new, size) as write:
        write(memoryview(header))
        opened: dict[Location, SourceFiles] = {}
        for output in outputs:
            stored, root = output.source, output.catalog.path
            if root not in opened:
                opened[root] = stack.enter_context(SourceFiles(root))
            cast = caster(stored.dtype, output.dtype)
            chunks = output.catalog.chunks(stored.key)
            tally.see_chunks(chunks)
            itemsize = ITEMSIZE[stored.dtype]
            for block in stream_tensor(opened[root], stored.key, stored.shape, itemsize, chunks):
                data = block
                if cast is not None:
                    data = cast(block)
                    tally.see_cast(block, stored.dtype, data, output.dtype)
                digest.update(data.data)
                write(data.data.cast("B"))
                advance(data.nbytes)
    # The name says that the file is whole, so it comes last.
    os.rename(new, path)
    durable.fsync(place.model)
    place.record(name, size, digest.hexdigest(), tally)
