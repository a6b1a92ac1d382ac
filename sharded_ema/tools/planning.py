"""What every tool that writes models shares: which tensors go into which files, and where to.

Everything is planned from metadata, before a byte is read or written.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sharded_ema.checkpoint import commit
from sharded_ema.checkpoint.reading.catalog import Catalog, StoredTensor
from sharded_ema.checkpoint.reading.stream import verify_chunk, verify_file
from sharded_ema.config import META_KEY
from sharded_ema.errors import CheckpointExistsError, CheckpointWriteError, ConfigError
from sharded_ema.tools.adapters import adapter_tensors
from sharded_ema.tools.casting import target_dtype
from sharded_ema.tools.contents import Average, num_bytes
from sharded_ema.tools.huggingface import ADAPTER_WEIGHTS, Model, copy_description, index_bytes
from sharded_ema.tools.report import Report

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}

#: Names of output files and the tensors in each, in the order of their data.
Files = list[tuple[str, list["Output"]]]


@dataclass(frozen=True, slots=True)
class Output:
    """A tensor to write: its name, what it is read from, and its dtype in the file."""

    name: str
    source: StoredTensor
    dtype: str

    @property
    def num_bytes(self) -> int:
        return num_bytes(self.source, self.dtype)


def check_target(target: Path, source: Path) -> None:
    """Refuse a target that is taken, or that lies inside the source.

    Raises:
        ConfigError, CheckpointExistsError: see above.
    """
    if target.resolve().is_relative_to(source.resolve()):
        raise ConfigError(f"{target} lies inside the checkpoint {source}, which must not change")
    if os.path.lexists(target) and not (target.is_dir() and not any(target.iterdir())):
        raise CheckpointExistsError(f"{target} already exists; nothing was written")


def plan_model(
    average: Average,
    report: Report,
    *,
    dtype: str | None,
    max_shard_size: str | int,
    model: Model | None,
    tied: str = "drop",
    adapter: str | None = None,
) -> Files:
    """The files of a model, or of a PEFT adapter, and what is in them.

    Args:
        report: takes what does not fit ``model``; its ``ok`` is then false.
        model: directory to be like. The other arguments are those of ``consolidate``.

    Raises:
        ConfigError: an argument is out of range.
        CheckpointMismatchError: the average has no such adapter.
    """
    limit = parse_size(max_shard_size)
    if adapter is not None or (model is not None and model.is_adapter):
        return [(ADAPTER_WEIGHTS, _plan_adapter(average, adapter, dtype, model, report))]
    return _plan_files(_plan_outputs(average, dtype, tied, model, report), limit)


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


def _plan_files(outputs: Sequence[Output], limit: int) -> Files:
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


def parse_size(size: str | int) -> int:
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


def check_space(target: Path, needed: int) -> None:
    """Refuse before writing what the disk cannot hold."""
    folder = next(p for p in (target, *target.absolute().parents) if p.exists())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CheckpointWriteError(f"{target} needs {needed:,} bytes, {folder} has {free:,} free")


@contextmanager
def publishing(target: Path) -> Iterator[Path]:
    """A directory to write into, which becomes ``target`` if all goes well and else vanishes.

    Raises:
        CheckpointWriteError: something could not be written.
    """
    staging = commit.temporary(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging.mkdir()
        yield staging
        if target.is_dir():
            target.rmdir()  # empty, as was checked
        commit.publish(staging, target, replace=False)
    except OSError as error:
        raise CheckpointWriteError(f"{target} could not be written: {error}") from error
    finally:
        commit.remove(staging)


def complete(folder: Path, files: Files, model: Model | None) -> list[str]:
    """Write what belongs beside the weights; returns the names of files copied from ``model``."""
    if len(files) > 1:
        outputs = [output for _, group in files for output in group]
        weight_map = {output.name: name for name, group in files for output in group}
        commit.write_durably(
            folder / "model.safetensors.index.json", index_bytes(weight_map, outputs)
        )
    return copy_description(model, folder) if model is not None else []


def verify_rest(catalog: Catalog, prefix: str) -> None:
    """Check what the export does not read but depends on, or cannot check as it streams."""
    key = prefix + META_KEY
    for chunk in catalog.chunks(key):
        verify_chunk(catalog.path, chunk, key)
    if catalog.format == "dcp" and catalog.manifest is not None:
        # Between the tensors of a .distcp file lie bytes that no checksum of a tensor covers.
        for record in catalog.manifest.files:
            verify_file(catalog.path / record.name, record.digest)


def write_all(descriptor: int, data: memoryview) -> None:
    while data.nbytes:
        data = data[os.write(descriptor, data) :]
