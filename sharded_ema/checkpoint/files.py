"""Paths and URLs, and the files that lie there: opened with care, held open, read at any position.

A checkpoint may have been made to harm, so only regular files inside its directory are opened, and
without waiting. Under a URL there are objects, which fsspec has a driver for.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import threading
import weakref
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial, wraps
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from sharded_ema.checkpoint.names import MANIFEST_NAME, is_plain_name
from sharded_ema.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointGoneError,
    CheckpointNotFoundError,
    CheckpointUnreachableError,
    ConfigError,
    EMAError,
)

# Names of files that OpenFiles keeps open; of one, as many as there are threads.
_MAX_OPEN_FILES = 32
# And directories.
_MAX_HELD = 6
# The end of a manifest has its digest in it.
_END_BYTES = 64

Bytes = NDArray[np.uint8]

# ---------------------------------------------------------------------- where


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
    return _Driver(fs, url), path


# Protocols of stores that have buckets and no directories.
_BUCKETS = frozenset({"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oss", "oci"})
# Packages whose errors are of no class that Python has.
_CLIENTS = frozenset(
    {"aiobotocore", "aiohttp", "azure", "botocore", "gcsfs", "google", "requests", "urllib3"}
)


# What a store says of what is there, and so is no failure.
_ANSWERS = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, EMAError)


def is_bucket_store(url: URL) -> bool:
    """Whether a URL is one of a store in which directories need not and cannot be made."""
    return url.partition("://")[0].rpartition("::")[2] in _BUCKETS


class reaching:
    """A block in which a store is asked for something; what its client raises becomes an error of
    this library.

    Raises:
        CheckpointUnreachableError: the store cannot be reached, or refuses.
    """

    def __init__(self, url: str) -> None:
        self._url = url

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if kind is None or issubclass(kind, _ANSWERS):
            return
        if issubclass(kind, OSError) or kind.__module__.partition(".")[0] in _CLIENTS:
            said = " ".join(str(error).split()) or kind.__name__
            raise CheckpointUnreachableError(f"{self._url} cannot be reached: {said}") from error


class _Driver:
    """A file system of fsspec whose calls are made in :class:`reaching`."""

    def __init__(self, fs: Any, url: str) -> None:
        self._fs = fs
        self._url = url

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._fs, name)
        if not callable(found):
            return found

        @wraps(found)
        def call(*args: Any, **options: Any) -> Any:
            with reaching(self._url):
                return found(*args, **options)

        return call


def entries(location: Location) -> set[str]:
    """Names in a directory; none if there is no such directory."""
    if isinstance(location, Path):
        try:
            return {entry.name for entry in location.iterdir()}
        except (FileNotFoundError, NotADirectoryError):
            return set()
    fs, path = driver(location)
    if not fs.isdir(path):
        return set()
    # Some tools put an empty object where they show a folder: it has the name of the folder.
    found = {name.rstrip("/") for name in fs.ls(path, detail=False)}
    return {name.rpartition("/")[2] for name in found if name.strip("/") != path.strip("/")}


@dataclass(frozen=True, slots=True)
class Upload:
    """An object of a store of which parts were sent and never put together.

    Attributes:
        name: below the URL that was asked about.
        bucket, key, number: what the store knows it by.
    """

    name: str
    bucket: str
    key: str
    number: str


def unfinished_uploads(url: URL) -> list[Upload]:
    """What was begun below a URL and is not there yet, or never will be; none if nobody can tell.

    S3 keeps such parts, and charges for them, until somebody ends the upload.
    """
    fs, path = driver(url)
    bucket, _, start = path.strip("/").partition("/")
    try:
        listed = fs.list_multipart_uploads(bucket)
    except (AttributeError, OSError, CheckpointError):  # not every driver, store and user may
        return []
    start = f"{start}/" if start else ""
    return [
        Upload(upload["Key"].removeprefix(start), bucket, upload["Key"], upload["UploadId"])
        for upload in listed
        if upload["Key"].startswith(start)
    ]


def is_file(location: Location) -> bool:
    """Whether there is a file, and no link that leads out of its directory."""
    if isinstance(location, Path):
        linked = location.is_symlink()
        return location.is_file() and not (linked and _leads_out(location.parent, location.name))
    fs, path = driver(location)
    return bool(fs.isfile(path))


def exists(location: Location) -> bool:
    """Whether there is anything, and be it a broken link."""
    if isinstance(location, Path):
        return os.path.lexists(location)
    fs, path = driver(location)
    return bool(fs.exists(path))


# What drivers call that which changes whenever an object does.
_STAMPS = ("ETag", "etag", "generation", "LastModified", "last_modified", "mtime", "created")


def identity(location: Location) -> tuple[object, ...] | None:
    """What is another once a file was written again; ``None`` without a file, or if nothing is.

    A link has none.
    """
    if isinstance(location, Path):
        try:
            status = location.lstat()
        except OSError:
            return None
        if not stat.S_ISREG(status.st_mode):
            return None
        times = (status.st_mtime_ns, status.st_ctime_ns)
        return (status.st_dev, status.st_ino, status.st_size, *times)
    fs, path = driver(location)
    try:
        info = fs.info(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    stamps = tuple(str(info[name]) for name in _STAMPS if info.get(name))
    return (info.get("size"), *stamps) if stamps else None


# ---------------------------------------------------------------------- one file


class OpenFile(ABC):
    """A file to read at any position; a context manager.

    Attributes:
        location: of the file.
        size: in bytes.
    """

    def __init__(self, location: Location, size: int) -> None:
        self.location = location
        self.size = size

    def read_at(self, view: memoryview, position: int) -> int:
        """Read bytes from ``position`` on; returns how many, 0 at the end of the file.

        Raises:
            CheckpointCorruptError: the disk cannot read them.
            CheckpointGoneError: it was removed since it was opened, as a store lets it be.
        """
        try:
            return self._read_at(view, position)
        except FileNotFoundError as error:
            raise gone(self.location) from error
        except OSError as error:
            raise CheckpointCorruptError(
                f"{self.location} cannot be read at byte {position}: {error.strerror or error}"
            ) from error

    def fill(self, view: memoryview, position: int) -> None:
        """Read as many bytes as ``view`` has.

        Raises:
            CheckpointCorruptError: the file ends before.
        """
        while view.nbytes:
            count = self.read_at(view, position)
            if not count:
                raise CheckpointCorruptError(
                    f"{self.location} ends at byte {position}, {view.nbytes} bytes are missing"
                )
            view = view[count:]
            position += count

    def fetch(self, view: memoryview, position: int) -> None:
        """The same, and nothing is read ahead; threads may share the file.

        Raises:
            CheckpointCorruptError: see :meth:`fill`.
        """
        self.fill(view, position)

    def read(self, position: int, num_bytes: int) -> bytes:
        """These bytes, or as many as there are."""
        data = bytearray(max(0, min(num_bytes, self.size - position)))
        if data:
            self.fill(memoryview(data), position)
        return bytes(data)

    @abstractmethod
    def _read_at(self, view: memoryview, position: int) -> int: ...

    @abstractmethod
    def close(self) -> None:
        """Give up what it holds."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self.close()


