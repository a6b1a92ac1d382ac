"""What consolidating costs in time and memory, against a copy and against the other tools.

``python launch/bench/consolidate.py``. One model, saved by four ranks in each of three layouts.
Each row is a command of its own, so that its time has the start of the interpreter in it and its
peak is its own; rows take turns, and medians are compared. What is read lies in the page cache.
``consolidate`` verifies every byte and makes its output durable; of the others, only the copy is
made durable. What they write is compared with ``dcp_to_torch_save``'s tensors once.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COPY = "cp -r + fsync"
OURS = "consolidate"
COLUMNS = (
    *("date", "git sha", "torch", "python", "cpu", "layout", "parameters", "row"),
    *("median_s", "work_s", "peak_mb", "ratio_to_cp", "rounds"),
)


def copy(folder: Path, target: Path) -> None:
    """The same bytes, by the shortest way, on disk for good."""
    subprocess.run(["cp", "-r", str(folder / "ours"), str(target)], check=True)
    for path in (*target.iterdir(), target, target.parent):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def ours(source: str, **options: object) -> Callable[[Path, Path], None]:
    """``consolidate`` of one of the sources."""

    def run(folder: Path, target: Path) -> None:
        from sharded_ema import consolidate

        report = consolidate(
            folder / source, target, prefix="model", progress=False, **options  # type: ignore[arg-type]
        )  # fmt: skip
        if not report.ok:
            raise RuntimeError(report.text())

    return run


def dcp_to_torch(folder: Path, target: Path) -> None:
    """PyTorch's own."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    target.mkdir()
    warnings.filterwarnings("ignore", category=UserWarning)
    dcp_to_torch_save(folder / "dcp", target / "model.pt")


def hugging_face(folder: Path, target: Path) -> None:
    """PyTorch's for the shards of its writer for Hugging Face."""
    from torch.distributed.checkpoint._consolidate_hf_safetensors import (
        consolidate_safetensors_files,
    )

    from layouts import model_shapes

    numel = int((folder / "numel").read_text())
    target.mkdir()
    files = {name: 1 + number % 4 for number, name in enumerate(model_shapes(numel))}
    consolidate_safetensors_files(str(folder / "hf"), str(target), files, num_threads=4)


def zero_to_fp32(folder: Path, target: Path) -> None:
    """DeepSpeed's, of files as it writes them, without the optimizer's moments."""
    from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict

    convert_zero_checkpoint_to_fp32_state_dict(
        str(folder / "zero"), str(target), safe_serialization=True
    )


ROWS: dict[str, Callable[[Path, Path], None]] = {
    COPY: copy,
    OURS: ours("ours"),
    f"{OURS} --jobs 2": ours("ours", jobs=2, max_shard_size="500MB"),
    f"{OURS} --dtype bfloat16": ours("ours", dtype="bfloat16"),
    f"{OURS} of stock DCP": ours("dcp"),
    "dcp_to_torch_save": dcp_to_torch,
    "consolidate_safetensors_files": hugging_face,
    "zero_to_fp32": zero_to_fp32,
}


def rows_of(layout: str) -> list[str]:
    """Those that can read the layout."""
    left_out = "consolidate_safetensors_files" if layout == "ranges" else "zero_to_fp32"
    return [name for name in ROWS if name != left_out]


def work(name: str, folder: Path, target: Path) -> None:
    """One row, in a process of its own; says how long the work itself took, and its peak."""
    start = time.perf_counter()
    ROWS[name](folder, target)
    seconds = time.perf_counter() - start
    status = Path("/proc/self/status").read_text()
    peak = int(status.partition("VmHWM:")[2].split()[0]) * 1024
    if name == COPY:
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    print(json.dumps({"seconds": seconds, "peak": peak}))


def command(name: str, folder: Path, target: Path) -> tuple[float, float, float]:
    """Wall seconds of the row's command, seconds of its work, and its peak in MB."""
    line = [sys.executable, __file__, "--work", name, str(folder), str(target)]
    start = time.perf_counter()
    done = subprocess.run(line, check=True, stdout=subprocess.PIPE, text=True)
    wall = time.perf_counter() - start
    said = json.loads(done.stdout.splitlines()[-1])
    return wall, said["seconds"], said["peak"] / 1e6


