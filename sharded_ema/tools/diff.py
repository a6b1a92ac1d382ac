"""``diff``: how far apart two sets of weights are, tensor by tensor, without PyTorch."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sharded_ema.checkpoint.files import OpenFiles
from sharded_ema.checkpoint.names import BUFFERS_PREFIX, FROZEN_PREFIX, META_KEY
from sharded_ema.checkpoint.reading.opened import Checkpoint, StoredTensor
from sharded_ema.checkpoint.safetensors import ITEMSIZE, PARTS
from sharded_ema.config import DEFAULT_PROFILE
from sharded_ema.errors import CheckpointMismatchError, ConfigError
from sharded_ema.tools.casting import FLOATING, NUMBERS, Bytes, widen
from sharded_ema.tools.contents import Average, find_average
from sharded_ema.tools.naming import adapter_tensors
from sharded_ema.tools.report import Report
from sharded_ema.tools.source import open_weights
from sharded_ema.tools.ties import aliases_of, tied_names

# Elements compared at a time: a few megabytes in float64, which stay in the cache.
_ELEMENTS = 1 << 17
_INTEGERS = {
    "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "<i1", "BOOL": "<u1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "<u1",
}  # fmt: skip
# Names listed when not all are asked for.
_SHOWN = 10


def diff(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    *,
    profile: str = DEFAULT_PROFILE,
    prefix: str | None = None,
    tensors: bool = False,
    tolerance: float = 0.0,
) -> Report:
    """Compare two sets of weights, streaming; memory stays at a few blocks of 4 MiB.

    Each side is a checkpoint of this library (one average of it, with its frozen parameters and
    buffers), a Hugging Face directory, a safetensors file, a state dict of ``torch.save``, or a DCP
    checkpoint. Tensors are matched by their names in the bare model, tied ones by any of their
    names; a common prefix in a DCP checkpoint or a state dict, such as ``"model."``, does not
    count. Checksums are verified on the way.

    Args:
        a, b: the two sides.
        profile: which average of a checkpoint.
        prefix: key prefix of the average, in a checkpoint that holds several.
        tensors: list every tensor.
        tolerance: largest relative distance of any one tensor, ``norm(a - b) / norm(b)``. With 0
            all bits must be equal, and between two dtypes all values.

    Returns:
        A report. ``ok`` is false if a tensor is further apart, has another shape, or is missing on
        one side. Distances in all are of floating-point tensors, counts of all tensors.

    Raises:
        CheckpointError: a side cannot be read, is damaged, or lacks the profile.
        ConfigError: ``tolerance`` is negative or not finite.
    """
    a, b = os.fspath(a), os.fspath(b)
    if not 0 <= tolerance < math.inf:
        raise ConfigError(f"tolerance must be at least 0 and finite, got {tolerance}")
    with OpenFiles() as files:
        left, right = (_open(path, profile, prefix, files) for path in (a, b))
        _match_names(left, right)
        verdict = "equal in every bit" if not tolerance else f"equal within {tolerance:g}"
        report = Report("diff", f"{a} {b}", verdict=verdict)
        _compare_sides(left, right, report, tensors=tensors, tolerance=tolerance)
    return report


def _compare_sides(
    left: _Side, right: _Side, report: Report, *, tensors: bool, tolerance: float
) -> None:
    total, rows = Distance(), []
    for name in [name for name in left.tensors if name in right.tensors]:
        mine, theirs = left.tensors[name], right.tensors[name]
        if not comparable(mine, theirs):
            report.fail(
                f"{name} is {mine.dtype} of shape {list(mine.shape)} in {left.path} and "
                f"{theirs.dtype} of shape {list(theirs.shape)} in {right.path}"
            )
            continue
        apart = distance(mine, theirs)
        # A counter, such as that of batch norm, would drown the weights.
        total.add(apart, counts_only=not {mine.dtype, theirs.dtype} <= NUMBERS)
        rows.append((name, _dtypes(mine, theirs), apart))
    report.facts |= {
        "compared_tensors": len(rows),
        "equal_tensors": sum(apart.equal for *_, apart in rows),
        **_facts(total),
    }
    for key, side, other in (("only_in_a", left, right), ("only_in_b", right, left)):
        names = [name for name in side.tensors if name not in other.tensors]
        if names:
            report.facts[key] = names if tensors else names[:_SHOWN]
            report.fail(f"{len(names)} tensors are only in {side.path}, such as {names[0]}")
        if side.unread:
            report.fail(
                f"{len(side.unread)} tensors of {side.path} have a dtype that is not read, such as "
                f"{side.unread[0]}"
            )
    _judge(report, [(name, apart) for name, _, apart in rows], tolerance)
    if tensors:
        report.facts["list"] = [
            {"name": name, "dtype": dtypes, **_facts(apart)} for name, dtypes, apart in rows
        ]


def _judge(report: Report, rows: list[tuple[str, Distance]], tolerance: float) -> None:
    def far(apart: Distance) -> bool:
        if not tolerance or apart.equal:
            return not apart.equal
        return apart.relative is None or apart.relative > tolerance

    beyond = {name: apart for name, apart in rows if far(apart)}
    if not beyond:
        return
    worst = max(beyond, key=lambda name: _or_infinity(beyond[name].relative))
    how = beyond[worst].relative
    report.fail(
        f"{len(beyond)} of {len(rows)} tensors differ"
        + (f" by more than {tolerance:g}" if tolerance else "")
        + f", the most {worst}: "
        + ("by what is no finite number" if how is None else f"relative distance {how:.3g}")
    )


def _or_infinity(value: float | None) -> float:
    return math.inf if value is None else value


def _facts(apart: Distance) -> dict[str, Any]:
    return {
        "relative_distance": apart.relative,
        "largest_difference": apart.largest if math.isfinite(apart.largest) else None,
        "differing_elements": apart.differing,
        "elements": apart.elements,
    }


def _dtypes(left: StoredTensor, right: StoredTensor) -> str:
    return left.dtype if left.dtype == right.dtype else f"{left.dtype}/{right.dtype}"


# ---------------------------------------------------------------------- names


@dataclass(slots=True)
class _Side:
    """One set of weights.

    Attributes:
        path: as given.
        checkpoint: that holds them.
        tensors: by name.
        average: what they are, if they are an average of this library.
        aliases: further names of tied weights, by the name in ``tensors``.
        start: what stood before the names in ``checkpoint``.
    """

    path: str | os.PathLike[str]
    checkpoint: Checkpoint
    tensors: dict[str, StoredTensor]
    average: Average | None = None
    aliases: Mapping[str, list[str]] = field(default_factory=dict)
    start: str = ""

    @property
    def unread(self) -> list[str]:
        """Keys of tensors among these that this library does not read."""
        return sorted(key for key in self.checkpoint.unread if key.startswith(self.start))


def _open(
    path: str | os.PathLike[str], profile: str, prefix: str | None, files: OpenFiles
) -> _Side:
    weights = open_weights(path, files)
    known = weights.prefixes()
    if not known:
        return _Side(path, weights, dict(weights.tensors))
    average = find_average(weights, profile, prefix if len(known) > 1 else None)
    return _Side(path, weights, dict(average.tensors), average, average.aliases, average.prefix)


def _match_names(left: _Side, right: _Side) -> None:
    """Give the tensors of both sides the names that they share."""
    for side, other in ((left, right), (right, left)):
        if side.checkpoint.format == "adapter" and other.average is not None:
            other.tensors = dict(adapter_tensors(other.average, None))
        elif _has_bare_keys(side) and not _has_bare_keys(other):
            side.start = prefix_of_names(other.tensors, other.aliases, side.checkpoint)
            side.tensors = {
                key.removeprefix(side.start): tensor
                for key, tensor in side.tensors.items()
                if key.startswith(side.start)
            }
    groups = tied_names([left, right])
    for side, other in ((left, right), (right, left)):
        for stored, others in aliases_of(side, groups, [other]).items():
            names = (stored, *others)
            there = [name for name in names if name in other.tensors]
            if there and stored in side.tensors:
                tensor = side.tensors[stored]
                for name in names:
                    side.tensors.pop(name, None)
                side.tensors |= dict.fromkeys(there, tensor)


def _has_bare_keys(side: _Side) -> bool:
    """Whether names are keys of somebody's checkpoint of a training, which may have a prefix."""
    return side.checkpoint.format in ("dcp", "torch") and side.average is None


