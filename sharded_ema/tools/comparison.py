"""Averages against raw weights: how far apart they are, and whether an average is a mere copy."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from sharded_ema.averaging.schedules import schedule_from_dict
from sharded_ema.checkpoint.files import OpenFiles
from sharded_ema.checkpoint.reading.chunks import KnownChunks
from sharded_ema.checkpoint.reading.opened import Checkpoint, StoredTensor
from sharded_ema.errors import CheckpointMismatchError, ConfigError
from sharded_ema.tools.casting import NUMBERS
from sharded_ema.tools.contents import Average, find_average
from sharded_ema.tools.diff import Distance, comparable, distance, prefix_of_names
from sharded_ema.tools.naming import adapter_tensors
from sharded_ema.tools.report import Report
from sharded_ema.tools.source import open_weights


def open_raw(path: str | os.PathLike[str], files: OpenFiles) -> Checkpoint:
    """Weights that no tool of this library has averaged.

    Args:
        files: see :class:`~sharded_ema.checkpoint.files.Directory`.

    Raises:
        CheckpointError: see :func:`~sharded_ema.tools.source.open_weights`.
        CheckpointMismatchError: the files say that they are an average.
    """
    weights = open_weights(path, files)
    said = weights.index.texts if isinstance(weights.index, KnownChunks) else {}
    if said.get("kind") in ("ema", "average"):
        raise CheckpointMismatchError(
            f"{path} is an average itself; pass the raw weights that it was made of, or take "
            "sharded-ema diff, which compares two averages"
        )
    return weights


def compare(checkpoint: Checkpoint, weights: Checkpoint, report: Report) -> None:
    """Add the distance of every average from the weights to a report, and what it means.

    Raises:
        CheckpointMismatchError: the weights are those of another model, or there is no average.
        CheckpointCorruptError: data is damaged.
    """
    if not checkpoint.prefixes():
        raise CheckpointMismatchError(f"{checkpoint.path} holds no average to compare with a model")
    for prefix in checkpoint.prefixes():
        for profile in checkpoint.meta(prefix)["profiles"]:
            _compare_average(find_average(checkpoint, profile, prefix), weights, report)


def _compare_average(average: Average, weights: Checkpoint, report: Report) -> None:
    name = f"{average.prefix}{average.profile}"
    averaged = _averaged(average, weights)
    start = prefix_of_names(averaged, average.aliases, weights)
    total, distances, missing = Distance(), {}, []
    equal = 0
    for key, tensor in averaged.items():
        names = [start + n for n in (key, *average.aliases.get(key, ()))]
        there = next((weights.tensors[n] for n in names if n in weights.tensors), None)
        if there is None:
            missing.append(key)
            continue
        apart = _distance(tensor, there)
        distances[key] = apart.relative
        equal += apart.equal
        total.add(apart)
    updates = average.meta["num_updates"]
    report.facts.setdefault("averages", []).append(
        {
            "prefix": average.prefix,
            "profile": average.profile,
            "updates": updates,
            "compared_tensors": len(distances),
            "equal_tensors": equal,
            "relative_distance": total.relative,
            "relative_distance_by_tensor": distances,
        }
    )
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


def _averaged(average: Average, weights: Checkpoint) -> dict[str, StoredTensor]:
    """The averaged tensors by the names that they have in the weights."""
    start = f"{average.prefix}{average.profile}."
    if weights.format == "adapter":
        adapter: dict[str, StoredTensor] = adapter_tensors(average, None)
        return {name: tensor for name, tensor in adapter.items() if tensor.key.startswith(start)}
    return {name: t for name, t in average.tensors.items() if t.key.startswith(start)}


def _distance(tensor: StoredTensor, other: StoredTensor) -> Distance:
    """How far an average is from its weights.

    Raises:
        CheckpointMismatchError: their shapes differ, or one is not floating-point.
    """
    if not comparable(tensor, other) or not {tensor.dtype, other.dtype} <= NUMBERS:
        raise CheckpointMismatchError(
            f"{tensor.key} is {tensor.dtype} of shape {tensor.shape}, and in "
            f"{other.checkpoint.path} {other.dtype} of shape {other.shape}; is it another model?"
        )
    return distance(tensor, other)


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
