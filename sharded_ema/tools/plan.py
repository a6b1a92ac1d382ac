"""What will be written: names, dtypes, files; all of it from metadata."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import xxhash

from sharded_ema.checkpoint.reading.models import ADAPTER_STEM, STEMS
from sharded_ema.checkpoint.reading.opened import Checkpoint, StoredTensor
from sharded_ema.errors import CheckpointMismatchError, ConfigError
from sharded_ema.model.layout import Shape
from sharded_ema.tools.assembly import Assembled, Output
from sharded_ema.tools.casting import Dtypes, widest
from sharded_ema.tools.contents import Average
from sharded_ema.tools.conversions import as_released
from sharded_ema.tools.huggingface import Model
from sharded_ema.tools.kept import kept_wide
from sharded_ema.tools.naming import Renaming, adapter_tensors, rename_all, select
from sharded_ema.tools.report import Report
from sharded_ema.version import __version__

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What the user asked for; see :func:`sharded_ema.consolidate`."""

    dtypes: Dtypes
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
class Plan:
    """The files of a model, or of several that differ in values only.

    Attributes:
        files: what each of them holds, by name, in order.
        headers: what the files of each model say of it, by its folder; ``""`` is the target itself.
        stem: what the files are called, before their numbers.
        dtype: of the whole, as PyTorch calls it: the one asked for, or the widest that is written;
            ``None`` if nothing is of floating-point numbers.
        shared: the name in ``files`` of each further name of a tensor, where the format of the
            files in the end stores it once.
    """

    files: Mapping[str, Sequence[Output]]
    headers: Mapping[str, Mapping[str, str]]
    stem: str
    dtype: str | None
    shared: Mapping[str, str] = field(default_factory=dict)

    @property
    def outputs(self) -> list[Output]:
        """All tensors that are stored, in order."""
        return [output for group in self.files.values() for output in group]

    @property
    def sources(self) -> dict[str, StoredTensor]:
        """The stored tensors that are read of one checkpoint, by key."""
        stretches = (s for output in self.outputs for s in output.made_of.stretches)
        return {stretch.tensor.key: stretch.tensor for stretch in stretches}

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
        read = [stretch.tensor for o in self.outputs for stretch in o.made_of.stretches]
        checkpoints = list(dict.fromkeys(tensor.checkpoint for tensor in read))
        sources = [
            checkpoint.identity(dict.fromkeys(t.key for t in read if t.checkpoint is checkpoint))
            for checkpoint in checkpoints
        ]
        number = {checkpoint: i for i, checkpoint in enumerate(checkpoints)}

        def made_of(output: Output) -> list[Any]:
            return [
                (number[s.tensor.checkpoint], s.tensor.key, s.start, s.stop)
                for s in output.made_of.stretches
            ]

        said = [
            (name, [(*o.described(format), made_of(o)) for o in group])
            for name, group in self.files.items()
        ]
        headers = {folder: dict(texts) for folder, texts in self.headers.items()}
        plan = json.dumps([__version__, format, headers, sources, said, dict(self.shared)])
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
    if said := str(wanted.dtypes):
        header["dtype"] = said
    if wanted.base is not None:
        header["base"] = wanted.base.path.name
    shared: dict[str, str] = {}
    if wanted.format == "torch":
        outputs, shared = _stored_once(outputs)
    model = wanted.model
    stem = model.stem if model is not None else STEMS[0]
    if wanted.is_adapter:
        stem, limit = ADAPTER_STEM, sys.maxsize  # PEFT reads one file
    return Plan(
        _files(outputs, limit, stem),
        {model.folder if model is not None else "": header},
        stem,
        wanted.dtypes.default or widest(output.dtype for output in outputs),
        shared,
    )


def _stored_once(outputs: Sequence[Output]) -> tuple[list[Output], dict[str, str]]:
    """The tensors without further names of the same one, and these with the name that is kept."""
    kept: dict[object, Output] = {}
    shared = {}
    for output in outputs:
        same = (id(output.made_of.tensor.checkpoint), output.made_of, output.dtype)
        if kept.setdefault(same, output) is not output:
            shared[output.name] = kept[same].name
    return list(kept.values()), shared


