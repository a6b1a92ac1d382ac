"""``diff``: how far apart two sets of weights are, tensor by tensor, without PyTorch."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sharded_ema.checkpoint.reading.opened import Catalog, StoredTensor
from sharded_ema.config import DEFAULT_PROFILE
from sharded_ema.errors import ConfigError
from sharded_ema.tools.adapters import adapter_tensors
from sharded_ema.tools.casting import FLOATING
from sharded_ema.tools.comparison import open_weights, prefix_of_names
from sharded_ema.tools.contents import Average, find_average
from sharded_ema.tools.distance import Distance, comparable, distance
from sharded_ema.tools.report import Report

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
    buffers), a Hugging Face directory, a safetensors file, or a DCP checkpoint. Tensors are matched
    by their names in the bare model, tied ones by any of their names; a common prefix in a DCP
    checkpoint, such as ``"model."``, does not count. Checksums are verified on the way.

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
    if not 0 <= tolerance < math.inf:
        raise ConfigError(f"tolerance must be at least 0 and finite, got {tolerance}")
    left, right = _open(a, profile, prefix), _open(b, profile, prefix)
    _match_names(left, right)
    report = Report("diff", f"{a} {b}")
    total, rows = Distance(), []
    for name in [name for name in left.tensors if name in right.tensors]:
        mine, theirs = left.tensors[name], right.tensors[name]
        if not comparable(mine, theirs):
            report.fail(
                f"{name} is {mine.dtype} of shape {list(mine.shape)} in {a} and {theirs.dtype} of "
                f"shape {list(theirs.shape)} in {b}"
            )
            continue
        apart = distance(left.catalog, mine, right.catalog, theirs)
        # A counter, such as that of batch norm, would drown the weights.
        total.add(apart, counts_only=not {mine.dtype, theirs.dtype} <= FLOATING)
        rows.append((name, _dtypes(mine, theirs), apart))
    report.facts |= {
        "compared_tensors": len(rows),
        "equal_tensors": sum(apart.equal for *_, apart in rows),
        **_facts(total),
    }
    for key, path, side, other in (("only_in_a", a, left, right), ("only_in_b", b, right, left)):
        names = [name for name in side.tensors if name not in other.tensors]
        if names:
            report.facts[key] = names if tensors else names[:_SHOWN]
            report.fail(f"{len(names)} tensors are only in {path}, such as {names[0]}")
        if side.unread:
            report.fail(
                f"{len(side.unread)} tensors of {path} have a dtype that is not read, such as "
                f"{side.unread[0]}"
            )
    _judge(report, [(name, apart) for name, _, apart in rows], tolerance)
    if tensors:
        report.facts["list"] = [
            {"name": name, "dtype": dtypes, **_facts(apart)} for name, dtypes, apart in rows
        ]
    return report


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
        tensors: by name.
        average: what they are, if they are an average of this library.
        aliases: further names of tied weights, by the name in ``tensors``.
        start: what stood before the names in ``catalog``.
    """

    catalog: Catalog
    tensors: dict[str, StoredTensor]
    average: Average | None = None
    aliases: Mapping[str, list[str]] = field(default_factory=dict)
    start: str = ""

    @property
    def unread(self) -> list[str]:
        """Keys of tensors among these that this library does not read."""
        return sorted(key for key in self.catalog.unsupported if key.startswith(self.start))


def _open(path: str | os.PathLike[str], profile: str, prefix: str | None) -> _Side:
    catalog = open_weights(path)
    known = catalog.prefixes()
    if not known:
        return _Side(catalog, dict(catalog.tensors))
    average = find_average(catalog, profile, prefix if len(known) > 1 else None)
    return _Side(catalog, dict(average.tensors), average, average.aliases, average.prefix)


def _match_names(left: _Side, right: _Side) -> None:
    """Give the tensors of both sides the names that they share."""
    for side, other in ((left, right), (right, left)):
        if side.catalog.format == "adapter" and other.average is not None:
            other.tensors = dict(adapter_tensors(other.average, None))
        elif _has_bare_keys(side) and not _has_bare_keys(other):
            side.start = prefix_of_names(other.tensors, other.aliases, side.catalog)
            side.tensors = {
                key.removeprefix(side.start): tensor
                for key, tensor in side.tensors.items()
                if key.startswith(side.start)
            }
    for side, other in ((left, right), (right, left)):
        for stored, others in side.aliases.items():
            there = [name for name in (stored, *others) if name in other.tensors]
            if there and stored in side.tensors:
                side.tensors |= dict.fromkeys(there, side.tensors.pop(stored))


def _has_bare_keys(side: _Side) -> bool:
    """Whether names are keys of somebody's DCP checkpoint, which may have a prefix."""
    return side.catalog.format == "dcp" and side.average is None