class _LocalFile(OpenFile):
    def __init__(self, location: Location, descriptor: int, size: int) -> None:
        super().__init__(location, size)
        self._descriptor = descriptor

    def _read_at(self, view: memoryview, position: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._descriptor, [view], position)
        # macOS before 11
        data = os.pread(self._descriptor, view.nbytes, position)
        view[: len(data)] = data
        return len(data)

    def close(self) -> None:
        os.close(self._descriptor)


class _RemoteFile(OpenFile):
    """An object of a store whose driver serves one request at a time."""

    def __init__(self, location: Location, file: Any, size: int) -> None:
        super().__init__(location, size)
        self._file = file
        self._lock = threading.Lock()

    def _read_at(self, view: memoryview, position: int) -> int:
        if position >= self.size:
            return 0
        with self._lock, reaching(str(self.location)):
            self._file.seek(position)
            return int(self._file.readinto(view))

    def close(self) -> None:
        self._file.close()


class _RemoteObject(_RemoteFile):
    """An object of a store whose driver serves any number of requests at once.

    Args:
        cat: the bytes of the object from ``start`` to ``end``.
    """

    def __init__(self, location: Location, file: Any, size: int, cat: Callable[..., bytes]) -> None:
        super().__init__(location, file, size)
        self._cat = cat

    def fetch(self, view: memoryview, position: int) -> None:
        """See :meth:`OpenFile.fetch`."""
        if not view.nbytes:  # which drivers take for all of it
            return
        stop = position + view.nbytes
        try:
            data = self._cat(start=position, end=stop) if stop <= self.size else b""
        except FileNotFoundError as error:
            raise gone(self.location) from error
        if len(data) != view.nbytes:
            raise CheckpointCorruptError(
                f"{self.location} ends before byte {stop}; it is truncated or replaced"
            )
        view[:] = data


