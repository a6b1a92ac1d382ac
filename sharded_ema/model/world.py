"""The processes of the job, whether or not they share the model."""

from __future__ import annotations

import torch.distributed as dist


def world_size() -> int:
    """Ranks of the default process group; 1 if there is none."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
