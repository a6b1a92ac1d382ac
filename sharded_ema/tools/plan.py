"""What a consolidation will write: names, dtypes, files; all of it from metadata."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from uuid import uuid4

import xxhash

from sharded_ema.checkpoint.location import URL
from sharded_ema.checkpoint.reading.manifest import dump_manifest
from sharded_ema.checkpoint.reading.opened import Catalog, StoredTensor
from sharded_ema.errors import ConfigError
from sharded_ema.tools.adapters import adapter_tensors
from sharded_ema.tools.casting import target_dtype
from sharded_ema.tools.contents import Average, num_bytes
from sharded_ema.tools.huggingface import Model
from sharded_ema.tools.naming import Renaming, rename_all, select
from sharded_ema.tools.report import Report
from sharded_ema.version import __version__

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the user asked for; see :func:`sharded_ema.consolidate`."""

    dtype: str | None
    tied: str
    adapter: str | None
    rename: Renaming
    include: Sequence[str]
    exclude: Sequence[str]
    base: Catalog | None
    model: Model | None

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]] | None:
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
    catalog: Catalog
    source: StoredTensor
    dtype: str

    @property
    def num_bytes(self) -> int:
        return num_bytes(self.source, self.dtype)


def plan_outputs(
    catalog: Catalog, average: Average, wanted: Wanted, report: Report
) -> list[Output]:
    """All tensors in the order in which they will be written; what does not fit is reported.

    Raises:
        ConfigError, CheckpointMismatchError: names or dtypes that cannot be.
    """
    if wanted.tied not in ("drop", "emit"):
        raise ConfigError(f'tied must be "drop" or "emit", got {wanted.tied!r}')
    if wanted.is_adapter:
        named = adapter_tensors(average, wanted.adapter)
        left = len(average.tensors) - len(named)
        if left:
            report.notes.append(f"{left} tensors in the checkpoint are not the adapter's")
        named = rename_all(named.items(), wanted.rename)
    else:
        named = rename_all(_with_tied(average, wanted), wanted.rename)
    found = {name: (catalog, tensor) for name, tensor in named.items()}
    if not wanted.is_adapter:
        if wanted.base is not None:
            found |= _fill(named, average, wanted.base, wanted, report)
        else:
            _tell_absent(average, wanted, report)
    wanted.rename.check_used()
    found = select(found, wanted.include, wanted.exclude)
    if wanted.base is not None:
        report.facts["from_base"] = sum(owner is wanted.base for owner, _ in found.values())
    if wanted.model is not None and wanted.shapes is not None:
        _compare({name: tensor for name, (_, tensor) in found.items()}, wanted.model, report)
    names = found if wanted.shapes is None else [n for n in wanted.shapes if n in found]
    return [
        Output(name, *found[name], target_dtype(found[name][1].dtype, wanted.dtype))
        for name in names
    ]


def _with_tied(average: Average, wanted: Wanted) -> Iterable[tuple[str, StoredTensor]]:
    """The tensors by name; tied ones by those of their names that the output is to have."""
    aliases = average.aliases
    for name, tensor in average.tensors.items():
        names = [name, *aliases.get(name, [])]
        if wanted.shapes is not None and len(names) > 1:
            names = [n for n in names if wanted.rename(n) in wanted.shapes]
        elif wanted.tied == "drop":
            names = names[:1]
        for each in names:
            yield each, tensor


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
    base: Catalog,
    wanted: Wanted,
    report: Report,
) -> dict[str, tuple[Catalog, StoredTensor]]:
    """What the base has and the checkpoint has not."""
    tied = {wanted.rename(n) for names in average.aliases.values() for n in names}
    filled = {
        name: (base, tensor)
        for name, tensor in base.tensors.items()
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


def _compare(named: Mapping[str, StoredTensor], model: Model, report: Report) -> None:
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


def plan_files(
    outputs: Sequence[Output], limit: int, stem: str = "model"
) -> list[tuple[str, list[Output]]]:
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
        return [(f"{stem}.safetensors", groups[0])]
    return [
        (f"{stem}-{i:05d}-of-{len(groups):05d}.safetensors", group)
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


def digest_plan(
    files: Sequence[tuple[str, Sequence[Output]]], header: Mapping[str, str], format: str
) -> str:
    """Hex digest of 128 bits of all that decides on the bytes of the output.

    Raises:
        CheckpointCorruptError: the blocks of a tensor do not fit it or its file.
    """
    outputs = [output for _, group in files for output in group]
    catalogs = {id(output.catalog): output.catalog for output in outputs}
    sources = [
        _digest_source(catalog, [o.source.key for o in outputs if o.catalog is catalog])
        for catalog in catalogs.values()
    ]
    number = {identity: i for i, identity in enumerate(catalogs)}
    said = [
        (name, [(o.name, number[id(o.catalog)], o.source.key, o.dtype) for o in group])
        for name, group in files
    ]
    plan = json.dumps([__version__, format, dict(header), sources, said])
    return xxhash.xxh3_128_hexdigest(plan.encode())


def _digest_source(catalog: Catalog, keys: Iterable[str]) -> str:
    """What tells the tensors of one save from those of another.

    That is the manifest, which has a digest of every file. Where there is none it is places, sizes
    and checksums of the blocks, and sizes and times of the files.
    """
    if catalog.manifest is not None:
        return xxhash.xxh3_128_hexdigest(dump_manifest(catalog.manifest))
    known = xxhash.xxh3_128()
    names = set()
    unchecked = False
    for key in keys:
        for chunk in catalog.chunks(key):
            known.update(repr((key, chunk)).encode())
            names.add(chunk.file)
            unchecked |= chunk.crc32 is None
    for name in sorted(names):
        path = catalog.path / name
        if not isinstance(path, URL):
            found = path.stat()
            known.update(repr((name, found.st_size, found.st_mtime_ns)).encode())
        elif unchecked:  # not every store says when an object was written; so nothing is taken over
            return uuid4().hex
    return known.hexdigest()