def prefix_of_names(
    averaged: Mapping[str, StoredTensor], aliases: Mapping[str, list[str]], weights: Checkpoint
) -> str:
    """What stands before the names in the weights, such as ``"model."`` in a DCP checkpoint.

    Raises:
        CheckpointMismatchError: no tensor is there under any prefix, or as many under several.
    """
    taken = tuple(
        f"{prefix}{part}"
        for prefix in weights.prefixes()
        for part in (
            *(f"{profile}." for profile in weights.meta(prefix)["profiles"]),
            FROZEN_PREFIX,
            BUFFERS_PREFIX,
            META_KEY,
        )
    )
    known = {key for key in weights.tensors if not key.startswith(taken)}
    first = next(iter(averaged), "")
    starts = {
        key.removesuffix(name)
        for name in (first, *aliases.get(first, ()))
        for key in known
        if f".{key}".endswith(f".{name}")
    }
    found = {
        start: sum(
            any(start + n in known for n in (name, *aliases.get(name, ()))) for name in averaged
        )
        for start in sorted(starts)
    }
    best = [start for start, count in found.items() if count == max(found.values())]
    if len(best) != 1:
        raise CheckpointMismatchError(
            f"{weights.path} holds {'several models' if best else 'none of the averaged tensors'}"
            + (f", under the prefixes {best}" if best else f", such as {first}")
        )
    return best[0]


