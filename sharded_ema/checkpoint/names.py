"""Every name that is fixed: keys in a state dict, files of a checkpoint, marks of directories.

Whoever makes such a name and whoever recognises it does so by a function from here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from uuid import uuid4

# ---------------------------------------------------------------------- keys of a state dict

#: What an average says of itself. The bytes are fixed in number, because torch's distributed
#: checkpoints (DCP) do not load into a tensor of another size.
META_KEY = "_meta"
META_BYTES = 1 << 18
META_VERSION = 1
#: Prefixes beside those of the profiles.
FROZEN_PREFIX = "_frozen."
BUFFERS_PREFIX = "_buffers."


def is_meta_key(key: str) -> bool:
    """Whether a key may be that of a description: a buffer may have the same last name."""
    inner = f".{key}"
    return inner.endswith(f".{META_KEY}") and not any(
        f".{part}" in inner for part in (BUFFERS_PREFIX, FROZEN_PREFIX)
    )


# ---------------------------------------------------------------------- files of a checkpoint

#: Written last: with it a directory of this library's is a checkpoint.
MANIFEST_NAME = "manifest.json"
CHUNKS_NAME = "chunks.safetensors"
#: The same for a directory of DCP's.
METADATA_NAME = ".metadata"
#: What a directory with a committed checkpoint has one of.
COMMITTED_NAMES = frozenset({MANIFEST_NAME, METADATA_NAME})

# Under a URL the names have the uuid of the save, so that no two saves write one object.
_DATA = re.compile(
    r"(?:shard-\d+|chunks)(?:-(?P<uuid>[0-9a-f]{32}))?\.safetensors|__\d+_\d+\.distcp"
)
_MAX_NAME_BYTES = 255


def shard_name(rank: int, uuid: str = "") -> str:
    """The file that a rank writes; with the uuid of the save where others may write beside it."""
    return f"shard-{rank:05d}{uuid and f'-{uuid}'}.safetensors"


def chunks_name(uuid: str = "") -> str:
    """The file with the chunk table; with the uuid as in :func:`shard_name`."""
    return f"chunks-{uuid}.safetensors" if uuid else CHUNKS_NAME


def is_chunks(name: str) -> bool:
    """Whether a file of this name has a chunk table."""
    match = _DATA.fullmatch(name)
    return match is not None and name in (CHUNKS_NAME, chunks_name(match["uuid"] or ""))


def is_part_of(name: str, uuid: str) -> bool:
    """Whether a file is known by its name to be one that the save of this uuid has written."""
    match = _DATA.fullmatch(name)
    return match is not None and match["uuid"] == uuid


def is_part(name: str) -> bool:
    """Whether a file of this name may belong to a checkpoint, or to a save that never finished."""
    return name in (*COMMITTED_NAMES, f"{METADATA_NAME}.tmp") or bool(_DATA.fullmatch(name))


# What file systems, desktops and the Hub put into directories that others have made.
_STRAY = re.compile(r"\..*|README\.md|Thumbs\.db|desktop\.ini", re.S)


def is_stray(name: str) -> bool:
    """Whether a file of this name is nobody's, so that it is no damage, as ``.nfs...`` is none."""
    return bool(_STRAY.fullmatch(name)) and not is_part(name)


def is_plain_name(name: object) -> bool:
    """Whether a value can be the name of a file, and stays inside the directory it is joined to."""
    if not isinstance(name, str) or name in ("", ".", "..") or set(name) & set("/\\\0"):
        return False
    try:
        return len(os.fsencode(name)) <= _MAX_NAME_BYTES
    except UnicodeEncodeError:
        return False


# ---------------------------------------------------------------------- beside checkpoints

#: A file that names the checkpoint committed last; of watched exports a link.
LATEST_NAME = "latest"
#: Directory of the average in a checkpoint of a DeepSpeed engine, below the tag. DeepSpeed's tools
#: look at files of the tag only.
ENGINE_DIRECTORY = "ema"
#: Directory that some programs keep the checkpoints of a run in.
CHECKPOINTS_DIRECTORY = "checkpoints"


def numbered(name: str, number: int) -> str:
    """Another name for the export of a checkpoint whose name is taken."""
    return f"{name}~{number}"


def without_number(name: str) -> str:
    """The name of the checkpoint that an export is of."""
    return re.sub(r"~\d+$", "", name)


# ---------------------------------------------------------------------- marks

#: ``<name>.tmp-<uuid>`` is a directory in which something is made that will be ``<name>``.
TEMPORARY_MARK = ".tmp-"
#: ``<name>.tmp-dead-<uuid>`` was ``<name>``, or such a directory, and is being removed.
DEAD_MARK = ".tmp-dead-"
#: ``<name>.old-<uuid>`` was ``<name>`` until a save with ``replace=True`` set it aside.
SET_ASIDE_MARK = ".old-"

