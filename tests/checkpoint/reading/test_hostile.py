"""Files made to harm: a named error each, nothing runs, nothing hangs, memory stays bounded."""

from __future__ import annotations

import io
import json
import os
import pickle
import socket
import struct
import subprocess
import sys
import tracemalloc
import zipfile
from collections.abc import Callable
from contextlib import chdir, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
import xxhash
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from sharded_ema import consolidate, inspect, verify
from sharded_ema.checkpoint.checked_json import load_json
from sharded_ema.checkpoint.files import Directory
from sharded_ema.checkpoint.names import MANIFEST_NAME
from sharded_ema.checkpoint.reading.dcp import DcpIndex
from sharded_ema.checkpoint.reading.pickles import take_apart
from sharded_ema.checkpoint.run import open_checkpoint
from sharded_ema.checkpoint.safetensors import read_header
from sharded_ema.cli import main
from sharded_ema.errors import CheckpointCorruptError, CheckpointError, EMAError
from tests.helpers.checkpoints import make, meta, meta_bytes, rows

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.timeout(60)]


def stock(path: Path) -> Path:
    """A DCP checkpoint that this library did not write, with an average and a pickled value."""
    average = {"ema.w": torch.arange(12.0).view(3, 4), "ema.v": torch.arange(4.0)}
    average["_meta"] = torch.from_numpy(meta_bytes().copy())
    dcp.save({"ema": average, "steps": [1, 2]}, checkpoint_id=path, no_dist=True)
    return path


def refused_everywhere(path: Path, out: Path) -> str:
    """Every tool says no by a named error, or by a report; the message of the first."""
    with pytest.raises(CheckpointError) as caught:
        opened = open_checkpoint(path)
        for tensor in opened.tensors.values():
            tensor.chunks()
    with suppress(EMAError):
        assert not verify(path).ok
    with pytest.raises(EMAError):
        consolidate(path, out, progress=False)
    assert not out.exists()
    return str(caught.value)


# ---------------------------------------------------------------------- pickles


def gadgets(mark: Path) -> dict[str, bytes]:
    """Pickles that would create ``mark``, by the instruction that they do it with."""
    command = f"open({str(mark)!r}, 'w').close()".encode()
    text = b"X" + struct.pack("<I", len(command)) + command
    call = b"\x85R."  # TUPLE1 REDUCE STOP
    size = b"\x8c\x05torch\x8c\x04Size\x93"  # an allowed global
    return {
        "global": b"\x80\x04cbuiltins\nexec\n" + text + call,
        "stack_global": b"\x80\x04\x8c\x08builtins\x8c\x04exec\x93" + text + call,
        "inst": b"(" + text + b"ibuiltins\nexec\n.",
        "obj": b"(cbuiltins\nexec\n" + text + b"o.",
        "newobj": b"\x80\x04cbuiltins\nexec\n" + text + b"\x85\x81.",
        "newobj_ex": b"\x80\x04cbuiltins\nexec\n" + text + b"\x85}\x92.",
        "ext1": b"\x80\x02\x82\x01" + text + call,
        "ext2": b"\x80\x02\x83\x01\x00" + text + call,
        "ext4": b"\x80\x02\x84\x01\x00\x00\x00" + text + call,
        "dotted": b"\x80\x04\x8c\x05torch\x8c\x0eos.path.exists\x93" + text + call,
        "attribute": b"\x80\x04\x8c\x05torch\x8c\x0dSize.__new__\x93" + text + call,
        "build": b"\x80\x04" + size + b"}\x8c\x0a__setstate__cbuiltins\nexec\nsb.",
        "build_class": b"\x80\x04" + size + b")R" + text + b"b.",
        "call_of_text": b"\x80\x04" + text + b")R.",
        "persid": b"\x80\x04Pname\n.",
        "binpersid": b"\x80\x04" + text + b"Q.",
        "nested": b"\x80\x04]" + b"cos\nsystem\n" + text + b"\x85Ra.",
        "importing": b"\x80\x04\x8c\x09antigrav\x8c\x01x\x93.",
        "getattr": b"\x80\x04cbuiltins\ngetattr\n(" + text + b"X\x01\x00\x00\x00xtR.",
        "getattr_of_getattr": b"\x80\x04cbuiltins\ngetattr\n(cbuiltins\nexec\n" + text + b"tR.",
        "getattr_called": b"\x80\x04cbuiltins\ngetattr\n(ctorch\nSize\n" + text + b"tR)R.",
        "bytearray": b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b".",
        "out_of_band": b"\x80\x05\x97.",
    }


NAMES = sorted(gadgets(Path("x")))


