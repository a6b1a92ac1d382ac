"""``synthesize``: averages of any width out of the snapshots of a run, without PyTorch."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sharded_ema.averaging.posthoc import Fit, Profile, fit
from sharded_ema.averaging.schedules import Power
from sharded_ema.checkpoint.files import OpenFiles, as_location, as_path
from sharded_ema.checkpoint.reading.opened import StoredTensor
from sharded_ema.checkpoint.safetensors import PARTS
from sharded_ema.config import as_whole
from sharded_ema.errors import ConfigError
from sharded_ema.tools.casting import parse_dtypes
from sharded_ema.tools.contents import Average, find_average, origin
from sharded_ema.tools.huggingface import read_like
from sharded_ema.tools.plan import Plan, Wanted, plan_model
from sharded_ema.tools.report import Report
from sharded_ema.tools.snapshots import Chosen, choose, find_snapshots
from sharded_ema.tools.sums import Sums, write_sums
from sharded_ema.tools.workplace import check_target

#: Widths in one call: each has a file open while it is written.
MAX_WIDTHS = 100
# Relative rounding error of a stored value.
_ROUNDING = {"F64": 2.0**-53, "F32": 2.0**-24, "F16": 2.0**-11, "BF16": 2.0**-8}
_ROUNDING |= {dtype: _ROUNDING[part] for dtype, part in PARTS.items()}


def synthesize(
    run: str | os.PathLike[str],
    *,
    sigma_rel: float | Sequence[float],
    out: str | os.PathLike[str],
    step: int | None = None,
    profiles: Sequence[str] | None = None,
    dtype: str | Sequence[str] | None = None,
    max_shard_size: str | int = "5GB",
    like: str | os.PathLike[str] | None = None,
    trust_code: bool = False,
    jobs: int = 1,
    progress: bool = True,
    max_residual: float = 0.05,
) -> Report:
    """Build averages of any length from the ``Power`` profiles in a run's checkpoints.

    All widths are written in one pass over the snapshots. Frozen parameters, buffers that are not
    averaged and integers come from the snapshot of ``step``.

    Args:
        run: directory with the checkpoints of a run: ``run/step_N``, ``run/checkpoints/step_N/ema``
            and the like.
        sigma_rel: relative widths, in ``(0, 0.2886...]``; at most 100.
        out: directory to create, with a model directory ``sigma_rel_<width>`` for each. It appears
            whole or not at all.
        step: of the snapshot at which the averages end; ``None`` for the last one.
        profiles: which stored profiles to use; ``None`` for all that are ``Power``.
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``; ``None`` keeps what is stored.
        max_shard_size: bytes per output file.
        like: a Hugging Face or PEFT adapter directory, as for ``consolidate``.
        trust_code: as for ``consolidate``.
        jobs: output files of a model written at a time.
        progress: show a progress bar on standard error.
        max_residual: refuse a width whose weighting is missed by more than this share of its norm,
            or in which rounding errors of the stored values could grow beyond it.

    Returns:
        A report with the residual of every width. If ``ok`` is false one of them cannot be
        expressed, or ``like`` does not fit, and nothing was written.

    Raises:
        CheckpointError: no snapshots, some are damaged or do not belong together, there is no
            ``Power`` profile in them; the target exists or cannot be written.
        ConfigError: an argument is out of range.
    """
    started = time.monotonic()
    widths = _widths(sigma_rel)
    step = None if step is None else as_whole(step, "step", least=0)
    jobs = as_whole(jobs, "jobs", least=1)
    if not max_residual > 0:
        raise ConfigError(f"max_residual must be positive, got {max_residual}")
    with OpenFiles() as files:
        chosen = choose(find_snapshots(as_location(run), files), step, profiles)
        target = as_path(out, "out")
        for snapshot in chosen.snapshots:
            check_target(target, snapshot.path)
        report = Report("synthesize", os.fspath(run), notes=chosen.notes)
        report.verdict = f"{target} is whole and on disk"
        schedules = [Power(sigma_rel=width) for width in widths]
        updates = chosen.target.updates
        found = fit(
            [profile for _, _, profile in chosen.columns],
            [Profile(schedule.gamma, updates) for schedule in schedules],
        )
        folders = [f"sigma_rel_{width!r}" for width in widths]
        report.facts |= _facts(chosen, target, schedules, folders, found)
        _check_fit(chosen, widths, found, max_residual, report)
        name = next(n for s, n, _ in chosen.columns if s is chosen.target)
        average = find_average(chosen.target.checkpoint, name, chosen.target.prefix)
        shapes = {name: tensor.shape for name, tensor in average.tensors.items()}
        model = read_like(like, shapes, trust_code=trust_code)
        wanted = Wanted(dtypes=parse_dtypes(dtype), max_shard_size=max_shard_size, model=model)
        plan = plan_model(average, wanted, report)
        if not report.ok:
            return report
        headers = {
            folder: _header(chosen, schedule, found, number)
            for number, (folder, schedule) in enumerate(zip(folders, schedules, strict=True))
        }
        write_sums(
            Sums(_sources(chosen, name, plan), found.coefficients),
            replace(plan, headers=headers),
            target,
            inputs=[Average(s.checkpoint, s.prefix, "", s.meta, {}) for s in chosen.snapshots],
            like=model,
            report=report,
            jobs=jobs,
            progress=progress,
        )
    report.facts["seconds"] = round(time.monotonic() - started, 3)
    return report


def _widths(sigma_rel: float | Sequence[float]) -> list[float]:
    given = [sigma_rel] if isinstance(sigma_rel, int | float) else list(sigma_rel)
    widths = [float(width) for width in given]
    if not widths or len(set(widths)) < len(widths) or len(widths) > MAX_WIDTHS:
        raise ConfigError(
            f"sigma_rel takes 1 to {MAX_WIDTHS} widths, each of them once; got {widths}"
        )
    return widths


def _facts(
    chosen: Chosen, target: Path, schedules: Sequence[Power], folders: Sequence[str], found: Fit
) -> dict[str, Any]:
    meta = chosen.target.meta
    return {
        "output": str(target),
        "step": chosen.target.step,
        "updates": chosen.target.updates,
        "update_every": meta["update_every"],
        "seed_step": meta["seed_step"],
        "snapshots": [s.step for s in chosen.snapshots],
        "profiles": {n: s.schedule(n) for s, n, _ in chosen.columns},
        "widths": {
            str(schedule.sigma_rel): {
                "gamma": schedule.gamma,
                "residual": float(found.residuals[number]),
                "gain": float(found.gains[number]),
                "output": folders[number],
            }
            for number, schedule in enumerate(schedules)
        },
    }


def _check_fit(
    chosen: Chosen, widths: Sequence[float], found: Fit, limit: float, report: Report
) -> None:
    """Refuse widths that the snapshots cannot express."""
    dtypes = {
        tensor.dtype
        for snapshot, name, _ in chosen.columns
        for key, tensor in snapshot.checkpoint.tensors.items()
        if key.startswith(f"{snapshot.prefix}{name}.")
    }
    rounding = max(_ROUNDING.get(dtype, 0.0) for dtype in dtypes)
    there = sorted({profile.gamma for _, _, profile in chosen.columns})
    for width, residual, gain in zip(widths, found.residuals, found.gains, strict=True):
        if residual > limit:
            report.fail(
                f"sigma_rel {width} cannot be made of {len(chosen.columns)} stored averages "
                f"(gamma {', '.join(f'{g:.4g}' for g in there)}): the residual {residual:.3g} "
                f"exceeds {limit:g}. Keep more snapshots, store a profile nearer to it, choose a "
                "width between the stored ones, or raise max_residual (--max-residual)"
            )
        elif gain * rounding > limit:
            report.fail(
                f"sigma_rel {width} would multiply rounding errors of the stored averages by "
                f"{gain:.3g}; use profiles that differ more (--profiles)"
            )


def _sources(chosen: Chosen, name: str, plan: Plan) -> dict[str, list[StoredTensor]]:
    """What is read in place of each tensor: that of every stored average, or of the last alone."""
    start = f"{chosen.target.prefix}{name}."
    found: dict[str, list[StoredTensor]] = {}
    for key, tensor in plan.sources.items():
        if key.startswith(start) and tensor.dtype in _ROUNDING:
            inner = key.removeprefix(start)
            found[key] = [
                s.checkpoint.tensors[f"{s.prefix}{profile}.{inner}"]
                for s, profile, _ in chosen.columns
            ]
        else:
            found[key] = [tensor]
    return found


def _header(chosen: Chosen, schedule: Power, found: Fit, number: int) -> dict[str, str]:
    target = chosen.target
    parts = [
        [snapshot.step, name, float(factor)]
        for (snapshot, name, _), factor in zip(
            chosen.columns, found.coefficients[number], strict=True
        )
    ]
    return {
        "format": "pt",
        "kind": "ema",
        "profile": f"sigma_rel_{schedule.sigma_rel!r}",
        "sigma_rel": repr(schedule.sigma_rel),
        "gamma": repr(schedule.gamma),
        "decay": repr(schedule.decay(max(1, target.meta["num_updates"]))),
        "num_updates": str(target.meta["num_updates"]),
        "step": str(target.step),
        **origin(target.checkpoint),
        "source_steps": ",".join(str(s.step) for s in chosen.snapshots),
        "residual": repr(float(found.residuals[number])),
        "coefficients": json.dumps(parts),
    }
