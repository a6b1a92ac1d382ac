"""What saving and consolidating an average cost, as ratios to plain writing and to stock DCP.

``python launch/bench/save.py``. One process, one plain model; all rows of a case are timed in turn.
Everything that is read lies in the page cache, so a copy is as fast as it can be. ``limit`` writes
the same bytes, makes them durable, and does nothing else.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from measure import ROOT, Report, Row, medians
from sharded_ema import SaveHandle, ShardedEMA, consolidate

ROW_BYTES = 4 * 4096
MATRIX_ROWS = 1024  # 16 MiB


def build_model(megabytes: int) -> nn.Module:
    """A plain model whose fp32 average has this size, in matrices of 16 MiB and less."""
    model = nn.Module()
    rows, weights = megabytes * 2**20 // ROW_BYTES, []
    while rows:
        part = min(rows, MATRIX_ROWS)
        weights.append(nn.Parameter(torch.randn(part, ROW_BYTES // 4)))
        rows -= part
    model.weights = nn.ParameterList(weights)
    return model


def sync(path: Path) -> None:
    """Make a file, or the entries of a directory, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_raw(path: Path, data: Sequence[Tensor]) -> None:
    """The same bytes in one file, by the shortest way."""
    path.mkdir()
    with open(path / "data", "wb", buffering=0) as stream:
        for tensor in data:
            view = tensor.view(-1).view(torch.uint8).numpy().data
            while view.nbytes:
                view = view[stream.write(view) :]
        os.fsync(stream.fileno())
    sync(path)
    sync(path.parent)


def copy_durably(source: Path, target: Path) -> None:
    """``cp -r`` and the fsync without which a copy is a promise."""
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    for path in target.iterdir():
        sync(path)
    sync(target)
    sync(target.parent)


def clear(path: Path) -> Callable[[], None]:
    """Removes ``path``, and lets nothing that other rows left unwritten weigh on the next one."""

    def before() -> None:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        os.sync()

    return before


def save_rows(ema: ShardedEMA, folder: Path) -> list[Row]:
    """The average to disk. Ours is checksummed; all of them are fsynced."""
    averages = {key: value for key, value in ema.state_dict().items() if key != "_meta"}
    data = list(averages.values())
    limit, stock = "raw write + fsync", "stock dcp.save"

    def stock_save() -> None:
        # Its file writer syncs as well, unless told otherwise.
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            dcp.save(averages, checkpoint_id=folder / "stock", no_dist=True)

    def row(name: str, call: Callable[[Path], object], baseline: str | None) -> Row:
        target = folder / name.replace(" ", "-")
        return Row(name, lambda: call(target), baseline, limit, clear(target))

    return [
        Row(limit, lambda: write_raw(folder / "raw", data), before=clear(folder / "raw")),
        Row(stock, stock_save, None, limit, clear(folder / "stock")),
        row("ema.save safetensors", lambda path: ema.save(path, step=1), stock),
        row("ema.save dcp", lambda path: ema.save(path, step=1, format="dcp"), stock),
    ]


def blocked_rows(ema: ShardedEMA, folder: Path) -> list[Row]:
    """How long an asynchronous save holds up its caller, against a copy of the same bytes."""
    averages = [value for key, value in ema.state_dict().items() if key != "_meta"]
    buffers = [torch.empty_like(tensor) for tensor in averages]
    limit, target = "memcpy", folder / "blocked"
    under_way: list[SaveHandle] = []

    def copy() -> None:
        for buffer, tensor in zip(buffers, averages, strict=True):
            buffer.copy_(tensor)

    def finish() -> None:
        while under_way:
            under_way.pop().result()
        clear(target)()

    def save() -> None:
        under_way.append(ema.save(target, step=1, asynchronous=True))

    return [
        Row(limit, copy, before=finish),
        Row("ema.save asynchronous", save, None, limit, finish),
    ]


def consolidate_rows(ema: ShardedEMA, folder: Path) -> list[Row]:
    """The average as one model. Ours verifies every byte and is fsynced; dcp_to_torch_save not."""
    ours, stock = folder / "source", folder / "source-dcp"
    ema.save(ours, step=1)
    ema.save(stock, step=1, format="dcp")
    limit, peer = "cp -r + fsync", "dcp_to_torch_save"

    def merge(source: Path, target: Path) -> None:
        if not consolidate(source, target, progress=False).ok:
            raise RuntimeError(f"{source} could not be consolidated")

    def row(name: str, call: Callable[[Path], object], against: tuple[str | None, str]) -> Row:
        target = folder / name.replace(" ", "-")
        return Row(name, lambda: call(target), *against, clear(target))

    copied = folder / "copied"
    return [
        Row(limit, lambda: copy_durably(ours, copied), before=clear(copied)),
        row(peer, lambda path: dcp_to_torch_save(stock, path), (None, limit)),
        row("consolidate safetensors", lambda path: merge(ours, path), (peer, limit)),
        row("consolidate dcp", lambda path: merge(stock, path), (peer, limit)),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and append to the table of results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--megabytes", type=int, default=256, help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="(default: %(default)s)")
    parser.add_argument(
        "--dir", type=Path, help="where to write; its file system is what is measured"
    )
    parser.add_argument(
        "--csv",
        type=Path,
        default=ROOT / "docs" / "benchmarks" / "save.csv",
        help="table to append to (default: docs/benchmarks/save.csv)",
    )
    args = parser.parse_args(argv)
    if args.megabytes < 1:
        parser.error("--megabytes must be at least 1")
    torch.set_num_threads(args.threads)
    report = Report("cpu")
    ema = ShardedEMA(build_model(args.megabytes), 0.999)
    with ExitStack() as stack:
        # In --dir too: what is removed at the end is then only what was made here.
        scratch = stack.enter_context(tempfile.TemporaryDirectory(dir=args.dir))
        cases = {"save": save_rows, "blocked": blocked_rows, "consolidate": consolidate_rows}
        for case, make in cases.items():
            folder = Path(scratch, case)
            folder.mkdir()
            rows = make(ema, folder)
            name = f"{case}: {args.megabytes} MiB"
            # The buffer of the first asynchronous save is the next one's.
            report.add(name, rows, medians(rows, args.rounds, warm=case == "blocked"))
            rows[-1].before()  # waits for a save under way
            shutil.rmtree(folder)
    report.append_to(args.csv)
    print("not run on GPU: saving is timed from host memory")
    return 0


if __name__ == "__main__":
    sys.exit(main())
