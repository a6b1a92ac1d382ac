"""A store below a directory that counts what is opened and fetched in it, by the names of files."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import fsspec
from fsspec.asyn import AsyncFileSystem
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem

#: How often each file was opened, or a range of it asked for; and bytes fetched, in this process.
OPENED: Counter[str] = Counter()
FETCHED: Counter[str] = Counter()


def _fetch(path: str, start: int, stop: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(start)
        data = file.read(stop - start)
    FETCHED[Path(path).name] += len(data)
    return data


def _info(path: str) -> dict[str, Any]:
    kind = "directory" if Path(path).is_dir() else "file"
    return {"name": path, "size": os.stat(path).st_size, "type": kind}


class _File(AbstractBufferedFile):
    def _fetch_range(self, start: int, end: int) -> bytes:
        return _fetch(self.path, start, end)


class CountingStore(AbstractFileSystem):
    """``counting://`` serves one request at a time, and reads ahead unless told not to."""

    protocol = "counting"
    root_marker = "/"

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        return _info(self._strip_protocol(path))

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        path = self._strip_protocol(path)
        found = [_info(entry.path) for entry in os.scandir(path)]
        return found if detail else [entry["name"] for entry in found]

    def _open(
        self, path: str, mode: str = "rb", cache_type: str = "readahead", **_: Any
    ) -> AbstractBufferedFile:
        OPENED[Path(path).name] += 1
        return _File(self, path, mode, 50 << 20, cache_type=cache_type)


class CountingObjects(AsyncFileSystem):
    """``objects://`` serves ranges, any number at once."""

    protocol = "objects"
    root_marker = "/"
    cachable = False

    async def _info(self, path: str, **_: Any) -> dict[str, Any]:
        return _info(self._strip_protocol(path))

    async def _ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        path = self._strip_protocol(path)
        found = [_info(entry.path) for entry in os.scandir(path)]
        return found if detail else [entry["name"] for entry in found]

    async def _cat_file(
        self, path: str, version: Any = None, start: int = 0, end: int = 0, **_: Any
    ) -> bytes:
        OPENED[Path(path).name] += 1
        # As s3fs takes an end of 0.
        return _fetch(self._strip_protocol(path), start, end or os.stat(path).st_size)

    def _open(self, path: str, mode: str = "rb", **_: Any) -> AbstractBufferedFile:
        return _File(self, path, mode, 50 << 20)


def register() -> None:
    """Make the protocols known to fsspec, and begin to count anew."""
    for store in (CountingStore, CountingObjects):
        fsspec.register_implementation(store.protocol, store, clobber=True)
    OPENED.clear()
    FETCHED.clear()
