"""State dicts that ``torch.save`` has written into one file, with a training around them or not.

The file is taken apart and never loaded (see :mod:`.torch_entry`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sharded_ema.checkpoint.files import OpenFile
from sharded_ema.checkpoint.reading.chunks import Chunk
from sharded_ema.checkpoint.reading.torch_entry import StoredEntry, read_file
from sharded_ema.errors import CheckpointMismatchError
from sharded_ema.model.layout import Box

#: What files of ``torch.save`` end with.
TORCH_ENDINGS = (".pt", ".pth", ".bin", ".ckpt", ".tar")
# Where trainings keep the weights of the model in what they save.
_KEYS = ("state_dict", "model_state_dict", "model", "module")


def read_state_dict(file: OpenFile) -> Mapping[str, StoredEntry]:
    """The tensors of a model in an open file, by name; what is no tensor is left out.

    Raises:
        CheckpointCorruptError: it is no file of ``torch.save``, or would make other objects.
        CheckpointMismatchError: it holds no state dict.
    """
    where = str(file.location)
    data = read_file(file, where)
    found = _tensors(data)
    if not found and isinstance(data, dict):
        found = next(filter(None, (_tensors(data.get(key)) for key in _KEYS)), {})
    if not found:
        held = (
            f"the keys {list(data)[:5]}" if isinstance(data, dict) else f"a {type(data).__name__}"
        )
        raise CheckpointMismatchError(
            f"{where} holds {held}, and no state dict of tensors by name, neither at its top nor "
            f"under {', '.join(_KEYS)}; save the state dict alone"
        )
    return found


def _tensors(value: Any) -> dict[str, StoredEntry]:
    items = value.items() if isinstance(value, dict) else ()
    return {name: entry for name, entry in items if isinstance(entry, StoredEntry)}


def as_chunk(entry: StoredEntry, name: str) -> Chunk:
    """Where a tensor lies in the file of this name."""
    return Chunk(
        Box.whole(entry.shape),
        name,
        entry.byte_offset,
        entry.num_bytes,
        None,
        crc32=entry.crc32,
        strides=entry.strides,
    )
