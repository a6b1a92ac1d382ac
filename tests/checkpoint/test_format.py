"""What the pages on the format say is true, and enough to read a checkpoint with."""

from __future__ import annotations

import json
import re
import shutil
import struct
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
import xxhash
from safetensors.torch import load_file
from torch import nn

from sharded_ema import ShardedEMA, consolidate, inspect, verify
from tests.data.make import KINDS, STEP, Model, expected, unpack
from tests.helpers.checkpoints import flip

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "format.md").read_text()
SCHEMA = json.loads((DOCS / "manifest.schema.json").read_text())


@pytest.fixture(scope="module", params=KINDS)
def kept(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of each kind, as an earlier version of the code wrote it."""
    return unpack(request.param, tmp_path_factory.mktemp("kept"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpack("v1-safetensors", tmp_path_factory.mktemp("whole"))


# ---------------------------------------------------------------------- kept checkpoints


def test_the_average_loads_bit_for_bit(kept: Path) -> None:
    model = Model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    ema = ShardedEMA(model, 0.5)
    assert ema.load(kept, verify=True) == ema.num_updates == STEP
    with ema.swap():
        found = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
        assert set(found) == {"wide.weight", "wide.bias", "deep", "scale"}
        for name, value in found.items():
            assert torch.equal(value, expected()[name]), name


def test_tools_read_it(kept: Path, tmp_path: Path) -> None:
    assert verify(kept).ok and inspect(kept).ok
    assert consolidate(kept, tmp_path / "out", progress=False).ok
    exported = load_file(tmp_path / "out" / "model.safetensors")
    wanted = expected()
    wanted["tied.weight"] = wanted["wide.weight"]
    # A nested save takes only what the average is responsible for.
    assert set(exported) <= set(wanted) and {"wide.weight", "scale"} <= set(exported)
    for name, value in exported.items():
        assert torch.equal(value, wanted[name]), name
    if "nested" not in kept.name:
        assert set(exported) == set(wanted)


# ---------------------------------------------------------------------- the schema


def manifests(tmp_path: Path) -> list[dict[str, Any]]:
    """The kept ones, and those of the code as it is."""
    ema = ShardedEMA(nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)), {"a": 0.9, "b": "power:0.1"})
    ema.save(tmp_path / "s", step=1)
    ema.save(tmp_path / "d", step=1, format="dcp")
    with ema.swap("a"):
        ema.save(tmp_path / "swapped", step=2)
    found = [tmp_path / "s", tmp_path / "d", tmp_path / "swapped"]
    found += [unpack(kind, tmp_path) for kind in KINDS if kind != "v1-nested-stock"]
    return [json.loads((path / "manifest.json").read_bytes()) for path in found]


def test_manifests_fit_the_schema(tmp_path: Path) -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    for manifest in manifests(tmp_path):
        jsonschema.validate(manifest, SCHEMA)
        # The kept checkpoints are older than some fields.
        assert set(manifest) <= set(SCHEMA["properties"]), "every field is in the schema"
        for described in manifest["emas"].values():
            assert set(described) <= set(SCHEMA["$defs"]["description"]["properties"])


@pytest.mark.parametrize("place", ["uuid", "tensors/0/shape", "files/0/name", "emas//step"])
def test_the_schema_is_strict(whole: Path, place: str) -> None:
    manifest = json.loads((whole / "manifest.json").read_bytes())
    *parents, last = [int(p) if p.isdigit() else p for p in place.split("/")]
    inner: Any = manifest
    for step in parents:
        inner = inner[step]
    for wrong in ("../x", None):
        with pytest.raises(jsonschema.ValidationError):
            inner[last] = wrong
            jsonschema.validate(manifest, SCHEMA)


def test_every_field_is_on_the_page() -> None:
    definitions = [SCHEMA, *SCHEMA["$defs"].values()]
    fields = {name for each in definitions for name in each.get("properties", {})}
    assert not [name for name in fields if f"`{name}`" not in PAGE]


# ---------------------------------------------------------------------- readers of their own


def reader_of_the_page() -> dict[str, Any]:
    """The program in docs/format.md, which knows nothing of this library."""
    (source,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    assert "sharded_ema" not in source.replace("sharded-ema", "")
    names: dict[str, Any] = {"__name__": "reader"}
    exec(source, names)
    return names


def test_the_reader_of_the_page_reads_every_tensor(whole: Path) -> None:
    reader = reader_of_the_page()
    for name, value in expected().items():
        keys = [f"ema.{name}", f"_frozen.{name}", f"_buffers.{name}"]
        manifest = reader["read_manifest"](whole)
        (key,) = [t["key"] for t in manifest["tensors"] if t["key"] in keys]
        assert np.array_equal(reader["read_tensor"](whole, key), value.numpy()), name
    meta = reader["read_tensor"](whole, "_meta").tobytes().rstrip(b"\0")
    assert json.loads(meta) == manifest["emas"][""]


def test_the_reader_of_the_page_refuses_damage(whole: Path, tmp_path: Path) -> None:
    reader = reader_of_the_page()
    random = np.random.default_rng(0)
    for file in sorted(whole.iterdir()):
        for position in random.integers(0, file.stat().st_size, 5):
            path = tmp_path / "harmed"
            shutil.copytree(whole, path)
            flip(path / file.name, int(position))
            with pytest.raises((SystemExit, ValueError, KeyError)):
                reader["read_tensor"](path, "ema.deep")
            shutil.rmtree(path)


DTYPES = {"F32": "<f4", "I64": "<i8", "U8": "u1", "BOOL": "?"}


class SmallReader:
    """Another one, written from the page: single rows of the table, single chunks of the data."""

    def __init__(self, root: Path) -> None:
        self.root = root
        raw = (root / "manifest.json").read_bytes()
        digest, zeroed = raw[-34:-2], raw[:-34] + b"0" * 32 + raw[-2:]
        assert xxhash.xxh3_128(zeroed).hexdigest().encode() == digest
        self.manifest = json.loads(raw)
        assert self.manifest["format_version"] == 1
        for record in self.manifest["files"]:
            head = self.read(record["name"], 0, record["header_bytes"])
            if head:
                assert xxhash.xxh3_128(head).hexdigest() == record["header_digest"]
                assert record["header_bytes"] % 4096 == 0
                assert record["header_bytes"] == 8 + struct.unpack("<Q", head[:8])[0]
                described = json.loads(head[8:])["__metadata__"]
                assert described == {"format": "pt", "uuid": self.manifest["uuid"]}
        table = "chunks.safetensors"
        self.length = 8 + struct.unpack("<Q", self.read(table, 0, 8))[0]
        self.columns = json.loads(self.read(table, 8, self.length - 8))
        assert self.length % 8 == 0

    def read(self, name: str, start: int, count: int) -> bytes:
        with open(self.root / name, "rb") as file:
            file.seek(start)
            return file.read(count)

    def cell(self, column: str, row: int) -> list[int]:
        described = self.columns[column]
        kind = {"I64": "q", "U8": "B"}[described["dtype"]]
        width = described["shape"][1] if len(described["shape"]) > 1 else 1
        size = struct.calcsize(f"<{width}{kind}")
        start = self.length + described["data_offsets"][0] + row * size
        return list(struct.unpack(f"<{width}{kind}", self.read("chunks.safetensors", start, size)))

    def tensor(self, key: str) -> np.ndarray:
        (number,) = [i for i, t in enumerate(self.manifest["tensors"]) if t["key"] == key]
        tensor = self.manifest["tensors"][number]
        out = np.zeros(tensor["shape"], DTYPES[tensor["dtype"]])
        first, count = tensor["chunks"]
        previous: list[int] = []
        for row in range(first, first + count):
            assert self.cell("tensor", row) == [number]
            offsets, sizes = self.cell("offsets", row), self.cell("sizes", row)
            assert previous < offsets, "rows are sorted"
            previous = offsets
            assert not any(offsets[out.ndim :]) and {1} >= set(sizes[out.ndim :])
            (file,), (start,) = self.cell("file", row), self.cell("byte_offset", row)
            (length,) = self.cell("num_bytes", row)
            data = self.read(self.manifest["files"][file]["name"], start, length)
            assert list(xxhash.xxh3_128(data).digest()) == self.cell("digest", row)
            block = np.frombuffer(data, out.dtype).reshape(sizes[: out.ndim])
            where = zip(offsets, sizes[: out.ndim], strict=False)
            out[tuple(slice(o, o + n) for o, n in where)] = block
        return out


def test_a_reader_of_rows_and_chunks(whole: Path) -> None:
    reader = SmallReader(whole)
    wanted = expected()
    for tensor in reader.manifest["tensors"]:
        name = tensor["key"].partition(".")[2]
        if name:
            assert np.array_equal(reader.tensor(tensor["key"]), wanted[name].numpy()), name
    assert [t["key"] for t in reader.manifest["tensors"]] == sorted(
        t["key"] for t in reader.manifest["tensors"]
    )
    assert reader.manifest["world_size"] == 2
    assert {f["name"] for f in reader.manifest["files"]} == {
        "chunks.safetensors", "shard-00000.safetensors", "shard-00001.safetensors",
    }  # fmt: skip
