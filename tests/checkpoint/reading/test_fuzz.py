"""Random changes under digests that are computed anew, so that every check behind them is met.

Whatever is done to a manifest, a chunk table, a header, a pickle or an archive: the readers answer,
or raise an error of this library, and never another one; they take little memory for it, and open
nothing outside the directory. ``make test`` runs a fixed 400 changes; ``make test-long`` goes on
for ten minutes.
"""

from __future__ import annotations

import io
import json
import os
import pickletools
import shutil
import struct
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
import xxhash
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

import sharded_ema
from sharded_ema import ShardedEMA, consolidate, inspect, verify
from sharded_ema.checkpoint.names import MANIFEST_NAME, is_plain_name
from sharded_ema.checkpoint.run import open_checkpoint
from sharded_ema.errors import EMAError
from tests.checkpoint.reading.test_hostile import signed, zipped
from tests.helpers.checkpoints import make, meta_bytes, rows

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

Files = dict[str, bytes]
Draw = Callable[[st.SearchStrategy], Any]
SECONDS = int(os.environ.get("FUZZ_SECONDS", "600"))

NUMBERS = st.one_of(
    st.sampled_from(
        [0, 1, -1, 2, 7, 8, 64, 65, 4095, 4096, 1 << 31, (1 << 63) - 1, 1 << 63, 1 << 64]
    ),
    st.integers(-3, 5000),
    st.integers(),
)
VALUES = st.recursive(
    st.one_of(
        st.none(), st.booleans(), NUMBERS, st.floats(allow_nan=False, allow_infinity=False),
        st.sampled_from(["", "ema", "F32", "U8", "dcp", "..", "/", "\ud800", "\0", "0" * 32,
                         "ema.weight", "_meta", "manifest.json", "shard-00000.safetensors"]),
        st.text(max_size=5),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)  # fmt: skip


# ---------------------------------------------------------------------- what is changed


def places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every place in a JSON tree, as container and index."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for index, value in list(items):
        yield tree, index
        if isinstance(value, dict | list):
            yield from places(value)


def change_tree(tree: Any, draw: Draw) -> None:
    """One to three changes of a JSON tree."""
    for _ in range(draw(st.integers(1, 3))):
        found = list(places(tree))
        if not found:
            return
        container, index = draw(st.sampled_from(found))
        action = draw(st.sampled_from(["replace", "nudge", "delete", "copy", "repeat"]))
        if action == "replace":
            container[index] = draw(VALUES)
        elif action == "nudge" and type(container[index]) is int:
            container[index] += draw(st.sampled_from([-8, -1, 1, 8, 4096, 1 << 62]))
        elif action == "delete":
            del container[index]
        elif action == "copy":
            other, there = draw(st.sampled_from(found))
            with suppress(KeyError, IndexError):
                container[index] = json.loads(json.dumps(other[there]))
        elif isinstance(container, list):
            container.append(container[index])
        else:
            container[draw(st.text(max_size=4))] = container[index]


def change_bytes(data: bytes, draw: Draw, start: int = 0) -> bytes:
    """Bytes replaced, removed or repeated."""
    changed = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        if len(changed) <= start:
            break
        at = draw(st.integers(start, len(changed) - 1))
        width = draw(st.sampled_from([1, 1, 2, 4, 8]))
        action = draw(st.sampled_from(["set", "number", "delete", "repeat"]))
        if action == "set":
            changed[at] = draw(st.integers(0, 255))
        elif action == "number":
            number = draw(NUMBERS) % (1 << 64)
            changed[at : at + width] = number.to_bytes(8, "little")[:width]
        elif action == "delete":
            del changed[at : at + width]
        else:
            changed[at:at] = changed[at : at + width]
    return bytes(changed)


def change_pickle(data: bytes, draw: Draw) -> bytes:
    """Instructions removed, repeated, exchanged, or with another number in them."""
    positions = [at for _, _, at in pickletools.genops(data)]
    parts = [data[a:b] for a, b in zip(positions, [*positions[1:], len(data)], strict=True)]
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(parts) - 1))
        other = draw(st.integers(0, len(parts) - 1))
        action = draw(st.sampled_from(["delete", "repeat", "swap", "copy", "number", "text"]))
        if action == "delete" and len(parts) > 1:
            del parts[at]
        elif action == "repeat":
            parts.insert(at, parts[at])
        elif action == "swap":
            parts[at], parts[other] = parts[other], parts[at]
        elif action == "copy":
            parts[at] = parts[other]
        elif action == "number":
            value = draw(NUMBERS)
            length = value.bit_length() // 8 + 1
            if length < 256:
                parts[at] = (
                    b"\x8a" + bytes([length]) + value.to_bytes(length, "little", signed=True)
                )
        else:
            text = draw(st.text(max_size=5)).encode()
            parts[at] = b"\x8c" + bytes([len(text)]) + text
    return b"".join(parts)


# ---------------------------------------------------------------------- the files


