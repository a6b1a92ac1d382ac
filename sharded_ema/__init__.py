"""Exponential moving averages of model weights, sharded like the training that makes them.

Names are imported on first use, so that the command-line tools start without PyTorch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from sharded_ema.errors import require_torch
from sharded_ema.version import __version__

if TYPE_CHECKING:
    from sharded_ema.averaging.schedules import (
        Constant,
        Cosine,
        HalfLife,
        HalfLifeFraction,
        Linear,
        Power,
        Schedule,
        Warmup,
    )
    from sharded_ema.checkpoint.run import latest_checkpoint
    from sharded_ema.checkpoint.storage_reader import SafetensorsStorageReader
    from sharded_ema.checkpoint.writing.background import SaveHandle
    from sharded_ema.checkpoint.writing.writer import SafetensorsStorageWriter
    from sharded_ema.ema import ShardedEMA
    from sharded_ema.errors import EMAError, EMAWarning
    from sharded_ema.tools.advise import advise
    from sharded_ema.tools.average import average
    from sharded_ema.tools.consolidate import consolidate
    from sharded_ema.tools.diff import diff
    from sharded_ema.tools.env import env
    from sharded_ema.tools.inspection import inspect
    from sharded_ema.tools.synthesize import synthesize
    from sharded_ema.tools.verify import verify
    from sharded_ema.tools.watch import watch

__all__ = [
    "Constant",
    "Cosine",
    "EMAError",
    "EMAWarning",
    "HalfLife",
    "HalfLifeFraction",
    "Linear",
    "Power",
    "SafetensorsStorageReader",
    "SafetensorsStorageWriter",
    "SaveHandle",
    "Schedule",
    "ShardedEMA",
    "Warmup",
    "__version__",
    "advise",
    "average",
    "consolidate",
    "diff",
    "env",
    "inspect",
    "latest_checkpoint",
    "synthesize",
    "verify",
    "watch",
]

_HOME = {
    "SafetensorsStorageReader": "checkpoint.storage_reader",
    "SafetensorsStorageWriter": "checkpoint.writing.writer",
    "SaveHandle": "checkpoint.writing.background",
    "ShardedEMA": "ema",
    "EMAError": "errors",
    "EMAWarning": "errors",
    "Constant": "averaging.schedules",
    "Cosine": "averaging.schedules",
    "HalfLife": "averaging.schedules",
    "HalfLifeFraction": "averaging.schedules",
    "Linear": "averaging.schedules",
    "Power": "averaging.schedules",
    "Schedule": "averaging.schedules",
    "Warmup": "averaging.schedules",
    "advise": "tools.advise",
    "average": "tools.average",
    "consolidate": "tools.consolidate",
    "diff": "tools.diff",
    "env": "tools.env",
    "inspect": "tools.inspection",
    "latest_checkpoint": "checkpoint.run",
    "synthesize": "tools.synthesize",
    "verify": "tools.verify",
    "watch": "tools.watch",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(f"{__name__}.{_HOME[name]}")
    except ImportError:
        require_torch(f"sharded_ema.{name}")
        raise
    return getattr(module, name)


def __dir__() -> list[str]:
    return sorted(__all__)
