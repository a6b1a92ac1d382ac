"""``consolidate``: one averaged model out of a sharded checkpoint, streaming, without PyTorch.

Everything is planned from metadata first. Tensors are then assembled through small buffers into
safetensors files in the Hugging Face layout, every chunk's checksum being verified on the way, and
the finished directory is published by one rename: whoever looks finds nothing or a whole model.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sharded_ema.checkpoint import commit
from sharded_ema.checkpoint.reading.catalog import Catalog, StoredTensor, open_checkpoint
from sharded_ema.checkpoint.reading.locations import Location
from sharded_ema.checkpoint.reading.safetensors_file import ITEMSIZE, build_header
from sharded_ema.checkpoint.reading.stream import (
    SourceFiles,
    stream_tensor,
    verify_chunk,
    verify_file,
)
from sharded_ema.config import DEFAULT_PROFILE, META_KEY
from sharded_ema.errors import CheckpointExistsError, CheckpointWriteError, ConfigError
from sharded_ema.tools.adapters import adapter_tensors
from sharded_ema.tools.casting import caster, target_dtype
from sharded_ema.tools.contents import Average, find_average, num_bytes
from sharded_ema.tools.huggingface import (
    ADAPTER_WEIGHTS,
    Model,
    copy_description,
    index_bytes,
    read_model,
)
from sharded_ema.tools.report import Report

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


@dataclass(frozen=True, slots=True)
class Output:
    """A tensor to write: its name, what it is read from, and its dtype in the file."""

    name: str
    source: StoredTensor
    dtype: str

    @property
    def num_bytes(self) -> int:
        return num_bytes(self.source, self.dtype)


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
    _check_target(target, catalog.path)
    report = Report("consolidate", str(src))
    model = read_model(Path(like)) if like is not None else None
    if adapter is not None or (model is not None and model.is_adapter):
        outputs = _plan_adapter(average, adapter, dtype, model, report)
        files = [(ADAPTER_WEIGHTS, outputs)]
    else:
        outputs = _plan_outputs(average, dtype, tied, model, report)
        files = _plan_files(outputs, _parse_size(max_shard_size))
    if not report.ok:
        return report
    _check_space(target, sum(o.num_bytes for o in outputs))
    staging = commit.temporary(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging.mkdir()
        _verify_rest(catalog, average)
        unchecked = _write_files(catalog, average, files, staging, jobs=jobs, progress=progress)
        if len(files) > 1:
            commit.write_durably(
                staging / "model.safetensors.index.json",
                index_bytes({o.name: name for name, group in files for o in group}, outputs),
            )
        copied = copy_description(model, staging) if model is not None else []
        if target.is_dir():
            target.rmdir()  # empty, as was checked
        commit.publish(staging, target, replace=False)
    except OSError as error:
        raise CheckpointWriteError(f"{src} could not be written to {target}: {error}") from error
    finally:
        commit.remove(staging)
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


def _check_target(target: Path, source: Location) -> None:
    if isinstance(source, Path) and target.resolve().is_relative_to(source.resolve()):
        raise ConfigError(f"{target} lies inside the checkpoint {source}, which must not change")
    if os.path.lexists(target) and not (target.is_dir() and not any(target.iterdir())):
        raise CheckpointExistsError(f"{target} already exists; nothing was written")


def _plan_adapter(
    average: Average,
    adapter: str | None,
    dtype: str | None,
    model: Model | None,
    report: Report,
) -> list[Output]:
    """The tensors of a PEFT adapter; PEFT reads them from one file."""
    named = adapter_tensors(average, adapter)
    left = len(average.tensors) - len(named)
    if left:
        report.notes.append(f"{left} tensors in the checkpoint are not the adapter's")
    if model is not None and model.shapes is not None:
        _compare(named, model, report)
    return [Output(n, tensor, target_dtype(tensor.dtype, dtype)) for n, tensor in named.items()]


def _plan_outputs(
    average: Average, dtype: str | None, tied: str, model: Model | None, report: Report
) -> list[Output]:
    """Names and dtypes of all tensors, in the order in which they will be written."""
    if tied not in ("drop", "emit"):
        raise ConfigError(f'tied must be "drop" or "emit", got {tied!r}')
    named = dict(average.tensors)
    for canonical, aliases in average.aliases.items():
        if canonical not in named:
            continue
        everywhere = dict.fromkeys([canonical, *aliases], named[canonical])
        if model is not None and model.shapes is not None:
            named.pop(canonical)
            named |= {name: t for name, t in everywhere.items() if name in model.shapes}
        elif tied == "emit":
            named |= everywhere
    absent = average.meta["absent"]["count"]
    if absent:
        report.facts["absent"] = absent
        shown = ", ".join(average.meta["absent"]["names"][:5])
        report.notes.append(
            f"{absent} tensors absent: they were left out of the average or frozen and not saved "
            f"({shown}{', ...' if absent > 5 else ''})"
        )
        if model is not None:
            report.fail(f"{absent} tensors of the model are absent from the checkpoint")
    if model is not None and model.shapes is not None:
        _compare(named, model, report)
    names = list(model.shapes) if model is not None and model.shapes is not None else list(named)
    return [
        Output(name, named[name], target_dtype(named[name].dtype, dtype))
        for name in names
        if name in named
    ]


def _compare(named: dict[str, StoredTensor], model: Model, report: Report) -> None:
    assert model.shapes is not None
    missing = [name for name in model.shapes if name not in named]
    extra = [name for name in named if name not in model.shapes]
    if missing:
        report.fail(
            f"{len(missing)} tensors of {model.path} are not in the checkpoint: {missing[:5]}"
        )
    if extra:
        report.fail(f"{len(extra)} tensors are unknown to {model.path}: {extra[:5]}")
    for name, tensor in named.items():
        shape = model.shapes.get(name, tensor.shape)
        if shape != tensor.shape:
            report.fail(f"{name} is {tensor.shape} here and {shape} in {model.path}")


def _plan_files(outputs: Sequence[Output], limit: int) -> list[tuple[str, list[Output]]]:
    """Distribute tensors over files in order, none but single tensors larger than ``limit``."""
    groups: list[list[Output]] = [[]]
    filled = 0
    for output in outputs:
        if groups[-1] and filled + output.num_bytes > limit:
            groups.append([])
            filled = 0
        groups[-1].append(output)
        filled += output.num_bytes
    if len(groups) == 1:
        return [("model.safetensors", groups[0])]
    return [
        (f"model-{i:05d}-of-{len(groups):05d}.safetensors", group)
        for i, group in enumerate(groups, start=1)
    ]


def _parse_size(size: str | int) -> int:
    """Bytes from ``5GB``, ``500MB`` or a number (decimal units, as in file sizes)."""
    text = str(size).strip().upper().removesuffix("B")
    unit = text[-1:] if text[-1:] in _UNITS else ""
    try:
        value = int(float(text.removesuffix(unit)) * _UNITS[unit])
    except (ValueError, OverflowError):
        value = 0
    if value < 1:
        raise ConfigError(f"max_shard_size must be a size such as 5GB or 500MB, got {size!r}")
    return value


def _check_space(target: Path, needed: int) -> None:
    """Refuse before writing what the disk cannot hold."""
    folder = next(p for p in (target, *target.absolute().parents) if p.exists())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CheckpointWriteError(f"{target} needs {needed:,} bytes, {folder} has {free:,} free")


def _verify_rest(catalog: Catalog, average: Average) -> None:
    """Check what the export does not read but depends on, or cannot check as it streams."""
    key = average.prefix + META_KEY
    for chunk in catalog.chunks(key):
        verify_chunk(catalog.path, chunk, key)
    if catalog.format == "dcp" and catalog.manifest is not None:
        # Between the tensors of a .distcp file lie bytes that no checksum of a tensor covers.
        for record in catalog.manifest.files:
            verify_file(catalog.path / record.name, record.digest)


def _write_files(
    catalog: Catalog,
    average: Average,
    files: Sequence[tuple[str, list[Output]]],
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
        _write_all(file.fileno(), memoryview(header))
        for output in outputs:
            stored = output.source
            cast = caster(stored.dtype, output.dtype)
            chunks = catalog.chunks(stored.key)
            unchecked += sum(c.digest is None and c.crc32 is None for c in chunks)
            itemsize = ITEMSIZE[stored.dtype]
            for block in stream_tensor(sources, stored.key, stored.shape, itemsize, chunks):
                data = block if cast is None else cast(block)
                _write_all(file.fileno(), data.data.cast("B"))
                advance(data.nbytes)
        os.fsync(file.fileno())
    return unchecked


def _write_all(descriptor: int, data: memoryview) -> None:
    while data.nbytes:
        data = data[os.write(descriptor, data) :]