def metadata_with(path: Path, gadget: bytes, where: str) -> bytes:
    """``.metadata`` that is, or holds, a gadget."""
    if where == "alone":
        return gadget
    whole = (path / ".metadata").read_bytes()
    # Just before the last instruction but one: everything else is as it should be.
    body = gadget.removeprefix(b"\x80\x04").removeprefix(b"\x80\x02").removesuffix(b".")
    assert whole.endswith(b"b.")
    return whole[:-2] + body + b"0b."


@pytest.mark.parametrize("where", ["alone", "inside"])
@pytest.mark.parametrize("name", NAMES)
def test_gadgets_in_the_metadata(tmp_path: Path, name: str, where: str) -> None:
    path, mark = stock(tmp_path / "c"), tmp_path / "mark"
    (path / ".metadata").write_bytes(metadata_with(path, gadgets(mark)[name], where))
    refused_everywhere(path, tmp_path / "out")
    assert not mark.exists()


@pytest.mark.parametrize("name", ["global", "stack_global", "inst", "obj"])
def test_the_gadgets_work_where_pickles_are_loaded(tmp_path: Path, name: str) -> None:
    with suppress(pickle.UnpicklingError, TypeError):
        pickle.loads(gadgets(tmp_path / "mark")[name])
    assert (tmp_path / "mark").exists()


def place_of(path: Path, key: str) -> tuple[Path, int, int]:
    storage = dcp.FileSystemReader(path).read_metadata().storage_data
    (info,) = [v for k, v in storage.items() if k.fqn == key]
    return path / info.relative_path, info.offset, info.length


def replace_entry(path: Path, key: str, entry: bytes) -> None:
    """Put other bytes where ``.metadata`` says that a tensor lies."""
    metadata = dcp.FileSystemReader(path).read_metadata()
    (info,) = [v for k, v in metadata.storage_data.items() if k.fqn == key]
    file = path / info.relative_path
    info.offset, info.length = file.stat().st_size, len(entry)
    with open(file, "ab") as opened:
        opened.write(entry)
    (path / ".metadata").write_bytes(pickle.dumps(metadata))


def entry_records(path: Path, key: str) -> dict[str, bytes]:
    file, offset, length = place_of(path, key)
    raw = file.read_bytes()[offset : offset + length]
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def zipped(records: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in records.items():
            archive.writestr(name, data)
    return buffer.getvalue()


@pytest.mark.parametrize("key", ["ema.ema.w", "ema._meta"])
@pytest.mark.parametrize("name", NAMES)
def test_gadgets_in_a_tensor(tmp_path: Path, name: str, key: str) -> None:
    path, mark = stock(tmp_path / "c"), tmp_path / "mark"
    records = entry_records(path, key)
    replace_entry(path, key, zipped({**records, "archive/data.pkl": gadgets(mark)[name]}))
    refused_everywhere(path, tmp_path / "out")
    assert not mark.exists()


@pytest.mark.parametrize("name", NAMES)
def test_gadgets_in_a_pickled_value_are_never_looked_at(tmp_path: Path, name: str) -> None:
    path, mark = stock(tmp_path / "c"), tmp_path / "mark"
    replace_entry(path, "steps", zipped({"archive/data.pkl": gadgets(mark)[name]}))
    assert verify(path).ok and inspect(path).ok
    assert consolidate(path, tmp_path / "out", progress=False).ok
    assert not mark.exists()


#: A tuple of tuples with 2 ** 100 leaves in 500 bytes: for ever to hash, to compare and to print.
NESTED = b"N" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(100))
BOMBS = {
    "key": b"\x80\x04}" + NESTED + b"Ns.",
    "call": b"\x80\x04\x8c\x05torch\x8c\x04Size\x93" + NESTED + b"\x85R.",
    "name": b"\x80\x04" + NESTED + NESTED + b"\x93.",
    "memo": b"\x80\x04Nr\xff\xff\xff\x7f.",
    "text": b"\x80\x04X\xff\xff\xff\x7fabc.",
    "text8": b"\x80\x04\x8d" + struct.pack("<Q", 1 << 60) + b"abc.",
    "bytes8": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 60) + b"abc.",
    "long4": b"\x80\x02\x8b\xff\xff\xff\x7f1.",
    "frame": b"\x80\x04\x95" + struct.pack("<Q", 1 << 62) + b"N.",
    "underrun": b"\x80\x04\x85\x85R.",
    "marks": b"\x80\x04" + b"(" * 100_000 + b".",
    "no_end": b"\x80\x04" + b"N" * 1000,
    "trailing": b"\x80\x04N." + b"cos\nsystem\n",
    "protocol": b"\x80\x09N.",
    "not_utf8": b"\x80\x04\x8c\x02\xed\xa0.",
    "surrogate": b"\x80\x04\x8c\x03\xed\xa0\x80.",
    "empty": b"",
}


