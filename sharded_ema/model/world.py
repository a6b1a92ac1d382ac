"""The processes of the job, whether or not they share the model."""

from __future__ import annotations

import os

import torch.distributed as dist


def world_size() -> int:
    """Ranks of the default process group; 1 if there is none."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_first_of_strangers() -> bool:
    """Whether a launcher has started several processes that do not know each other.

    Only the first of them says so.
    """
    if dist.is_available() and dist.is_initialized():
        return False
    return os.environ.get("RANK") == "0" and os.environ.get("WORLD_SIZE", "1") != "1"
