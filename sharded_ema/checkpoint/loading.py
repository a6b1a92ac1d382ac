"""Ranks read their pieces of a checkpoint together.

The first rank reads what tells where the data lies and gives it to the others. Then each opens the
files that hold its pieces, each once. What fails on one rank is raised on all, because they agree
after each step.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from sharded_ema.checkpoint.files import URL, Directory, Kept, as_location, gone
from sharded_ema.checkpoint.filling import Filling, fill
from sharded_ema.checkpoint.names import MANIFEST_NAME, METADATA_NAME, is_part_of
from sharded_ema.checkpoint.reading.chunks import TableIndex
from sharded_ema.checkpoint.reading.manifest import check_header
from sharded_ema.checkpoint.reading.opened import Checkpoint, data_files, open_directory
from sharded_ema.checkpoint.reading.selection import Selection, Wanted, select
from sharded_ema.checkpoint.run import open_checkpoint
from sharded_ema.errors import CheckpointGoneError, CheckpointNotFoundError
from sharded_ema.model.agreement import Ranks
from sharded_ema.model.pieces import FlatShard, Piece, pieces_of

# Files whose headers are compared before anything is read: they are all held open until then.
_MAX_CHECKED_FIRST = 16


@dataclass(frozen=True, slots=True)
class Told:
    """What the first rank tells the others of a checkpoint.

    Attributes:
        where: its directory or URL.
        sizes: of the files that all are to hold in memory, by name: how many of their first bytes,
            and how large they are.
    """

    where: str
    sizes: dict[str, tuple[int, int]]


class Loading:
    """One load: :meth:`look`, :meth:`share`, :meth:`open`, :meth:`want`, :meth:`choose`,
    :meth:`check` and :meth:`read`.

    All ranks take all steps, and agree after each that may fail on one of them.

    Args:
        path: see :func:`~sharded_ema.checkpoint.run.find_checkpoint`.
        ranks: that load.
    """

    def __init__(self, path: str | os.PathLike[str], ranks: Ranks) -> None:
        self._path = path
        self._ranks = ranks
        self._told: Told | None = None
        self._kept: dict[str, Kept] = {}
        self._checkpoint: Checkpoint | None = None
        self._targets: list[tuple[str, Piece]] = []
        self._selection: Selection | None = None
        self._fillings: list[Filling] = []
        self._unchecked: set[str] = set()

    def look(self) -> Told | None:
        """Find the checkpoint and read its metadata, on the first rank.

        Raises:
            CheckpointError: see :func:`~sharded_ema.checkpoint.run.open_checkpoint`.
        """
        if self._ranks.rank:
            return None
        checkpoint = self._checkpoint = open_checkpoint(self._path, check_files=False)
        sizes = {name: (kept.size, kept.size) for name, kept in checkpoint.directory.kept.items()}
        if isinstance(checkpoint.index, TableIndex):
            assert checkpoint.manifest is not None
            # Its rows are given to the others as they choose among them.
            name = checkpoint.manifest.chunks_name
            sizes[name] = checkpoint.index.table.header_bytes, sizes[name][1]
        return Told(str(checkpoint.path), sizes)

    def share(self, told: Told, purpose: str) -> None:
        """Give the metadata to all ranks. Collective.

        Args:
            told: what :meth:`look` has returned on the first.

        Raises:
            AbsentRankError: a rank was lost on the way.
        """
        self._told = told
        for name, (count, size) in told.sizes.items():
            if self._checkpoint is None:
                self._kept[name] = Kept(np.empty(count, np.uint8), size)
            else:
                self._kept[name] = self._checkpoint.directory.kept[name]
            self._ranks.broadcast(self._kept[name].data[:count], purpose)

    def open(self) -> Checkpoint:
        """The checkpoint, the same on all ranks.

        Raises:
            CheckpointGoneError: another one than the first rank has found is there by now.
            CheckpointError: see :func:`~sharded_ema.checkpoint.run.open_checkpoint`.
        """
        if self._checkpoint is None:
            self._checkpoint = self._open_told()
        return self._checkpoint

    def _open_told(self) -> Checkpoint:
        assert self._told is not None
        where = as_location(self._told.where)
        try:
            directory = Directory(where)
        except CheckpointNotFoundError:
            raise CheckpointGoneError(
                f"{where} is there for the first rank and not for this one: it was removed or "
                "replaced meanwhile, or the ranks share no disk; put it where all see it"
            ) from None
        directory.kept |= self._kept
        with directory.unless_gone():
            checkpoint = open_directory(directory, self._kept, check_files=False)
            committed = METADATA_NAME if checkpoint.manifest is None else MANIFEST_NAME
            # Under a URL names and headers tell whose the objects are, and none is replaced.
            if not isinstance(where, URL) and not directory.is_as_kept(committed):
                raise gone(where)
        return checkpoint

    def want(self, state: Mapping[str, Tensor]) -> None:
        """Note what this rank needs.

        Args:
            state: tensors to fill, by the keys that they have in the checkpoint.

        Raises:
            CheckpointCorruptError: a tensor has more dimensions than the chunk table.
        """
        self._targets = [
            (key, piece)
            for key, value in state.items()
            if not isinstance(value, FlatShard) or value.reads
            for piece in pieces_of(value)
            if piece[0].numel
        ]
        checkpoint = self.open()
        if isinstance(checkpoint.index, TableIndex):
            self._selection = Selection(checkpoint, checkpoint.index, self._wanted())

    def _wanted(self) -> list[Wanted]:
        return [(key, box) for key, (box, _) in self._targets]

    def choose(self, purpose: str) -> None:
        """Choose among the rows of the chunk table, which the first rank gives to all. Collective.

        Raises:
            AbsentRankError: a rank was lost on the way.
        """
        if self._selection is None:
            return
        index = self.open().index
        assert isinstance(index, TableIndex)
        for first, count in index.table.slabs():
            if self._ranks.rank:
                rows = np.empty(count, index.table.row_type)
            else:
                rows = index.table.records(first, count)
            self._ranks.broadcast(rows.view(np.uint8), purpose)
            self._selection.take(rows)

    def check(self) -> None:
        """Check what was chosen, and some of the files.

        Every file is looked at by one rank, whether or not anybody reads from it. With many files
        to a rank, the headers of some are only compared when they are read from.

        Raises:
            CheckpointCorruptError: chunks do not fit the tensors or the files, or a file is not the
                one that was written.
        """
        checkpoint, selection = self.open(), self._selection
        with checkpoint.directory.unless_gone():
            parts = selection.parts() if selection else select(checkpoint, self._wanted())
            for part in parts:
                _, (box, tensor) = self._targets[part.piece]
                into = tensor.detach()[part.box.within(box).slices]
                inside = part.box.within(part.chunk.box)
                self._fillings.append(Filling(part.key, part.chunk, inside, into))
            self._check_files(checkpoint, {part.chunk.file for part in parts})

    def _check_files(self, checkpoint: Checkpoint, needed: set[str]) -> None:
        manifest = checkpoint.manifest
        files = data_files(manifest) if manifest is not None else []
        first, last = (len(files) * (self._ranks.rank + i) // self._ranks.size for i in (0, 1))
        share = {record.name for record in files[first:last]}
        if manifest is not None and isinstance(checkpoint.path, URL):
            share |= {name for name in needed if not is_part_of(name, manifest.uuid)}
        held = 0
        for record in files:
            if record.name not in share:
                continue
            held += record.name in needed
            if record.name in needed and held > _MAX_CHECKED_FIRST:
                self._unchecked.add(record.name)
            else:
                check_header(checkpoint.directory, record)

    def read(self, *, verify: bool) -> None:
        """Fill what was chosen.

        Args:
            verify: see :func:`.filling.fill`.

        Raises:
            CheckpointCorruptError: a file is not there, too short or damaged. Some of the tensors
                may have been overwritten.
            CheckpointMismatchError: what is to be verified carries no checksum.
            CheckpointGoneError: the checkpoint was removed or replaced meanwhile.
        """
        with self.open() as checkpoint:
            fill(checkpoint, self._fillings, verify=verify, headers=self._unchecked)
