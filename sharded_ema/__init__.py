"""Exponential moving averages of model weights, sharded like the training that makes them.

Names are imported on first use, so that the command-line tools start without PyTorch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from sharded_ema.version import __version__

if TYPE_CHECKING:
    from sharded_ema.checkpoint.background import SaveHandle
    from sharded_ema.checkpoint.reader import SafetensorsStorageReader
    from sharded_ema.checkpoint.reading.runs import latest_checkpoint
    from sharded_ema.checkpoint.writer import SafetensorsStorageWriter
    from sharded_ema.ema import ShardedEMA
    from sharded_ema.errors import EMAError, EMAWarning
    from sharded_ema.schedules import Constant, HalfLife, HalfLifeFraction, Power, Schedule, Warmup
    from sharded_ema.tools.average import average
    from sharded_ema.tools.consolidate import consolidate
    from sharded_ema.tools.diff import diff
    from sharded_ema.tools.summary import inspect
    from sharded_ema.tools.synthesize import synthesize
    from sharded_ema.tools.verify import verify
    from sharded_ema.tools.watch import watch

__all__ = [
    "Constant",
    "EMAError",
    "EMAWarning",
    "HalfLife",
    "HalfLifeFraction",
    "Power",
    "SafetensorsStorageReader",
    "SafetensorsStorageWriter",
    "SaveHandle",
    "Schedule",
    "ShardedEMA",
    "Warmup",
    "__version__",
    "average",
    "consolidate",
    "diff",
    "inspect",
    "latest_checkpoint",
    "synthesize",
    "verify",
    "watch",
]

_HOME = {
    "SafetensorsStorageReader": "checkpoint.reader",
    "SafetensorsStorageWriter": "checkpoint.writer",
    "SaveHandle": "checkpoint.background",
    "ShardedEMA": "ema",
    "EMAError": "errors",
    "EMAWarning": "errors",
    "Constant": "schedules",
    "HalfLife": "schedules",
    "HalfLifeFraction": "schedules",
    "Power": "schedules",
    "Schedule": "schedules",
    "Warmup": "schedules",
    "average": "tools.average",
    "consolidate": "tools.consolidate",
    "diff": "tools.diff",
    "inspect": "tools.summary",
    "latest_checkpoint": "checkpoint.reading.runs",
    "synthesize": "tools.synthesize",
    "verify": "tools.verify",
    "watch": "tools.watch",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
