"""``consolidate``: one averaged model out of a sharded checkpoint, streaming, without PyTorch.

Everything is planned from metadata first. Tensors are then assembled through small buffers into
safetensors files in the Hugging Face layout, every chunk's checksum being verified on the way, and
the finished directory is published by one rename: whoever looks finds nothing or a whole model.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sharded_ema.checkpoint.reading.catalog import Catalog, open_checkpoint
from sharded_ema.checkpoint.reading.safetensors_file import ITEMSIZE, build_header
from sharded_ema.checkpoint.reading.stream import SourceFiles, stream_tensor
from sharded_ema.config import DEFAULT_PROFILE
from sharded_ema.errors import ConfigError
from sharded_ema.tools.casting import caster
from sharded_ema.tools.contents import Average, find_average
from sharded_ema.tools.huggingface import read_model
from sharded_ema.tools.planning import (
    Files,
    Output,
    check_space,
    check_target,
    complete,
    plan_model,
    publishing,
    verify_rest,
    write_all,
)
from sharded_ema.tools.report import Report


def consolidate(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    profile: str = DEFAULT_PROFILE,
    dtype: str | None = None,
    max_shard_size: str | int = "5GB",
    prefix: str | None = None,
    like: str | os.PathLike[str] | None = None,
    jobs: int = 1,
    tied: str = "drop",
    adapter: str | None = None,
    progress: bool = True,
) -> Report:
    """Write one average as a model directory that ``from_pretrained`` loads.

    Args:
        src: a committed checkpoint: ours, or a DCP one with an average of ours in it.
        dst: directory to create; it must not exist, or be empty.
        profile: which average.
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"`` for floating tensors, rounded to
            nearest even; ``None`` keeps what is stored.
        max_shard_size: bytes per output file, such as ``"5GB"``; a larger tensor gets its own.
        prefix: key prefix of the average if the checkpoint holds several.
        like: a Hugging Face directory. Its configuration and tokenizer files are copied; if it has
            safetensors weights, names and shapes must be theirs. The directory of a PEFT adapter
            makes the output one: ``adapter_model.safetensors``, with PEFT's names.
        jobs: output files written at a time.
        tied: ``"drop"`` writes tied weights under one name, ``"emit"`` under all their names.
        adapter: write the PEFT adapter of this name; needed if the model had several.
        progress: show a progress bar on standard error.

    Returns:
        A report. If ``ok`` is false a check failed and nothing was published.

    Raises:
        CheckpointError: the source cannot be read, is corrupt or lacks the profile; the target
            exists or cannot be written. Nothing is left at ``dst``.
        ConfigError: an argument is out of range.
    """
    started = time.monotonic()
    if jobs < 1:
        raise ConfigError(f"jobs must be at least 1, got {jobs}")
    catalog = open_checkpoint(src)
    average = find_average(catalog, profile, prefix)
    target = Path(dst)
    check_target(target, catalog.path)
    report = Report("consolidate", str(src))
    model = read_model(Path(like)) if like is not None else None
    files = plan_model(
        average,
        report,
        dtype=dtype,
        max_shard_size=max_shard_size,
        model=model,
        tied=tied,
        adapter=adapter,
    )
    outputs = [output for _, group in files for output in group]
    if not report.ok:
        return report
    check_space(target, sum(o.num_bytes for o in outputs))
    with publishing(target) as staging:
        verify_rest(catalog, average.prefix)
        unchecked = _write_files(catalog, average, files, staging, jobs=jobs, progress=progress)
        copied = complete(staging, files, model)
    if unchecked:
        report.notes.append(f"{unchecked} chunks carry no CRC32, so their bytes were not checked")
    report.facts |= {
        "output": str(target),
        "profile": profile,
        "step": average.meta["step"],
        "updates": average.meta["num_updates"],
        "tensors": len(outputs),
        "bytes": sum(o.num_bytes for o in outputs),
        "files": len(files),
        "copied": len(copied),
        "metadata": "verified" if catalog.verified_metadata else "unverified",
        "seconds": round(time.monotonic() - started, 3),
    }
    return report


def _write_files(
    catalog: Catalog,
    average: Average,
    files: Files,
    staging: Path,
    *,
    jobs: int,
    progress: bool,
) -> int:
    """Write the output files; returns how many chunks had no checksum to compare with."""
    settings = average.meta["profiles"][average.profile]
    header = {
        "format": "pt",
        "kind": "ema",
        "profile": average.profile,
        "decay": repr(settings["decay"]),
        "num_updates": str(average.meta["num_updates"]),
        "step": str(average.meta["step"]),
        "source": catalog.manifest.uuid if catalog.manifest else "unknown",
    }
    total = sum(o.num_bytes for _, group in files for o in group)
    with (
        tqdm(
            total=total, unit="B", unit_scale=True, desc="consolidate", disable=not progress
        ) as bar,
        ThreadPoolExecutor(max_workers=jobs) as pool,
    ):
        running = [
            pool.submit(_write_file, catalog, group, staging / name, header, bar.update)
            for name, group in files
        ]
        try:
            return sum(done.result() for done in running)
        finally:
            for waiting in running:
                waiting.cancel()


def _write_file(
    catalog: Catalog,
    outputs: Sequence[Output],
    path: Path,
    metadata: dict[str, str],
    advance: Callable[[int], Any],
) -> int:
    unchecked = 0
    header, _ = build_header([(o.name, o.dtype, o.source.shape) for o in outputs], metadata)
    with open(path, "xb", buffering=0) as file, SourceFiles(catalog.path) as sources:
        write_all(file.fileno(), memoryview(header))
        for output in outputs:
            stored = output.source
            cast = caster(stored.dtype, output.dtype)
            chunks = catalog.chunks(stored.key)
            unchecked += sum(c.digest is None and c.crc32 is None for c in chunks)
            itemsize = ITEMSIZE[stored.dtype]
            for block in stream_tensor(sources, stored.key, stored.shape, itemsize, chunks):
                data = block if cast is None else cast(block)
                write_all(file.fileno(), data.data.cast("B"))
                advance(data.nbytes)
        os.fsync(file.fileno())
    return unchecked
