"""Start a program in which accelerate shards on CPUs too: ``sharding_on_cpus.py PROGRAM ARGS``.

accelerate 1.15 knows FSDP only as a kind of training on accelerators. Here its state says FSDP also
where it would have said MULTI_CPU; all that follows from it is accelerate's own code.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

start = AcceleratorState.__init__


def start_sharding(
    self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any
) -> None:
    start(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        self.fsdp_plugin = fsdp_plugin
        if self.mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(self.mixed_precision)
        self.distributed_type = DistributedType.FSDP
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP


AcceleratorState.__init__ = start_sharding
os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"  # else "cpu:0", which FSDP1 takes for another
del sys.argv[0]
sys.path[0] = str(Path(sys.argv[0]).parent)
runpy.run_path(sys.argv[0], run_name="__main__")
