"""How the ranks of a save plan who writes what, and keep the plan while nothing changes.

DCP gathers every tensor's name, shape and place anew for each save. Its planner can keep what it
has gathered, but in attributes of the class: of two averages in a process each would get the plan
of the other. Here a plan belongs to one average, and is used again if every rank has to save what
it had to save when all of them made that plan together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner, Metadata, SavePlan
from torch.distributed.checkpoint.planner import WriteItem

from sharded_ema.checkpoint.writing.commit import Place
from sharded_ema.checkpoint.writing.rows import Geometry, Rows, in_order
from sharded_ema.model.pieces import FlatShard, pieces_of

# Bits of a number that ranks compare.
_NUMBER_BITS = 60


def digest_of(state: Mapping[str, Tensor]) -> str:
    """A digest of what a plan depends on: names, dtypes, shapes, and the blocks of this rank."""
    known = xxhash.xxh3_128()
    for key, value in state.items():
        writes = not isinstance(value, FlatShard) or value.writes
        boxes = [(box.offsets, box.sizes) for box, _ in pieces_of(value)] if writes else []
        known.update(repr((key, value.dtype, tuple(value.shape), boxes)).encode())
    return known.hexdigest()


@dataclass(frozen=True, slots=True)
class Plan:
    """What the ranks have planned together.

    Attributes:
        digest: of what this rank had to save.
        number: of the plan, the same on all ranks that have made it, and on no others.
        items: what this rank writes.
        shared: what the coordinator knows of all ranks: a :class:`Geometry` or DCP's metadata;
            ``None`` on other ranks.
    """

    digest: str
    number: int
    items: list[WriteItem]
    shared: Any


class Planner(DefaultSavePlanner):
    """DCP's planner, which sends no plan if there is one that all ranks have kept.

    Neither does what the coordinator knows go back to all ranks after a save, as DCP's metadata
    does: the writer takes it from ``shared``.

    Args:
        kept: the plan to use again; all ranks must have kept it.

    Attributes:
        shared: see :class:`Plan`.
    """

    flattens = True

    def __init__(self, kept: Plan | None = None) -> None:
        super().__init__(flatten_state_dict=self.flattens)
        self._kept = kept
        self._number = 0
        self.shared: Any = None if kept is None else kept.shared

    def create_local_plan(self) -> SavePlan:
        return SavePlan([]) if self._kept is not None else super().create_local_plan()

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        if self._kept is not None:
            return [SavePlan([]) for _ in all_plans], Metadata({})
        plans, self.shared = super().create_global_plan(all_plans)
        return plans, Metadata({})

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        items = self._items(new_plan) if self._kept is None else self._kept.items
        place: Place = new_plan.storage_data
        self._number = int(place.uuid, 16) >> (128 - _NUMBER_BITS)
        self.plan = dataclasses.replace(new_plan, items=items)
        return self.plan

    def _items(self, new_plan: SavePlan) -> list[WriteItem]:
        """What this rank is to write by a new plan."""
        return new_plan.items

    def made(self, digest: str) -> Plan:
        """The plan that was made, or used again, by a save that has succeeded."""
        return self._kept or Plan(digest, self._number, self.plan.items, self.shared)


class ColumnPlanner(Planner):
    """The same in columns of numbers, for what is written in this library's format."""

    flattens = False
    _own: list[WriteItem]

    def create_local_plan(self) -> SavePlan:
        plan = super().create_local_plan()
        if self._kept is not None:
            return plan
        self._own = in_order(plan.items)
        return SavePlan([], planner_data=Rows.of(plan.items).pack())

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        if self._kept is not None:
            return super().create_global_plan(all_plans)
        self.shared = geometry = Geometry.of(Rows.unpack(plan.planner_data) for plan in all_plans)
        packed = (
            None if flags is None else np.packbits(flags).tobytes() for flags in geometry.kept
        )
        return [SavePlan([], planner_data=flags) for flags in packed], Metadata({})

    def _items(self, new_plan: SavePlan) -> list[WriteItem]:
        packed: bytes | None = new_plan.planner_data
        if packed is None:
            return self._own
        flags = np.unpackbits(np.frombuffer(packed, np.uint8), count=len(self._own))
        return [item for item, kept in zip(self._own, flags.tolist(), strict=True) if kept]
