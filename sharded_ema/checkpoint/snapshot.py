"""What of an average goes into a state dict, and how one is taken back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sharded_ema.averaging.schedules import Schedule
from sharded_ema.averaging.shadow import Clock, Shadow
from sharded_ema.checkpoint.names import (
    BUFFERS_PREFIX,
    FROZEN_PREFIX,
    META_BYTES,
    META_KEY,
    META_VERSION,
)
from sharded_ema.checkpoint.reading.manifest import decode_meta, encode_meta
from sharded_ema.checkpoint.reading.opened import Checkpoint
from sharded_ema.config import Settings, check_schedules
from sharded_ema.errors import CheckpointMismatchError, ConfigError
from sharded_ema.model.layout import Box
from sharded_ema.model.pieces import Piece, pieces_of, whole
from sharded_ema.model.sources import ShardSource

# Names of absent tensors that are listed in full.
_MAX_ABSENT_NAMES = 100


def make_meta(
    settings: Settings, clock: Clock, shadow: Shadow, source: ShardSource
) -> dict[str, Any]:
    """What a checkpoint says of itself: schedules, counters, aliases; JSON types only."""
    inventory = source.inventory
    absent = [named.fqn for named in inventory.excluded]
    if settings.frozen == "skip":
        absent += [named.fqn for named in inventory.frozen]
    n = max(1, clock.num_updates)
    return {
        "version": META_VERSION,
        "kind": "ema",
        "step": clock.applied_steps,
        "num_updates": clock.num_updates,
        **clock.to_dict(),
        "profiles": {
            name: {
                "schedule": schedule.to_dict(),
                "decay": schedule.decay(n),
                "seed_weight": shadow.seed_weight[name],
            }
            for name, schedule in settings.profiles.items()
        },
        "aliases": {
            named.fqn: list(named.aliases)
            for named in (*inventory.averaged, *inventory.frozen)
            if named.aliases
        },
        "adapters": inventory.adapters,
        "buffers": settings.buffers,
        "frozen": settings.frozen,
        "absent": {"count": len(absent), "names": absent[:_MAX_ABSENT_NAMES]},
        "nonfinite_elements": shadow.collect_skipped(),
    }


def make_averages(source: ShardSource, shadow: Shadow) -> dict[str, Tensor]:
    """``<profile>.<name>``: the shadows as values that DCP can save and load in place."""
    return {
        f"{profile}.{shard.name.fqn}": value
        for profile, views in shadow.views.items()
        for shard, value in zip(source.shards, source.values(views), strict=True)
    }


def make_state(source: ShardSource, shadow: Shadow, meta: Mapping[str, Any]) -> dict[str, Tensor]:
    """The averages, and what makes an export a whole model: frozen parameters and buffers."""
    state = make_averages(source, shadow)
    if meta["frozen"] == "save":
        for named in source.inventory.frozen:
            state[FROZEN_PREFIX + named.fqn] = source.extra_value(named)
    for named in source.inventory.buffers:
        state[BUFFERS_PREFIX + named.fqn] = source.extra_value(named)
    state[META_KEY] = _meta_tensor(meta, source)
    return state


def _meta_tensor(meta: Mapping[str, Any], source: ShardSource) -> Tensor:
    data = encode_meta(dict(meta))
    if len(data) > META_BYTES:
        raise ConfigError(
            f"the description of this average takes {len(data)} bytes, more than {META_BYTES}; "
            "it has too many aliases of tied weights"
        )
    tensor = torch.zeros(META_BYTES, dtype=torch.uint8, device="cpu")
    tensor[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    if not source.ranks:
        return tensor
    return whole(tensor, writes=source.is_first_rank)


def read_meta(state: Mapping[str, Any]) -> dict[str, Any]:
    """The description in a state dict.

    Raises:
        CheckpointMismatchError: there is none, so this is no state of an average.
    """
    value = state.get(META_KEY)
    if not isinstance(value, Tensor):
        raise CheckpointMismatchError(
            f"the state has no {META_KEY!r}, so it is not the state of a ShardedEMA; its keys "
            f"look like {list(state)[:3]}"
        )
    ((_, tensor),) = pieces_of(value)
    return decode_meta(tensor.cpu().numpy().tobytes(), META_KEY)


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """What to read from a checkpoint: keys below ``prefix``, and its description."""

    prefix: str
    keys: list[str]
    meta: dict[str, Any]


def plan_load(
    catalog: Checkpoint,
    own: Mapping[str, Tensor],
    profiles: Mapping[str, Schedule] | None,
    *,
    elsewhere: frozenset[str],
    strict: bool,
) -> LoadPlan:
    """Check a checkpoint against this average before anything is overwritten.

    Args:
        own: this object's averages by key.
        profiles: schedules that must be the stored ones; ``None`` to accept others.
        elsewhere: names that are averaged on other ranks only.

    Raises:
        CheckpointMismatchError: no average in it, or names, shapes or schedules do not fit.
    """
    prefixes = catalog.prefixes()
    if len(prefixes) != 1:
        raise CheckpointMismatchError(
            f"{catalog.path} holds {len(prefixes)} averages of this library"
            + (
                f", under the prefixes {prefixes}; load the one you mean with dcp.load"
                if prefixes
                else "; was it saved by ema.save, or by dcp.save with the ShardedEMA in the state? "
                "To begin an average of a run that kept none, load its weights and call "
                "ema.reseed()"
            )
        )
    prefix = prefixes[0]
    meta = catalog.meta(prefix)
    if profiles is not None:
        check_schedules(meta, profiles)
    stored = {
        key.removeprefix(prefix): tensor.shape
        for key, tensor in catalog.tensors.items()
        if key.startswith(prefix)
    }
    _check(own, stored, meta, elsewhere, strict=strict, where=str(catalog.path))
    return LoadPlan(prefix, [key for key in own if key in stored], meta)


def check_names(
    own: Mapping[str, Tensor],
    state: Mapping[str, Any],
    meta: Mapping[str, Any],
    *,
    elsewhere: frozenset[str],
    strict: bool,
) -> None:
    """The same for a state dict in memory."""
    shapes = {key: tuple(v.shape) for key, v in state.items() if isinstance(v, Tensor)}
    _check(own, shapes, meta, elsewhere, strict=strict, where="the state")


def _check(
    own: Mapping[str, Tensor],
    stored: Mapping[str, Sequence[int]],
    meta: Mapping[str, Any],
    elsewhere: frozenset[str],
    *,
    strict: bool,
    where: str,
) -> None:
    shapes = [
        f"{key} is {tuple(stored[key])} there and {tuple(value.shape)} here"
        for key, value in own.items()
        if key in stored and tuple(stored[key]) != tuple(value.shape)
    ]
    if shapes:
        raise CheckpointMismatchError(
            f"{where} belongs to another model: {_some(shapes)}; nothing was loaded"
        )
    if not own.keys() & stored.keys():
        raise CheckpointMismatchError(
            f"{where} has none of the averages of this model; nothing was loaded. It holds the "
            f"profiles {sorted(meta['profiles'])}"
        )
    averages = tuple(f"{name}." for name in meta["profiles"])
    known = own.keys() | {start + name for start in averages for name in elsewhere}
    missing = [key for key in own if key not in stored]
    extra = [key for key in stored if key.startswith(averages) and key not in known]
    if strict and (missing or extra):
        raise CheckpointMismatchError(
            f"{where} does not fit this model: it lacks {_some(missing)} and has unknown "
            f"{_some(extra)}; nothing was loaded. If that is meant, load with strict=False"
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
            ends = zip(part.offsets, part.sizes, strict=True)
            source = tensor[tuple(slice(o, o + n) for o, n in ends)]
            break
    else:
        raise CheckpointMismatchError(
            f"{key}: this rank needs {box} and the given value holds {[b for b, _ in given]}; load "
            "through torch.distributed.checkpoint to change the sharding"
        )
    if source.data_ptr() != into.data_ptr():
        into.copy_(source)
