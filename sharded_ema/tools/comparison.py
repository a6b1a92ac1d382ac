"""Averages against raw weights: how far apart they are, and whether an average is a mere copy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sharded_ema.checkpoint.reading.catalog import Catalog, StoredTensor, open_checkpoint
from sharded_ema.checkpoint.reading.dcp import METADATA_NAME
from sharded_ema.checkpoint.reading.manifest import MANIFEST_NAME
from sharded_ema.checkpoint.reading.safetensors_file import ITEMSIZE
from sharded_ema.checkpoint.reading.stream import SourceFiles, stream_tensor
from sharded_ema.config import BUFFERS_PREFIX, FROZEN_PREFIX, META_KEY
from sharded_ema.errors import CheckpointMismatchError, ConfigError
from sharded_ema.schedules import schedule_from_dict
from sharded_ema.tools.adapters import adapter_tensors
from sharded_ema.tools.casting import FLOATING, Bytes, widen
from sharded_ema.tools.contents import Average, find_average
from sharded_ema.tools.huggingface import open_model
from sharded_ema.tools.report import Report


def open_weights(path: Path) -> Catalog:
    """Raw weights: a Hugging Face directory, a safetensors file or a DCP checkpoint.

    Raises:
        CheckpointNotFoundError: none of these is there.
        CheckpointCorruptError: it cannot be read.
    """
    if (path / MANIFEST_NAME).is_file() or (path / METADATA_NAME).is_file():
        return open_checkpoint(path)
    return open_model(path)


def compare(catalog: Catalog, weights: Catalog, report: Report) -> None:
    """Add the distance of every average from the weights to a report, and what it means.

    Raises:
        CheckpointMismatchError: the weights are those of another model, or there is no average.
        CheckpointCorruptError: data is damaged.
    """
    if not catalog.prefixes():
        raise CheckpointMismatchError(f"{catalog.path} holds no average to compare with a model")
    for prefix in catalog.prefixes():
        for profile in catalog.meta(prefix)["profiles"]:
            _compare_average(catalog, find_average(catalog, profile, prefix), weights, report)


@dataclass(slots=True)
class _Distance:
    """Sums over elements, in float64."""

    apart: float = 0.0
    norm: float = 0.0
    equal: bool = True

    def add(self, other: _Distance) -> None:
        self.apart += other.apart
        self.norm += other.norm
        self.equal &= other.equal

    @property
    def relative(self) -> float | None:
        """Norm of the difference over norm of the weights; ``None`` if it is not finite."""
        if not self.apart:
            return 0.0
        value = math.sqrt(self.apart / self.norm) if self.norm else math.inf
        return value if math.isfinite(value) else None


def _compare_average(catalog: Catalog, average: Average, weights: Catalog, report: Report) -> None:
    name = f"{average.prefix}{average.profile}"
    averaged = _averaged(average, weights)
    start = _prefix_of_names(averaged, average.aliases, weights)
    total, distances, missing = _Distance(), {}, []
    equal = 0
    for key, tensor in averaged.items():
        names = [start + n for n in (key, *average.aliases.get(key, ()))]
        there = next((weights.tensors[n] for n in names if n in weights.tensors), None)
        if there is None:
            missing.append(key)
            continue
        distance = _distance(catalog, tensor, weights, there)
        distances[key] = distance.relative
        equal += distance.equal
        total.add(distance)
    updates = average.meta["num_updates"]
    report.facts[f"average {name}"] = {
        "updates": updates,
        "compared_tensors": len(distances),
        "equal_tensors": equal,
        "relative_distance": total.relative,
        "relative_distance_by_tensor": distances,
    }
    if missing:
        report.notes.append(
            f"{name}: {len(missing)} averaged tensors are not in the model, such as {missing[0]}"
        )
    if not updates:
        report.notes.append(f"{name}: not started: it has had no update, so it is the weights")
    elif total.equal and _had_zero_decay(average):
        report.notes.append(f"{name}: equals the model, because its decay was 0")
    elif total.equal and not missing:
        report.fail(
            f"{name} equals the model in all {equal} tensors after {updates} updates: it is a copy "
            "of the weights and no average"
        )


def _averaged(average: Average, weights: Catalog) -> dict[str, StoredTensor]:
    """The averaged tensors by the names that they have in the weights."""
    start = f"{average.prefix}{average.profile}."
    if weights.format == "adapter":
        adapter: dict[str, StoredTensor] = adapter_tensors(average, None)
        return {name: tensor for name, tensor in adapter.items() if tensor.key.startswith(start)}
    return {name: t for name, t in average.tensors.items() if t.key.startswith(start)}


def _prefix_of_names(
    averaged: Mapping[str, StoredTensor], aliases: Mapping[str, list[str]], weights: Catalog
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


def _distance(
    catalog: Catalog, tensor: StoredTensor, weights: Catalog, other: StoredTensor
) -> _Distance:
    """Stream two tensors past each other.

    Raises:
        CheckpointMismatchError: their shapes differ, or one is not floating-point.
    """
    if tensor.shape != other.shape or not {tensor.dtype, other.dtype} <= FLOATING:
        raise CheckpointMismatchError(
            f"{tensor.key} is {tensor.dtype} of shape {tensor.shape}, and in {weights.path} "
            f"{other.dtype} of shape {other.shape}; is it another model?"
        )
    found = _Distance()
    same = tensor.dtype == other.dtype
    with SourceFiles(catalog.path) as here, SourceFiles(weights.path) as there:
        blocks = _in_step(_blocks(here, catalog, tensor), _blocks(there, weights, other),
                          ITEMSIZE[tensor.dtype], ITEMSIZE[other.dtype])  # fmt: skip
        for mine, theirs in blocks:
            average, raw = widen(mine, tensor.dtype), widen(theirs, other.dtype)
            with np.errstate(invalid="ignore", over="ignore"):
                apart = average - raw
                found.apart += float(np.dot(apart, apart))
                found.norm += float(np.dot(raw, raw))
            equal = np.array_equal(mine, theirs) if same else np.array_equal(average, raw)
            found.equal &= bool(equal)
    return found


def _blocks(files: SourceFiles, catalog: Catalog, tensor: StoredTensor) -> Iterator[Bytes]:
    chunks = catalog.chunks(tensor.key)
    return stream_tensor(files, tensor.key, tensor.shape, ITEMSIZE[tensor.dtype], chunks)


def _in_step(
    left: Iterator[Bytes], right: Iterator[Bytes], left_size: int, right_size: int
) -> Iterator[tuple[Bytes, Bytes]]:
    """Blocks of equally many elements, from two streams whose blocks end elsewhere."""
    a = b = np.empty(0, np.uint8)
    while True:
        a = a if a.size else next(left, a)
        b = b if b.size else next(right, b)
        count = min(a.size // left_size, b.size // right_size)
        if not count:
            return
        yield a[: count * left_size], b[: count * right_size]
        a, b = a[count * left_size :], b[count * right_size :]


def _had_zero_decay(average: Average) -> bool:
    """Whether the last update may have replaced the average by the weights."""
    meta = average.meta
    settings: dict[str, Any] = meta["profiles"][average.profile]
    # The first step that the last update can have covered; schedules never fall.
    first = meta["last_lerp_step"] - (meta["seed_step"] or 0) - meta["update_every"] + 1
    try:
        decay: Callable[[int], float] = schedule_from_dict(settings["schedule"]).decay
        return settings["decay"] == 0 or decay(max(1, first)) == 0
    except (ConfigError, ArithmeticError):  # of a later version
        return bool(settings["decay"] == 0)
