"""Where checkpoints lie: a path of this machine, or a URL that fsspec has a driver for."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

#: A path, or a URL without a slash at its end.
Location = Path | str


def is_url(location: str | os.PathLike[str]) -> bool:
    """Whether this is a URL, such as ``s3://bucket/run``; ``file://`` is one as well."""
    return "://" in os.fspath(location)


def as_location(location: str | os.PathLike[str]) -> Location:
    """A path as ``Path``, a URL as text."""
    return os.fspath(location).rstrip("/") if is_url(location) else Path(location)


def name_of(location: Location) -> str:
    """The last part."""
    return location.name if isinstance(location, Path) else location.rpartition("/")[2]


def parent_of(location: Location) -> Location:
    """All but the last part."""
    return location.parent if isinstance(location, Path) else location.rpartition("/")[0]


def inside_of(location: Location, name: str) -> Location:
    """A plain name below it."""
    return location / name if isinstance(location, Path) else f"{location}/{name}"


def entries(location: Location) -> set[str]:
    """Names in a directory; none if there is no such directory."""
    if isinstance(location, Path):
        return {entry.name for entry in location.iterdir()} if location.is_dir() else set()
    fs, path = _driver(location)
    if not fs.isdir(path):
        return set()
    return {found.rstrip("/").rpartition("/")[2] for found in fs.ls(path, detail=False)}


def is_file(location: Location) -> bool:
    """Whether there is a file, and no link."""
    if isinstance(location, Path):
        return location.is_file() and not location.is_symlink()
    fs, path = _driver(location)
    return bool(fs.isfile(path))


def exists(location: Location) -> bool:
    """Whether there is anything, and be it a broken link."""
    if isinstance(location, Path):
        return os.path.lexists(location)
    fs, path = _driver(location)
    return bool(fs.exists(path))


def read_small(location: Location, limit: int) -> bytes | None:
    """The content of a file; ``None`` if it is larger than ``limit`` bytes."""
    if isinstance(location, Path):
        with open(location, "rb") as file:
            data = file.read(limit + 1)
    else:
        fs, path = _driver(location)
        data = fs.cat_file(path, 0, limit + 1)
    return data if len(data) <= limit else None


def _driver(url: str) -> tuple[Any, str]:
    """The driver for a URL, without what it remembers of earlier looks, and the path in it."""
    import fsspec  # not needed by those who read files

    fs, path = fsspec.core.url_to_fs(url)
    fs.invalidate_cache()
    return fs, path