def check_equal(folder: Path, shapes: Sequence[str]) -> None:
    """What ``consolidate`` wrote is what ``dcp_to_torch_save`` wrote, tensor by tensor."""
    import torch
    from safetensors import safe_open

    path = folder / "stock" / "model.pt"
    stock = torch.load(path, mmap=True, weights_only=True)  # noqa: TID251 - made a moment ago
    for name in ("ours", "of-dcp"):
        with safe_open(folder / name / "model.safetensors", "pt") as file:
            if set(file.keys()) != set(shapes):
                raise RuntimeError(f"{name} holds other tensors")
            for key in shapes:
                if not torch.equal(file.get_tensor(key), stock[f"model.{key}"]):
                    raise RuntimeError(f"{key} differs in {name}")


def measure(folder: Path, layout: str, numel: int, rounds: int) -> list[dict[str, str]]:
    """Write one layout, compare the outputs, time all rows in turn."""
    from layouts import LAYOUTS, model_shapes, write

    (folder / "numel").write_text(str(numel))
    write(folder, layout, numel)
    shapes = model_shapes(numel)
    for name, row in (
        ("ours", OURS),
        ("of-dcp", f"{OURS} of stock DCP"),
        ("stock", "dcp_to_torch_save"),
    ):
        command(row, folder, folder / f"equal-{name}")
    (folder / "equal").mkdir()
    for name in ("ours", "of-dcp", "stock"):
        (folder / f"equal-{name}").rename(folder / "equal" / name)
    check_equal(folder / "equal", list(shapes))
    shutil.rmtree(folder / "equal")
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in rows_of(layout)}
    for _ in range(rounds):
        for name, results in found.items():
            os.sync()  # what other rows left unwritten shall not weigh on this one
            results.append(command(name, folder, folder / "target"))
            shutil.rmtree(folder / "target")
    print(f"\n{layout}: {LAYOUTS[layout]}; outputs equal under torch.equal")
    print(f"  {'':<32} {'median s':>9} {'/ cp':>6} {'work s':>8} {'peak MB':>8}")
    baseline = statistics.median(wall for wall, _, _ in found[COPY])
    lines = []
    for name, results in found.items():
        wall, seconds, peak = (statistics.median(part) for part in zip(*results, strict=True))
        ratio = wall / baseline
        print(f"  {name:<32} {wall:>9.2f} {ratio:>6.2f} {seconds:>8.2f} {peak:>8.0f}")
        lines.append(
            {
                "layout": layout,
                "parameters": str(sum(math.prod(shape) for shape in shapes.values())),
                "row": name,
                "median_s": f"{wall:.3f}",
                "work_s": f"{seconds:.3f}",
                "peak_mb": f"{peak:.0f}",
                "ratio_to_cp": f"{ratio:.3f}",
                "rounds": str(rounds),
            }
        )
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and append to the table of results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument(
        "--parameters", type=int, default=500_000_000, help="at least (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--layouts", nargs="+", default=["rows", "columns", "ranges"])
    parser.add_argument("--dir", type=Path, help="where to write; takes 24 bytes a parameter")
    parser.add_argument(
        "--csv", type=Path, default=ROOT / "docs" / "benchmarks" / "consolidate.csv",
        help="table to append to (default: docs/benchmarks/consolidate.csv)",
    )  # fmt: skip
    parser.add_argument("--work", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.work:
        work(args.work[0], Path(args.work[1]), Path(args.work[2]))
        return 0
    from measure import append_rows, machine

    lines = []
    for layout in args.layouts:
        with tempfile.TemporaryDirectory(dir=args.dir) as folder:
            lines += measure(Path(folder), layout, args.parameters, args.rounds)
    append_rows(args.csv, COLUMNS, [{**machine(), **line} for line in lines])
    return 0


if __name__ == "__main__":
    sys.exit(main())