_MARKED = re.compile(r"(?P<name>.+)(?P<mark>\.tmp-dead-|\.tmp-|\.old-)(?P<uuid>[0-9a-f]{32})", re.S)
_LOOKS_TEMPORARY = re.compile(r"\.tmp-[0-9a-f-]+$")
_CHECK_DIGITS = 8


@dataclass(frozen=True, slots=True)
class Marked:
    """A name with a mark, taken apart.

    Attributes:
        name: without the mark.
        mark: one of those above.
        uuid: 32 hex digits.
    """

    name: str
    mark: str
    uuid: str

    @property
    def is_own(self) -> bool:
        """Whether the digits are such as this library makes, and not any uuid of a stranger."""
        return self.uuid == new_uuid(self.uuid)


def new_uuid(seed: str | None = None) -> str:
    """32 hex digits that are known for this library's: the last eight follow from the others.

    Args:
        seed: hex digits that the first ones are taken of; random if ``None``.
    """
    digits = (seed or uuid4().hex)[:-_CHECK_DIGITS]
    return digits + sha256(f"sharded_ema {digits}".encode()).hexdigest()[:_CHECK_DIGITS]


def parse_marked(name: str) -> Marked | None:
    """What a name with a mark says; ``None`` if it has none."""
    match = _MARKED.fullmatch(name)
    if match is None:
        return None
    return Marked(match["name"], match["mark"], match["uuid"])


def temporary(path: Path, uuid: str | None = None) -> Path:
    """A new temporary path beside ``path``; with the caller's 32 hex digits to find it again."""
    return path.with_name(f"{path.name}{TEMPORARY_MARK}{uuid or new_uuid()}")


def set_aside(path: Path, uuid: str | None = None) -> Path:
    """A path beside ``path`` for what is there and about to be replaced by the save of ``uuid``."""
    return path.with_name(f"{path.name}{SET_ASIDE_MARK}{uuid or new_uuid()}")


def doomed(path: Path) -> Path:
    """A new path beside ``path`` for what is about to be removed; names do not grow by it."""
    return path.with_name(f"{without_mark(path.name)}{DEAD_MARK}{new_uuid()}")


def is_temporary(name: str) -> bool:
    """Whether a name is of what is being made, or removed."""
    marked = parse_marked(name)
    return marked is not None and marked.mark != SET_ASIDE_MARK


def is_set_aside(name: str) -> bool:
    """Whether a name is one that :func:`set_aside` makes."""
    marked = parse_marked(name)
    return marked is not None and marked.mark == SET_ASIDE_MARK


def looks_temporary(name: str) -> bool:
    """Whether a name is like a temporary one, and so is not read: also with other digits."""
    return bool(_LOOKS_TEMPORARY.search(name))


def is_marked(name: str) -> bool:
    """Whether a directory is of a save that has not finished, or was replaced by one."""
    return looks_temporary(name) or is_set_aside(name)


def without_mark(name: str) -> str:
    """The name that a temporary or replaced directory goes by, or went."""
    marked = parse_marked(name)
    return marked.name if marked is not None else name


# ---------------------------------------------------------------------- in temporary directories

#: What will be the checkpoint, the model, or the file ``latest``.
CHECKPOINT_DIRECTORY = "checkpoint"
MODEL_DIRECTORY = "model"
#: What a consolidation has finished.
JOURNAL_NAME = "journal.jsonl"

_HOLDER = re.compile(r"holder-(?P<uuid>[0-9a-f]{32})\.(?P<end>json|new)")


def holder_name(uuid: str) -> str:
    """The file that says who holds a temporary directory."""
    return f"holder-{uuid}.json"


def unfinished_holder_name(uuid: str) -> str:
    """The same while it is written."""
    return f"holder-{uuid}.new"


def holders(names: Iterable[str]) -> list[str]:
    """Those of some names that :func:`holder_name` makes."""
    return [n for n in names if (match := _HOLDER.fullmatch(n)) and match["end"] == "json"]


def is_holder(name: str) -> bool:
    """Whether a file says, or was about to say, who holds a directory."""
    return bool(_HOLDER.fullmatch(name))


def is_of_workplace(name: str) -> bool:
    """Whether something of this name is put into a temporary directory."""
    return (
        name in (CHECKPOINT_DIRECTORY, MODEL_DIRECTORY, LATEST_NAME)
        or name.startswith(JOURNAL_NAME)
        or is_holder(name)
    )
