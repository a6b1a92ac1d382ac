"""What each rank holds of a model, compared when all ranks meet.

Two questions are answered, before anything is made of the answers: whether what several ranks hold
alike is equal, and which ranks hold other tensors than these. Digests go round, whose size does not
depend on the model; what they stand for is asked for only where they differ, and then of one rank
for each answer.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from typing import Any, NamedTuple

import torch
import xxhash
from torch import Tensor

from sharded_ema.errors import BindError
from sharded_ema.model.agreement import Ranks
from sharded_ema.model.inventory import Inventory
from sharded_ema.model.layout import Box
from sharded_ema.model.sources.protocol import Copy, ReadsShards

#: Blocks that several ranks hold alike, by name, with digests of their elements.
Record = dict[str, tuple[Box, str]]


@dataclass(frozen=True, slots=True)
class Tensors:
    """The tensors that a rank knows of, and what becomes of them.

    Attributes:
        held: by name: what becomes of it, its global shape and dtype.
        averaged: names of those that are averaged.
        aliases: other names of tied weights.
        excluded: names that the patterns leave out.
        frozen: names of frozen parameters.
        adapters: names of PEFT adapters.
    """

    held: dict[str, str]
    averaged: list[str]
    aliases: dict[str, list[str]]
    excluded: list[str]
    frozen: list[str]
    adapters: list[str]

    @classmethod
    def of(cls, inventory: Inventory) -> Tensors:
        """What an inventory lists."""
        kinds = {
            "averaged": inventory.averaged,
            "frozen": inventory.frozen,
            "a buffer": inventory.buffers,
            "an extra state": inventory.extra,
        }
        return cls(
            held={
                named.fqn: f"{kind}, {list(named.shape)} of {named.tensor.dtype}"
                for kind, tensors in kinds.items()
                for named in tensors
            },
            averaged=[named.fqn for named in inventory.averaged],
            aliases={n.fqn: list(n.aliases) for n in inventory.parameters if n.aliases},
            excluded=[named.fqn for named in inventory.excluded],
            frozen=[named.fqn for named in inventory.frozen],
            adapters=inventory.adapters,
        )

    def joined(self, others: Iterable[Tensors]) -> Tensors:
        """Those of several ranks together."""
        found = Tensors(**asdict(self))
        for other in others:
            found.held.update(other.held)
            found.aliases.update(other.aliases)
            for kind in ("averaged", "excluded", "frozen", "adapters"):
                known = getattr(found, kind)
                known += [name for name in getattr(other, kind) if name not in known]
        return found


class Digests(NamedTuple):
    """What one rank says when all meet.

    Attributes:
        stage: first rank of those that are known to hold tensors of the same names.
        held: digest of what it holds.
        alike: by digest of the names and blocks that the same ranks hold alike, that of their
            elements.
    """

    stage: int
    held: str
    alike: dict[str, str]


@dataclass(frozen=True, slots=True)
class Holdings:
    """What is known of all ranks of a model.

    Attributes:
        tensors: of all ranks together.
        borrowed: names of what this rank holds and an earlier one writes.
    """

    tensors: Tensors
    borrowed: frozenset[str] = field(default_factory=frozenset)


def take_stock(reader: ReadsShards) -> Digests:
    """This rank's answer, for :func:`compare`. Reads what several ranks hold alike."""
    alike = {
        _hash(sorted((n, str(c.box)) for n, c in part.items())): _hash(
            [digest_of(part[name].tensor) for name in sorted(part)]
        )
        for part in _parts(reader.copies())
    }
    stage = reader.stage[0] if reader.stage else 0
    return Digests(stage, _hash(Tensors.of(reader.inventory).held), alike)


def compare(reader: ReadsShards, ranks: Ranks, answers: Sequence[Digests]) -> Holdings:
    """Find out who holds what. Collective, and without communication if all hold the same.

    Args:
        answers: of every rank, see :func:`take_stock`.

    Raises:
        BindError: what should be alike is not; the tensor and the ranks are named.
    """
    own = Tensors.of(reader.inventory)
    stages: dict[int, list[int]] = {}
    for position, answer in enumerate(answers):
        stages.setdefault(answer.stage, []).append(position)
    if len({answer.held for answer in answers}) == 1:
        _refuse_unequal(reader, ranks, answers)
        mine = answers[ranks.rank].stage
        return Holdings(own, frozenset(own.held if mine != min(stages) else ()))
    first = {held: p for p, held in reversed(list(enumerate(a.held for a in answers)))}
    speaks = first[answers[ranks.rank].held] == ranks.rank
    told = ranks.gather(own if speaks else None, "a comparison of what the ranks hold")
    known = {held: t for held, position in first.items() if (t := told[position])}
    tensors = [known[answer.held] for answer in answers]
    members = ranks.members
    for positions in stages.values():
        for position in positions:
            _refuse_other(tensors, positions[0], position, members)
    for one, other in combinations(sorted(first.values()), 2):
        if reader.is_pipeline or _are_stages(tensors[one], tensors[other]):
            _refuse_contradiction(tensors, one, other, members)
        else:
            _refuse_other(tensors, one, other, members)
    _refuse_unequal(reader, ranks, answers)
    _refuse_unequal_ties(reader, ranks, list(known.values()))
    earlier = [
        name
        for stage, positions in stages.items()
        if stage < answers[ranks.rank].stage
        for name in tensors[positions[0]].held
    ]
    joined = tensors[0].joined(tensors[p] for p in sorted(first.values()))
    return Holdings(joined, frozenset(earlier) & own.held.keys())


