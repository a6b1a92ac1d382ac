"""Another module of the same parameters that is given an average: a teacher, a reference."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from sharded_ema.errors import BindError, ConfigError, SwapError
from sharded_ema.model.adapters import merged_layers
from sharded_ema.model.agreement import collective
from sharded_ema.model.buffers import fill
from sharded_ema.model.followed import Alike, FollowedModel
from sharded_ema.model.gathering import gather_each
from sharded_ema.model.inventory import Inventory, Named, Selection, as_model
from sharded_ema.model.layout import Box
from sharded_ema.model.pieces import Piece, pieces_of
from sharded_ema.model.sources import make_source
from sharded_ema.model.sources.protocol import Source

_CALL = "ema.copy_to(module=...)"


def part_of_the_way(
    now: Sequence[Tensor], average: Sequence[Tensor], share: float
) -> Sequence[Tensor]:
    """``now + share * (average - now)``, rounded once, to the average's precision.

    Returns:
        New tensors; with a share of 1 the average itself.
    """
    if share == 1.0:
        return average
    with torch.no_grad():
        return [
            p.detach().to(e.device, e.dtype).lerp(e, share)
            for p, e in zip(now, average, strict=True)
        ]


@torch.no_grad()
def write_into(
    module: nn.Module | Sequence[nn.Module],
    model: FollowedModel,
    average: Callable[[], Mapping[str, Tensor]],
    share: float,
    prepare: Callable[[], None],
    alike: Alike,
) -> None:
    """Move another module's parameters to an average, or part of the way. Collective.

    Of a tensor nothing is sent where every rank has all that its part of the module takes. Others
    come together on the host of every rank, one after the other.

    Args:
        module: sharded in whatever way; its averaged tensors have the names of the model's.
        model: whose average it is.
        average: by name, with this rank's pieces, as in a state dict.
        share: of the way.
        prepare: what must be done on every rank before; if it fails on one, all raise.
        alike: what must be the same on all ranks.

    Raises:
        BindError: the module lacks parameters, or has other shapes.
        ConfigError: it has parameters of the model itself.
        SwapError: an average stands in for its weights, or adapters are merged into them.
    """
    model.meet()
    wanted: dict[str, Tensor] = {}
    found: list[Source] = []

    def look() -> list[str]:
        prepare()
        wanted.update(average())
        other = make_source(
            as_model(module), Selection(only=frozenset(wanted)), shard_replicas=False
        )
        _check(other.reader.inventory, model.inventory)
        model.refuse_elsewhere(_CALL, other.reader.inventory.averaged)
        other.stand_in.settle()
        found.append(other)
        targets = _targets(other, other.reader.live())
        return [name for name, pieces in targets.items() if not _is_here(wanted[name], pieces)]

    sent = {name for names in model.ranks.agree(look, _CALL, alike) for name in names}
    (source,) = found
    live = source.reader.live()
    example = next(iter(wanted.values()))
    values = [torch.empty_like(p, dtype=_wider(p, example)) for p in live]
    targets = _targets(source, values)
    for name in targets.keys() - sent:
        for box, target in targets[name]:
            target.copy_(_covering(wanted[name], box))
    apart = {name: value for name, value in wanted.items() if name in sent}
    for name, full in gather_each(apart, model.ranks, _CALL, everywhere=True) if sent else ():
        assert full is not None
        for box, target in targets.get(name, ()):
            target.copy_(full[box.slices])
    with collective(_CALL):
        source.stand_in.overwrite(part_of_the_way(live, values, share))
    source.stand_in.settle()
    _copy_buffers(source.reader.inventory.buffers, model.inventory.buffers)


def _wider(parameter: Tensor, average: Tensor) -> torch.dtype:
    """dtype that holds values of both."""
    return torch.promote_types(parameter.dtype, average.dtype)


def _targets(source: Source, tensors: Sequence[Tensor]) -> dict[str, list[Piece]]:
    """This rank's blocks of every averaged tensor, as views of ``tensors``."""
    stored = source.reader.stored(tensors)
    return {
        shard.name.fqn: [piece for piece in pieces_of(value) if piece[0].numel]
        for shard, value in zip(source.reader.shards, stored, strict=True)
    }


def _is_here(value: Tensor, pieces: Sequence[Piece]) -> bool:
    """Whether this rank holds all of some blocks."""
    held = [there for there, _ in pieces_of(value)]
    return all(any(box.inside(there) for there in held) for box, _ in pieces)


def _covering(value: Tensor, box: Box) -> Tensor:
    """A block of what this rank holds."""
    parts = ((box.inside(there), tensor) for there, tensor in pieces_of(value))
    return next(tensor[part.slices] for part, tensor in parts if part is not None)


def _check(other: Inventory, own: Inventory) -> None:
    theirs = {name: named for named in other.averaged for name in named.all_names}
    mine = {id(named.tensor) for named in own.parameters}
    missing, differing = [], []
    for named in own.averaged:
        there = theirs.get(named.fqn)
        if there is None:
            missing.append(named.fqn)
        elif there.shape != named.shape:
            differing.append(f"{named.fqn} is {there.shape} there and {named.shape} here")
        elif named.is_parameter and id(there.tensor) in mine:
            raise ConfigError(
                f"the module given to copy_to() has the parameter {named.fqn} of the averaged "
                "model itself; leave module= out to overwrite that, or pass a module of its own"
            )
    if missing or differing:
        raise BindError(
            "the module given to copy_to() is another model: "
            + "; ".join([f"it lacks {missing[:3]}"] * bool(missing) + differing[:3])
            + ". Build it as the averaged model was built, without its wrappers or with others"
        )
    merged = merged_layers(other)
    if merged:
        raise SwapError(
            f"adapters are merged into the module given to copy_to(), as in {merged[0]}, which "
            "would not see the average; unmerge them first"
        )


def _copy_buffers(there: Sequence[Named], here: Sequence[Named]) -> None:
    """Buffers are copied as they are: statistics belong to the weights."""
    known = {named.fqn: named for named in here}
    for named in there:
        if named.fqn in known:
            fill(named.read(), known[named.fqn].read())
