"""Checkpoints for tests, written with numpy straight from the description of the format."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from safetensors.numpy import save

from sharded_ema.checkpoint.names import CHUNKS_NAME, MANIFEST_NAME
from sharded_ema.checkpoint.reading.chunks import Chunk
from sharded_ema.checkpoint.reading.manifest import (
    FileRecord,
    Manifest,
    TensorRecord,
    dump_manifest,
)
from sharded_ema.checkpoint.safetensors import ITEMSIZE, build_header
from sharded_ema.model.layout import Box, FlatRange, Shape

UUID = "00112233445566778899aabbccddeeff"
NAME = {
    "float64": "F64", "float32": "F32", "float16": "F16", "int64": "I64", "uint8": "U8",
    "bool": "BOOL",
}  # fmt: skip
#: From the shape of a tensor to the boxes of each rank.
Chunking = Callable[[Shape], list[list[Box]]]


def meta(**changes: Any) -> dict[str, Any]:
    """What an average says of itself."""
    return {
        "version": 1, "kind": "ema", "step": 100, "applied_steps": 100, "seed_step": 0,
        "last_lerp_step": 100, "update_every": 1, "start_step": 0, "num_updates": 100,
        "profiles": {
            "ema": {"schedule": {"type": "Constant", "decay": 0.999}, "decay": 0.999,
                    "seed_weight": 0.01}
        },
        "aliases": {}, "buffers": "copy", "frozen": "save", "absent": {"count": 0, "names": []},
        "nonfinite_elements": 0, **changes,
    }  # fmt: skip


def meta_bytes(size: int = 4096, **changes: Any) -> np.ndarray:
    """The ``_meta`` tensor: JSON, zero-padded."""
    return np.frombuffer(json.dumps(meta(**changes)).encode().ljust(size, b"\0"), np.uint8)


def whole(shape: Shape) -> list[list[Box]]:
    return [[Box.whole(shape)]]


def rows(ranks: int) -> Chunking:
    """Uneven blocks of dimension 0, as FSDP2 makes them."""

    def cut(shape: Shape) -> list[list[Box]]:
        if not shape:
            return whole(shape)
        step = -(-shape[0] // ranks)
        starts = range(0, shape[0], max(1, step))
        return [
            [Box((s, *[0] * (len(shape) - 1)), (min(step, shape[0] - s), *shape[1:]))]
            for s in starts
        ]

    return cut


def grid(shape: Shape) -> list[list[Box]]:
    """Two by two uneven blocks of the last two dimensions, as tensor parallelism makes them."""
    if len(shape) < 2 or min(shape[-2:]) < 2:
        return whole(shape)
    *outer, high, wide = shape
    zeros = (0,) * len(outer)
    found = []
    for top, tall in ((0, high // 2), (high // 2, high - high // 2)):
        for left, broad in ((0, wide // 3 or 1), (wide // 3 or 1, wide - (wide // 3 or 1))):
            found.append([Box((*zeros, top, left), (*outer, tall, broad))])
    return found


def ranges(ranks: int) -> Chunking:
    """Flat ranges that begin and end anywhere, as ZeRO and sliced replicas make them."""

    def cut(shape: Shape) -> list[list[Box]]:
        total = math.prod(shape)
        ends = [total * (i + 1) // ranks for i in range(ranks)]
        return [
            [box for _, box in FlatRange(start, stop).boxes(shape)]
            for start, stop in zip([0, *ends], ends, strict=False)
        ]

    return cut


def make(
    path: Path,
    tensors: Mapping[str, np.ndarray],
    chunking: Chunking = whole,
    *,
    metas: Mapping[str, dict[str, Any]] | None = None,
    dtypes: Mapping[str, str] | None = None,
    change: Callable[[list[tuple[int, Chunk]]], None] | None = None,
    uuid: str = UUID,
    listed: Mapping[str, dict[str, Any]] | None = None,
) -> Path:
    """Write a committed checkpoint.

    Args:
        tensors: by key; ``_meta`` is added under each prefix of ``metas``.
        metas: descriptions by prefix; one average at the top unless given.
        dtypes: safetensors names for those that numpy lacks (bfloat16 as uint16).
        change: alters the chunk table's rows before all digests are computed.
        uuid: of the save.
        listed: descriptions for the manifest, if they are to differ from those in the tensors.
    """
    metas = {"": meta()} if metas is None else metas
    arrays = dict(tensors)
    for prefix, said in metas.items():
        arrays[f"{prefix}_meta"] = meta_bytes(**said)
    names = {k: (dtypes or {}).get(k) or NAME[str(a.dtype)] for k, a in arrays.items()}
    path.mkdir(parents=True)
    pieces: dict[int, list[tuple[str, Box]]] = {}
    for key, array in arrays.items():
        # One rank writes the description, whole.
        cut = whole if key.endswith("_meta") else chunking
        for rank, boxes in enumerate(cut(array.shape)):
            pieces.setdefault(rank, []).extend((key, box) for box in boxes if box.numel)
    files: list[FileRecord] = []
    chunks: dict[str, list[Chunk]] = {key: [] for key in arrays}
    for rank, mine in pieces.items():
        if not mine:
            continue
        mine.sort(key=lambda piece: -ITEMSIZE[names[piece[0]]])
        record, written = _write_shard(path, rank, mine, arrays, names, uuid)
        files.append(record)
        for (key, _), chunk in zip(mine, written, strict=True):
            chunks[key].append(chunk)
    records: list[TensorRecord] = []
    table: list[tuple[int, Chunk]] = []
    for key in sorted(arrays):
        mine_sorted = sorted(chunks[key], key=lambda c: c.box.offsets)
        shape = tuple(arrays[key].shape)
        records.append(TensorRecord(key, shape, names[key], len(table), len(mine_sorted)))
        table += [(len(records) - 1, chunk) for chunk in mine_sorted]
    if change is not None:
        change(table)
    data = chunk_table(table, {f.name: i for i, f in enumerate(files)}, uuid)
    (path / CHUNKS_NAME).write_bytes(data)
    files.append(FileRecord(CHUNKS_NAME, len(data), xxhash.xxh3_128_hexdigest(data)))
    manifest = Manifest(
        "safetensors", uuid, dict(listed or metas), tuple(records), tuple(files),
        max(1, len(pieces)), {"torch": "0"},
    )  # fmt: skip
    (path / MANIFEST_NAME).write_bytes(dump_manifest(manifest))
    return path


def chunk_table(rows: Sequence[tuple[int, Chunk]], file_ids: Mapping[str, int], uuid: str) -> bytes:
    """The chunk table, row by row.

    Args:
        rows: ``(tensor id, chunk)``, in their order.
        file_ids: position of each file in the manifest.
    """
    width = max([1, *(len(chunk.box.sizes) for _, chunk in rows)])
    columns = {
        "tensor": [tensor for tensor, _ in rows],
        "offsets": [[*c.box.offsets, *[0] * (width - len(c.box.sizes))] for _, c in rows],
        "sizes": [[*c.box.sizes, *[1] * (width - len(c.box.sizes))] for _, c in rows],
        "file": [file_ids[chunk.file] for _, chunk in rows],
        "byte_offset": [chunk.byte_offset for _, chunk in rows],
        "num_bytes": [chunk.num_bytes for _, chunk in rows],
    }
    shapes = {"offsets": (-1, width), "sizes": (-1, width)}
    arrays: dict[str, np.ndarray] = {
        name: np.array(column, np.int64).reshape(shapes.get(name, -1))
        for name, column in columns.items()
    }
    digests = b"".join(chunk.digest or b"" for _, chunk in rows)
    arrays["digest"] = np.frombuffer(digests, np.uint8).reshape(-1, 16)
    return save(arrays, {"format": "pt", "uuid": uuid})


def _write_shard(
    path: Path,
    rank: int,
    pieces: Sequence[tuple[str, Box]],
    arrays: Mapping[str, np.ndarray],
    names: Mapping[str, str],
    uuid: str,
) -> tuple[FileRecord, list[Chunk]]:
    described = [(f"{key}@{i}", names[key], box.sizes) for i, (key, box) in enumerate(pieces)]
    header, entries = build_header(described, {"format": "pt", "uuid": uuid})
    name = f"shard-{rank:05d}.safetensors"
    blocks = []
    chunks = []
    for (key, box), entry in zip(pieces, entries, strict=True):
        slices = tuple(slice(o, o + n) for o, n in zip(box.offsets, box.sizes, strict=True))
        data = np.ascontiguousarray(arrays[key][slices]).tobytes()
        digest = xxhash.xxh3_128_digest(data)
        chunks.append(Chunk(box, name, len(header) + entry.start, len(data), digest))
        blocks.append(data)
    content = header + b"".join(blocks)
    (path / name).write_bytes(content)
    digest_of_header = xxhash.xxh3_128_hexdigest(header)
    record = FileRecord(
        name, len(content), xxhash.xxh3_128_hexdigest(content), len(header), digest_of_header
    )
    return record, chunks


def flip(path: Path, position: int) -> None:
    """Change one bit of a file."""
    data = bytearray(path.read_bytes())
    data[position] ^= 0x10
    path.write_bytes(data)