def _are_stages(one: Tensors, other: Tensors) -> bool:
    """Whether two ranks hold different parts of a model, with some tied weights at most in both."""
    shared = len(one.held.keys() & other.held.keys())
    return 2 * shared <= min(len(one.held), len(other.held))


# ---------------------------------------------------------------------- names


def _refuse_other(
    tensors: Sequence[Tensors], first: int, second: int, members: Sequence[int]
) -> None:
    """Refuse two ranks that hold other tensors than one another."""
    _refuse_contradiction(tensors, first, second, members)
    for there, here in ((first, second), (second, first)):
        alone = sorted(tensors[there].held.keys() - tensors[here].held.keys())
        if alone:
            what = tensors[there].held[alone[0]]
            others = f" and {len(alone) - 1} more tensors" if len(alone) > 1 else ""
            raise BindError(
                f"rank {members[there]} has {alone[0]} ({what}){others}, which rank "
                f"{members[here]} has not, although they share most of the model. Make the same "
                "model on all ranks. Stages of a pipeline share no more than tied weights; experts "
                "that each rank has for itself must be DTensors on a slice of one mesh, or be left "
                "out with exclude="
            )


def _refuse_contradiction(
    tensors: Sequence[Tensors], first: int, second: int, members: Sequence[int]
) -> None:
    """Refuse two ranks to which one name means different things."""
    for name, what in tensors[first].held.items():
        there = tensors[second].held.get(name, what)
        if there != what:
            raise BindError(
                f"{name} is {what} on rank {members[first]} and {there} on rank "
                f"{members[second]}; make the same model on all ranks, with the same requires_grad "
                f"and patterns. {_STAGES}"
            )


_STAGES = (
    "If the ranks hold stages of a pipeline, their layers must have the names that they have in "
    "the whole model (a ModuleDict of layers by their numbers)"
)


# ---------------------------------------------------------------------- elements


def digest_of(tensor: Tensor) -> str:
    """xxh3-128 of a tensor's elements in C order, as hex digits. Copies GPU tensors to the host."""
    plain = tensor.detach().cpu().contiguous().reshape(-1)
    return xxhash.xxh3_128_hexdigest(plain.view(torch.uint8).numpy().data)


def _hash(value: Any) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(value, sort_keys=True).encode())


def _parts(copies: Mapping[str, Copy]) -> list[dict[str, Copy]]:
    """Copies, those together that the same ranks hold."""
    parts: dict[Any, dict[str, Copy]] = {}
    for name, copy in copies.items():
        parts.setdefault(copy.over, {})[name] = copy
    return list(parts.values())


def _refuse_unequal(reader: ReadsShards, ranks: Ranks, answers: Sequence[Digests]) -> None:
    """Refuse blocks that the same ranks hold alike and that are not equal."""
    seen: dict[tuple[str, str], int] = {}
    for position, answer in enumerate(answers):
        for pair in answer.alike.items():
            seen.setdefault(pair, position)
    times = Counter(key for key, _ in seen)
    unequal = {key for key, count in times.items() if count > 1}
    if not unequal:
        return
    speaks = any(pair[0] in unequal and p == ranks.rank for pair, p in seen.items())
    _refuse_differing_copies(reader, ranks, reader.copies() if speaks else {})


def _refuse_unequal_ties(reader: ReadsShards, ranks: Ranks, known: Sequence[Tensors]) -> None:
    """Refuse tied weights that several stages hold and that are not equal."""
    times = Counter(name for tensors in known for name in tensors.held)
    if max(times.values()) > 1:
        copies = {n: c for n, c in reader.copies().items() if times[n] > 1}
        _refuse_differing_copies(reader, ranks, copies)


def _refuse_differing_copies(reader: ReadsShards, ranks: Ranks, copies: Mapping[str, Copy]) -> None:
    record = {n: (c.box, digest_of(c.tensor), c.synchronised) for n, c in copies.items()}
    told = ranks.gather(record, "a comparison of what the ranks hold alike")
    found = find_differing([{n: (b, d) for n, (b, d, _) in r.items()} for r in told])
    if found is None:
        return
    name, first, second = found
    who = f"rank {ranks.members[first]} and rank {ranks.members[second]}"
    if told[first][name][2]:
        raise BindError(
            f"parameter {name} is replicated and differs between {who}: the framework keeps "
            "replicas equal but does not make them so. Seed all replicas alike before the model is "
            "initialised, load the same weights into them, or broadcast them "
            "(sync_module_states=True of FullyShardedDataParallel)"
        )
    raise BindError(
        f"parameter {name} is not sharded but differs between {who}; a checkpoint would keep one "
        "of the two. If it is meant to be the same, wrap the model in DistributedDataParallel or "
        "fully_shard, or broadcast it from one rank. If it has been wrapped since, as by "
        "accelerator.prepare(), make the ShardedEMA of what that returned. "
        f"{_STAGES}. Experts that each rank has for "
        "itself must be DTensors on a slice of one mesh, or be left out with exclude="
    )


def find_differing(records: Sequence[Record]) -> tuple[str, int, int] | None:
    """The first block that two ranks should hold alike and do not.

    Args:
        records: of every rank.

    Returns:
        Its parameter, and two positions of ranks that differ; ``None`` if all are equal.
    """
    seen: dict[tuple[str, Box], tuple[int, str]] = {}
    for rank, record in enumerate(records):
        for name, (box, digest) in record.items():
            first, expected = seen.setdefault((name, box), (rank, digest))
            if digest != expected:
                return name, first, rank
    return None
