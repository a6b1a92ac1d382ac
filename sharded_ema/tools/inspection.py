"""``inspect``: what is in a checkpoint, or in the directory of a run."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Collection
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from sharded_ema.averaging.schedules import Power, horizon, schedule_from_dict, sigma_rel_from_gamma
from sharded_ema.checkpoint.files import URL, as_location, unfinished_uploads
from sharded_ema.checkpoint.names import BUFFERS_PREFIX, FROZEN_PREFIX, LATEST_NAME
from sharded_ema.checkpoint.reading.chunks import KnownChunks, TableIndex
from sharded_ema.checkpoint.reading.dcp import DcpIndex
from sharded_ema.checkpoint.reading.models import open_model
from sharded_ema.checkpoint.reading.opened import Checkpoint, StoredTensor
from sharded_ema.checkpoint.reading.rank_shards import FORMAT as RANK_SHARDS
from sharded_ema.checkpoint.reading.rank_shards import LACKS
from sharded_ema.checkpoint.run import Committed, Run, locate, open_checkpoint, read_run
from sharded_ema.errors import CheckpointNotFoundError, ConfigError
from sharded_ema.model.layout import Box
from sharded_ema.tools.report import Report
from sharded_ema.tools.source import open_rank_shards


def inspect(path: str | os.PathLike[str], *, tensors: bool = False) -> Report:
    """Describe a checkpoint, or list those of a run, from metadata alone; reads no tensor data.

    Args:
        path: a committed checkpoint, ours or one of PyTorch's distributed format; a directory
            with several of ours in it; or a model directory or file of weights, such as
            ``consolidate`` writes; or the shards of ``HuggingFaceStorageWriter``.
        tensors: list every tensor, with the number of its chunks and how they cut it.

    Returns:
        A report. ``ok`` is false if a checkpoint of the run has a damaged manifest.

    Raises:
        CheckpointError: it cannot be opened; the class says why.
    """
    path = os.fspath(path)
    report = Report("inspect", path)
    if as_location(path).name == LATEST_NAME:
        path = locate(path)
    try:
        checkpoint = open_rank_shards(as_location(path)) or open_checkpoint(path)
    except CheckpointNotFoundError:
        run = read_run(path)
        if run.checkpoints or run.damaged or run.leftovers:
            return _add_uploads(path, _describe_run(run, report))
        model = _find_model(path)
        if model is None:
            raise
        checkpoint = model
    with checkpoint:
        return _add_uploads(path, _describe_checkpoint(checkpoint, tensors, report))


def _add_uploads(path: str | os.PathLike[str], report: Report) -> Report:
    """Say what a store keeps of objects that are not whole."""
    where = as_location(path)
    uploads = unfinished_uploads(where) if isinstance(where, URL) else []
    if uploads:
        report.facts["unfinished_uploads"] = [upload.name for upload in uploads]
        report.notes.append(
            f"{len(uploads)} uploads of several parts have not ended: of saves that are under way "
            "or were killed; a rule of the bucket (AbortIncompleteMultipartUpload) ends them"
        )
    return report


# ---------------------------------------------------------------------- a run


def _describe_run(run: Run, report: Report) -> Report:
    report.facts["checkpoints"] = [_row(found, run.latest) for found in run.checkpoints]
    report.facts["bytes"] = sum(found.num_bytes for found in run.checkpoints)
    if run.leftovers:
        report.facts["uncommitted"] = run.leftovers
        report.notes.append(
            f"{len(run.leftovers)} directories are of saves that are under way or did not finish; "
            "the next save there removes what is nobody's"
        )
    if not run.checkpoints:
        report.notes.append("no committed checkpoint of an average is in it")
    elif run.latest not in (None, run.checkpoints[-1].name):
        report.notes.append(
            f"the file latest names {run.latest}, the last committed is {run.checkpoints[-1].name}"
        )
    for name, problem in run.damaged.items():
        report.fail(f"{name}: {problem}")
    return report


def _row(found: Committed, latest: str | None) -> dict[str, Any]:
    return {
        "name": found.name,
        "step": found.step,
        "saved_at": _time(found.saved_at),
        "bytes": found.num_bytes,
        "latest": found.name == latest,
    }


def _time(milliseconds: int) -> str | None:
    """ISO 8601 in UTC, to the second; ``None`` if it was not recorded or cannot be."""
    try:
        when = datetime.fromtimestamp(milliseconds // 1000, UTC)
    except (ValueError, OverflowError, OSError):
        return None
    return when.isoformat() if milliseconds else None


# ---------------------------------------------------------------------- a checkpoint


def _describe_checkpoint(checkpoint: Checkpoint, tensors: bool, report: Report) -> Report:
    report.facts["format"] = checkpoint.format
    report.facts["metadata"] = "verified" if checkpoint.verified_metadata else "unverified"
    if checkpoint.manifest is not None:
        report.facts |= {
            "saved_at": _time(checkpoint.manifest.saved_at),
            "uuid": checkpoint.manifest.uuid,
            "world_size": checkpoint.manifest.world_size,
            "files": len(checkpoint.manifest.files) + 1,
            "libraries": dict(checkpoint.manifest.libraries),
        }
    report.facts["averages"] = [
        _describe_average(checkpoint, prefix) for prefix in checkpoint.prefixes()
    ]
    is_dcp = isinstance(checkpoint.index, DcpIndex)
    if checkpoint.manifest is None and is_dcp:
        report.facts["parts"] = _parts(checkpoint)
        report.notes.append(
            "a checkpoint of torch.distributed.checkpoint not written by this library: only its "
            "data can have checksums"
        )
    elif checkpoint.format == RANK_SHARDS:
        report.notes.append(LACKS)
    elif isinstance(checkpoint.index, KnownChunks):
        report.facts["header"] = header = dict(checkpoint.index.texts)
        if "kind" not in header:
            report.notes.append("its files do not say whether it is an average")
    if not checkpoint.prefixes() and (checkpoint.manifest or is_dcp):
        report.notes.append("no average of this library is in it")
    if checkpoint.unread:
        first = checkpoint.unread[min(checkpoint.unread)]
        report.notes.append(
            f"{len(checkpoint.unread)} tensors have a dtype that is not read, such as {first.key} "
            f"({first.dtype})"
        )
    places = _places(checkpoint)
    report.facts |= {
        "tensors": len(places),
        "chunks": sum(chunks for chunks, _ in places.values()),
        "layouts": dict(Counter(layout for _, layout in places.values()).most_common()),
        "bytes": sum(t.num_bytes for t in checkpoint.tensors.values()),
    }
    if tensors:
        report.facts["list"] = [
            {
                "name": key,
                "dtype": checkpoint.tensors[key].dtype,
                "shape": list(checkpoint.tensors[key].shape),
                "bytes": checkpoint.tensors[key].num_bytes,
                "chunks": chunks,
                "layout": layout,
            }
            for key, (chunks, layout) in places.items()
        ]
    return report


def _find_model(path: str | os.PathLike[str]) -> Checkpoint | None:
    with suppress(CheckpointNotFoundError):
        return open_model(Path(path))
    return None


def _describe_average(checkpoint: Checkpoint, prefix: str) -> dict[str, Any]:
    meta = checkpoint.meta(prefix)
    facts: dict[str, Any] = {
        "prefix": prefix,
        "step": meta["step"],
        "updates": meta["num_updates"],
        "applied_steps": meta["applied_steps"],
        "seed_step": meta["seed_step"],
        "update_every": meta["update_every"],
        "start_step": meta["start_step"],
        # Applied since the average last took the parameters in.
        "steps_in_open_window": meta["applied_steps"] - meta["last_lerp_step"],
    }
    facts["profiles"] = [
        {
            "name": profile,
            **_span(settings),
            "weight_of_initial_weights": settings["seed_weight"],
            "sampled_distance_to_live_weights": meta.get("sampled_distance", {}).get(profile),
            **_total(_under(checkpoint, f"{prefix}{profile}.")),
        }
        for profile, settings in meta["profiles"].items()
    ]
    facts["frozen"] = {
        "policy": meta["frozen"],
        **_total(_under(checkpoint, prefix + FROZEN_PREFIX)),
    }
    buffers = _under(checkpoint, prefix + BUFFERS_PREFIX)
    facts["buffers"] = {"policy": meta["buffers"], **_total(buffers)}
    facts["aliases"] = meta["aliases"]
    facts["absent"] = meta["absent"]
    if "adapters" in meta:
        facts["adapters"] = meta["adapters"]
    facts["nonfinite_elements_skipped"] = meta["nonfinite_elements"]
    return facts


def _span(settings: dict[str, Any]) -> dict[str, Any]:
    """How long an average remembers, at its last update: the decay, and what it means in steps."""
    decay, schedule = settings["decay"], dict(settings["schedule"])
    with suppress(ConfigError, ArithmeticError):  # of a later version
        known = schedule_from_dict(schedule)
        if isinstance(known, Power):
            schedule["sigma_rel"] = sigma_rel_from_gamma(known.gamma)
    return {
        "schedule": {"type": "unknown", **schedule},
        "decay": decay,
        # JSON has no infinity.
        "horizon_steps": horizon(decay) if decay < 1 else None,
        "half_life_steps": math.log(0.5) / math.log(decay) if 0 < decay < 1 else None,
    }


def _parts(checkpoint: Checkpoint) -> dict[str, dict[str, int]]:
    """What lies under each first part of a key, such as ``model`` and ``optimizer``."""
    found: dict[str, list[StoredTensor]] = {}
    for key, tensor in sorted(checkpoint.tensors.items()):
        found.setdefault(key.partition(".")[0], []).append(tensor)
    return {name: _total(tensors) for name, tensors in found.items()}


def _under(checkpoint: Checkpoint, start: str) -> list[StoredTensor]:
    return [tensor for key, tensor in checkpoint.tensors.items() if key.startswith(start)]


def _total(found: list[StoredTensor]) -> dict[str, int]:
    return {
        "tensors": len(found),
        "parameters": sum(math.prod(t.shape) for t in found),
        "bytes": sum(t.num_bytes for t in found),
    }


def _places(checkpoint: Checkpoint) -> dict[str, tuple[int, str]]:
    """Number of chunks, and how they cut the tensor, by key, sorted."""
    if isinstance(checkpoint.index, TableIndex):
        records, coverage = checkpoint.index.survey()
        for number in coverage.faulty():
            checkpoint.tensors[records[number].key].chunks()  # says what is wrong
        dims = (frozenset(np.flatnonzero(cut).tolist()) for cut in coverage.cut)
        return {
            record.key: (record.num_chunks, _layout(cut, bool(flat)))
            for record, cut, flat in zip(records, dims, coverage.flat, strict=True)
        }
    found = {}
    for key in sorted(checkpoint.tensors):
        boxes, shape = _boxes(checkpoint, key), checkpoint.tensors[key].shape
        dims_of_one = {d for d, n in enumerate(shape) if any(box.sizes[d] != n for box in boxes)}
        flat = all(box.flat_run(shape) for box in boxes)
        found[key] = (len(boxes), _layout(dims_of_one, flat))
    return found


def _boxes(checkpoint: Checkpoint, key: str) -> list[Box]:
    """The chunks of a tensor; of a DCP checkpoint as its metadata gives them."""
    if isinstance(checkpoint.index, DcpIndex):
        return [at.box for at in checkpoint.index.locations(key) if at.box is not None]
    return [chunk.box for chunk in checkpoint.tensors[key].chunks()]


def _layout(cut: Collection[int], flat: bool) -> str:
    """How a tensor lies in its chunks.

    ``"whole"``; ``"rows"`` or ``"columns"``, cut in the first or one other dimension; ``"ranges"``
    of elements in C order; ``"blocks"`` in several dimensions.

    Args:
        cut: dimensions in which a chunk is shorter than the tensor.
        flat: whether the elements of each chunk are one run in C order.
    """
    if not cut:
        return "whole"
    if len(cut) == 1:
        return "rows" if 0 in cut else "columns"
    return "ranges" if flat else "blocks"
