"""``inspect``: what is in a checkpoint."""

from __future__ import annotations

import math
import os
from typing import Any

from sharded_ema.checkpoint.reading.catalog import Catalog, open_checkpoint
from sharded_ema.config import BUFFERS_PREFIX, FROZEN_PREFIX
from sharded_ema.schedules import horizon
from sharded_ema.tools.contents import num_bytes
from sharded_ema.tools.report import Report


def inspect(path: str | os.PathLike[str], *, tensors: bool = False) -> Report:
    """Describe a checkpoint from its metadata alone; reads no tensor data.

    Args:
        path: a committed checkpoint, ours or one of PyTorch's distributed format.
        tensors: list every tensor.

    Raises:
        CheckpointError: it cannot be opened; the class says why.
    """
    catalog = open_checkpoint(path)
    report = Report("inspect", str(path))
    report.facts["format"] = catalog.format
    report.facts["metadata"] = "verified" if catalog.verified_metadata else "unverified"
    if catalog.manifest is not None:
        report.facts["world_size"] = catalog.manifest.world_size
        report.facts["files"] = len(catalog.manifest.files) + 1
        report.facts["libraries"] = dict(catalog.manifest.libraries)
    for prefix in catalog.prefixes():
        name = f"average under {prefix!r}" if prefix else "average"
        report.facts[name] = _describe(catalog, prefix)
    if not catalog.prefixes():
        report.notes.append("no average of this library is in it")
    report.facts["tensors"] = len(catalog.tensors)
    report.facts["bytes"] = sum(num_bytes(t) for t in catalog.tensors.values())
    if tensors:
        report.facts["list"] = [
            f"{key} {t.dtype} {list(t.shape)}" for key, t in sorted(catalog.tensors.items())
        ]
    return report


def _describe(catalog: Catalog, prefix: str) -> dict[str, Any]:
    meta = catalog.meta(prefix)
    facts: dict[str, Any] = {
        "step": meta["step"],
        "updates": meta["num_updates"],
        "update_every": meta["update_every"],
        "start_step": meta["start_step"],
    }
    for profile, settings in meta["profiles"].items():
        stored = _under(catalog, f"{prefix}{profile}.")
        facts[f"profile {profile}"] = {
            "schedule": ", ".join(f"{k}={v}" for k, v in settings["schedule"].items()),
            "decay": settings["decay"],
            "horizon_steps": horizon(settings["decay"]),
            "weight_of_initial_weights": settings["seed_weight"],
            **({"sampled_distance_to_live_weights": meta["sampled_distance"][profile]}
               if profile in meta.get("sampled_distance", {}) else {}),
            **stored,
        }  # fmt: skip
    facts["frozen"] = _under(catalog, prefix + FROZEN_PREFIX)["tensors"]
    facts["buffers"] = _under(catalog, prefix + BUFFERS_PREFIX)["tensors"]
    facts["tied_aliases"] = sum(len(names) for names in meta["aliases"].values())
    facts["absent"] = meta["absent"]["count"]
    facts["nonfinite_elements_skipped"] = meta["nonfinite_elements"]
    return facts


def _under(catalog: Catalog, start: str) -> dict[str, int]:
    found = [t for key, t in catalog.tensors.items() if key.startswith(start)]
    return {
        "tensors": len(found),
        "parameters": sum(math.prod(t.shape) for t in found),
        "bytes": sum(num_bytes(t) for t in found),
    }
