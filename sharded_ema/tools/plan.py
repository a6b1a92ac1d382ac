"""What will be written: names, dtypes, files; all of it from metadata."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import xxhash

from sharded_ema.checkpoint.reading.models import ADAPTER_STEM
from sharded_ema.checkpoint.reading.opened import Checkpoint, StoredTensor
from sharded_ema.checkpoint.safetensors import in_parts, num_bytes
from sharded_ema.errors import CheckpointMismatchError, ConfigError
from sharded_ema.model.layout import Shape
from sharded_ema.tools.casting import target_dtype
from sharded_ema.tools.contents import Average
from sharded_ema.tools.huggingface import Model
from sharded_ema.tools.naming import Renaming, adapter_tensors, rename_all, select
from sharded_ema.tools.report import Report
from sharded_ema.version import __version__

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What the user asked for; see :func:`sharded_ema.consolidate`."""

    dtype: str | None
    max_shard_size: str | int
    model: Model | None
    tied: str | None = None
    adapter: str | None = None
    rename: Renaming = field(default_factory=lambda: Renaming(()))
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    base: Checkpoint | None = None
    format: str = "safetensors"

    @property
    def shapes(self) -> Mapping[str, Shape] | None:
        """Of the tensors that the model to be like has, if it has any."""
        return self.model.shapes if self.model is not None else None

    @property
    def is_adapter(self) -> bool:
        """Whether an adapter is wanted, and no whole model."""
        return self.adapter is not None or (self.model is not None and self.model.is_adapter)


@dataclass(frozen=True, slots=True)
class Output:
    """A tensor to write: its name, where it is read from, and its dtype in the file."""

    name: str
    source: StoredTensor
    dtype: str

    @property
    def num_bytes(self) -> int:
        """Of it in the file."""
        return num_bytes(self.dtype, self.source.shape)

    def described(self, format: str) -> tuple[str, str, Shape]:
        """Name, dtype and shape in the header of a safetensors file.

        Args:
            format: of the files in the end: in those of PyTorch there is room for every dtype.
        """
        stored = self.dtype, self.source.shape
        if self.dtype == "C128" and format == "safetensors":
            stored = in_parts(*stored)
        return self.name, *stored


@dataclass(frozen=True, slots=True)
class Plan:
    """The files of a model, or of several that differ in values only.

    Attributes:
        files: what each of them holds, by name, in order.
        headers: what the files of each model say of it, by its folder; ``""`` is the target itself.
    """

    files: Mapping[str, Sequence[Output]]
    headers: Mapping[str, Mapping[str, str]]

    @property
    def outputs(self) -> list[Output]:
        """All tensors, in order."""
        return [output for group in self.files.values() for output in group]

    @property
    def num_bytes(self) -> int:
        """Of all tensors of all models."""
        return len(self.headers) * sum(map(group_bytes, self.files.values()))

    def digest(self, format: str) -> str:
        """Hex digest of 128 bits of all that decides on the bytes of the output.

        Args:
            format: of the files; see :func:`sharded_ema.consolidate`.

        Raises:
            CheckpointCorruptError: the blocks of a tensor do not fit it or its file.
        """
        outputs = self.outputs
        checkpoints = list(dict.fromkeys(o.source.checkpoint for o in outputs))
        sources = [
            checkpoint.identity(o.source.key for o in outputs if o.source.checkpoint is checkpoint)
            for checkpoint in checkpoints
        ]
        number = {checkpoint: i for i, checkpoint in enumerate(checkpoints)}
        said = [
            (name, [(o.name, number[o.source.checkpoint], o.source.key, o.dtype) for o in group])
            for name, group in self.files.items()
        ]
        headers = {folder: dict(texts) for folder, texts in self.headers.items()}
        plan = json.dumps([__version__, format, headers, sources, said])
        return xxhash.xxh3_128_hexdigest(plan.encode())


def group_bytes(group: Iterable[Output]) -> int:
    """Of some tensors."""
    return sum(output.num_bytes for output in group)


def plan_model(average: Average, wanted: Wanted, report: Report) -> Plan:
    """The files of one model; what does not fit is reported.

    Raises:
        ConfigError, CheckpointMismatchError: names, sizes or dtypes that cannot be, or there is no
            such adapter.
    """
    limit = parse_size(wanted.max_shard_size)
    outputs = _outputs(average, wanted, report)
    report.notes += _said_of_complex(outputs, wanted.format)
    header = average.header()
    if wanted.base is not None:
        header["base"] = wanted.base.path.name
    if wanted.is_adapter:  # PEFT reads one file
        return Plan({f"{ADAPTER_STEM}.safetensors": outputs}, {"": header})
    return Plan(_files(outputs, limit), {"": header})


