"""``inspect``: what is in a checkpoint, or in the directory of a run."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sharded_ema.averaging.schedules import Power, horizon, schedule_from_dict, sigma_rel_from_gamma
from sharded_ema.checkpoint.location import as_location
from sharded_ema.checkpoint.pointer import LATEST_NAME
from sharded_ema.checkpoint.reading.opened import Catalog, StoredTensor, open_checkpoint
from sharded_ema.checkpoint.run import Committed
from sharded_ema.config import BUFFERS_PREFIX, FROZEN_PREFIX
from sharded_ema.errors import CheckpointNotFoundError, ConfigError
from sharded_ema.model.layout import Box, Shape
from sharded_ema.tools.contents import num_bytes
from sharded_ema.tools.huggingface import model_header, open_model
from sharded_ema.tools.report import Report
from sharded_ema.tools.runs import Run, checkpoint_name, read_run
from sharded_ema.tools.source import locate


def inspect(path: str | os.PathLike[str], *, tensors: bool = False) -> Report:
    """Describe a checkpoint, or list those of a run, from metadata alone; reads no tensor data.

    Args:
        path: a committed checkpoint, ours or one of PyTorch's distributed format; a directory
            with several of ours in it; or a model directory or safetensors file, such as
            ``consolidate`` writes.
        tensors: list every tensor, with the number of its chunks and how they cut it.

    Returns:
        A report. ``ok`` is false if a checkpoint of the run has a damaged manifest.

    Raises:
        CheckpointError: it cannot be opened; the class says why.
    """
    report = Report("inspect", str(path))
    if as_location(path).name == LATEST_NAME:
        path = locate(path)
    try:
        return _describe_checkpoint(open_checkpoint(path), tensors, report)
    except CheckpointNotFoundError:
        run = read_run(path)
        if run.checkpoints or run.damaged or run.leftovers:
            return _describe_run(run, report)
        model = _find_model(path)
        if model is None:
            raise
    return _describe_checkpoint(model, tensors, report)


# ---------------------------------------------------------------------- a run


def _describe_run(run: Run, report: Report) -> Report:
    names = [checkpoint_name(found.path) for found in run.checkpoints]
    report.facts["checkpoints"] = [
        _row(name, found, run.latest) for name, found in zip(names, run.checkpoints, strict=True)
    ]
    report.facts["bytes"] = sum(found.num_bytes for found in run.checkpoints)
    if run.leftovers:
        report.facts["uncommitted"] = run.leftovers
        report.notes.append(
            f"{len(run.leftovers)} directories are of saves that are under way or did not finish; "
            "the next save there removes what is nobody's"
        )
    if not names:
        report.notes.append("no committed checkpoint of an average is in it")
    elif run.latest is not None and run.latest != names[-1]:
        report.notes.append(
            f"the file latest names {run.latest}, the last committed is {names[-1]}"
        )
    for name, problem in run.damaged.items():
        report.fail(f"{name}: {problem}")
    return report


def _row(name: str, found: Committed, latest: str | None) -> dict[str, Any]:
    return {
        "name": name,
        "step": found.step,
        "saved_at": _time(found.saved_at),
        "bytes": found.num_bytes,
        "latest": name == latest,
    }


def _time(milliseconds: int) -> str | None:
    """ISO 8601 in UTC, to the second; ``None`` if it was not recorded or cannot be."""
    try:
        when = datetime.fromtimestamp(milliseconds // 1000, UTC)
    except (ValueError, OverflowError, OSError):
        return None
    return when.isoformat() if milliseconds else None


# ---------------------------------------------------------------------- a checkpoint


def _describe_checkpoint(catalog: Catalog, tensors: bool, report: Report) -> Report:
    report.facts["format"] = catalog.format
    report.facts["metadata"] = "verified" if catalog.verified_metadata else "unverified"
    if catalog.manifest is not None:
        report.facts |= {
            "saved_at": _time(catalog.manifest.saved_at),
            "uuid": catalog.manifest.uuid,
            "world_size": catalog.manifest.world_size,
            "files": len(catalog.manifest.files) + 1,
            "libraries": dict(catalog.manifest.libraries),
        }
    for prefix in catalog.prefixes():
        name = f"average under {prefix!r}" if prefix else "average"
        report.facts[name] = _describe_average(catalog, prefix)
    if catalog.manifest is None and catalog.index is not None:
        report.facts["parts"] = _parts(catalog)
        report.notes.append(
            "a checkpoint of torch.distributed.checkpoint not written by this library: only its "
            "data can have checksums"
        )
    elif catalog.manifest is None:
        report.facts["header"] = header = model_header(catalog)
        if "kind" not in header:
            report.notes.append("its files do not say whether it is an average")
    if not catalog.prefixes() and (catalog.manifest or catalog.index):
        report.notes.append("no average of this library is in it")
    if catalog.unsupported:
        report.notes.append(
            f"{len(catalog.unsupported)} tensors have a dtype that is not read, such as "
            f"{min(catalog.unsupported)}"
        )
    boxes = {key: _boxes(catalog, key) for key in sorted(catalog.tensors)}
    cuts = {key: _cut(found, catalog.tensors[key].shape) for key, found in boxes.items()}
    report.facts |= {
        "tensors": len(boxes),
        "chunks": sum(map(len, boxes.values())),
        "layouts": dict(Counter(cuts.values()).most_common()),
        "bytes": sum(num_bytes(t) for t in catalog.tensors.values()),
    }
    if tensors:
        report.facts["list"] = [
            {
                "name": key,
                "dtype": catalog.tensors[key].dtype,
                "shape": list(catalog.tensors[key].shape),
                "bytes": num_bytes(catalog.tensors[key]),
                "chunks": len(found),
                "layout": cuts[key],
            }
            for key, found in boxes.items()
        ]
    return report


def _find_model(path: str | os.PathLike[str]) -> Catalog | None:
    with suppress(CheckpointNotFoundError):
        return open_model(Path(path))
    return None


def _describe_average(catalog: Catalog, prefix: str) -> dict[str, Any]:
    meta = catalog.meta(prefix)
    facts: dict[str, Any] = {
        "step": meta["step"],
        "updates": meta["num_updates"],
        "applied_steps": meta["applied_steps"],
        "seed_step": meta["seed_step"],
        "update_every": meta["update_every"],
        "start_step": meta["start_step"],
        # Applied since the average last took the parameters in.
        "steps_in_open_window": meta["applied_steps"] - meta["last_lerp_step"],
    }
    for profile, settings in meta["profiles"].items():
        facts[f"profile {profile}"] = {
            **_span(settings),
            "weight_of_initial_weights": settings["seed_weight"],
            **({"sampled_distance_to_live_weights": meta["sampled_distance"][profile]}
               if profile in meta.get("sampled_distance", {}) else {}),
            **_total(_under(catalog, f"{prefix}{profile}.")),
        }  # fmt: skip
    facts["frozen"] = {"policy": meta["frozen"], **_total(_under(catalog, prefix + FROZEN_PREFIX))}
    buffers = _under(catalog, prefix + BUFFERS_PREFIX)
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
    kind = schedule.pop("type", "unknown")
    shown = (
        f"{name}={value:.6g}" if isinstance(value, float) else f"{name}={value}"
        for name, value in schedule.items()
        if value is not None
    )
    return {
        "schedule": f"{kind}({', '.join(shown)})",
        "decay": decay,
        # JSON has no infinity.
        "horizon_steps": horizon(decay) if decay < 1 else None,
        "half_life_steps": math.log(0.5) / math.log(decay) if 0 < decay < 1 else None,
    }


def _parts(catalog: Catalog) -> dict[str, dict[str, int]]:
    """What lies under each first part of a key, such as ``model`` and ``optimizer``."""
    found: dict[str, list[StoredTensor]] = {}
    for key, tensor in sorted(catalog.tensors.items()):
        found.setdefault(key.partition(".")[0], []).append(tensor)
    return {name: _total(tensors) for name, tensors in found.items()}


def _under(catalog: Catalog, start: str) -> list[StoredTensor]:
    return [tensor for key, tensor in catalog.tensors.items() if key.startswith(start)]


def _total(found: list[StoredTensor]) -> dict[str, int]:
    return {
        "tensors": len(found),
        "parameters": sum(math.prod(t.shape) for t in found),
        "bytes": sum(num_bytes(t) for t in found),
    }


def _boxes(catalog: Catalog, key: str) -> list[Box]:
    """The chunks of a tensor; of a DCP checkpoint as its metadata gives them."""
    if catalog.index is not None:
        return [at.box for at in catalog.index.locations(key) if at.box is not None]
    return [chunk.box for chunk in catalog.chunks(key)]


def _cut(boxes: Iterable[Box], shape: Shape) -> str:
    """How a tensor lies in its chunks.

    ``"whole"``; ``"rows"`` or ``"columns"``, cut in the first or one other dimension; ``"ranges"``
    of elements in C order; ``"blocks"`` in several dimensions.
    """
    found = list(boxes)
    dims = {d for d, n in enumerate(shape) if any(box.sizes[d] != n for box in found)}
    if not dims:
        return "whole"
    if len(dims) == 1:
        return "rows" if dims == {0} else "columns"
    return "ranges" if all(box.flat_run(shape) for box in found) else "blocks"
