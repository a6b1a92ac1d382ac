"""Memory and time of consolidation at sizes at which they count."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import xxhash

from sharded_ema.checkpoint.names import CHUNKS_NAME, MANIFEST_NAME
from sharded_ema.checkpoint.reading.chunks import Chunk
from sharded_ema.checkpoint.reading.manifest import (
    FileRecord,
    Manifest,
    TensorRecord,
    dump_manifest,
)
from sharded_ema.checkpoint.safetensors import build_header
from sharded_ema.model.layout import Box
from tests.helpers.checkpoints import UUID, chunk_table, meta, meta_bytes

ROOT = Path(__file__).parents[2]
# ru_maxrss would include the peak of the process that started this one.
MEASURED = """
import json, re, sys, time
from pathlib import Path
from sharded_ema.tools.consolidate import consolidate
start = time.perf_counter()
report = consolidate(sys.argv[1], sys.argv[2], progress=False, **json.loads(sys.argv[3]))
seconds = time.perf_counter() - start
assert report.ok and "torch" not in sys.modules
peak = int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) // 1024
print(json.dumps({"peak": peak, "seconds": seconds, "facts": report.facts}))
"""


def measured(source: Path, target: Path, **options: Any) -> dict[str, Any]:
    command = [sys.executable, "-c", MEASURED, str(source), str(target), json.dumps(options)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("layout", ["rows", "columns", "ranges"])
def test_half_a_billion_parameters(tmp_path: Path, layout: str) -> None:
    code = f"""
if __name__ == "__main__":
    import sys
    from pathlib import Path
    sys.path.insert(0, {str(ROOT / "launch" / "bench")!r})
    from layouts import write
    write(Path({str(tmp_path)!r}), {layout!r}, 500_000_000)
"""
    (tmp_path / "write.py").write_text(code)
    subprocess.run([sys.executable, str(tmp_path / "write.py")], check=True, cwd=ROOT)
    for name, options in (("ours", {}), ("ours", {"dtype": "bfloat16", "jobs": 2}), ("dcp", {})):
        target = tmp_path / f"out-{len(list(tmp_path.iterdir()))}"
        found = measured(tmp_path / name, target, prefix="model", **options)
        assert found["facts"]["bytes"] >= 1e9
        assert found["peak"] < 128, f"{name} {options}: {found['peak']} MB"


def llama_70b() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"embed": (128256, 8192), "head": (128256, 8192)}
    for layer in range(80):
        for name, shape in {
            "q": (8192, 8192), "k": (1024, 8192), "v": (1024, 8192), "o": (8192, 8192),
            "up": (28672, 8192), "gate": (28672, 8192), "down": (8192, 28672),
            "norm1": (8192,), "norm2": (8192,),
        }.items():  # fmt: skip
            shapes[f"layers.{layer}.{name}"] = shape
    return shapes | {"norm": (8192,)}


def hollow_checkpoint(path: Path, ranks: int) -> Path:
    """A committed checkpoint of 70 billion parameters in rows, whose data was never written."""
    path.mkdir()
    shapes = {f"ema.{name}": shape for name, shape in sorted(llama_70b().items())}
    said = meta_bytes()
    files: list[FileRecord] = []
    chunks: dict[str, list[Chunk]] = {key: [] for key in ("_meta", *shapes)}
    digest = bytes(16)
    for rank in range(ranks):
        pieces = {}
        for key, (height, *rest) in shapes.items():
            share = -(-height // ranks)
            first, last = min(rank * share, height), min((rank + 1) * share, height)
            if last > first:
                pieces[key] = Box((first, *[0] * len(rest)), (last - first, *rest))
        described = [
            (f"{key}@{i}", "F32", box.sizes) for i, (key, box) in enumerate(pieces.items())
        ]
        if rank == 0:
            described.append(("_meta@0", "U8", (len(said),)))
        header, entries = build_header(described, {"format": "pt", "uuid": UUID})
        name = f"shard-{rank:05d}.safetensors"
        size = len(header) + entries[-1].stop
        with open(path / name, "wb") as file:
            file.write(header)
            file.truncate(size)
            if rank == 0:
                file.seek(len(header) + entries[-1].start)
                file.write(said.tobytes())
        boxes = [*pieces.items(), *([("_meta", Box((0,), (len(said),)))] if rank == 0 else [])]
        for (key, box), entry in zip(boxes, entries, strict=True):
            place = len(header) + entry.start
            chunks[key].append(Chunk(box, name, place, entry.stop - entry.start, digest))
        hashed = xxhash.xxh3_128_hexdigest(header)
        files.append(FileRecord(name, size, "0" * 32, len(header), hashed))
    rows, records = [], []
    for number, (key, mine) in enumerate(chunks.items()):
        shape, dtype = ((len(said),), "U8") if key == "_meta" else (shapes[key], "F32")
        records.append(TensorRecord(key, shape, dtype, len(rows), len(mine)))
        rows += [(number, chunk) for chunk in mine]
    table = chunk_table(rows, {f.name: i for i, f in enumerate(files)}, UUID)
    (path / CHUNKS_NAME).write_bytes(table)
    files.append(FileRecord(CHUNKS_NAME, len(table), xxhash.xxh3_128_hexdigest(table)))
    manifest = Manifest(
        "safetensors", UUID, {"": meta()}, tuple(records), tuple(files), ranks, {"torch": "0"}
    )
    (path / MANIFEST_NAME).write_bytes(dump_manifest(manifest))
    return path


def check_plan(tmp_path: Path, ranks: int) -> dict[str, Any]:
    source = hollow_checkpoint(tmp_path / "c", ranks)
    found = measured(source, tmp_path / "out", plan=True, dtype="bfloat16")
    assert found["facts"]["tensors"] == 723 and found["facts"]["files"] > 20
    assert found["facts"]["bytes"] == 2 * 70_553_706_496
    assert {path.name for path in tmp_path.iterdir()} == {"c"}
    return found


def test_a_plan_needs_no_data(tmp_path: Path) -> None:
    assert check_plan(tmp_path, 8)["peak"] < 128


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_plan_for_a_thousand_ranks(tmp_path: Path) -> None:
    found = check_plan(tmp_path, 1024)
    assert found["peak"] < 1024, "megabytes"
    # The only limit on time in the tests: a plan is looked at by a person who waits.
    assert found["seconds"] < 10