def _outputs(average: Average, wanted: Wanted, report: Report) -> list[Output]:
    """All tensors in the order in which they will be written."""
    if wanted.tied not in (None, "drop", "emit"):
        raise ConfigError(f'tied must be "drop" or "emit", got {wanted.tied!r}')
    if wanted.is_adapter:
        named = adapter_tensors(average, wanted.adapter)
        left = len(average.tensors) - len(named)
        if left:
            report.notes.append(f"{left} tensors in the checkpoint are not the adapter's")
        found = rename_all(named.items(), wanted.rename)
    else:
        found = rename_all(_with_tied(average, wanted), wanted.rename)
        if wanted.base is not None:
            found |= _fill(found, average, wanted.base, wanted, report)
        else:
            _tell_absent(average, wanted, report)
    wanted.rename.check_used()
    found = select(found, wanted.include, wanted.exclude)
    _check_read(found)
    if wanted.base is not None:
        taken = sum(tensor.checkpoint is wanted.base for tensor in found.values())
        report.facts["from_base"] = taken
    if wanted.model is not None and wanted.shapes is not None:
        _compare(found, wanted.shapes, wanted.model.path, report)
    names = found if wanted.shapes is None else [n for n in wanted.shapes if n in found]
    return [
        Output(name, found[name], target_dtype(found[name].dtype, wanted.dtype)) for name in names
    ]


def _check_read(named: Mapping[str, StoredTensor]) -> None:
    unread = {name: tensor for name, tensor in named.items() if not tensor.is_read}
    if unread:
        name, tensor = next(iter(unread.items()))
        raise CheckpointMismatchError(
            f"{tensor.checkpoint.path}: {len(unread)} tensors have a dtype that this library does "
            f"not read, such as {name} with {tensor.dtype}; leave them out (--exclude), or choose "
            "a longer prefix"
        )


def _with_tied(average: Average, wanted: Wanted) -> Iterable[tuple[str, StoredTensor]]:
    """The tensors by name; tied ones by those of their names that the output is to have.

    By all of them, as the ``state_dict()`` of the model has, unless the output is to be like a
    model directory: its files have one, and ``from_pretrained`` ties the rest again.
    """
    aliases = average.aliases
    drop = wanted.tied == "drop" or (wanted.tied is None and wanted.model is not None)
    for name, tensor in average.tensors.items():
        names = [name, *aliases.get(name, [])]
        if wanted.shapes is not None and len(names) > 1:
            names = [n for n in names if wanted.rename(n) in wanted.shapes]
        elif drop:
            names = names[:1]
        for each in names:
            yield each, tensor


def _said_of_complex(outputs: Sequence[Output], format: str) -> Iterable[str]:
    """What a reader of the files has to know of complex tensors."""
    if format != "safetensors":
        return
    single, double = ([o.name for o in outputs if o.dtype == dtype] for dtype in ("C64", "C128"))
    if single:
        yield (
            f"{len(single)} tensors are complex64, such as {single[0]}, which safetensors 0.7 and "
            "later can read"
        )
    if double:
        yield (
            f"{len(double)} tensors are complex128, such as {double[0]}, which safetensors lacks: "
            "they are written as float64 with a last dimension of 2, of which "
            "torch.view_as_complex makes what they were; --format torch keeps them"
        )


def _tell_absent(average: Average, wanted: Wanted, report: Report) -> None:
    count, names = average.absent
    if not count:
        return
    report.facts["absent"] = count
    shown = ", ".join(names[:5])
    takes = "--base DIR takes them from another model"
    if average.meta.get("adapters"):
        takes = "--like ADAPTER_DIR writes the adapter alone, under PEFT's names"
    report.notes.append(
        f"{count} tensors absent: they were left out of the average or frozen and not saved "
        f"({shown}{', ...' if count > 5 else ''}); {takes}"
    )
    if wanted.model is not None:
        report.fail(f"{count} tensors of the model are absent from the checkpoint")


def _fill(
    named: Mapping[str, StoredTensor],
    average: Average,
    base: Checkpoint,
    wanted: Wanted,
    report: Report,
) -> dict[str, StoredTensor]:
    """What the base has and the checkpoint has not."""
    tied = {wanted.rename(n) for names in average.aliases.values() for n in names}
    filled = {
        name: tensor
        for name, tensor in (base.tensors | base.unread).items()
        if name not in named
        and name not in tied
        and (wanted.shapes is None or name in wanted.shapes)
    }
    count, names = average.absent
    missing = [n for n in map(wanted.rename, names) if n not in filled]
    if missing or len(filled) < count:
        report.fail(
            f"{count} tensors are absent from the checkpoint and {base.path} lacks "
            f"{len(missing) or count - len(filled)} of them"
            + (f": {missing[:5]}" if missing else "")
        )
    both = [name for name in named if name in base.tensors]
    for name in both:
        if named[name].shape != base.tensors[name].shape:
            report.fail(
                f"{name} is {named[name].shape} here and {base.tensors[name].shape} in {base.path}"
            )
    return filled


def _compare(
    named: Mapping[str, StoredTensor], shapes: Mapping[str, Shape], model: Path, report: Report
) -> None:
    missing = [name for name in shapes if name not in named]
    extra = [name for name in named if name not in shapes]
    if missing:
        report.fail(f"{len(missing)} tensors of {model} are not in the checkpoint: {missing[:5]}")
    if extra:
        report.fail(f"{len(extra)} tensors are unknown to {model}: {extra[:5]}")
    for name, tensor in named.items():
        shape = shapes.get(name, tensor.shape)
        if shape != tensor.shape:
            report.fail(f"{name} is {tensor.shape} here and {shape} in {model}")


def _files(outputs: Sequence[Output], limit: int) -> dict[str, Sequence[Output]]:
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
        return {"model.safetensors": groups[0]}
    return {
        f"model-{i:05d}-of-{len(groups):05d}.safetensors": group
        for i, group in enumerate(groups, start=1)
    }


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
