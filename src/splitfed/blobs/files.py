"""What local blobs need of single files: read one, write one whole, make one durable, and tell whose a leftover is.

The traps here are the system's: a write may be partial and may not exceed 2 GB, fsync on macOS stops short of the disk,
a directory is fsynced too where that exists, and `os.kill(pid, 0)`, which asks whether a process lives, is Ctrl-C on
Windows.
"""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress

if sys.platform == "darwin":
    import fcntl

_BINARY: int = getattr(os, "O_BINARY", 0)  # Windows
_READ_FLAGS = os.O_RDONLY | _BINARY
_NEW_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _BINARY
_UNNAMED: int = getattr(os, "O_TMPFILE", 0)  # Linux
_FILE_MODE = 0o600
_SMALL = 64 * 1024
_MAX_BUFFERS = 1024  # IOV_MAX
_MAX_WRITE = 1 << 30


def read(path: str) -> memoryview | None:
    """Return the whole file, private and writable; None when there is none.

    Small files are copied, since a mapping costs more than it saves; larger ones are mapped copy-on-write, which takes
    the same time at any size. A mapped file must be replaced or unlinked, never truncated: that kills the reader.
    """
    try:
        fd = os.open(path, _READ_FLAGS)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        data = os.read(fd, _SMALL)
        if len(data) < _SMALL:
            return memoryview(bytearray(data))
        if sys.version_info >= (3, 13):  # before, each mapping kept a file descriptor
            return memoryview(mmap.mmap(fd, 0, access=mmap.ACCESS_COPY, trackfd=False))
        return memoryview(mmap.mmap(fd, 0, access=mmap.ACCESS_COPY))
    except IsADirectoryError:
        return None
    finally:
        os.close(fd)


def create_unnamed(directory: str) -> int:
    """Open a new file in `directory` that has no name yet.

    Raises:
        OSError: that isn't possible here.
    """
    if not _UNNAMED:
        raise OSError(errno.ENOTSUP, "no O_TMPFILE on this system")
    return os.open(directory, os.O_WRONLY | _UNNAMED, _FILE_MODE)


def link_unnamed(fd: int, path: str) -> None:
    """Give the unnamed file the name `path`, which mustn't exist."""
    # A src_dir_fd makes Python call linkat with AT_SYMLINK_FOLLOW; which one doesn't matter, the path is absolute.
    os.link(f"/proc/self/fd/{fd}", path, src_dir_fd=fd, follow_symlinks=True)


def create_named(path: str, parts: Sequence[memoryview], sync: bool) -> None:
    """Write a new file, whole; nothing remains of it when that fails."""
    fd = os.open(path, _NEW_FLAGS, _FILE_MODE)
    try:
        try:
            write(fd, parts, sync)
        finally:
            os.close(fd)
    except BaseException:
        with suppress(OSError):
            os.unlink(path)
        raise


def write(fd: int, parts: Sequence[memoryview], sync: bool) -> None:
    """Write all of the flat `parts`, gathered without joining them first; with `sync`, to the disk."""
    rest = list(parts)
    start = 0
    while start < len(rest):
        batch = rest[start : start + _MAX_BUFFERS]
        if sum(map(len, batch)) > _MAX_WRITE:
            batch = [batch[0][:_MAX_WRITE]]
        written = os.writev(fd, batch) if hasattr(os, "writev") else os.write(fd, batch[0])
        while start < len(rest) and written >= len(rest[start]):
            written -= len(rest[start])
            start += 1
        if written:
            rest[start] = rest[start][written:]
    if sync:
        sync_file(fd)


def sync_file(fd: int) -> None:
    """Return once the file's content survives a power loss."""
    if sys.platform == "darwin":
        with suppress(OSError):  # not every file system has it
            fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
            return
    os.fsync(fd)


def sync_path(path: str) -> None:
    """Make the content of a file durable that another process wrote; one that is gone is fine."""
    with suppress(FileNotFoundError):
        fd = os.open(path, os.O_RDWR | _BINARY)
        try:
            sync_file(fd)
        finally:
            os.close(fd)


def sync_directory(path: str) -> None:
    """Make the names in a directory durable; Windows and some network mounts have no such thing."""
    if os.name == "nt":
        return
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as exc:
        if exc.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(fd)


def host_tag() -> str:
    """Return 8 hex digits for the place where a process id means something: host and, in containers, PID namespace."""
    namespace = ""
    with suppress(OSError):
        namespace = os.readlink("/proc/self/ns/pid")
    return hashlib.blake2s(f"{socket.gethostname()} {namespace}".encode(), digest_size=4).hexdigest()


def is_alive(pid: int) -> bool:
    """Tell whether a process of this number may be running here; True where that can't be asked harmlessly."""
    if os.name == "nt":
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True
