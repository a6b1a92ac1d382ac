"""Text as bytes: what is read, what is held out, and which bytes a step sees."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from training.ranks import RunError

HELD_OUT = 0.05  # part of the text
# Below this many files a draw by name may hold out none or nearly all: take tails instead.
FEW_FILES = 40
SEPARATOR = b"\0"  # between documents; occurs in no text file, so it also ends a generation
_NOT_TEXT = {"site-packages", "test", "tests", "idle_test", "pydoc_data", "__pycache__"}


@dataclass(frozen=True)
class Corpus:
    """Training and held-out bytes, and where they came from."""

    train: np.ndarray
    held_out: np.ndarray
    files: int
    source: str

    @property
    def digest(self) -> str:
        """Identifies text and split; a resumed run must see the same."""
        digest = hashlib.blake2b(digest_size=16)
        digest.update(len(self.train).to_bytes(8, "little"))
        digest.update(self.train.tobytes())
        digest.update(self.held_out.tobytes())
        return digest.hexdigest()

    def batch(self, seed: int, step: int, samples: range, context: int) -> torch.Tensor:
        """Sequences ``samples`` of the global batch of ``step``: ``(len, context + 1)`` ids.

        A pure function of its arguments: the ranks cut one batch among them, so a run sees the
        same text on any number of ranks and after any resume.
        """
        room = len(self.train) - context
        starts = [_draw(seed, step, sample) % room for sample in samples]
        return _windows(self.train, starts, context)

    def held_out_windows(self, sequences: int, context: int) -> torch.Tensor:
        """The fixed evaluation set: windows spread evenly over the held-out text."""
        room = len(self.held_out) - context - 1
        starts = [room * i // max(1, sequences - 1) for i in range(sequences)]
        return _windows(self.held_out, starts, context)


def _draw(seed: int, step: int, sample: int) -> int:
    # Philox is a counter-based generator: any sample of any step, without drawing those before.
    return int(np.random.Philox(key=seed, counter=[0, 0, step, sample]).random_raw())


def _windows(text: np.ndarray, starts: Sequence[int], context: int) -> torch.Tensor:
    rows = np.stack([text[start : start + context + 1] for start in starts])
    return torch.from_numpy(rows.astype(np.int64))


def load_corpus(paths: Sequence[Path], limit: int, context: int) -> Corpus:
    """Read ``paths`` (default: the standard library's source) and split off the held-out part.

    Args:
        paths: files and directories; hidden and binary files of a directory are passed over.
        limit: read at most about this many bytes, files being chosen by the hash of their name.
        context: the shortest text of use has one sequence of this length in either part.

    Raises:
        RunError: a path does not exist, or there is too little text.
    """
    documents = _read(sorted(set(_list_files(paths)), key=lambda item: _hash(item[0])), limit)
    train, held_out = _split(documents)
    need = context + 1
    if len(train) < need or len(held_out) < need:
        raise RunError(
            f"too little text: {len(documents)} files give {len(train)} bytes to train on and "
            f"{len(held_out)} held out, but one sequence takes {need}; give more --data, raise "
            f"--data-bytes or lower --context"
        )
    source = ", ".join(str(path) for path in paths) or "Python's standard library"
    return Corpus(
        np.frombuffer(train, np.uint8), np.frombuffer(held_out, np.uint8), len(documents), source
    )


def _list_files(paths: Sequence[Path]) -> Iterator[tuple[str, Path]]:
    """Pairs of a name that is the same on every machine, and the path on this one."""
    if not paths:
        root = Path(sysconfig.get_paths()["stdlib"])
        for path in _walk(root):
            if path.suffix == ".py" and not _NOT_TEXT & set(path.relative_to(root).parts):
                yield path.relative_to(root).as_posix(), path
        return
    for given in paths:
        root = given.resolve()
        if root.is_file():
            yield root.name, root
        elif root.is_dir():
            for path in _walk(root):
                yield f"{root.name}/{path.relative_to(root).as_posix()}", path
        else:
            raise RunError(f"--data {given}: no such file or directory")


def _walk(root: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            path = Path(folder, name)
            if not name.startswith(".") and path.is_file():
                yield path


def _read(files: Sequence[tuple[str, Path]], limit: int) -> list[tuple[str, bytes]]:
    documents, total = [], 0
    for name, path in files:
        if total >= limit:
            break
        with path.open("rb") as stream:
            text = stream.read(limit - total)
        if text and SEPARATOR not in text[:8192]:  # a NUL byte marks a binary file
            documents.append((name, text))
            total += len(text)
    return documents


def _split(documents: Sequence[tuple[str, bytes]]) -> tuple[bytes, bytes]:
    """Training and held-out text: whole files by their name, or tails if there are few files."""
    train, held_out = [], []
    for name, text in documents:
        if len(documents) < FEW_FILES:
            cut = len(text) - int(len(text) * HELD_OUT)
            train.append(text[:cut])
            held_out.append(text[cut:])
        else:
            chosen = _hash("held out:" + name) < HELD_OUT * 2**64
            (held_out if chosen else train).append(text)
    return SEPARATOR.join(train), SEPARATOR.join(held_out)


def _hash(name: str) -> int:
    # Not the built-in hash(), which differs from process to process.
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
