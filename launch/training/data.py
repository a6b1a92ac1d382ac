"""Text: what is read, what is held out, and which part of it a step sees."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from training.preemption import leave_signals_to_parent
from training.ranks import RunError
from training.tokenizer import SEPARATOR, Tokenizer

HELD_OUT = 0.05  # part of the text
# Below this many files a draw by name may hold out none or nearly all: take tails instead.
FEW_FILES = 40
_NOT_TEXT = {"site-packages", "test", "tests", "idle_test", "pydoc_data", "__pycache__"}


@dataclass(frozen=True)
class Corpus:
    """Training and held-out text, and where it came from.

    Attributes:
        train: bytes, or the ids of their tokens once it was ``encoded``.
        held_out: the same.
    """

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

    def encoded(self, tokenizer: Tokenizer, context: int) -> Corpus:
        """The same text in tokens.

        Raises:
            RunError: they are less than one sequence of this length.
        """
        train, held_out = tokenizer.encode(self.train), tokenizer.encode(self.held_out)
        if min(len(train), len(held_out)) < context + 2:
            raise RunError(
                f"too little text: {len(train)} tokens to train on and {len(held_out)} held out, "
                f"but one sequence takes {context + 1}; give more --data, raise --data-bytes, or "
                f"lower --context or --vocab-size"
            )
        return replace(self, train=train, held_out=held_out)

    def held_out_windows(self, sequences: int, context: int) -> torch.Tensor:
        """The fixed evaluation set: windows spread evenly over the held-out text."""
        room = len(self.held_out) - context - 1
        windows = Windows(self.held_out, context)
        starts = [room * i // max(1, sequences - 1) for i in range(sequences)]
        return torch.stack([windows[start] for start in starts])


class Windows(Dataset[torch.Tensor]):
    """All sequences of a text; that of index ``i`` begins at its ``i``-th token.

    An item has shape ``(context + 1,)``: what goes in, and one token on, what is predicted.
    """

    def __init__(self, text: np.ndarray, context: int) -> None:
        self._text, self._context = text, context

    def __len__(self) -> int:
        return len(self._text) - self._context

    def __getitem__(self, start: int) -> torch.Tensor:
        return torch.from_numpy(self._text[start : start + self._context + 1].astype(np.int64))


class StepSampler(Sampler[list[int]]):
    """The sequences of each step, from ``first`` to ``last``: a rank's share of a global batch.

    What a step sees is a function of seed and step alone. The ranks cut one batch among them, so a
    run sees the same text on any number of ranks and after any resume, and its position in the
    data is its number of steps: there is nothing else to save.

    Args:
        room: number of sequences to draw from.
        share: the numbers of this rank's sequences within a batch.
    """

    def __init__(self, seed: int, first: int, last: int, share: range, room: int) -> None:
        self._seed, self._share, self._room = seed, share, room
        self._steps = range(first, last + 1)

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[list[int]]:
        for step in self._steps:
            yield [_draw(self._seed, step, number) % self._room for number in self._share]


def step_batches(
    text: np.ndarray,
    context: int,
    sampler: StepSampler,
    workers: int,
    device: torch.device,
) -> DataLoader[torch.Tensor]:
    """The batches of a run, ``(sequences, context + 1)`` ids each.

    Args:
        workers: processes that read ahead; with 0 a batch is read when its step begins.
        device: where they will go; for a GPU they are put into pinned memory.
    """
    return DataLoader(
        Windows(text, context),
        batch_sampler=sampler,
        num_workers=workers,
        worker_init_fn=leave_signals_to_parent,
        pin_memory=device.type == "cuda",
        # Else it would draw from the generator of the training.
        generator=torch.Generator(),
    )


def _draw(seed: int, step: int, sample: int) -> int:
    # Philox is a counter-based generator: any sample of any step, without drawing those before.
    return int(np.random.Philox(key=seed, counter=[0, 0, step, sample]).random_raw())


def load_corpus(paths: Sequence[Path], limit: int, context: int) -> Corpus:
    """Read ``paths`` (default: the standard library's source) and split off the held-out part.

    Args:
        paths: files and directories; hidden and binary files of a directory are passed over.
        limit: read at most about this many bytes, files being chosen by the hash of their name.
        context: the shortest text of use has one sequence of this length in either part.

    Raises:
        RunError: a path does not exist, or there is too little text.
    """
    documents = _read(sorted(set(_list_files(paths)), key=lambda item: stable_hash(item[0])), limit)
    train, held_out = _split(documents)
    need = context + 1
    if min(len(train), len(held_out)) < need:
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
            chosen = stable_hash("held out:" + name) < HELD_OUT * 2**64
            (held_out if chosen else train).append(text)
    return SEPARATOR.join(train), SEPARATOR.join(held_out)


def stable_hash(name: str) -> int:
    """64 bits of a name, the same on every machine; the built-in ``hash`` is not."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
