"""Tensors filled with what chunks of a checkpoint hold."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby

import torch
from torch import Tensor

from sharded_ema.checkpoint.dtypes import TORCH_DTYPE
from sharded_ema.checkpoint.files import Bytes
from sharded_ema.checkpoint.reading.chunks import Chunk
from sharded_ema.checkpoint.reading.opened import Checkpoint
from sharded_ema.checkpoint.reading.ranges import (
    Check,
    FileCheck,
    Stretch,
    blocks_of,
    filled,
    near_bytes,
    read_stretches,
)
from sharded_ema.checkpoint.reading.stream import ChunkCheck
from sharded_ema.errors import CheckpointMismatchError
from sharded_ema.model.layout import Box


@dataclass(frozen=True, slots=True, eq=False)
class Filling:
    """Some elements of a chunk, and where they go.

    Attributes:
        key: of the tensor that the chunk is of.
        chunk: that holds them.
        box: the elements, counted from the first of the chunk.
        into: of the size of ``box``, on any device; the elements are converted to its dtype.
    """

    key: str
    chunk: Chunk
    box: Box
    into: Tensor


@torch.no_grad()
def fill(
    checkpoint: Checkpoint,
    fillings: Sequence[Filling],
    *,
    verify: bool,
    headers: Collection[str] = (),
) -> None:
    """Read what is needed, each file opened once, and copy it to where it goes.

    Args:
        verify: compare what is read with its checksum: chunks are read whole, of this library's
            checkpoints in the format ``"dcp"`` files, since what an entry says of itself does not
            show that it belongs to this save. A chunk that is read in one request is compared
            before it is copied.
        headers: names of files whose headers were not compared with the manifest before.

    Raises:
        CheckpointCorruptError: a file is not there or too short, or a checksum differs. Some of
            what is filled may have been overwritten.
        CheckpointMismatchError: a chunk that is to be verified carries no checksum.
    """
    manifest = checkpoint.manifest
    records = {file.name: file for file in manifest.files} if manifest is not None else {}
    whole_files = verify and checkpoint.format == "dcp" and bool(records)
    wanted: dict[str, list[Stretch]] = {}
    ordered = sorted(fillings, key=_place)
    for (name, _), group in groupby(ordered, key=_place):
        stretches = wanted.setdefault(name, [])
        if name in headers and not stretches and records[name].header_bytes:
            record = records[name]
            path = checkpoint.path / name
            check = FileCheck(path, record.header_bytes, record.header_digest)
            stretches.append(Stretch(0, record.header_bytes, check))
        stretches += _stretches(checkpoint, list(group), verify=verify, whole_file=whole_files)
    for name in wanted:
        if whole_files:
            size = records[name].num_bytes
            check = FileCheck(checkpoint.path / name, size, records[name].digest)
            wanted[name] = filled(wanted[name], size, check)
    read_stretches(checkpoint.directory, wanted)


def _place(filling: Filling) -> tuple[str, int]:
    return filling.chunk.file, filling.chunk.byte_offset


def _stretches(
    checkpoint: Checkpoint, fillings: Sequence[Filling], *, verify: bool, whole_file: bool
) -> Iterator[Stretch]:
    """What is to be read of one chunk."""
    key, chunk = fillings[0].key, fillings[0].chunk
    if not verify:
        for filling in fillings:
            yield from _blocks(checkpoint, chunk, filling.box, None, [filling])
        return
    check: ChunkCheck | None = None
    if not whole_file:
        if chunk.digest is None and chunk.crc32 is None:
            raise CheckpointMismatchError(
                f"{key} in {checkpoint.path} was written without a CRC32, so it cannot be "
                "verified; load it with verify=False if you trust it"
            )
        check = ChunkCheck(checkpoint.directory, chunk, key)
    yield from _blocks(checkpoint, chunk, Box.whole(chunk.box.sizes), check, fillings)


def _blocks(
    checkpoint: Checkpoint,
    chunk: Chunk,
    box: Box,
    check: Check | None,
    fillings: Sequence[Filling],
) -> Iterator[Stretch]:
    tensor = checkpoint.tensors[fillings[0].key]
    dtype = TORCH_DTYPE[tensor.dtype]
    for start, block in blocks_of(chunk, box, tensor.itemsize, near_bytes(checkpoint.path)):
        put = partial(_copy, dtype, chunk, block, fillings)
        yield Stretch(start, start + block.numel * tensor.itemsize, check, put)


def _copy(
    dtype: torch.dtype, chunk: Chunk, block: Box, fillings: Sequence[Filling], data: Bytes
) -> None:
    """Copy what fillings need of a block of a chunk, of which ``data`` are the bytes."""
    if data.ctypes.data % dtype.itemsize:
        data = data.copy()  # PyTorch ends the process over complex elements that lie askew
    flat = torch.from_numpy(data).view(dtype)
    source = flat.view(block.sizes) if chunk.strides is None else (
        flat.as_strided(block.sizes, chunk.strides)
    )  # fmt: skip
    for filling in fillings:
        common = filling.box.common(block)
        if common is not None:
            target = filling.into[common.within(filling.box).slices]
            target.copy_(source[common.within(block).slices])
