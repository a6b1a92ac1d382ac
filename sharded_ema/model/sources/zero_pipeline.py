"""What every DeepSpeed source has in common: its engine, and its stage if that is a pipeline.

The stages of a pipeline hold different layers. Their parameters have names that are unique in the
whole model, but for tied layers, which several stages hold and train alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from sharded_ema.errors import UnsupportedLayoutError
from sharded_ema.model.inventory import Inventory, ShardSource
from sharded_ema.model.layout import Box


class EngineSource(ShardSource):
    """The part of a model that one DeepSpeed engine trains.

    Args:
        engine: a DeepSpeed engine.
        inventory: the tensors of its module.

    Raises:
        UnsupportedLayoutError: the engine slices layers over ranks (tensor parallelism).
    """

    def __init__(self, engine: Any, inventory: Inventory) -> None:
        self.engine = engine
        self.inventory = inventory
        #: Replicas of what this rank holds, which share it or hold it whole.
        self.replicas: dist.ProcessGroup = engine.seq_data_parallel_group
        self.ranks = dist.get_process_group_ranks(self.replicas)
        self.is_pipeline = hasattr(engine, "is_pipe_parallel")
        sliced = engine.mp_world_size
        if self.is_pipeline:
            self.ranks = list(range(dist.get_world_size()))
            sliced = engine.grid.get_slice_parallel_world_size()
        if sliced > 1:
            raise UnsupportedLayoutError(
                f"the engine slices layers over {sliced} ranks; DeepSpeed's tensor parallelism is "
                "not supported"
            )

    def is_borrowed(self, fqn: str) -> bool:
        """Whether an earlier pipeline stage holds the tensor, too, and writes it."""
        ties = self.engine.module.tied_comms if self.is_pipeline else {}
        return any(
            fqn.startswith(f"tied_modules.{key}.") and min(tie["ranks"]) != dist.get_rank()
            for key, tie in ties.items()
        )

    def writes_whole(self, fqn: str) -> bool:
        return dist.get_rank(self.replicas) == 0 and not self.is_borrowed(fqn)

    def agreement_record(self) -> dict[str, tuple[Box, str]]:
        # DeepSpeed keeps equal what it replicates; what is told here is who averages what.
        nothing = (Box((), ()), "")
        return {n.fqn: nothing for n in self.inventory.averaged} if self.is_pipeline else {}

    def compare(self, records: Sequence[dict[str, tuple[Box, str]]]) -> None:
        own = {named.fqn for named in self.inventory.averaged}
        self.elsewhere = frozenset(name for record in records for name in record) - own
