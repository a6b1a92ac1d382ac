"""Averages that other libraries have kept, and models that other software has written."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from sharded_ema.checkpoint.dtypes import TORCH_DTYPE
from sharded_ema.checkpoint.files import URL, as_location, is_file, open_regular
from sharded_ema.checkpoint.names import COMMITTED_NAMES
from sharded_ema.checkpoint.reading.chunks import KnownChunks
from sharded_ema.checkpoint.reading.models import (
    ADAPTER_CONFIG,
    TORCH_WEIGHTS,
    open_model,
    weight_files,
)
from sharded_ema.checkpoint.reading.opened import StoredTensor
from sharded_ema.checkpoint.reading.state_dicts import TORCH_ENDINGS
from sharded_ema.checkpoint.reading.torch_entry import StoredEntry, read_file
from sharded_ema.errors import CheckpointCorruptError, CheckpointMismatchError
from sharded_ema.model.inventory import Inventory, Named
from sharded_ema.model.layout import Shape

# What wrappers put before the names of the bare model.
_WRAPPERS = ("", "module.", "_orig_mod.", "module._orig_mod.")
# Where libraries count the updates of an average: torch_ema, diffusers, AveragedModel.
_COUNTS = ("num_updates", "optimization_step", "n_averaged")


@dataclass(frozen=True, slots=True)
class OtherAverage:
    """A whole model that is to be taken for an average.

    Attributes:
        where: it is, for messages.
        shapes: of its tensors by name; by their numbers if it has no names.
        read: a tensor by that name, on the CPU.
        num_updates: after how many updates it was saved, if that is known.
        in_order: whether it has no names, and lists the parameters in the order of the model.
    """

    where: str
    shapes: Mapping[str, Shape]
    read: Callable[[str], Tensor]
    num_updates: int | None
    in_order: bool = False

    def fit(self, inventory: Inventory, *, strict: bool) -> dict[str, str]:
        """Names of averaged tensors, each with the name that it has here.

        Args:
            strict: refuse missing and unknown names.

        Raises:
            CheckpointMismatchError: it is of another model.
        """
        names = self._in_order(inventory) if self.in_order else self._by_name(inventory)
        found = {n.fqn: names[n.fqn] for n in inventory.averaged if n.fqn in names}
        differing = [
            f"{named.fqn} is {self.shapes[found[named.fqn]]} there and {named.shape} here"
            for named in inventory.averaged
            if named.fqn in found and self.shapes[found[named.fqn]] != named.shape
        ]
        missing = [n.fqn for n in inventory.averaged if n.fqn not in found]
        extra = sorted(self.shapes.keys() - names.values()) if strict else []
        if differing or not found or (strict and (missing or extra)):
            wrong = "; ".join(
                differing[:3]
                + [f"it lacks {missing[:3]}"] * bool(missing)
                + [f"it has unknown {extra[:3]}"] * bool(extra)
            )
            raise CheckpointMismatchError(
                f"{self.where} belongs to another model: {wrong}; nothing was loaded. Its names "
                f"look like {list(self.shapes)[:3]}"
            )
        return found

    def _by_name(self, inventory: Inventory) -> dict[str, str]:
        known: list[Named] = [
            *inventory.averaged, *inventory.frozen, *inventory.excluded, *inventory.buffers,
            *inventory.ignored, *inventory.extra,
        ]  # fmt: skip

        def under(prefix: str) -> dict[str, str]:
            return {
                named.fqn: prefix + name
                for named in known
                for name in reversed(named.all_names)
                if prefix + name in self.shapes
            } | {
                f"{named.fqn} as {name}": prefix + name
                for named in known
                for name in named.aliases
                if prefix + name in self.shapes
            }

        return max(map(under, _WRAPPERS), key=len)

    def _in_order(self, inventory: Inventory) -> dict[str, str]:
        averaged = [named.fqn for named in inventory.averaged if named.is_parameter]
        for order in (averaged, inventory.order):
            if len(order) == len(self.shapes):
                return {name: str(number) for number, name in enumerate(order)}
        raise CheckpointMismatchError(
            f"{self.where} belongs to another model: it lists {len(self.shapes)} parameters, and "
            f"here are {len(inventory.order)}, of which {len(averaged)} are averaged; nothing was "
            "loaded"
        )


def open_other(path: str | PathLike[str]) -> OtherAverage | None:
    """What another library or other software has saved; ``None`` if it is none of that.

    Raises:
        CheckpointCorruptError: it cannot be read.
        CheckpointMismatchError: it holds no weights, or several sets of them.
    """
    where = as_location(path)
    if isinstance(where, URL):
        return None
    if where.is_dir():
        if any(is_file(where / name) for name in COMMITTED_NAMES):
            return None
        names = weight_files(where, (where / ADAPTER_CONFIG).is_file())
        if names != [TORCH_WEIGHTS]:
            return _of_model(where) if names else None
        where = where / TORCH_WEIGHTS
    if not where.is_file():
        return None
    if where.suffix == ".safetensors":
        return _of_model(where)
    return _of_torch(where) if where.suffix in TORCH_ENDINGS else None


def _of_model(path: Path) -> OtherAverage:
    checkpoint = open_model(path)
    tensors = checkpoint.tensors
    index = checkpoint.index
    # Exports of this library say so.
    said = index.texts.get("num_updates", "") if isinstance(index, KnownChunks) else ""

    def read(name: str) -> Tensor:
        return _as_tensor(tensors[name])

    return OtherAverage(
        str(path),
        {name: tensor.shape for name, tensor in tensors.items()},
        read,
        int(said) if said.isdecimal() else None,
    )


def _as_tensor(stored: StoredTensor) -> Tensor:
    return _flat(stored.read(), stored.dtype).view(stored.shape)


def _of_torch(path: Path) -> OtherAverage:
    with open_regular(path) as file:
        data = read_file(file, str(path))
    if not isinstance(data, dict):
        _refuse(path, f"a {type(data).__name__}")
    count = next((n for n in (_number(path, data.get(name)) for name in _COUNTS) if n), None)
    if "shadow_params" in data:
        listed = data["shadow_params"]
        if not isinstance(listed, list) or not all(isinstance(t, StoredEntry) for t in listed):
            _refuse(path, "shadow_params that are no list of tensors")
        tensors = {str(number): tensor for number, tensor in enumerate(listed)}
        return _of_entries(path, tensors, count, in_order=True)
    state = data.get("state_dict_ema", data)  # timm's checkpoints
    tensors = {
        name: value
        for name, value in state.items()
        if isinstance(value, StoredEntry) and name not in _COUNTS
    }
    others = [name for name in state if name not in tensors and name not in _COUNTS]
    if others or not tensors:
        _refuse(path, f"a dict with {others[:3]}")
    return _of_entries(path, tensors, count)


def _of_entries(
    path: Path, entries: Mapping[str, StoredEntry], count: int | None, *, in_order: bool = False
) -> OtherAverage:
    def read(name: str) -> Tensor:
        return _read_entry(path, entries[name], name)

    shapes = {name: entry.shape for name, entry in entries.items()}
    return OtherAverage(str(path), shapes, read, count, in_order)


def _read_entry(path: Path, entry: StoredEntry, name: str) -> Tensor:
    with open_regular(path) as file:
        data = file.read(entry.byte_offset, entry.num_bytes)
    if len(data) != entry.num_bytes or entry.crc32 not in (None, zlib.crc32(data)):
        raise CheckpointCorruptError(f"{path}: {name} is damaged (CRC32 mismatch)")
    flat = _flat(data, entry.dtype)
    return (
        flat.view(entry.shape)
        if entry.strides is None
        else flat.as_strided(entry.shape, entry.strides)
    )


def _flat(data: bytes, name: str) -> Tensor:
    dtype = TORCH_DTYPE[name]
    return torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)


def _number(path: Path, value: object) -> int | None:
    """A count of updates, which AveragedModel keeps in a tensor."""
    if isinstance(value, StoredEntry) and value.shape == ():
        value = int(_read_entry(path, value, "a count"))
    return value if isinstance(value, int) else None


def _refuse(path: Path, what: str) -> NoReturn:
    raise CheckpointMismatchError(
        f"{path} holds {what}, and no average: a state dict of tensors by name, the state of "
        "torch_ema or of diffusers' EMAModel, or a checkpoint of timm with state_dict_ema. If "
        "weights in it are an average, save their state dict alone"
    )
