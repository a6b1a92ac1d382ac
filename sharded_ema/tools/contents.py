"""Which stored tensors make up one averaged model, and under which names."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from sharded_ema.checkpoint.reading.catalog import Catalog, StoredTensor
from sharded_ema.checkpoint.reading.safetensors_file import ITEMSIZE
from sharded_ema.config import BUFFERS_PREFIX, FROZEN_PREFIX
from sharded_ema.errors import CheckpointMismatchError


@dataclass(frozen=True, slots=True)
class Average:
    """One profile of one average in a checkpoint.

    Attributes:
        prefix: of its keys.
        profile: its name.
        meta: what the average says of itself.
        tensors: averaged, frozen and buffers, by the name in the bare model's ``state_dict()``.
    """

    prefix: str
    profile: str
    meta: dict[str, Any]
    tensors: dict[str, StoredTensor]

    @property
    def aliases(self) -> dict[str, list[str]]:
        """Other names of tied weights, by the name they are stored under."""
        found: dict[str, list[str]] = self.meta.get("aliases", {})
        return found


def find_prefix(catalog: Catalog, prefix: str | None) -> str:
    """The key prefix of the average that is meant.

    Raises:
        CheckpointMismatchError: none, or several and none was chosen.
    """
    known = catalog.prefixes()
    if prefix is not None:
        wanted = prefix if not prefix or prefix.endswith(".") else f"{prefix}."
        if wanted in known:
            return wanted
        raise CheckpointMismatchError(
            f"{catalog.path} has no average under the prefix {prefix!r}; it has {known}"
        )
    if len(known) != 1:
        what = f"averages under several prefixes, choose one: {known}" if known else "no average"
        raise CheckpointMismatchError(f"{catalog.path} holds {what}")
    return known[0]


def find_average(catalog: Catalog, profile: str, prefix: str | None) -> Average:
    """Collect the tensors of a profile.

    Raises:
        CheckpointMismatchError: there is no such prefix or profile.
    """
    prefix = find_prefix(catalog, prefix)
    meta = catalog.meta(prefix)
    if profile not in meta["profiles"]:
        raise CheckpointMismatchError(
            f"{catalog.path} has no profile {profile!r}; it has {sorted(meta['profiles'])}"
        )
    tensors: dict[str, StoredTensor] = {}
    for part in (f"{profile}.", FROZEN_PREFIX, BUFFERS_PREFIX):
        start = prefix + part
        for key, tensor in catalog.tensors.items():
            if key.startswith(start):
                tensors[key.removeprefix(start)] = tensor
    return Average(prefix, profile, meta, tensors)


def num_bytes(tensor: StoredTensor, dtype: str | None = None) -> int:
    """Size of a tensor in bytes, stored as it is or as ``dtype``."""
    return math.prod(tensor.shape) * ITEMSIZE[dtype or tensor.dtype]
