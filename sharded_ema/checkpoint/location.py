"""Where checkpoints lie: a path of this machine, or a URL that fsspec has a driver for."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from sharded_ema.errors import ConfigError


class URL(str):
    """A URL without a slash at its end, with as much of ``Path`` as is needed here."""

    __slots__ = ()

    def __truediv__(self, name: str) -> URL:
        return URL(f"{self}/{name}")

    @property
    def name(self) -> str:
        """The last part."""
        return self.rpartition("/")[2]

    @property
    def parent(self) -> URL:
        """All but the last part."""
        return URL(self.rpartition("/")[0])


Location = Path | URL


def as_location(location: str | os.PathLike[str]) -> Location:
    """A URL such as ``s3://bucket/run`` as such (``file://`` is one as well), else a path."""
    text = os.fspath(location)
    return URL(text.rstrip("/")) if "://" in text else Path(text)


def as_path(location: str | os.PathLike[str], what: str) -> Path:
    """A path of this machine.

    Raises:
        ConfigError: it is a URL, which as a path would name a directory here.
    """
    if isinstance(as_location(location), URL):
        raise ConfigError(f"{what} must lie on this machine, got the URL {location}")
    return Path(location)


def driver(url: str) -> tuple[Any, str]:
    """fsspec's file system for a URL, without what it remembers of earlier looks, and the path.

    Raises:
        ConfigError: fsspec has no driver for it.
    """
    try:
        import fsspec  # not needed by those who have files

        fs, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise ConfigError(f"{url} cannot be reached: {error}") from error
    fs.invalidate_cache()
    return fs, path


def entries(location: Location) -> set[str]:
    """Names in a directory; none if there is no such directory."""
    if isinstance(location, Path):
        return {entry.name for entry in location.iterdir()} if location.is_dir() else set()
    fs, path = driver(location)
    if not fs.isdir(path):
        return set()
    return {found.rstrip("/").rpartition("/")[2] for found in fs.ls(path, detail=False)}


def is_file(location: Location) -> bool:
    """Whether there is a file, and no link."""
    if isinstance(location, Path):
        return location.is_file() and not location.is_symlink()
    fs, path = driver(location)
    return bool(fs.isfile(path))


def exists(location: Location) -> bool:
    """Whether there is anything, and be it a broken link."""
    if isinstance(location, Path):
        return os.path.lexists(location)
    fs, path = driver(location)
    return bool(fs.exists(path))
