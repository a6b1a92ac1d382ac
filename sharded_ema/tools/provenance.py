"""What an export says of where it came from, and of its own bytes.

Its safetensors files say it in their headers, so that each of them can go its own way. Files of
PyTorch have no room for it, so it lies beside them, in ``provenance.json``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from sharded_ema.checkpoint.checked_json import load_json
from sharded_ema.checkpoint.durable import write_durably
from sharded_ema.checkpoint.files import open_regular, read_whole
from sharded_ema.checkpoint.names import (
    MANIFEST_NAME,
    METADATA_NAME,
    is_plain_name,
)
from sharded_ema.checkpoint.reading.stream import BLOCK_BYTES, scan_file
from sharded_ema.checkpoint.safetensors import parse_header, read_header
from sharded_ema.errors import CheckpointCorruptError, CheckpointError, CheckpointNotFoundError
from sharded_ema.tools.report import Report

SIDECAR = "provenance.json"
#: In the header of a file in place of its digest, of which the digest is taken.
NO_DIGEST = "0" * 32
_DIGEST = "digest"
_VERSION = 1
_MAX_BYTES = 1 << 24
# Fields that are no texts but JSON.
_JSON = (
    "step", "num_updates", "decay", "sigma_rel", "gamma", "residual", "schedule", "coefficients",
    "sources", "weights", "saves",
)  # fmt: skip


# ---------------------------------------------------------------------- written


def with_room(texts: Mapping[str, str]) -> dict[str, str]:
    """The texts of a header with room for the digest of the file."""
    return {**texts, _DIGEST: NO_DIGEST}


def sign(path: Path, header: bytes, digest: str) -> None:
    """Write into a new file, durably, the digest of its bytes with none in their place.

    Args:
        header: with which the file begins, and which has room for it.
    """
    with open(path, "r+b", buffering=0) as file:
        os.pwrite(file.fileno(), _field(digest), header.index(_field(NO_DIGEST)))
        os.fsync(file.fileno())


def write_sidecar(folder: Path, texts: Mapping[str, str]) -> None:
    """Write beside the files in a folder what a header would say, and their sizes and digests."""
    files = {
        path.name: {"bytes": path.stat().st_size, _DIGEST: scan_file(path)[0]}
        for path in sorted(folder.iterdir())
        if path.is_file()
    }
    said = {"version": _VERSION, **texts, "files": files}
    write_durably(folder / SIDECAR, f"{json.dumps(said, indent=1)}\n".encode())


def verify_written(path: Path, digest: str) -> None:
    """Compare a safetensors file that was written here with its digest.

    Raises:
        CheckpointCorruptError: it is missing, or not what was written.
    """
    found, texts = _digest_of(path)
    if digest != found or texts.get(_DIGEST) != digest:
        raise CheckpointCorruptError(f"{path} is damaged: its bytes do not fit its digest")


def _digest_of(path: Path) -> tuple[str, dict[str, str]]:
    """xxh3-128 in hex of a file with no digest in its header, and what the header says.

    Raises:
        CheckpointCorruptError: it is missing, or no safetensors file.
    """
    whole = xxhash.xxh3_128()
    buffer = np.empty(BLOCK_BYTES, np.uint8)
    with open_regular(path) as file:
        _, texts, position = parse_header(file)
        head = file.read(0, position)
        whole.update(head.replace(_field(texts.get(_DIGEST, "")), _field(NO_DIGEST), 1))
        while count := file.read_at(buffer.data, position):
            whole.update(buffer[:count].data)
            position += count
    return whole.hexdigest(), texts


def _field(digest: str) -> bytes:
    # As the header has it, which is JSON without spaces; inside a text its quotes would be escaped.
    return f'"{_DIGEST}":"{digest}"'.encode()


# ---------------------------------------------------------------------- found again


def find_export(path: Path) -> list[Path]:
    """The files of an export that say where it came from; none if it is no export.

    Raises:
        CheckpointNotFoundError: there are several exports side by side.
    """
    if path.suffix == ".safetensors" and path.is_file():
        return [path] if _says(path) else []
    if not path.is_dir() or (path / MANIFEST_NAME).exists():
        return []
    if (path / SIDECAR).is_file():
        return [path / SIDECAR]
    if (path / METADATA_NAME).exists():
        return []
    found = [file for file in sorted(path.glob("*.safetensors")) if _says(file)]
    if found:
        return found
    inner = [
        file
        for pattern in ("*/*.safetensors", f"*/{SIDECAR}")
        for file in sorted(path.glob(pattern))
        if file.name == SIDECAR or _says(file)
    ]
    folders = sorted({file.parent.name for file in inner})
    if len(folders) > 1:
        raise CheckpointNotFoundError(
            f"{path} holds several exports, name one of them: {', '.join(folders[:10])}"
        )
    return inner


def _says(file: Path) -> bool:
    with suppress(CheckpointError):
        return _DIGEST in read_header(file)[1]
    return False


def verify_export(path: Path, files: list[Path], report: Report) -> None:
    """Check every byte of an export, and report where it came from.

    Args:
        path: the export, or one of its files.
        files: what :func:`find_export` has found there.

    Raises:
        CheckpointCorruptError: its ``provenance.json`` cannot be read.
    """
    said: dict[str, Any] = {}
    if files[0].name == SIDECAR:
        said = _verify_sidecar(files[0], report)
    else:
        for file in files:
            texts = _verify_file(file, report)
            if said and texts and texts | {_DIGEST: ""} != said | {_DIGEST: ""}:
                report.fail(f"{file} is of another export than {files[0].name}")
            said = said or texts
        if path.is_dir():
            _verify_complete(files, report)
    facts = {name: _value(name, text) for name, text in said.items()}
    for name in ("format", _DIGEST, "version", "files"):
        facts.pop(name, None)
    there = [files[0].parent / name for name in said.get("files", ())] or files
    report.facts |= {
        "format": "export",
        "files": len(there),
        "bytes": sum(file.stat().st_size for file in there if file.is_file()),
        "provenance": facts,
    }
    report.notes.append(describe(facts))


def describe(facts: Mapping[str, Any]) -> str:
    """A sentence about where an export came from."""
    if facts.get("kind") == "average":
        return f"the mean of {', '.join(facts.get('sources', []))}"
    if facts.get("kind") != "ema":
        return f"tensors that other software has stored, of the save {facts.get('source')}"
    return (
        f"the average {facts.get('profile')!r} after {facts.get('num_updates')} updates, at step "
        f"{facts.get('step')}, of the save {facts.get('source')}"
    )


def _verify_file(file: Path, report: Report) -> dict[str, str]:
    """What a file says, if it is whole."""
    try:
        digest, texts = _digest_of(file)
    except (CheckpointError, OSError) as error:
        report.fail(str(error))
        return {}
    if digest != texts.get(_DIGEST):
        report.fail(f"{file} is damaged: its bytes do not fit its digest")
    return texts


def _verify_complete(files: list[Path], report: Report) -> None:
    """Whether all files of the index are there."""
    folder, there = files[0].parent, {file.name for file in files}
    for index in folder.glob("*.safetensors.index.json"):
        listed = load_json(read_whole(index, _MAX_BYTES), str(index)).get("weight_map")
        names = listed.values() if isinstance(listed, dict) else ()
        for name in sorted({str(name) for name in names} - there):
            report.fail(f"{folder / name} is missing, or says nothing of where it came from")


def _verify_sidecar(sidecar: Path, report: Report) -> dict[str, Any]:
    said = load_json(read_whole(sidecar, _MAX_BYTES), str(sidecar))
    files = said.get("files")
    if said.get("version") != _VERSION or not isinstance(files, dict):
        raise CheckpointCorruptError(f"{sidecar} is none of this library, or of a later version")
    for name, record in files.items():
        file = sidecar.parent / name
        wanted = record.get(_DIGEST) if isinstance(record, dict) else None
        if not is_plain_name(name):
            raise CheckpointCorruptError(f"{sidecar} names a file that cannot be: {name!r}")
        try:
            if scan_file(file)[0] != wanted:
                report.fail(f"{file} is damaged: its bytes do not fit its digest")
        except (CheckpointError, OSError) as error:
            report.fail(str(error))
    return said


def _value(name: str, text: Any) -> Any:
    if name in _JSON and isinstance(text, str):
        with suppress(ValueError):
            return json.loads(text)
    return text
