"""What of an average goes into a state dict, and how one is taken back."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sharded_ema.averaging.average import Average
from sharded_ema.averaging.schedules import Schedule
from sharded_ema.checkpoint.names import (
    BUFFERS_PREFIX,
    FROZEN_PREFIX,
    META_BYTES,
    META_KEY,
    META_VERSION,
)
from sharded_ema.checkpoint.reading.manifest import decode_meta, encode_meta
from sharded_ema.checkpoint.reading.opened import Checkpoint
from sharded_ema.checkpoint.safetensors import PARTS
from sharded_ema.config import Settings
from sharded_ema.errors import CheckpointMismatchError, ConfigError
from sharded_ema.model.followed import FollowedModel
from sharded_ema.model.holdings import Tensors
from sharded_ema.model.layout import Box
from sharded_ema.model.pieces import Piece, pieces_of, unwritten, whole
from sharded_ema.model.sources.protocol import ReadsShards

# Names of absent tensors that are listed in full.
_MAX_ABSENT_NAMES = 100


# ---------------------------------------------------------------------- giving


def make_meta(settings: Settings, average: Average, tensors: Tensors) -> dict[str, Any]:
    """What a checkpoint says of itself: schedules, counters, aliases; JSON types only.

    Args:
        tensors: what all ranks hold.
    """
    absent = [*tensors.excluded, *(tensors.frozen if settings.frozen == "skip" else ())]
    return {
        "version": META_VERSION,
        "kind": "ema",
        "step": average.clock.applied_steps,
        **average.describe(),
        "aliases": tensors.aliases,
        "adapters": tensors.adapters,
        "buffers": settings.buffers_text,
        "frozen": settings.frozen,
        "absent": {"count": len(absent), "names": absent[:_MAX_ABSENT_NAMES]},
        "nonfinite_elements": average.shadow.collect_skipped(),
    }


def make_averages(model: FollowedModel, average: Average) -> dict[str, Tensor]:
    """``<profile>.<name>``: the shadows as values that DCP can save and load in place.

    Of an average that stands in for the weights, buffers are those that the model has, which the
    body of the swap may have computed anew.
    """
    borrowed, reader = model.holdings.borrowed, model.reader
    found = {}
    for profile, views in average.shadow.views.items():
        tensors = _as_in_the_model(reader, views) if profile == model.standing_in else views
        for shard, value in zip(reader.shards, reader.stored(tensors), strict=True):
            name = shard.name.fqn
            found[f"{profile}.{name}"] = unwritten(value) if name in borrowed else value
    return found


@torch.no_grad()
def _as_in_the_model(reader: ReadsShards, views: Sequence[Tensor]) -> list[Tensor]:
    found = list(views)
    for i, (shard, live) in enumerate(zip(reader.shards, reader.live(), strict=True)):
        # One that is the average, rounded to the model's dtype, is the average.
        if not shard.name.is_parameter and not torch.equal(live, found[i].to(live)):
            found[i] = live.to(found[i].device, found[i].dtype, copy=True)
    return found


def make_state(
    model: FollowedModel, average: Average, meta: Mapping[str, Any]
) -> dict[str, Tensor]:
    """The averages, and what makes an export a whole model: frozen parameters and buffers."""
    state = make_averages(model, average)
    inventory = model.inventory
    apart = {FROZEN_PREFIX: inventory.frozen, BUFFERS_PREFIX: inventory.buffers + inventory.extra}
    if meta["frozen"] == "skip":
        del apart[FROZEN_PREFIX]
    for prefix, tensors in apart.items():
        for named in tensors:
            value = model.reader.stored_apart(named)
            is_borrowed = named.fqn in model.holdings.borrowed
            state[prefix + named.fqn] = unwritten(value) if is_borrowed else value
    state[META_KEY] = _meta_tensor(meta, model.reader.ranks)
    return state


def of_one_profile(state: Mapping[str, Tensor], profile: str) -> dict[str, Tensor]:
    """The tensors of a state that make a whole model, by their names in it."""
    found = {}
    for key, value in state.items():
        for start in (f"{profile}.", FROZEN_PREFIX, BUFFERS_PREFIX):
            if key.startswith(start):
                found[key.removeprefix(start)] = value
    return found


@torch.no_grad()
def as_plain(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of a model in one process, all of it, as plain tensors.

    Averages are the memory of the shadow, as before. Frozen parameters and buffers are copies:
    whoever loads into the state in place would overwrite the model's.
    """
    plain = {}
    for key, value in state.items():
        pieces = pieces_of(value)
        tensor = pieces[0][1] if pieces else torch.empty(value.shape, dtype=value.dtype)
        apart = key.startswith((FROZEN_PREFIX, BUFFERS_PREFIX))
        plain[key] = tensor.detach().clone() if apart else tensor
    return plain


