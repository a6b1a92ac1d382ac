"""Processes that share one consolidation, out of a source that gives each so much and no more.

What is shared out is worth it where a process, or its machine, reads more slowly than the storage
could: over a network, from an object store. The stand-in for that: every process waits after each
read, for as long as the bytes take at RATE.

    python launch/bench/parts.py
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from sharded_ema import ShardedEMA

PROCESSES = (1, 2, 4)
# Started once the others are, so that what is timed is no import.
THROTTLED = """
import sys, time
from sharded_ema.checkpoint import files
from sharded_ema.tools.consolidate import consolidate
source, out, size, part, rate = sys.argv[1:]
read = files.OpenFile.read_at
def slowly(file, view, position):
    count = read(file, view, position)
    time.sleep(count / float(rate))
    return count
files.OpenFile.read_at = slowly
print("ready", flush=True)
sys.stdin.readline()
assert consolidate(source, out, max_shard_size=size, part=part, progress=False).ok
"""


def timed(source: Path, out: Path, size: int, count: int, rate: float) -> float:
    """Seconds that so many processes take together."""
    command = [sys.executable, "-c", THROTTLED, str(source), str(out), str(size)]
    running = [
        subprocess.Popen(
            [*command, f"{index}/{count}", str(rate)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for index in range(count)
    ]
    for process in running:
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    started = time.perf_counter()
    for process in running:
        assert process.stdin is not None
        process.stdin.write(b"\n")
        process.stdin.flush()
    for process in running:
        process.wait()
    assert not any(process.returncode for process in running)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--megabytes", type=int, default=320)
    parser.add_argument("--files", type=int, default=32)
    parser.add_argument("--rate", type=float, default=10e6, help="bytes per second and process")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root, elements = Path(folder), args.megabytes * 250_000 // args.files
        model = torch.nn.ParameterList(torch.rand(elements) for _ in range(args.files))
        ShardedEMA(model, 0.9).save(root / "source", step=1)
        wanted: dict[str, bytes] = {}
        alone = 0.0
        print("processes  seconds  times as fast")
        for count in PROCESSES:
            out = root / f"out-{count}"
            seconds = timed(root / "source", out, 4 * elements, count, args.rate)
            alone = alone or seconds
            print(f"{count:9}  {seconds:7.1f}  {alone / seconds:13.2f}", flush=True)
            found = {path.name: path.read_bytes() for path in out.iterdir()}
            wanted = wanted or found
            if found != wanted:
                raise RuntimeError(f"{count} processes have written other bytes than one")


if __name__ == "__main__":
    main()
