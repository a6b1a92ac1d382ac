"""``average``: the mean of several checkpoints, uniform or weighted, without PyTorch."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from sharded_ema.checkpoint.files import URL, Location, OpenFiles, as_location, as_path
from sharded_ema.checkpoint.names import BUFFERS_PREFIX, FROZEN_PREFIX
from sharded_ema.checkpoint.reading.models import holds_model, open_model
from sharded_ema.checkpoint.reading.opened import StoredTensor
from sharded_ema.config import DEFAULT_PROFILE, as_whole
from sharded_ema.errors import CheckpointMismatchError, ConfigError
from sharded_ema.tools.casting import NUMBERS, parse_dtypes
from sharded_ema.tools.contents import Average, find_tensors, origin
from sharded_ema.tools.diff import comparable
from sharded_ema.tools.huggingface import read_like
from sharded_ema.tools.plan import Wanted, plan_model
from sharded_ema.tools.report import Report
from sharded_ema.tools.source import open_source
from sharded_ema.tools.sums import Sums, write_sums
from sharded_ema.tools.ties import aliases_of, tied_names
from sharded_ema.tools.workplace import check_target


@dataclass(frozen=True)
class _Input:
    """One model to average.

    Attributes:
        path: as given.
        average: the tensors that count, by name.
        aliases: further names of tied weights, by one that they are stored under.
    """

    path: str
    average: Average
    aliases: Mapping[str, list[str]] = field(default_factory=dict)

    @property
    def described(self) -> bool:
        """Whether it is an average of this library."""
        return bool(self.average.meta)

    def named(self) -> dict[str, StoredTensor]:
        """Its tensors by all their names."""
        tensors = self.average.tensors
        found = dict(tensors)
        for stored, aliases in self.aliases.items():
            if stored in tensors:
                found = dict.fromkeys(aliases, tensors[stored]) | found
        return found

    def without(self, used: set[str]) -> list[str]:
        """Names of its tensors other than those of these keys, and what is tied to them."""
        tied = [{name, *others} for name, others in self.aliases.items()]
        known = {name for name, tensor in self.average.tensors.items() if tensor.key in used}
        known = known.union(*(names for names in tied if names & known))
        return [name for name in self.average.tensors if name not in known]

    def copied(self, tensor: StoredTensor) -> bool:
        """Whether a tensor has no mean: integers, and what an average has not averaged."""
        apart = tuple(self.average.prefix + part for part in (FROZEN_PREFIX, BUFFERS_PREFIX))
        return tensor.dtype not in NUMBERS or (self.described and tensor.key.startswith(apart))


def average(
    checkpoints: Sequence[str | os.PathLike[str]],
    *,
    out: str | os.PathLike[str],
    weights: Sequence[float] | None = None,
    profile: str = DEFAULT_PROFILE,
    prefix: str | None = None,
    dtype: str | Sequence[str] | None = None,
    max_shard_size: str | int = "5GB",
    like: str | os.PathLike[str] | None = None,
    trust_code: bool = False,
    jobs: int = 1,
    progress: bool = True,
) -> Report:
    """Average models, as pre-training merges its last checkpoints.

    Floating-point tensors are summed in float64 and rounded once. Integers, and the frozen
    parameters and buffers that checkpoints of this library hold beside the average, come from the
    last input.

    Args:
        checkpoints: each a checkpoint of this library, a Hugging Face directory, a safetensors
            file, a state dict of ``torch.save``, or a DCP checkpoint. Weights that ``config.json``
            ties may have any of their names.
        out: directory to create; it must not exist, or be empty.
        weights: of each checkpoint, not negative; they are divided by their sum. ``None``: equal.
        profile: which average, of checkpoints of this library.
        prefix: key prefix of the average in a larger checkpoint, or of the model in a DCP
            checkpoint without one, such as ``"model"``; as for ``consolidate``.
        dtype: as for ``consolidate``; ``None`` keeps that of the last input.
        max_shard_size: bytes per output file.
        trust_code: as for ``consolidate``.
        like: as for ``consolidate``; if the last input is a Hugging Face directory, that one.
        jobs: output files written at a time.
        progress: show a progress bar on standard error.

    Returns:
        A report. If ``ok`` is false ``like`` does not fit and nothing was written.

    Raises:
        CheckpointError: an input cannot be read, is damaged, or is another model than the last;
            the target exists or cannot be written.
        ConfigError: an argument is out of range.
    """
    started = time.monotonic()
    jobs = as_whole(jobs, "jobs", least=1)
    shares = _shares(weights, len(checkpoints))
    with OpenFiles() as files:
        inputs = _tied([_open(as_location(path), profile, prefix, files) for path in checkpoints])
        last, target = inputs[-1], as_path(out, "out")
        for each in inputs:
            named = Path(each.path)
            check_target(target, named if named.is_file() else each.average.checkpoint.path)
        report = Report("average", ", ".join(each.path for each in inputs))
        report.verdict = f"{target} is whole and on disk"
        if like is None and last.average.checkpoint.format != "dcp" and not last.described:
            like = last.path if Path(last.path).is_dir() else None
        shapes = {name: tensor.shape for name, tensor in last.average.tensors.items()}
        model = read_like(like, shapes, trust_code=trust_code)
        wanted = Wanted(dtypes=parse_dtypes(dtype), max_shard_size=max_shard_size, model=model)
        plan = plan_model(last.average, wanted, report)
        if not report.ok:
            return report
        read = {n: t for n, t in last.average.tensors.items() if t.key in plan.sources}
        sources = {read[name].key: found for name, found in _sources(inputs, read).items()}
        header = {
            "format": "pt",
            "kind": "average",
            "sources": json.dumps([each.path for each in inputs]),
            "weights": json.dumps(shares),
            "saves": json.dumps([origin(each.average.checkpoint) for each in inputs]),
        }
        report.facts |= {
            "output": str(target),
            "checkpoints": len(inputs),
            "weights": shares,
            "averaged_tensors": sum(len(found) > 1 for found in sources.values()),
        }
        write_sums(
            Sums(sources, np.array([shares])),
            replace(plan, headers=dict.fromkeys(plan.headers, header)),
            target,
            inputs=[each.average for each in inputs],
            like=model,
            report=report,
            jobs=jobs,
            progress=progress,
        )
    report.facts["seconds"] = round(time.monotonic() - started, 3)
    return report


def _shares(weights: Sequence[float] | None, count: int) -> list[float]:
    if not count:
        raise ConfigError("there is no checkpoint to average")
    given = [1.0] * count if weights is None else [float(weight) for weight in weights]
    total = math.fsum(given)
    if len(given) != count or not all(0 <= w < math.inf for w in given) or not 0 < total < math.inf:
        raise ConfigError(
            f"weights must be {count} numbers that are not negative, one for each checkpoint, and "
            f"not all zero; got {given}"
        )
    return [weight / total for weight in given]


def _open(path: Location, profile: str, prefix: str | None, files: OpenFiles) -> _Input:
    """One input.

    Raises:
        CheckpointError: there is none, it is damaged, or nothing in it can be averaged.
    """
    if isinstance(path, URL) or not holds_model(path):
        return _Input(str(path), find_tensors(open_source(path, files), profile, prefix))
    model = open_model(path, files)
    if model.format == "adapter":
        raise CheckpointMismatchError(
            f"{path} is a PEFT adapter; only adapters in checkpoints of this library can be "
            "averaged, with like (--like)"
        )
    return _Input(str(path), find_tensors(model, DEFAULT_PROFILE, ""))


def _tied(inputs: Sequence[_Input]) -> list[_Input]:
    """The inputs, each with the names of tied weights that it needs to be matched with another."""
    averages = [each.average for each in inputs]
    groups = tied_names(averages)
    return [replace(each, aliases=aliases_of(each.average, groups, averages)) for each in inputs]


def _sources(
    inputs: Sequence[_Input], outputs: Mapping[str, StoredTensor]
) -> dict[str, list[StoredTensor]]:
    """A tensor of each input for every output, or of the last one alone.

    Raises:
        CheckpointMismatchError: an input lacks one, has it in another shape, or has others.
    """
    last = inputs[-1]
    # All names under which another input may have a tied weight.
    names: dict[str, list[str]] = {}
    for name, tensor in last.named().items():
        names.setdefault(tensor.key, []).append(name)
    found = {name: [tensor] for name, tensor in outputs.items()}
    for each in reversed(inputs[:-1]):
        named, used = each.named(), set()
        for name, tensor in outputs.items():
            other = next((named[n] for n in (name, *names[tensor.key]) if n in named), None)
            if other is None or other.shape != tensor.shape:
                what = "lacks" if other is None else f"has {other.shape} as"
                raise CheckpointMismatchError(
                    f"{each.path} {what} {name}, which is {tensor.shape} in {last.path}: they are "
                    "different models"
                )
            used.add(other.key)
            if not last.copied(tensor):
                if not comparable(tensor, other) or other.dtype not in NUMBERS:
                    raise CheckpointMismatchError(
                        f"{name} is {other.dtype} in {each.path} and {tensor.dtype} in {last.path}"
                    )
                found[name].insert(0, other)
        if extra := each.without(used):
            raise CheckpointMismatchError(
                f"{each.path} has {len(extra)} tensors that {last.path} lacks, such as {extra[0]}"
            )
    return found