@dataclass(frozen=True, slots=True)
class Kept:
    """The content of a file in memory, or the beginning of it.

    Attributes:
        data: its first bytes.
        size: of the file.
    """

    data: Bytes
    size: int

    @property
    def is_whole(self) -> bool:
        """Whether all of it is there."""
        return self.data.nbytes == self.size


class _KeptFile(OpenFile):
    """What is in memory already."""

    def __init__(self, location: Location, kept: Kept) -> None:
        super().__init__(location, kept.size)
        self._data = kept.data

    def _read_at(self, view: memoryview, position: int) -> int:
        part = self._data[position : position + view.nbytes]
        view[: part.nbytes] = part.data
        return part.nbytes

    def close(self) -> None:
        pass


def open_regular(location: Location | Member) -> OpenFile:
    """A regular file, or an object under a URL, to read.

    Raises:
        CheckpointCorruptError: it is missing, or a directory, FIFO, socket or device.
        CheckpointError: it cannot be opened.
    """
    if isinstance(location, Member):
        return location.directory.open_new(location.name)
    if isinstance(location, URL):
        return _open_remote(location)
    return _open_local(location, lambda: os.open(location, _READ))


# Without O_NONBLOCK, opening a FIFO would wait for somebody to write.
_READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK


def _open_local(location: Path, opens: Callable[[], int]) -> OpenFile:
    """The file that ``opens`` gives a descriptor of; it is called ``location``."""
    try:
        descriptor = opens()
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointCorruptError(f"{location} is missing") from None
    except OSError as error:
        raise CheckpointError(f"{location} cannot be opened: {error.strerror}") from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise CheckpointCorruptError(f"{location} is not a regular file")
    return _LocalFile(location, descriptor, status.st_size)


def _open_remote(url: URL) -> OpenFile:
    fs, path = driver(url)
    try:
        if fs.async_impl:
            cat = partial(fs.cat_file, path)
            return _RemoteObject(url, fs.open(path, "rb"), int(fs.size(path)), cat)
        # Read in blocks that are large enough: what a driver reads ahead would be fetched in vain.
        return _RemoteFile(url, fs.open(path, "rb", cache_type="none"), int(fs.size(path)))
    except FileNotFoundError:
        raise CheckpointCorruptError(f"{url} is missing") from None
    except OSError as error:
        raise CheckpointError(f"{url} cannot be opened: {error}") from error


def read_whole(location: Location | Member, limit: int) -> bytes:
    """The content of a small file; see :func:`read_array`."""
    return read_array(location, limit).tobytes()


def read_array(location: Location | Member, limit: int) -> Bytes:
    """The content of a file that fits into memory.

    Args:
        limit: bytes; a larger file is not read.

    Raises:
        CheckpointCorruptError: it is missing, no regular file, or larger.
    """
    with open_regular(location) as file:
        if file.size > limit:
            raise CheckpointCorruptError(
                f"{location} has {file.size} bytes, more than the {limit} that it may have"
            )
        data = np.empty(file.size, np.uint8)
        file.fetch(data.data, 0)
        return data


