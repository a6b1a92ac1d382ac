"""``verify``: whether every byte of a checkpoint is the one that was written.

Each file is read once, from its first byte to its last. All that is wrong is reported, not only the
first of it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NoReturn

import numpy as np

from sharded_ema.checkpoint.files import (
    Directory,
    Location,
    OpenFiles,
    as_location,
    gone,
    inside,
)
from sharded_ema.checkpoint.names import MANIFEST_NAME, META_KEY, METADATA_NAME, is_stray
from sharded_ema.checkpoint.reading.chunks import ChunkTable, TableIndex
from sharded_ema.checkpoint.reading.dcp import DcpIndex
from sharded_ema.checkpoint.reading.manifest import (
    Manifest,
    check_file,
    check_listing,
    read_manifest,
)
from sharded_ema.checkpoint.reading.opened import Checkpoint, open_directory, open_listed
from sharded_ema.checkpoint.reading.rank_shards import LACKS
from sharded_ema.checkpoint.reading.stream import Span, scan_file
from sharded_ema.checkpoint.reading.torch_entry import records
from sharded_ema.checkpoint.run import find_checkpoint, locate
from sharded_ema.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointGoneError,
    CheckpointMismatchError,
    CheckpointUncommittedError,
    CheckpointUnreachableError,
    ConfigError,
)
from sharded_ema.tools.comparison import compare, open_raw
from sharded_ema.tools.provenance import find_export, verify_export
from sharded_ema.tools.report import Report
from sharded_ema.tools.source import open_rank_shards


def verify(path: str | os.PathLike[str], *, model: str | os.PathLike[str] | None = None) -> Report:
    """Check every byte of a checkpoint, and that its averages are averages.

    Reads all files in blocks of 4 MiB. Of a DCP checkpoint that this library did not write only the
    CRC32 of its entries can be checked; ``metadata: unverified`` says so.

    An export is checked by the digests in its files, and the report says where it came from.

    Args:
        path: a committed checkpoint, ours or one of PyTorch's distributed format, what
            ``engine.save_checkpoint`` of DeepSpeed wrote with an average in it, or what one of the
            tools here has written as a model.
        model: raw weights to compare the averages with: a Hugging Face directory, a safetensors
            file, or a DCP checkpoint. The check fails if an average that was updated, and not
            with a decay of zero, equals them in every element: then it does not average.

    Returns:
        A report that lists all damage. ``ok`` is false if there is any, or if an average is a copy
        of ``model``.

    Raises:
        CheckpointNotFoundError, CheckpointUncommittedError: there is no committed checkpoint.
        CheckpointMismatchError: of a later version, or ``model`` has other tensors or is an
            average itself; or there are shards of ``HuggingFaceStorageWriter``, without checksums.
        CheckpointCorruptError: ``model`` cannot be read.
        ConfigError: ``model`` with an export.
    """
    path, model = os.fspath(path), None if model is None else os.fspath(model)
    report = Report("verify", path, verdict="no damage was found")
    location = as_location(path)
    if isinstance(location, Path) and (export := find_export(location)):
        if model is not None:
            raise ConfigError(
                f"{path} is an export, whose distance from other weights diff tells; leave model "
                "(--model) out"
            )
        verify_export(location, export, report)
        return report
    with OpenFiles() as files:
        where = locate(path)
        shards = open_rank_shards(where, files)
        if shards is not None:
            _refuse_shards(shards)
        directory, names = find_checkpoint(where, files)
        weights = None if model is None else open_raw(model, files)
        checkpoint = None
        with _noting(report):
            if MANIFEST_NAME in names:
                checkpoint = _verify_own(directory, names, report)
            else:
                checkpoint = _verify_stock(directory, names, report)
        if not report.ok and directory.is_gone():
            raise gone(directory.location)
        if checkpoint is not None and report.ok:
            _verify_descriptions(checkpoint, report)
        if weights is not None and checkpoint is not None and report.ok:
            report.facts["model"] = model
            compare(checkpoint, weights, report)
        elif weights is not None:
            report.notes.append("not compared with the model, because the checkpoint is damaged")
    return report


def _refuse_shards(shards: Checkpoint) -> NoReturn:
    """Say what there is no way to verify, unless something in it cannot be right anyway.

    Raises:
        CheckpointCorruptError, CheckpointMismatchError: see above.
    """
    for tensor in shards.tensors.values():
        tensor.chunks()
    raise CheckpointMismatchError(
        f"{shards.path} cannot be verified: these are {LACKS}; their headers fit the files, and no "
        "tensor has a hole"
    )


# What says nothing of the bytes.
_NO_DAMAGE = (
    CheckpointGoneError,
    CheckpointMismatchError,
    CheckpointUncommittedError,
    CheckpointUnreachableError,
)


@contextmanager
def _noting(report: Report) -> Iterator[None]:
    """Turn damage that is met inside into a line of the report."""
    try:
        yield
    except _NO_DAMAGE:
        raise
    except (CheckpointError, OSError) as error:
        report.fail(str(error))


def _verify_structure(checkpoint: Checkpoint, report: Report) -> bool:
    """Whether the blocks of every tensor fill it."""
    before = len(report.problems)
    keys: Iterable[str] = checkpoint.tensors
    if isinstance(checkpoint.index, TableIndex):
        records, coverage = checkpoint.index.survey()
        keys = (records[number].key for number in coverage.faulty())
    for key in keys:
        with _noting(report):
            checkpoint.tensors[key].chunks()  # says what is wrong
    return len(report.problems) == before


def _verify_descriptions(checkpoint: Checkpoint, report: Report) -> None:
    for prefix in checkpoint.prefixes():
        with _noting(report):
            if checkpoint.meta(prefix) != checkpoint.stored_meta(prefix):
                report.fail(
                    f"{checkpoint.path}: {prefix}{META_KEY} differs from what {MANIFEST_NAME} says"
                )


def _tell(report: Report, file: Location, damaged: Iterable[Span]) -> None:
    for span in damaged:
        report.fail(
            f"{file}, bytes {span.start} to {span.stop}: {span.content()} is damaged or missing"
        )


# ---------------------------------------------------------------------- with a manifest


def _verify_own(directory: Directory, names: set[str], report: Report) -> Checkpoint | None:
    root = directory.location
    manifest = read_manifest(directory)
    report.facts |= {
        "format": manifest.format,
        "metadata": "verified",
        "tensors": len(manifest.tensors),
        "files": len(manifest.files) + 1,
        "bytes": sum(f.num_bytes for f in manifest.files),
    }
    with _noting(report):
        check_listing(root, names, manifest)
    if strays := set(filter(is_stray, names)):
        report.notes.append(f"{len(strays)} files are not part of it, such as {min(strays)}")
    faulty = set()
    for record in manifest.files:
        before = len(report.problems)
        with _noting(report):
            check_file(directory, record, manifest.uuid)
        if len(report.problems) > before:
            faulty.add(record.name)
    checkpoint = table = None
    entries: dict[str, list[tuple[int, int, str]]] = {}
    if not faulty & {manifest.chunks_name, METADATA_NAME}:
        with _noting(report):
            checkpoint = open_listed(directory, manifest)
            if isinstance(checkpoint.index, DcpIndex):
                entries = checkpoint.index.entries()
            filled = _verify_structure(checkpoint, report)
            if filled and isinstance(checkpoint.index, TableIndex):
                table = _Table(checkpoint.index.table, manifest)
    for number, record in enumerate(manifest.files):
        before = len(report.problems)
        spans: Iterable[Span] = ()
        with _noting(report):
            if table is not None:
                spans = table.spans(number)
            elif record.name in entries:
                spans = _spans_of_entries(directory, record.name, entries[record.name], report)
        sound = record.name not in faulty and len(report.problems) == before
        try:
            digest, damaged = scan_file(directory / record.name, spans, record.num_bytes)
        except CheckpointUnreachableError:
            raise
        except (CheckpointError, OSError) as error:
            digest, damaged = record.digest, list(spans)
            if record.name not in faulty:
                report.fail(str(error))
        _tell(report, root / record.name, damaged)
        if digest != record.digest and sound and not damaged:
            report.fail(
                f"{root / record.name}: its digest is not the one in the manifest; what has "
                "changed lies outside the data of its tensors"
            )
    return checkpoint


class _Table:
    """The chunks by file; a few columns of numbers instead of an object per chunk."""

    def __init__(self, table: ChunkTable, manifest: Manifest) -> None:
        self._table = table
        self._manifest = manifest
        self._columns = table.places()
        self._order = np.lexsort((self._columns["byte_offset"], self._columns["file"]))
        self._files = self._columns["file"][self._order]

    def spans(self, number: int) -> Iterator[Span]:
        """The chunks in a file, in its order.

        Raises:
            CheckpointCorruptError: they leave a hole in the file, or overlap.
        """
        record = self._manifest.files[number]
        first, last = np.searchsorted(self._files, [number, number + 1])
        rows = self._order[first:last]
        starts = self._columns["byte_offset"][rows]
        stops = starts + self._columns["num_bytes"][rows]
        if record.header_bytes and not np.array_equal(
            np.append(starts, record.num_bytes), np.append(record.header_bytes, stops)
        ):
            raise CheckpointCorruptError(f"the chunks in {record.name} leave holes or overlap")
        digests = self._columns["digest"][rows]
        for row, start, stop, digest in zip(rows, starts, stops, digests, strict=True):
            describe = partial(self._describe, int(row))
            yield Span(int(start), int(stop), digest.tobytes(), None, describe)

    def _describe(self, row: int) -> str:
        tensor = int(self._columns["tensor"][row])
        record = self._manifest.tensors[tensor]
        (chunk,) = self._table.rows(row, 1, tensor=tensor, ndim=len(record.shape))
        return f"{record.key}, the chunk at {chunk.box.offsets} of size {chunk.box.sizes},"


# ---------------------------------------------------------------------- PyTorch's own


def _verify_stock(directory: Directory, names: set[str], report: Report) -> Checkpoint:
    checkpoint = open_directory(directory, names)
    assert isinstance(checkpoint.index, DcpIndex)
    entries = checkpoint.index.entries()
    report.facts |= {
        "format": "dcp",
        "metadata": "unverified",
        "tensors": len(checkpoint.tensors),
        "files": len(entries) + 1,
        "bytes": sum(length for places in entries.values() for _, length, _ in places),
    }
    _verify_structure(checkpoint, report)
    unchecked = 0
    for name, places in entries.items():
        with _noting(report):
            file = inside(directory.location, name)
            spans = _spans_of_entries(directory, name, places, report)
            checked = [span for span in spans if span.crc32 is not None]
            unchecked += len(spans) - len(checked)
            _, damaged = scan_file(directory / name, checked, checked[-1].stop if checked else 0)
            _tell(report, file, damaged)
    if unchecked:
        report.facts["unchecked"] = unchecked
        report.notes.append(f"{unchecked} records carry no CRC32, so their bytes were not checked")
    if others := names - entries.keys() - {METADATA_NAME}:
        report.notes.append(f"{len(others)} files are not part of it, such as {min(others)}")
    return checkpoint


def _spans_of_entries(
    directory: Directory, name: str, entries: Sequence[tuple[int, int, str]], report: Report
) -> list[Span]:
    """The records in the entries of a ``.distcp`` file, in its order."""
    found: list[Span] = []
    end = 0
    file = inside(directory.location, name)
    with directory.open(name) as opened:
        for offset, length, key in entries:
            with _noting(report):
                if offset < end:
                    raise CheckpointCorruptError(
                        f"{file}: {key} at byte {offset} overlaps the entry before it"
                    )
                end = offset + length
                for record in records(opened, offset, length, f"{key} in {file}"):
                    start, stop = record.byte_offset, record.byte_offset + record.num_bytes
                    describe = partial("{} of {}".format, record.name, key)
                    if start < stop:
                        found.append(Span(start, stop, None, record.crc32, describe))
    found.sort(key=lambda span: span.start)
    for before, span in pairwise(found):
        if span.start < before.stop:
            raise CheckpointCorruptError(f"{file}: {span.content()} overlaps {before.content()}")
    return found