def reseal(files: Files, manifest: dict) -> None:
    """Sizes and digests in the manifest as the files now are."""
    for record in manifest["files"]:
        data = files[record["name"]]
        record["bytes"], record["digest"] = len(data), xxhash.xxh3_128_hexdigest(data)
        if record["header_bytes"]:
            length = min(len(data), 8 + int.from_bytes(data[:8], "little"))
            record["header_bytes"] = length
            record["header_digest"] = xxhash.xxh3_128_hexdigest(data[:length])
    files[MANIFEST_NAME] = signed(manifest)


def manifest_of(files: Files) -> dict:
    fields: dict = json.loads(files[MANIFEST_NAME])
    del fields["digest"]
    return fields


def in_manifest(files: Files, draw: Draw) -> None:
    manifest = manifest_of(files)
    change_tree(manifest, draw)
    files[MANIFEST_NAME] = signed(manifest) if manifest else b"{}"


def in_description(files: Files, draw: Draw) -> None:
    manifest = manifest_of(files)
    change_tree(manifest["emas"][""], draw)
    files[MANIFEST_NAME] = signed(manifest)


def in_table(files: Files, draw: Draw) -> None:
    data = files["chunks.safetensors"]
    start = 8 + int.from_bytes(data[:8], "little")
    cells = bytearray(data)
    for _ in range(draw(st.integers(1, 3))):
        at = start + 8 * draw(st.integers(0, (len(data) - start) // 8 - 1))
        cells[at : at + 8] = (draw(NUMBERS) % (1 << 64)).to_bytes(8, "little")
    files["chunks.safetensors"] = bytes(cells)
    reseal(files, manifest_of(files))


def in_header(name: str) -> Callable[[Files, Draw], None]:
    def change(files: Files, draw: Draw) -> None:
        data = files[name]
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        change_tree(header, draw)
        text = json.dumps(header).encode().ljust(length)
        files[name] = struct.pack("<Q", len(text)) + text + data[8 + length :]
        reseal(files, manifest_of(files))

    return change


def in_bytes(name: str) -> Callable[[Files, Draw], None]:
    def change(files: Files, draw: Draw) -> None:
        files[name] = change_bytes(files[name], draw)
        if MANIFEST_NAME in files:
            reseal(files, manifest_of(files))

    return change


def in_metadata(files: Files, draw: Draw) -> None:
    files[".metadata"] = change_pickle(files[".metadata"], draw)


def in_entry(files: Files, draw: Draw) -> None:
    """The entries are in the file one after the other; one of them is rebuilt in its place."""
    metadata = dcp.FileSystemReader(BASES["stock"]).read_metadata()
    info = draw(st.sampled_from(list(metadata.storage_data.values())))
    data = files[info.relative_path]
    entry = data[info.offset : info.offset + info.length]
    with zipfile.ZipFile(io.BytesIO(entry)) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    if draw(st.booleans()):
        records["archive/data.pkl"] = change_pickle(records["archive/data.pkl"], draw)
        entry = zipped(records)
    else:  # the directory at the end
        entry = change_bytes(entry, draw, start=entry.index(b"PK\x01\x02"))
    # At the end of the archive is what a reader looks for first.
    entry = entry.rjust(info.length, b"\0")[-info.length :]
    files[info.relative_path] = data[: info.offset] + entry + data[info.offset + info.length :]


def in_stock_description(files: Files, draw: Draw) -> None:
    storage = dcp.FileSystemReader(BASES["stock"]).read_metadata().storage_data
    (info,) = [v for k, v in storage.items() if k.fqn == "ema._meta"]
    data = files[info.relative_path]
    with zipfile.ZipFile(io.BytesIO(data[info.offset : info.offset + info.length])) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    described = json.loads(records["archive/data/0"].rstrip(b"\0"))
    change_tree(described, draw)
    size = len(records["archive/data/0"])
    records["archive/data/0"] = json.dumps(described).encode().ljust(size, b"\0")[:size]
    entry = zipped(records).rjust(info.length, b"\0")
    files[info.relative_path] = data[: info.offset] + entry + data[info.offset + info.length :]


BASES: dict[str, Path] = {}
TARGETS: dict[str, tuple[str, Callable[[Files, Draw], None]]] = {
    "manifest": ("ours", in_manifest),
    "description": ("ours", in_description),
    "table": ("ours", in_table),
    "table header": ("ours", in_header("chunks.safetensors")),
    "table bytes": ("ours", in_bytes("chunks.safetensors")),
    "shard header": ("ours", in_header("shard-00000.safetensors")),
    "shard bytes": ("ours", in_bytes("shard-00000.safetensors")),
    "metadata": ("stock", in_metadata),
    "metadata bytes": ("stock", in_bytes(".metadata")),
    "entries": ("stock", in_entry),
    "stock description": ("stock", in_stock_description),
    "entry bytes": ("stock", in_bytes("__0_0.distcp")),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One checkpoint of ours and one of DCP, each with two averages' worth of kinds."""
    root = tmp_path_factory.mktemp("bases")
    arrays = {"ema.weight": np.ones((2, 3), "f4"), "ema.bias": np.ones(2, "f4")}
    BASES["ours"] = make(root / "ours", {**arrays, "_buffers.n": np.array(7)}, rows(2))
    average = {key: torch.from_numpy(value) for key, value in arrays.items()}
    average["ema.weight"] = average["ema.weight"].t().contiguous().t()
    state = {"ema": {**average, "_meta": torch.from_numpy(meta_bytes().copy())}, "n": 1}
    dcp.save(state, checkpoint_id=root / "stock", no_dist=True)
    BASES["stock"] = root / "stock"
    yield root
    BASES.clear()


# ---------------------------------------------------------------------- the watch

# More than a reader of such small files needs, whatever they claim.
MAX_BYTES = 256 << 20
#: What Python and its packages open on their own; of this package the lines of a traceback.
THEIRS = (
    sys.prefix, sys.base_prefix, "/proc/", "/dev/null",
    *(str(Path(package.__file__).parents[up]) for package, up in ((torch, 1), (sharded_ema, 0))),
)  # fmt: skip
OPENED: list[Any] | None = None
HOOKED: list[bool] = []


def note(event: str, arguments: tuple[Any, ...]) -> None:
    if OPENED is not None and event == "open":
        OPENED.append(arguments[0])


@contextmanager
def watched(root: Path) -> Iterator[None]:
    """Nothing outside ``root`` is opened in the block, and memory does not grow by much."""
    global OPENED
    if not HOOKED:
        sys.addaudithook(note)  # which nobody can remove again
        HOOKED.append(True)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = status("VmRSS")
    OPENED = opened = []
    try:
        yield
    finally:
        OPENED = None
    grown = status("VmHWM") - before
    assert grown < MAX_BYTES, f"{grown >> 20} MB"
    outside = [path for path in opened if leads_out(path, root)]
    assert not outside, outside


def status(name: str) -> int:
    """Bytes, as the system counts them."""
    text = Path("/proc/self/status").read_text()
    return int(text.split(f"{name}:")[1].split()[0]) << 10


def leads_out(path: Any, root: Path) -> bool:
    """Names alone are opened in a directory that is held."""
    if isinstance(path, int):
        return False
    text = os.fsdecode(path)
    if is_plain_name(text):
        return False
    return ".." in Path(text).parts or not text.startswith((str(root), *THEIRS))


@pytest.mark.parametrize("how", ["outside", "above", "memory"])
def test_the_watch_sees(tmp_path: Path, how: str) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").touch()
    with pytest.raises(AssertionError), watched(tmp_path / "a"):
        if how == "memory":
            np.ones(MAX_BYTES + (1 << 24), "u1")
        else:
            (tmp_path / "b" if how == "outside" else tmp_path / "a" / ".." / "b").read_bytes()
    with watched(tmp_path / "a"):
        (tmp_path / "a" / "c").touch()


def read_in_every_way(path: Path, out: Path) -> None:
    """Nothing but errors of this library may come out."""
    with suppress(EMAError):
        opened = open_checkpoint(path)
        for tensor in opened.tensors.values():
            tensor.chunks()
    for tool in (verify, inspect):
        with suppress(EMAError):
            tool(path).text()
    with suppress(EMAError):
        consolidate(path, out, progress=False)
    shutil.rmtree(out, ignore_errors=True)
    with suppress(EMAError):
        ShardedEMA(torch.nn.Linear(3, 2), 0.999).load(path, verify=True, strict=False)


def fuzz(root: Path, examples: int, number: int) -> None:
    contents = {
        kind: {file.name: file.read_bytes() for file in base.iterdir()}
        for kind, base in BASES.items()
    }
    path = root / "changed"

    @seed(number)
    @settings(
        max_examples=examples, deadline=None, database=None, phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.data())
    def change_and_read(data: st.DataObject) -> None:
        kind, change = TARGETS[data.draw(st.sampled_from(sorted(TARGETS)))]
        files = dict(contents[kind])
        change(files, data.draw)
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
        for name, content in files.items():
            (path / name).write_bytes(content)
        with watched(root):
            read_in_every_way(path, root / "out")

    change_and_read()


def test_the_bases_are_sound(bases: Path) -> None:
    for path in BASES.values():
        assert verify(path).ok
        assert ShardedEMA(torch.nn.Linear(3, 2), 0.999).load(path, verify=True) == 100


@pytest.mark.slow
def test_changes_under_good_digests(bases: Path) -> None:
    fuzz(bases, 400, 0)


@pytest.mark.long
@pytest.mark.timeout(SECONDS + 600)
def test_changes_under_good_digests_for_long(bases: Path) -> None:
    end, number = time.monotonic() + SECONDS, 1
    while time.monotonic() < end:
        fuzz(bases, 1000, number)
        number += 1
    print(f"{number - 1} rounds of 1000 changes")