# ---------------------------------------------------------------------- two tensors


@dataclass(slots=True)
class Distance:
    """Sums over elements in float64.

    Attributes:
        apart: of squared differences.
        norm: of squares of the second tensor, its NaN and Inf left out.
        largest: absolute difference.
        elements: how many were compared.
        differing: how many of them are not equal. Elements of one dtype are equal if their bits
            are, elements of two dtypes if they have the same value or are both NaN.
    """

    apart: float = 0.0
    norm: float = 0.0
    largest: float = 0.0
    elements: int = 0
    differing: int = 0

    def add(self, other: Distance, *, counts_only: bool = False) -> None:
        """Take in the sums of another tensor, or only how many of its elements differ."""
        self.elements += other.elements
        self.differing += other.differing
        if not counts_only:
            self.apart += other.apart
            self.norm += other.norm
            # NaN stays, whichever comes first.
            self.largest = float(np.maximum(self.largest, other.largest))

    @property
    def equal(self) -> bool:
        """Whether no element differs."""
        return not self.differing

    @property
    def relative(self) -> float | None:
        """Norm of the difference over norm of the second tensor; ``None`` if not finite."""
        if not self.apart:
            return 0.0
        value = math.sqrt(self.apart / self.norm) if self.norm else math.inf
        return value if math.isfinite(value) else None


def comparable(left: StoredTensor, right: StoredTensor) -> bool:
    """Whether :func:`distance` can compare two tensors: 8-bit floats only with their own kind."""
    known = {left.dtype, right.dtype} <= FLOATING | _INTEGERS.keys()
    known |= {left.dtype, right.dtype} <= PARTS.keys()
    return left.shape == right.shape and (known or left.dtype == right.dtype)


def distance(left: StoredTensor, right: StoredTensor) -> Distance:
    """Compare two tensors for which :func:`comparable` holds; a complex element counts as two.

    Raises:
        CheckpointCorruptError: data is damaged.
    """
    found = Distance()
    one, other = (PARTS.get(tensor.dtype, tensor.dtype) for tensor in (left, right))
    for mine, theirs in _in_step(left.blocks(), right.blocks(), ITEMSIZE[one], ITEMSIZE[other]):
        _compare(found, mine, one, theirs, other)
    return found


def _compare(found: Distance, mine: Bytes, dtype: str, theirs: Bytes, other: str) -> None:
    raw = _values(theirs, other)
    found.elements += raw.size
    found.norm += _square(raw)
    if dtype == other and np.array_equal(mine, theirs):
        return
    values = _values(mine, dtype)
    with np.errstate(invalid="ignore", over="ignore"):
        apart = values - raw
    if dtype == other:
        bits = np.dtype(f"<u{ITEMSIZE[dtype]}")
        differing = mine.view(bits) != theirs.view(bits)
    else:
        differing = (values != raw) & ~(np.isnan(values) & np.isnan(raw))
    # Equal infinities are no NaN apart.
    apart[~differing] = 0.0
    found.differing += int(np.count_nonzero(differing))
    with np.errstate(over="ignore"):
        found.apart += float(np.dot(apart, apart))
    found.largest = float(np.maximum(found.largest, np.abs(apart).max(initial=0.0)))


def _square(values: NDArray[np.float64]) -> float:
    with np.errstate(invalid="ignore", over="ignore"):
        norm = float(np.dot(values, values))
    if math.isfinite(norm):
        return norm
    finite = values[np.isfinite(values)]
    return float(np.dot(finite, finite))


def _values(data: Bytes, dtype: str) -> NDArray[np.float64]:
    if dtype in FLOATING:
        return widen(data, dtype)
    if dtype in _INTEGERS:
        return data.view(_INTEGERS[dtype]).astype("<f8")
    return np.full(data.size // ITEMSIZE[dtype], np.nan)  # how far apart cannot be said


def _in_step(
    left: Iterator[Bytes], right: Iterator[Bytes], left_size: int, right_size: int
) -> Iterator[tuple[Bytes, Bytes]]:
    """Blocks of equally many elements, from two streams whose blocks end elsewhere."""
    a = b = np.empty(0, np.uint8)
    while True:
        a = a if a.size else next(left, a)
        b = b if b.size else next(right, b)
        count = min(a.size // left_size, b.size // right_size, _ELEMENTS)
        if not count:
            return
        yield a[: count * left_size], b[: count * right_size]
        a, b = a[count * left_size :], b[count * right_size :]