def _meta_tensor(meta: Mapping[str, Any], ranks: Sequence[int]) -> Tensor:
    data = encode_meta(dict(meta))
    if len(data) > META_BYTES:
        raise ConfigError(
            f"the description of this average takes {len(data)} bytes, more than {META_BYTES}; "
            "it has too many aliases of tied weights"
        )
    tensor = torch.zeros(META_BYTES, dtype=torch.uint8, device="cpu")
    tensor[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    if not ranks:
        return tensor
    return whole(tensor, writes=torch.distributed.get_rank() == ranks[0])


# ---------------------------------------------------------------------- taking


@dataclass(frozen=True, slots=True)
class Stored:
    """An average that is there to be loaded.

    Attributes:
        where: it is, for messages.
        prefix: of its keys.
        meta: what it says of itself.
        shapes: by key, without the prefix.
        complex: keys of complex numbers.
    """

    where: str
    prefix: str
    meta: dict[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    complex: frozenset[str]


def stored_in_checkpoint(checkpoint: Checkpoint) -> Stored:
    """The one average in a checkpoint.

    Raises:
        CheckpointMismatchError: there is none, or several.
    """
    prefixes = checkpoint.prefixes()
    if len(prefixes) != 1:
        raise CheckpointMismatchError(
            f"{checkpoint.path} holds {len(prefixes)} averages of this library"
            + (
                f", under the prefixes {prefixes}; load the one you mean with dcp.load"
                if prefixes
                else "; was it saved by ema.save, or by dcp.save with the ShardedEMA in the state? "
                "To begin an average of a run that kept none, load its weights and call "
                "ema.reseed()"
            )
        )
    (prefix,) = prefixes
    tensors = {
        key.removeprefix(prefix): tensor
        for key, tensor in checkpoint.tensors.items()
        if key.startswith(prefix)
    }
    return Stored(
        str(checkpoint.path),
        prefix,
        checkpoint.meta(prefix),
        {key: tensor.shape for key, tensor in tensors.items()},
        frozenset(key for key, tensor in tensors.items() if tensor.dtype in PARTS),
    )


def stored_in_state(state: Mapping[str, Any]) -> Stored:
    """The average in a state dict.

    Raises:
        CheckpointMismatchError: it has no description, so this is no state of an average.
    """
    value = state.get(META_KEY)
    if not isinstance(value, Tensor):
        raise CheckpointMismatchError(
            f"the state has no {META_KEY!r}, so it is not the state of a ShardedEMA; its keys "
            f"look like {list(state)[:3]}"
        )
    ((_, tensor),) = pieces_of(value)
    meta = decode_meta(tensor.cpu().numpy().tobytes(), META_KEY)
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    return Stored(
        "the state",
        "",
        meta,
        {key: tuple(value.shape) for key, value in tensors.items()},
        frozenset(key for key, value in tensors.items() if value.is_complex()),
    )


def check_fits(
    own: Mapping[str, Tensor],
    stored: Stored,
    profiles: Mapping[str, Schedule],
    *,
    averaged: Collection[str],
    strict: bool,
) -> None:
    """Check what is there against this average before anything is overwritten.

    Args:
        own: this object's averages by key.
        profiles: its schedules.
        averaged: names that are averaged here or on other ranks.
        strict: refuse other schedules, missing and unknown names.

    Raises:
        CheckpointMismatchError: names, shapes or schedules do not fit.
    """
    if strict:
        _check_schedules(stored.meta, profiles)
    where, shapes = stored.where, stored.shapes
    differing = [
        f"{key} is {tuple(shapes[key])} there and {tuple(value.shape)} here"
        for key, value in own.items()
        if key in shapes and tuple(shapes[key]) != tuple(value.shape)
    ]
    differing += [
        f"{key} is {'real' if value.is_complex() else 'complex'} there and not here"
        for key, value in own.items()
        if key in shapes and (key in stored.complex) != value.is_complex()
    ]
    if differing:
        raise CheckpointMismatchError(
            f"{where} belongs to another model: {_some(differing)}; nothing was loaded"
        )
    if not own.keys() & shapes.keys():
        raise CheckpointMismatchError(
            f"{where} has none of the averages of this model; nothing was loaded. It holds the "
            f"profiles {sorted(stored.meta['profiles'])}"
        )
    averages = tuple(f"{name}." for name in stored.meta["profiles"])
    known = own.keys() | {start + name for start in averages for name in averaged}
    missing = [key for key in own if key not in shapes]
    extra = [key for key in shapes if key.startswith(averages) and key not in known]
    if strict and (missing or extra):
        raise CheckpointMismatchError(
            f"{where} does not fit this model: it lacks {_some(missing)} and has unknown "
            f"{_some(extra)}; nothing was loaded. If that is meant, load with strict=False"
        )


def _check_schedules(meta: Mapping[str, Any], profiles: Mapping[str, Schedule]) -> None:
    """Refuse to continue an average under another schedule."""
    stored = meta["profiles"]
    if set(stored) != set(profiles):
        raise CheckpointMismatchError(
            f"the checkpoint holds the profiles {sorted(stored)}, this average has "
            f"{sorted(profiles)}; use the same names, or load with strict=False"
        )
    for name, schedule in profiles.items():
        # Through JSON, as the stored one went, which has lists for tuples.
        if stored[name]["schedule"] != json.loads(json.dumps(schedule.to_dict())):
            raise CheckpointMismatchError(
                f"profile {name} was saved with the schedule {stored[name]['schedule']} and is "
                f"loaded with {schedule.to_dict()}; use the same schedule, or load with "
                "strict=False to continue under the new one"
            )


def _some(items: Sequence[str]) -> str:
    """A list that stays readable."""
    if not items:
        return "nothing"
    shown = ", ".join(items[:5])
    return f"{len(items)} ({shown}{', ...' if len(items) > 5 else ''})"


def shares_memory(own: Mapping[str, Tensor], state: Mapping[str, Any]) -> bool:
    """Whether a state holds this rank's own memory, as after ``dcp.load`` into a state dict."""
    mine = {t.data_ptr() for value in own.values() for _, t in pieces_of(value) if t.numel()}
    given = (v for key, v in state.items() if key in own and isinstance(v, Tensor))
    return any(t.data_ptr() in mine for v in given for _, t in pieces_of(v))


@torch.no_grad()
def copy_state(own: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Copy given values into this rank's pieces; same memory stays as it is."""
    for key, target in own.items():
        if key not in state:
            continue
        given = list(pieces_of(state[key]))
        for box, into in pieces_of(target):
            if box.numel:
                _fill(key, into, box, given)


def _fill(key: str, into: Tensor, box: Box, given: Sequence[Piece]) -> None:
    for there, tensor in given:
        part = box.inside(there)
        if part is not None:
            source = tensor[part.slices]
            break
    else:
        raise CheckpointMismatchError(
            f"{key}: this rank needs {box} and the given value holds {[b for b, _ in given]}; load "
            "through torch.distributed.checkpoint to change the sharding"
        )
    if source.data_ptr() != into.data_ptr():
        into.copy_(source)