def read_if_file(location: Location, limit: int) -> bytes | None:
    """The same if there is a file, and no link; else ``None``.

    Raises:
        CheckpointCorruptError: it is larger.
    """
    return read_whole(location, limit) if is_file(location) else None


def inside(root: Location, name: str) -> Location:
    """Where a file of the checkpoint lies.

    Raises:
        CheckpointCorruptError: the name, or a link that has it, leads out of the directory.
    """
    path = root / name
    if isinstance(root, URL) or isinstance(path, URL):
        if not is_plain_name(name):
            raise CheckpointCorruptError(f"{root}: {name!r} is no name of a file in it")
        return path
    if _leads_out(root, name):
        raise CheckpointCorruptError(f"{root}: the file name {name!r} leads out of the directory")
    return path


def _leads_out(root: Path, name: str) -> bool:
    try:
        return "\0" in name or not lies_in(root / name, root.resolve())
    except (OSError, RuntimeError, ValueError):  # links in a circle, names that cannot be
        return True


def lies_in(path: Path, folder: Path) -> bool:
    """Whether a path leads to somewhere in a directory, or in the cache of the Hub around it.

    There files are links: ``<repository>/snapshots/<revision>/<file>`` into
    ``<repository>/blobs``.

    Args:
        folder: resolved.
    """
    snapshot = next((p for p in (folder, *folder.parents) if p.parent.name == "snapshots"), None)
    homes = [folder] if snapshot is None else [folder, snapshot.parents[1] / "blobs"]
    return any(path.resolve().is_relative_to(home) for home in homes)


# ---------------------------------------------------------------------- many files


class OpenFiles:
    """Files that stay open from one read to the next, 32 at the most; a context manager.

    Threads may share it: a file that one of them reads is not there for another, which opens it
    once more. What was closed is opened again when it is needed. Nobody who forgets to close it
    loses the files for good.
    """

    def __init__(self) -> None:
        # By directory and name; what was used last comes last.
        self._idle: OrderedDict[tuple[object, str], list[OpenFile]] = OrderedDict()
        # Directories that are held, what was used last comes last.
        self._held: OrderedDict[_Handle, None] = OrderedDict()
        self._lock = threading.Lock()
        weakref.finalize(self, _close_all, self._idle, self._held)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close what nobody is reading."""
        with self._lock:
            _close_all(self._idle, self._held)

    def hold(self, handle: _Handle) -> None:
        """Note that a directory is held open, and let go of the one that was used least lately."""
        with self._lock:
            self._held[handle] = None
            self._held.move_to_end(handle)
            if len(self._held) > _MAX_HELD:
                self._held.popitem(last=False)[0].close()

    @contextmanager
    def open(self, root: Directory, name: str) -> Iterator[OpenFile]:
        """The file of this name in a directory to read, for the time of a block.

        Raises:
            CheckpointCorruptError, CheckpointError: see :meth:`Directory.open_new`.
        """
        key = (root.token, name)
        with self._lock:
            idle = self._idle.pop(key, None)
            file = idle.pop() if idle else None
            if idle:
                self._idle[key] = idle
        if file is None:
            file = root.open_new(name)
        try:
            yield file
        except BaseException:
            file.close()
            raise
        with self._lock:
            self._idle.setdefault(key, []).append(file)
            self._idle.move_to_end(key)
            if len(self._idle) > _MAX_OPEN_FILES:
                _close_first(self._idle)


def _close_first(idle: OrderedDict[tuple[object, str], list[OpenFile]]) -> None:
    for file in idle.popitem(last=False)[1]:
        file.close()


def _close_all(
    idle: OrderedDict[tuple[object, str], list[OpenFile]], held: OrderedDict[_Handle, None]
) -> None:
    while idle:
        _close_first(idle)
    while held:
        held.popitem()[0].close()


class _Handle:
    """A directory of this machine, held by a descriptor: what takes its name later is not it.

    The descriptor may be closed meanwhile. Who opens it again finds the same directory or an error.

    Raises:
        FileNotFoundError, NotADirectoryError: there is none.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._descriptor: int | None = self._open()
        self._identity = _identity(self._descriptor)
        self._box = [self._descriptor]
        weakref.finalize(self, _close_descriptor, self._box)

    def _open(self) -> int:
        return os.open(self._path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY)

    def close(self) -> None:
        """Give the descriptor back; harmless if done before."""
        with self._lock:
            _close_descriptor(self._box)
            self._descriptor = None

    @contextmanager
    def descriptor(self) -> Iterator[int]:
        """The descriptor, which nobody closes in the block.

        Raises:
            CheckpointGoneError: another directory has the name by now, or none.
        """
        with self._lock:
            if self._descriptor is None:
                try:
                    opened = self._open()
                except OSError:
                    raise gone(self._path) from None
                self._descriptor = opened
                self._box[:] = [opened]
                if _identity(opened) != self._identity:
                    _close_descriptor(self._box)
                    self._descriptor = None
                    raise gone(self._path)
            yield self._descriptor

    def is_gone(self) -> bool:
        """Whether another directory has the name by now, or none."""
        try:
            status = os.stat(self._path)
        except OSError:
            return True
        return (status.st_dev, status.st_ino) != self._identity[:2]