@pytest.mark.parametrize("name", sorted(BOMBS))
def test_bombs_in_pickles(tmp_path: Path, name: str) -> None:
    path = stock(tmp_path / "c")
    (path / ".metadata").write_bytes(BOMBS[name])
    refused_everywhere(path, tmp_path / "out")


def test_bytes_after_the_end_of_the_metadata(tmp_path: Path) -> None:
    path = stock(tmp_path / "c")
    with open(path / ".metadata", "ab") as file:
        file.write(b"N.")
    assert "follow its end" in refused_everywhere(path, tmp_path / "out")


def test_a_chunk_that_is_listed_twice(tmp_path: Path) -> None:
    """Refused at once: a list of references to one chunk takes two bytes for each."""
    path = stock(tmp_path / "c")
    metadata = dcp.FileSystemReader(path).read_metadata()
    metadata.state_dict_metadata["ema.ema.w"].chunks *= 2  # type: ignore[union-attr]
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    assert "has no place, or two" in refused_everywhere(path, tmp_path / "out")


def test_chunks_shared_by_many_tensors(tmp_path: Path) -> None:
    """Without elements they need no place of their own; a thousand times a thousand of them."""
    path = stock(tmp_path / "c")
    metadata = dcp.FileSystemReader(path).read_metadata()
    shared = metadata.state_dict_metadata["ema.ema.w"]
    empty = ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([0, 4]))
    shared.chunks = [empty] * 1000  # type: ignore[union-attr]
    metadata.state_dict_metadata |= {f"t{i}": shared for i in range(1000)}
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    assert "more chunks than it has bytes" in refused_everywhere(path, tmp_path / "out")


# ---------------------------------------------------------------------- zip archives


def reorder(raw: bytes, **fields: int) -> bytes:
    """Change fields of the first record in the central directory, or of its end."""
    data = bytearray(raw)
    places = {
        "flags": (8, 2), "method": (10, 2), "crc": (16, 4), "compressed": (20, 4),
        "size": (24, 4), "name_length": (28, 2), "extra_length": (30, 2), "offset": (42, 4),
    }  # fmt: skip
    ends = {"entries": (10, 2), "directory_size": (12, 4), "directory_offset": (16, 4)}
    start, end = data.index(b"PK\x01\x02"), data.rindex(b"PK\x05\x06")
    for name, value in fields.items():
        base, (at, width) = (start, places[name]) if name in places else (end, ends[name])
        data[base + at : base + at + width] = value.to_bytes(width, "little")
    return bytes(data)


def zip64(raw: bytes) -> bytes:
    """Sizes of the first record replaced by enormous ones in an extra field."""
    data = bytearray(reorder(raw, size=0xFFFFFFFF, compressed=0xFFFFFFFF, extra_length=20))
    start = data.index(b"PK\x01\x02")
    name = int.from_bytes(data[start + 28 : start + 30], "little")
    extra = struct.pack("<HHQQ", 1, 16, 1 << 62, 1 << 62)
    at = start + 46 + name
    data[at:at] = extra
    return reorder(bytes(data), directory_size=data.rindex(b"PK\x05\x06") - start)