def _outputs(average: Average, wanted: Wanted, report: Report) -> list[Output]:
    """All tensors in the order in which they will be written."""
    if wanted.tied not in (None, "drop", "emit"):
        raise ConfigError(f'tied must be "drop" or "emit", got {wanted.tied!r}')
    if wanted.is_adapter:
        named = adapter_tensors(average, wanted.adapter)
        left = len(average.tensors) - len(named)
        if left:
            report.notes.append(f"{left} tensors in the checkpoint are not the adapter's")
        found = _assembled(named.items(), wanted)
    else:
        found = _assembled(_with_tied(average, wanted), wanted)
        if wanted.base is not None:
            found |= _fill(found, average, wanted.base, wanted, report)
        else:
            _tell_absent(average, wanted, report)
    wanted.rename.check_used()
    found = select(found, wanted.include, wanted.exclude)
    _check_read(found)
    wanted.dtypes.check_used(found)
    if wanted.base is not None:
        taken = sum(made.tensor.checkpoint is wanted.base for made in found.values())
        report.facts["from_base"] = taken
    if wanted.model is not None and wanted.shapes is not None:
        _compare(found, wanted.shapes, wanted.model.path, report)
    kept = kept_wide(wanted.model, found) if wanted.dtypes.narrows else frozenset()
    return [
        Output(name, found[name], wanted.dtypes.of(name, found[name].dtype, kept))
        for name in _in_order(found, wanted.shapes)
    ]


def _check_read(named: Mapping[str, Assembled]) -> None:
    unread = {name: made.tensor for name, made in named.items() if not made.tensor.is_read}
    if unread:
        name, tensor = next(iter(unread.items()))
        raise CheckpointMismatchError(
            f"{tensor.checkpoint.path}: {len(unread)} tensors have a dtype that this library does "
            f"not read, such as {name} with {tensor.dtype}; leave them out (--exclude), or choose "
            "a longer prefix"
        )


def _assembled(named: Iterable[tuple[str, StoredTensor]], wanted: Wanted) -> dict[str, Assembled]:
    """The tensors under their new names, taken apart or joined as those of a release are."""
    found = {n: Assembled.whole(t) for n, t in rename_all(named, wanted.rename).items()}
    if wanted.shapes is not None and wanted.model is not None:
        return as_released(found, wanted.shapes, wanted.model.path)
    if wanted.base is not None:
        shapes = {name: tensor.shape for name, tensor in wanted.base.tensors.items()}
        return as_released(found, shapes, Path(str(wanted.base.path)))
    return found


def _in_order(found: Mapping[str, Assembled], like: Iterable[str] | None) -> list[str]:
    """Names in the order of the model to be like, but slices of one tensor as they lie in it.

    So the tensor is read once from its first element to its last.
    """
    slices: dict[StoredTensor, list[str]] = {}
    for name, made in found.items():
        if made.is_part:
            slices.setdefault(made.tensor, []).append(name)
    names: dict[str, None] = {}
    for name in found if like is None else [n for n in like if n in found]:
        together = slices.get(found[name].tensor, [name]) if found[name].is_part else [name]
        names |= dict.fromkeys(sorted(together, key=lambda n: found[n].stretches[0].start))
    return list(names)


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
    named: Mapping[str, Assembled],
    average: Average,
    base: Checkpoint,
    wanted: Wanted,
    report: Report,
) -> dict[str, Assembled]:
    """What the base has and the checkpoint has not."""
    tied = {wanted.rename(n) for names in average.aliases.values() for n in names}
    filled = {
        name: Assembled.whole(tensor)
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
    named: Mapping[str, Assembled], shapes: Mapping[str, Shape], model: Path, report: Report
) -> None:
    missing = [name for name in shapes if name not in named]
    extra = [name for name in named if name not in shapes]
    if missing:
        report.fail(f"{len(missing)} tensors of {model} are not in the checkpoint: {missing[:5]}")
    if extra:
        report.fail(f"{len(extra)} tensors are unknown to {model}: {extra[:5]}")
    for name, made in named.items():
        shape = shapes.get(name, made.shape)
        if shape != made.shape:
            report.fail(f"{name} is {made.shape} here and {shape} in {model}")


def _files(outputs: Sequence[Output], limit: int, stem: str) -> dict[str, Sequence[Output]]:
    """Distribute tensors over files in order, none but single tensors larger than ``limit``.

    Slices of one tensor stay in one file if that has room for them, as each file reads it again.
    """
    groups: list[list[Output]] = [[]]
    filled = 0
    for _, together in groupby(outputs, key=_read_together):
        slices = list(together)
        units = [slices] if group_bytes(slices) <= limit else [[output] for output in slices]
        for unit in units:
            if groups[-1] and filled + group_bytes(unit) > limit:
                groups.append([])
                filled = 0
            groups[-1] += unit
            filled += group_bytes(unit)
    if len(groups) == 1:
        return {f"{stem}.safetensors": groups[0]}
    return {
        f"{stem}-{i:05d}-of-{len(groups):05d}.safetensors": group
        for i, group in enumerate(groups, start=1)
    }


def _read_together(output: Output) -> object:
    return output.made_of.tensor if output.made_of.is_part else output


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