def _close_descriptor(box: list[int]) -> None:
    while box:
        os.close(box.pop())


def _identity(descriptor: int) -> tuple[int, int, int]:
    """What tells a directory from one that gets its number later, whose manifest is younger."""
    status, written = os.fstat(descriptor), 0
    with suppress(OSError):
        written = os.stat(MANIFEST_NAME, dir_fd=descriptor, follow_symlinks=False).st_mtime_ns
    return status.st_dev, status.st_ino, written


def gone(location: Location) -> CheckpointGoneError:
    """The error for a checkpoint that is no longer the one that was opened."""
    return CheckpointGoneError(
        f"{location} was removed or replaced while it was read; open it again, or read a later one"
    )


class Member:
    """A file of a directory that is held, to be opened in it and by no path.

    Attributes:
        directory, name: see above.
    """

    def __init__(self, directory: Directory, name: str) -> None:
        self.directory = directory
        self.name = name

    def __str__(self) -> str:
        return str(self.directory.location / self.name)


class Directory:
    """The directory of a checkpoint, or what lies under a URL, as a place to read pieces from.

    It is opened once: of a directory that is replaced meanwhile everything still comes from the one
    that was there, or an error says so. Under a URL nothing can be held, but there no name is used
    by two saves.

    Args:
        location: where it lies.
        files: holds its files open; one for several directories makes them share its limit.
            ``None`` for one of its own.
        links: whether its files may be links to anywhere, as in a model directory that the user
            names. Else only to a file in it, or in the cache of the Hub that it is part of.

    Attributes:
        location, files: see above.
        kept: what is taken for the content of files, by name, so that nobody reads them again.

    Raises:
        CheckpointNotFoundError: there is no such directory on this machine.
    """

    def __init__(
        self, location: Location, files: OpenFiles | None = None, *, links: bool = False
    ) -> None:
        self.location = location
        self.files = OpenFiles() if files is None else files
        self._links = links
        self._handle: _Handle | None = None
        # Under a URL: what it is known by, and the digest of that.
        self._known: tuple[str, bytes] | None = None
        self.kept: dict[str, Kept] = {}
        if isinstance(location, Path):
            try:
                self._handle = _Handle(location)
            except OSError as error:
                raise CheckpointNotFoundError(
                    f"{location} is no directory that can be opened: {error.strerror}"
                ) from None
            self.files.hold(self._handle)
        # What its files are held open under: no reference to what holds them.
        self.token: object = self._handle or object()

    def __truediv__(self, name: str) -> Member:
        return Member(self, name)

    def names(self) -> set[str]:
        """The names in it."""
        if self._handle is None:
            return entries(self.location)
        with self._reaching(self._handle) as descriptor, os.scandir(descriptor) as found:
            return {entry.name for entry in found}

    def remember(self, name: str, data: bytes) -> None:
        """Take a file of it for what it is known by, under a URL."""
        self._known = (name, hashlib.sha256(data).digest())

    def is_as_kept(self, name: str) -> bool:
        """Whether a file has the size of what is taken for its content, and ends as that does."""
        kept = self.kept[name]
        end = kept.data[-_END_BYTES:]
        with self._open_path(name) as file:
            return file.size == kept.size and file.read(file.size - end.nbytes, end.nbytes) == (
                end.tobytes()
            )

    def is_gone(self) -> bool:
        """Whether it was removed, or replaced, since it was opened."""
        if self._handle is not None:
            return self._handle.is_gone()
        if self._known is None:
            return False
        name, digest = self._known
        try:
            with open_regular(self.location / name) as file:
                return hashlib.sha256(file.read(0, file.size)).digest() != digest
        except CheckpointError:
            return True

    @contextmanager
    def unless_gone(self) -> Iterator[None]:
        """Tell what is missing or wrong because the checkpoint is gone from what is damaged.

        Raises:
            CheckpointGoneError: instead of any error about a checkpoint, if it is gone.
        """
        try:
            yield
        except CheckpointGoneError:
            raise
        except CheckpointError as error:
            if self.is_gone():
                raise gone(self.location) from error
            raise

    @contextmanager
    def _reaching(self, handle: _Handle) -> Iterator[int]:
        with handle.descriptor() as descriptor:
            yield descriptor
        self.files.hold(handle)

    def open_new(self, name: str) -> OpenFile:
        """A file in it, which the caller closes.

        Raises:
            CheckpointCorruptError: it is missing, no regular file, or a link that leads out.
            CheckpointGoneError: it is missing with the whole directory.
            CheckpointError: it cannot be opened.
        """
        if name in self.kept:
            return _KeptFile(self.location / name, self.kept[name])
        return self._open_path(name)

    def _open_path(self, name: str) -> OpenFile:
        path = self.location / name
        with self.unless_gone():
            if isinstance(path, URL):
                return _open_remote(path)
            return _open_local(path, lambda: self._open_in(name))

    def _open_in(self, name: str) -> int:
        assert self._handle is not None
        with self._reaching(self._handle) as descriptor:
            if self._links:
                return os.open(name, _READ, dir_fd=descriptor)
            inner = name if is_plain_name(name) else self._inner(name)
            try:
                return os.open(inner, _READ | os.O_NOFOLLOW, dir_fd=descriptor)
            except OSError as error:
                if error.errno not in (errno.ELOOP, errno.EMLINK):
                    raise
            return os.open(self._inner(name), _READ | os.O_NOFOLLOW, dir_fd=descriptor)

    def _inner(self, name: str) -> str:
        """Where the file lies that a name leads to, from here."""
        path = inside(self.location, name)
        assert isinstance(path, Path) and isinstance(self.location, Path)
        return os.path.relpath(path.resolve(), self.location.resolve())

    @contextmanager
    def open(self, name: str) -> Iterator[OpenFile]:
        """A file in it, for the time of a block.

        Args:
            name: that does not come from the checkpoint, or was checked by :func:`inside`.

        Raises:
            CheckpointCorruptError: it is missing, or no regular file.
            CheckpointError: it cannot be opened.
        """
        with self.unless_gone(), self.files.open(self, name) as file:
            yield file

    def read_into(self, name: str, buffer: Bytes, position: int) -> None:
        """Fill ``buffer`` with a file's bytes from ``position`` on.

        Raises:
            CheckpointCorruptError: the file is not there or too short.
        """
        with self.open(name) as file:
            file.fill(buffer.data, position)