def duplicated(records: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in [*records.items(), ("archive/data/0", bytes(48))]:
            archive.writestr(name, data)
    return buffer.getvalue()


def overlapping(records: dict[str, bytes]) -> bytes:
    """The data said to lie in the pickle."""
    raw = zipped(dict(sorted(records.items(), reverse=True)))
    return reorder(raw, offset=raw.index(b"PK\x03\x04", 8))


TRICKS: dict[str, Callable[[dict[str, bytes]], bytes]] = {
    "compressed": lambda r: zipped(r, zipfile.ZIP_DEFLATED),
    "lzma": lambda r: zipped(r, zipfile.ZIP_LZMA),
    "duplicate": duplicated,
    "overlapping": overlapping,
    "huge": lambda r: zip64(zipped(r)),
    "encrypted": lambda r: reorder(zipped(r), flags=1),
    "method": lambda r: reorder(zipped(r), method=99),
    "size": lambda r: reorder(zipped(r), size=0x7FFFFFFF, compressed=0x7FFFFFFF),
    "sizes_differ": lambda r: reorder(zipped(r), size=1),
    "offset": lambda r: reorder(zipped(r), offset=0x7FFFFFFF),
    "sum": lambda r: reorder(zipped(r), crc=1),
    "name": lambda r: reorder(zipped(r), name_length=0xFFFF),
    "directory_size": lambda r: reorder(zipped(r), directory_size=0x7FFFFFFF),
    "directory_offset": lambda r: reorder(zipped(r), directory_offset=0x7FFFFFFF),
    "no_pickle": lambda r: zipped({k: v for k, v in r.items() if k != "archive/data.pkl"}),
    "no_data": lambda r: zipped({k: v for k, v in r.items() if k != "archive/data/0"}),
    "large_pickle": lambda r: zipped({**r, "archive/data.pkl": bytes(2 << 20)}),
    "big_endian": lambda r: zipped({**r, "archive/byteorder": b"big"}),
    "garbage": lambda r: b"PK\x05\x06" * 100,
    "nothing": lambda r: b"",
}


@pytest.mark.parametrize("name", sorted(TRICKS))
def test_tricks_with_zip_archives(tmp_path: Path, name: str) -> None:
    path = stock(tmp_path / "c")
    records = entry_records(path, "ema.ema.w")
    first = ["archive/data.pkl"] if name != "overlapping" else []
    ordered = {key: records[key] for key in [*first, *records]}
    replace_entry(path, "ema.ema.w", TRICKS[name](ordered))
    opened = open_checkpoint(path)
    with pytest.raises(CheckpointCorruptError, match=r"ema\.ema\.w"):
        opened.tensors["ema.ema.w"].chunks()
    assert not verify(path).ok
    with pytest.raises(EMAError):
        consolidate(path, tmp_path / "out", progress=False)


def test_the_tricks_are_sound_but_for_what_they_change(tmp_path: Path) -> None:
    path = stock(tmp_path / "c")
    replace_entry(path, "ema.ema.w", zipped(entry_records(path, "ema.ema.w")))
    assert verify(path).ok


def test_two_tensors_in_one_place(tmp_path: Path) -> None:
    path = stock(tmp_path / "c")
    metadata = dcp.FileSystemReader(path).read_metadata()
    places = {k.fqn: v for k, v in metadata.storage_data.items()}
    places["steps"].offset = places["ema.ema.w"].offset + 8
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    assert "overlaps" in verify(path).text()


# ---------------------------------------------------------------------- paths and kinds of files


def signed(fields: object) -> bytes:
    """A manifest of any content under a good digest."""
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    head = text.encode()[:-1] + b',"digest":"'
    return head + xxhash.xxh3_128_hexdigest(head + b"0" * 32 + b'"}').encode() + b'"}'


def resigned(path: Path, change: Callable[[dict], None]) -> Path:
    """A manifest with other content and a good digest."""
    fields = json.loads((path / MANIFEST_NAME).read_bytes())
    del fields["digest"]
    change(fields)
    (path / MANIFEST_NAME).write_bytes(signed(fields))
    return path


def plain(tmp_path: Path) -> Path:
    return make(tmp_path / "c", {"ema.w": np.ones((6, 4), "f4")}, rows(2))


def test_a_shard_of_another_save_under_good_digests(tmp_path: Path) -> None:
    path = plain(tmp_path)
    other = make(tmp_path / "d", {"ema.w": np.ones((6, 4), "f4")}, rows(2), uuid="1" * 32)
    shard = (other / "shard-00001.safetensors").read_bytes()
    (path / "shard-00001.safetensors").write_bytes(shard)

    def renew(manifest: dict) -> None:
        for record in manifest["files"]:
            if record["name"] == "shard-00001.safetensors":
                record["digest"] = xxhash.xxh3_128_hexdigest(shard)
                record["header_digest"] = xxhash.xxh3_128_hexdigest(shard[:4096])

    message = refused_everywhere(resigned(path, renew), tmp_path / "out")
    assert "shard-00001.safetensors belongs to another save" in message


BAD_NAMES = [
    "/etc/passwd", "../outside", "a/../../outside", "sub/file", "..", ".", "", "a\0b", "a\\b",
    "x" * 300, "\ud800", "manifest.json", 7, None, ["a"],
]  # fmt: skip


@pytest.mark.parametrize("name", BAD_NAMES, ids=[ascii(n)[:20] for n in BAD_NAMES])
def test_names_in_the_manifest(tmp_path: Path, name: object) -> None:
    path = plain(tmp_path)
    shard = path / "shard-00000.safetensors"
    (tmp_path / "outside").write_bytes(shard.read_bytes())
    resigned(path, lambda m: m["files"][0].update(name=name))
    refused_everywhere(path, tmp_path / "out")


@pytest.mark.parametrize(
    "name", [n for n in BAD_NAMES if isinstance(n, str) and n not in (".", "manifest.json")],
    ids=lambda n: ascii(n)[:20],
)  # fmt: skip
def test_names_in_the_metadata(tmp_path: Path, name: str) -> None:
    path = stock(tmp_path / "c")
    (tmp_path / "outside").write_bytes((path / "__0_0.distcp").read_bytes())
    metadata = dcp.FileSystemReader(path).read_metadata()
    for info in metadata.storage_data.values():
        info.relative_path = name
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    refused_everywhere(path, tmp_path / "out")


def linked_out(file: Path, aside: Path) -> None:
    file.rename(aside)
    file.symlink_to(aside)


def linked_relatively(file: Path, aside: Path) -> None:
    file.rename(aside)
    file.symlink_to(Path("..") / aside.name)


def linked_through_a_directory(file: Path, aside: Path) -> None:
    file.rename(aside)
    (file.parent / "door").symlink_to(aside.parent)
    file.symlink_to(Path("door") / aside.name)


def linked_to_itself(file: Path, aside: Path) -> None:
    file.unlink()
    file.symlink_to(file.name)


def linked_to_nothing(file: Path, aside: Path) -> None:
    file.unlink()
    file.symlink_to("nothing")


def linked_to_a_device(file: Path, aside: Path) -> None:
    file.unlink()
    file.symlink_to("/dev/zero")


def fifo(file: Path, aside: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def directory(file: Path, aside: Path) -> None:
    file.unlink()
    file.mkdir()


def a_socket(file: Path, aside: Path) -> None:
    file.unlink()
    # The path of a socket must be short.
    with chdir(file.parent), socket.socket(socket.AF_UNIX) as bound:
        bound.bind(file.name)


KINDS = [
    linked_out, linked_relatively, linked_through_a_directory, linked_to_itself, linked_to_nothing,
    linked_to_a_device, fifo, directory, a_socket,
]  # fmt: skip
FILES = [
    ("ours", "manifest.json"), ("ours", "chunks.safetensors"), ("ours", "shard-00001.safetensors"),
    ("stock", ".metadata"), ("stock", "__0_0.distcp"),
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.__name__)
@pytest.mark.parametrize("which, name", FILES)
def test_what_is_no_file_of_its_own(
    tmp_path: Path, which: str, name: str, kind: Callable[[Path, Path], None]
) -> None:
    path = plain(tmp_path) if which == "ours" else stock(tmp_path / "c")
    kind(path / name, tmp_path / "aside")
    refused_everywhere(path, tmp_path / "out")


# ---------------------------------------------------------------------- JSON


DEEP = b'{"a":' * 100_000 + b"1" + b"}" * 100_000
JSONS = {
    "deep_lists": b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep_objects": DEEP,
    "repeated": b'{"a":1,"a":2}',
    "repeated_inside": b'{"a":[{"b":1,"b":1}]}',
    "nan": b'{"a":NaN}',
    "infinity": b'{"a":-Infinity}',
    "beyond": b'{"a":1e999}',
    "far beyond": b'{"a":[-1e' + b"9" * 400 + b"]}",
    "deep": b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "digits": b'{"a":' + b"9" * 10_000 + b"}",
    "not_utf8": b'{"a":"\xff"}',
    "half": b'{"a":',
    "list": b"[]",
    "many": b'{"a":[' + b"0," * 4_000_001 + b"0]}",
}


@pytest.mark.parametrize("name", sorted(JSONS))
def test_json_that_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointCorruptError, match="here"):
        load_json(JSONS[name], "here")
    file = tmp_path / "f.safetensors"
    file.write_bytes(struct.pack("<Q", len(JSONS[name])) + JSONS[name])
    with pytest.raises(CheckpointCorruptError, match=r"f\.safetensors"):
        read_header(file)


MANIFESTS: dict[str, Callable[[dict], None]] = {
    "float_size": lambda m: m["files"][0].update(bytes=1e3),
    "bool_size": lambda m: m["files"][0].update(bytes=True),
    "negative_size": lambda m: m["files"][0].update(bytes=-1),
    "huge_size": lambda m: m["files"][0].update(bytes=1 << 80),
    "huge_header": lambda m: m["files"][0].update(header_bytes=1 << 62),
    "no_header": lambda m: m["files"][0].update(header_bytes=0),
    "header_elsewhere": lambda m: m["files"][0].update(header_bytes=4104),
    "text_size": lambda m: m["files"][0].update(bytes="1"),
    "no_digest": lambda m: m["files"][0].pop("digest"),
    "file_twice": lambda m: m["files"].append(m["files"][0]),
    "tensor_twice": lambda m: m["tensors"].append(m["tensors"][1]),
    "no_files": lambda m: m.update(files=[]),
    "no_tensors": lambda m: m.update(tensors=[]),
    "huge_shape": lambda m: m["tensors"][1].update(shape=[1 << 62, 1 << 62]),
    "wrapping_shape": lambda m: m["tensors"][1].update(shape=[1 << 63, 2]),
    "float_shape": lambda m: m["tensors"][1].update(shape=[6.0, 4]),
    "negative_shape": lambda m: m["tensors"][1].update(shape=[-6, -4]),
    "many_dims": lambda m: m["tensors"][1].update(shape=[1] * 65 + [6, 4]),
    "smaller_shape": lambda m: m["tensors"][1].update(shape=[5, 4]),
    "transposed": lambda m: m["tensors"][1].update(shape=[4, 6]),
    "flat": lambda m: m["tensors"][1].update(shape=[24]),
    "dtype": lambda m: m["tensors"][1].update(dtype="F64"),
    "unknown_dtype": lambda m: m["tensors"][1].update(dtype="F31"),
    "list_dtype": lambda m: m["tensors"][1].update(dtype=["F32"]),
    "fewer_chunks": lambda m: m["tensors"][1].update(chunks=[1, 1]),
    "more_chunks": lambda m: m["tensors"][1].update(chunks=[1, 1 << 62]),
    "others_chunks": lambda m: m["tensors"][1].update(chunks=[0, 2]),
    "three_chunks": lambda m: m["tensors"][1].update(chunks=[0, 1, 2]),
    "no_key": lambda m: m["tensors"][1].update(key=""),
    "half_a_key": lambda m: m["tensors"][1].update(key="\ud800"),
    "other_uuid": lambda m: m.update(uuid="0" * 32),
    "other_format": lambda m: m.update(format="dcp"),
    "no_format": lambda m: m.update(format="pickle"),
    "later_version": lambda m: m.update(format_version=3),
    "text_version": lambda m: m.update(format_version="1"),
    "other_kind": lambda m: m.update(kind="model"),
    "emas_list": lambda m: m.update(emas=[]),
    "ema_without_tensor": lambda m: m["emas"].update({"x.": m["emas"][""]}),
    "libraries": lambda m: m.update(libraries={"torch": 2}),
}


@pytest.mark.parametrize("name", sorted(MANIFESTS))
def test_manifests_that_cannot_be(tmp_path: Path, name: str) -> None:
    refused_everywhere(resigned(plain(tmp_path), MANIFESTS[name]), tmp_path / "out")


DESCRIPTIONS: dict[str, object] = {
    "version": "1", "kind": "model", "step": 1.5, "num_updates": -1, "applied_steps": None,
    "seed_step": "0", "last_lerp_step": True, "update_every": 0, "start_step": [], "profiles": {},
    "aliases": {"a": "b"}, "buffers": 1, "frozen": None, "absent": {"count": 1, "names": [1]},
    "nonfinite_elements": 0.5, "sampled_distance": {"ema": -1}, "adapters": "default",
}  # fmt: skip
PROFILES: list[object] = [
    {"ema": 1},
    {"e.m": {"schedule": {}, "decay": 0.5, "seed_weight": 0}},
    {"ema": {"schedule": [], "decay": 0.5, "seed_weight": 0}},
    {"ema": {"schedule": {}, "decay": 1.5, "seed_weight": 0}},
    {"ema": {"schedule": {}, "decay": "0.5", "seed_weight": 0}},
    {"ema": {"schedule": {}, "decay": 0.5}},
    {"ema": {"schedule": {}, "decay": 1e400, "seed_weight": 0}},
]


@pytest.mark.parametrize(
    "field, value", [*DESCRIPTIONS.items(), *(("profiles", p) for p in PROFILES)]
)
def test_descriptions_that_cannot_be(tmp_path: Path, field: str, value: object) -> None:
    path = plain(tmp_path)
    resigned(path, lambda m: m["emas"][""].update({field: value}))
    for tool in (verify, inspect):
        with suppress(EMAError):
            assert not tool(path).ok
    with pytest.raises(EMAError):
        consolidate(path, tmp_path / "out", progress=False)


@pytest.mark.parametrize("field", sorted({*DESCRIPTIONS} - {"sampled_distance", "adapters"}))
def test_descriptions_that_lack_a_field(tmp_path: Path, field: str) -> None:
    path = resigned(plain(tmp_path), lambda m: m["emas"][""].pop(field))
    with pytest.raises(EMAError):
        inspect(path)
    assert main(["consolidate", str(path), str(tmp_path / "out"), "--no-progress"]) != 0


# ---------------------------------------------------------------------- the chunk table


def tampered(path: Path, column: str, value: int | bytes, row: int = 1) -> Path:
    """A cell of the chunk table changed, all digests renewed."""
    file = path / "chunks.safetensors"
    data = bytearray(file.read_bytes())
    entries, _, start = read_header(file)
    entry = entries[column]
    width = (entry.stop - entry.start) // entry.shape[0]
    cell = value if isinstance(value, bytes) else value.to_bytes(8, "little", signed=True)
    at = start + entry.start + row * width
    data[at : at + len(cell)] = cell
    file.write_bytes(data)
    digest = xxhash.xxh3_128_hexdigest(bytes(data))

    def renew(manifest: dict) -> None:
        for record in manifest["files"]:
            if record["name"] == file.name:
                record["digest"] = digest

    return resigned(path, renew)


LARGEST = (1 << 63) - 1
CELLS = [
    ("tensor", 0), ("tensor", -1), ("tensor", LARGEST), ("offsets", 1), ("offsets", -1),
    ("offsets", LARGEST), ("sizes", 2), ("sizes", 4), ("sizes", 0), ("sizes", -3),
    ("sizes", LARGEST), ("file", 2), ("file", -1), ("file", 99), ("file", LARGEST),
    ("byte_offset", 0), ("byte_offset", 4095), ("byte_offset", -1), ("byte_offset", LARGEST),
    ("num_bytes", 0), ("num_bytes", 47), ("num_bytes", -1), ("num_bytes", LARGEST),
]  # fmt: skip


@pytest.mark.parametrize("column, value", CELLS)
def test_cells_that_cannot_be(tmp_path: Path, column: str, value: int) -> None:
    refused_everywhere(tampered(plain(tmp_path), column, value), tmp_path / "out")


@pytest.mark.parametrize("column, value", [("byte_offset", 4100), ("digest", bytes(16))])
def test_cells_that_only_the_data_can_refute(
    tmp_path: Path, column: str, value: int | bytes
) -> None:
    path = tampered(plain(tmp_path), column, value)
    open_checkpoint(path).tensors["ema.w"].chunks()
    assert not verify(path).ok
    with pytest.raises(CheckpointCorruptError):
        consolidate(path, tmp_path / "out", progress=False)


# ---------------------------------------------------------------------- memory and time


LIMITED = """
import resource, sys
from pathlib import Path
from sharded_ema.errors import EMAError
from sharded_ema.tools.verify import verify
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
resource.setrlimit(resource.RLIMIT_CPU, (40, 40))
for path in sys.argv[1:]:
    try:
        report = verify(path)
    except EMAError as error:
        print(type(error).__name__)
    else:
        assert not report.ok, path
        print("damaged")
"""


def sparse(file: Path, head: bytes, size: int) -> None:
    with open(file, "wb") as opened:
        opened.write(head)
        opened.truncate(size)


def huge(tmp_path: Path) -> dict[str, Path]:
    """Checkpoints that say they are enormous, most of them a few kilobytes on disk."""
    found: dict[str, Path] = {}

    def ours(name: str) -> Path:
        found[name] = make(tmp_path / name, {"ema.w": np.ones((6, 4), "f4")}, rows(2))
        return found[name]

    def theirs(name: str) -> Path:
        found[name] = stock(tmp_path / name)
        return found[name]

    sparse(ours("manifest") / MANIFEST_NAME, b"{", 1 << 40)
    sparse(ours("table") / "chunks.safetensors", struct.pack("<Q", (1 << 40) - 8) + b"{", 1 << 40)
    sparse(theirs("metadata") / ".metadata", b"\x80\x04", 1 << 40)
    # 250 MB of instructions that make an empty dict each would take 16 GB; this many take 1.
    (theirs("dicts") / ".metadata").write_bytes(b"\x80\x04" + b"}" * 3_000_000 + b".")
    (theirs("memo") / ".metadata").write_bytes(b"\x80\x04Nr\xff\xff\xff\xff.")
    claim(theirs("archive"), 1 << 33)
    base = (theirs("nested") / ".metadata").read_bytes()
    (found["nested"] / ".metadata").write_bytes(base[:-2] + NESTED + b"\x85" + b"b.")
    (theirs("nested_key") / ".metadata").write_bytes(BOMBS["key"])
    shards = ours("chunks")

    def many_dims(manifest: dict) -> None:
        manifest["tensors"][1]["shape"] = [2] * 64

    resigned(shards, many_dims)
    resigned(ours("rows"), lambda m: m["tensors"][1].update(chunks=[1, 1 << 40]))
    resigned(ours("header"), lambda m: m["files"][0].update(header_bytes=1 << 40, bytes=1 << 41))
    sparse(found["header"] / "shard-00000.safetensors", b"", 1 << 41)
    described = ours("description")
    resigned(described, lambda m: m["emas"][""].update(aliases={"a": ["b" * 1_000_000] * 20}))
    return found


def claim(path: Path, size: int) -> None:
    """Let the entries of a stock checkpoint be one archive, a hole but for the end of it."""
    end = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, 1, 1, size, 0)
    end += struct.pack("<4sLQL", b"PK\x06\x07", 0, size, 1)
    end += struct.pack("<4s4H2LH", b"PK\x05\x06", *[0xFFFF] * 4, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    with open(path / "__0_0.distcp", "wb") as file:
        file.truncate(size)
        file.seek(size)
        file.write(end)
    metadata = dcp.FileSystemReader(path).read_metadata()
    for index, info in metadata.storage_data.items():
        metadata.storage_data[index] = replace(info, offset=0, length=size + len(end))
    (path / ".metadata").write_bytes(pickle.dumps(metadata))


PICKLES = {
    "dicts": b"}",
    "dicts, memoized": b"}\x94",
    "lists": b"]",
    "marks": b"(",
    "full lists": b"]Na",
    "full dicts": b"}h\x00Ns",
    "pairs": b"NN\x86",
    "texts": b"\x8c\x02ab",
    "numbers": b"M\xe8\x03",
    "bytes": b"C\x02ab",
    "globals": b"ctorch\nSize\n",
    "notes": b"h\x01)R",
}


@pytest.mark.parametrize("name", sorted(PICKLES))
def test_pickles_take_memory_in_proportion(name: str) -> None:
    """Refused, or at most 25 bytes for each of theirs."""
    size = 1 << 19
    begin = b"\x80\x04\x8c\x01a\x94ctorch\nSize\n\x94"
    data = begin + PICKLES[name] * (size // len(PICKLES[name])) + b"."
    tracemalloc.start()
    with suppress(CheckpointCorruptError):
        take_apart(data, lambda _: True, "here")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 25 * len(data), f"{peak / len(data):.0f} bytes for each"


# Before 3.11.4 Python pickles enumerations through getattr, which is not allowed, below protocol 3.
@pytest.mark.parametrize("protocol", [*[2] * (sys.version_info >= (3, 11, 4)), 3, 4, 5])
def test_large_descriptions_are_not_taken_for_bombs(tmp_path: Path, protocol: int) -> None:
    """Short names and many chunks: what takes most memory for its bytes."""
    tensors, storage = {}, {}
    for number in range(2000):
        offsets = [torch.Size([8 * i]) for i in range(3)]
        tensors[f"p{number}"] = TensorStorageMetadata(
            TensorProperties(),
            torch.Size([24]),
            [ChunkStorageMetadata(offset, torch.Size([8])) for offset in offsets],
        )
        for i, offset in enumerate(offsets):
            index = MetadataIndex(f"p{number}", offset, i)
            storage[index] = _StorageInfo(f"__{i}_0.distcp", number, 1)
    (tmp_path / ".metadata").write_bytes(
        pickle.dumps(Metadata(tensors, None, storage), protocol=protocol)
    )
    assert len(DcpIndex(Directory(tmp_path)).tensors) == 2000


def test_what_says_it_is_enormous(tmp_path: Path) -> None:
    """One GiB of address space and 40 seconds for all of them."""
    found = huge(tmp_path)
    found["header"].joinpath("shard-00000.safetensors").unlink()  # hashing 2 TiB takes its time
    run = subprocess.run(
        [sys.executable, "-c", LIMITED, *map(str, found.values())],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert len(run.stdout.split()) == len(found)


def test_names_do_not_reach_the_terminal_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make(tmp_path / "c", {"ema.\x1b[31mred\r": np.ones(3, "f4")}, metas={"": meta()})
    assert main(["inspect", str(path), "--tensors"]) == 0
    out = capsys.readouterr().out
    assert "\\x1b[31mred\\r" in out and "\x1b" not in out and "\r" not in out


def test_names_do_not_forge_lines_of_a_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for mark in ("\n", "\r\n", "\x85", "\u2028", "\u202e"):
        path = make(
            tmp_path / f"c{ord(mark[0])}",
            {f"ema.x{mark}  note: signed{mark}y": np.ones(3, "f4")},
            metas={"": meta()},
        )
        for command in (["inspect", str(path), "--tensors"], ["verify", str(path)]):
            main(command)
            said = capsys.readouterr()
            text = said.out + said.err
            assert not [line for line in text.splitlines() if line.strip() == "note: signed"]
            assert mark[-1] == "\n" or mark not in text
