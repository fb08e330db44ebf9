"""Single files of a local store: read, published whole, made durable, swept when the writer died.

The race of two writers for one name is guarded here. `open(path, "x")` creates atomically, but it
shows readers a file that is still being written, and a writer killed half-way leaves half a file
for good. "Does it exist? no; then write and rename" lets two writers win. So the bytes go to a file
that no reader can name, which is then *linked* to its name: a link fails when the name exists, and
what it names is whole. There are three ways to do so, and an experiment at the first create finds
out which one the file system offers:

- `unnamed` (Linux): a file without a name, linked through /proc. A killed writer leaves nothing.
- `named`: a temporary file in the folder `.tmp` of the store, linked, then unlinked. A killed
  writer may leave it there, where no listing shows it, and `sweep` removes it.
- `locked`, where there are no hard links (FAT, some network and FUSE mounts): a question and a
  rename under a file lock. **Writers on one host only**: another host may not see the lock, and
  two could win one name.

All writers of a directory must come to the same answer, because a lock doesn't stop a writer that
links. Therefore the way is the outcome of an experiment in the root of the store, and never of an
error that one writer meets later.

A writer holds a lock on its temporary file, which the system lets go of when the process dies. So a
sweep needs no clock and no process numbers: what it can lock has no writer, be it of this process,
of another or of another container. Nor can it do harm: a writer whose temporary file was taken away
nevertheless (between its creation and the lock, or between the last byte and the link) finds no
file to link, and writes it once more. (Where a folder of the store is a mount of its own, temporary
files are beside their targets, and no sweep looks there.)

Files are their owner's alone, unless the folder that holds the store says by its setgid bit that a
group works in it, or the store is opened as shared: then the umask decides what the group may do.
Others never may. (The umask alone says nothing: of 022, the usual one, nobody means to publish
gradients to a group that all users of the machine are in.)

The other traps are the system's: a write may be partial and may not exceed 2 GB, fsync on macOS
stops short of the disk, and `os.kill(pid, 0)`, which asks whether a process lives, is Ctrl-C on
Windows.
"""

from __future__ import annotations

import errno
import mmap
import os
import queue
import stat
import sys
import threading
import time
import weakref
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Literal, TypeAlias

from filelock import FileLock

if sys.platform != "win32":
    import fcntl

Way: TypeAlias = Literal["unnamed", "named", "locked"]

LOCKS = ".locks"
TEMPORARIES = ".tmp"
"""The folder of a store where files are written before they have their names."""
_UNTOUCHED_SECONDS = 86_400.0
"""Where the file system has no locks, a file that nobody has written to for so long has no writer.
A clock that is wrong costs a writer a second try, and nothing else."""

_BINARY: int = getattr(os, "O_BINARY", 0)  # Windows
_READ_FLAGS = os.O_RDONLY | _BINARY
_NEW_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _BINARY
_UNNAMED: int = getattr(os, "O_TMPFILE", 0)  # Linux

# From this size on a file is mapped: below, setting up the mapping costs more than the copy.
_SMALL = 64 * 1024
_MAX_BUFFERS = 1024  # IOV_MAX: more buffers in one writev are EINVAL
_MAX_WRITE = 1 << 30  # macOS refuses 2 GB, Linux cuts short there

# What a file system without hard links answers to link(2). Any other error is the disk's own.
_NO_LINKS = (
    errno.EPERM,
    errno.EACCES,
    errno.ENOTSUP,
    errno.EOPNOTSUPP,
    errno.ENOSYS,
    errno.EMLINK,
    errno.EINVAL,
)
_LOCK_SECONDS = 60.0
_POLL_SECONDS = 0.005
_LOCK_FILES = 64


@dataclass(frozen=True, slots=True)
class Modes:
    """What files and directories are created with; the umask takes its bits away."""

    file: int
    directory: int


PRIVATE = Modes(0o600, 0o700)
SHARED = Modes(0o660, 0o770)


def is_setgid(path: str) -> bool:
    """Whether what is created at `path` will belong to the group of a folder, by its setgid bit.

    That is `path` itself, or what there is of the folders above it.
    """
    while True:
        try:
            return bool(os.stat(path).st_mode & stat.S_ISGID)
        except OSError:
            above = os.path.dirname(path)
            if above == path:
                return False
            path = above


def lock_mode(directory: str) -> int:
    """The mode of a lock file: for whomever its directory is.

    It is set as it is, past the umask, which the directory's own mode has gone through.
    """
    return os.stat(directory).st_mode & SHARED.file


def read(path: str) -> memoryview | None:
    """Return the whole file, private and writable; None when there is none.

    Small files are copied; larger ones are mapped copy-on-write, which takes the same time at any
    size. A mapped file must be replaced or unlinked, never truncated: that kills the reader.
    """
    try:
        fd = os.open(path, _READ_FLAGS)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        data = os.read(fd, _SMALL)
        if len(data) < _SMALL:
            # Not the end yet: a network mount may answer with a part of what was asked for.
            while more := os.read(fd, _SMALL):
                data += more
            return memoryview(bytearray(data))
        if sys.version_info >= (3, 13):  # before, each mapping kept a file descriptor
            return memoryview(mmap.mmap(fd, 0, access=mmap.ACCESS_COPY, trackfd=False))
        return memoryview(mmap.mmap(fd, 0, access=mmap.ACCESS_COPY))
    except IsADirectoryError:
        return None
    finally:
        os.close(fd)


def write(fd: int, parts: Sequence[memoryview], sync: bool) -> None:
    """Write all of the flat `parts`, without joining them first; with `sync`, to the disk."""
    rest = list(parts)
    start = 0
    while start < len(rest):
        batch = rest[start : start + _MAX_BUFFERS]
        if sum(map(len, batch)) > _MAX_WRITE:
            batch = [batch[0][:_MAX_WRITE]]
        if hasattr(os, "writev"):
            written = os.writev(fd, batch)
        else:
            written = os.write(fd, batch[0])
        # The system may have taken any number of bytes: skip the parts that are done, then cut the
        # one that is half done.
        while start < len(rest) and written >= len(rest[start]):
            written -= len(rest[start])
            start += 1
        if written:
            rest[start] = rest[start][written:]
    if sync:
        sync_file(fd)


class Publisher:
    """Publishes files in existing directories beneath `root`.

    Args:
        root: The directory of the store, where locks and the experiment go.
        way: How a file gets its name; None finds that out by an experiment at the first create.
        shared: Whether the group may be let in wherever the store is.
    """

    def __init__(self, root: str, way: Way | None = None, *, shared: bool = False) -> None:
        self._root = root
        self._way = way
        self._shared = shared
        self._modes: Modes | None = None
        self._spares: Spares | None = None

    def make_directory(self, path: str) -> None:
        """Make a directory in one that is there.

        Raises:
            FileExistsError: it is there already.
        """
        os.mkdir(path, self.modes().directory)
        if self._shared and os.name != "nt":
            # So that what another user creates in it belongs to its group, and not to theirs.
            os.chmod(path, stat.S_ISGID | stat.S_IMODE(os.stat(path).st_mode))

    def modes(self) -> Modes:
        """The modes of this store, as the folder that holds it was when they were first needed."""
        if self._modes is None:
            self._modes = SHARED if self._shared or is_setgid(self._root) else PRIVATE
        return self._modes

    def publish(
        self,
        directory: str,
        path: str,
        parts: Sequence[memoryview],
        sync: bool,
        *,
        replace: bool,
        near: bool = False,
    ) -> bool:
        """Write `parts` to a new file of `directory`, then name it `path`, atomically.

        With `sync` the content is on the disk before it has its name. The name is not: for that the
        caller syncs the directory. A temporary file is made `near` its name where somebody keeps
        removing that directory while it is empty: then it isn't.

        Returns:
            Whether the file has that name now; always, with `replace`.
        """
        if self._way is None and not replace:
            self._way = self._experiment()
        if self._way == "unnamed":
            try:
                self._publish_unnamed(directory, path, parts, sync)
                return True
            except FileExistsError:
                # A link never replaces. A put tries it all the same: its key is usually new, and
                # then this is one system call less than a temporary name and a rename.
                if not replace:
                    return False
        try:
            folder = directory if near else self._temporaries
            return self._publish_named(folder, path, parts, sync, replace=replace)
        except OSError as exc:
            if exc.errno != errno.EXDEV:
                raise
            # Another file system is mounted there, and no name leads from one into the other.
            return self._publish_named(directory, path, parts, sync, replace=replace)

    def _publish_named(
        self, folder: str, path: str, parts: Sequence[memoryview], sync: bool, *, replace: bool
    ) -> bool:
        with self._temporary(folder, parts, sync) as temporary:
            if not replace:
                return self._claim(temporary, path)
            os.replace(temporary, path)
            return True

    def _publish_unnamed(
        self, directory: str, path: str, parts: Sequence[memoryview], sync: bool
    ) -> None:
        try:
            if self._spares is None:
                self._spares = Spares(self._root, self.modes().file)
            _write_and_link(self._spares.take(), path, parts, sync)
        except OSError as exc:
            if exc.errno != errno.EXDEV:
                raise
            # Another file system is mounted in that directory: a spare of the root can't go there.
            _write_and_link(_open_unnamed(directory, self.modes().file), path, parts, sync)

    def sweep(self) -> None:
        """Remove the temporary files whose writers are gone.

        Whatever fails here is tried again by the next sweep.
        """
        with suppress(OSError):
            for name in os.listdir(self._temporaries):
                with suppress(OSError):
                    _remove_abandoned(os.path.join(self._temporaries, name))

    def prune(self) -> None:
        """Remove the folder of temporary files if it is empty."""
        with suppress(OSError):
            os.rmdir(self._temporaries)

    def _claim(self, temporary: str, path: str) -> bool:
        """Give the temporary file the name `path`; return False if that is taken."""
        if self._way == "locked":
            return self._rename_locked(temporary, path)
        try:
            os.link(temporary, path)
        except FileExistsError:
            # Or it was ours, after all: NFS repeats a link whose reply was lost.
            return os.stat(temporary).st_nlink > 1
        return True

    def _rename_locked(self, temporary: str, path: str) -> bool:
        # One of a few lock files, by hash: a lock file can't be removed safely, so one per key
        # would pile up.
        locks = os.path.join(self._root, LOCKS)
        with suppress(FileExistsError):
            self.make_directory(locks)
        number = zlib.crc32(path.encode()) % _LOCK_FILES
        lock = FileLock(os.path.join(locks, f".create-{number}"), mode=lock_mode(locks))
        with lock.acquire(timeout=_LOCK_SECONDS, poll_interval=_POLL_SECONDS):
            if os.path.lexists(path):
                return False
            os.replace(temporary, path)
            return True

    @property
    def _temporaries(self) -> str:
        return os.path.join(self._root, TEMPORARIES)

    @contextmanager
    def _temporary(self, folder: str, parts: Sequence[memoryview], sync: bool) -> Iterator[str]:
        """Write a temporary file for the block; after it, unlink that name if it is still there."""
        path = os.path.join(folder, f"{TEMPORARIES}-{os.urandom(8).hex()}")
        try:
            fd = os.open(path, _NEW_FLAGS, self.modes().file)
        except FileNotFoundError:
            with suppress(FileExistsError):
                self.make_directory(folder)
            fd = os.open(path, _NEW_FLAGS, self.modes().file)
        try:
            try:
                if sys.platform != "win32":
                    with suppress(OSError):  # without locks its age tells
                        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                write(fd, parts, sync)
            finally:
                os.close(fd)
            yield path
        finally:
            # What can't be unlinked now is swept later: the file has its name, or an error says why
            # it hasn't.
            _unlink(path)

    def _experiment(self) -> Way:
        """Publish a file among the temporary ones by each way, the best one first."""
        target = os.path.join(self._temporaries, f"{TEMPORARIES}-{os.urandom(8).hex()}")
        with suppress(FileExistsError):
            self.make_directory(self._temporaries)
        parts = [memoryview(b"experiment")]
        # Whatever fails here, be it a full disk: the next way meets it too, unless it was a trouble
        # of this way only.
        with suppress(OSError):
            unnamed = _open_unnamed(self._root, self.modes().file)
            _write_and_link(unnamed, target, parts, sync=False)
            _unlink(target)
            return "unnamed"
        with self._temporary(self._temporaries, parts, sync=False) as temporary:
            try:
                os.link(temporary, target)
            except OSError as exc:
                if exc.errno not in _NO_LINKS:
                    raise
                return "locked"
            _unlink(target)
            return "named"


def _unlink(path: str) -> None:
    """Unlink a temporary file, or leave that to the next sweep."""
    with suppress(OSError):
        os.unlink(path)


def _remove_abandoned(path: str) -> None:
    """Unlink a temporary file unless its writer lives.

    Raises:
        OSError: its writer lives, or that can't be found out here.
    """
    if sys.platform == "win32":
        os.unlink(path)  # which fails while somebody has it open
        return
    fd = os.open(path, os.O_RDWR)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return
    except OSError:  # no locks on this file system
        if time.time() - os.fstat(fd).st_mtime < _UNTOUCHED_SECONDS:
            return
    finally:
        os.close(fd)
    os.unlink(path)


LEAST_SPARES = 2
MOST_SPARES = 8
"""With fewer spares than the first, the thread makes as many as the second."""


class Spares:
    """Files without a name, made ahead: a create then only writes and links.

    A file system takes 0.04 to 1 ms to find room for a new file, the longer the more files were
    deleted lately, and a batch creates two. So a thread makes them ahead, some at a time: each time
    that it is woken it competes with the request under way. Nobody else sees one: it has no name
    until it is linked, and dies with the process that holds it open. What that gives is a row of
    the benchmarks.

    The trap: after a fork both processes hold the same files open. Whoever didn't make a file
    mustn't write to it.

    Args:
        directory: Where they are made; it must exist once one is asked for.
        mode: Their mode, but for what the umask takes.
    """

    def __init__(self, directory: str, mode: int = PRIVATE.file) -> None:
        self._directory = directory
        self._mode = mode
        self._ready: deque[int] = deque()
        self._process = os.getpid()
        weakref.finalize(self, _close_all, self._ready)

    def __reduce__(self) -> tuple[type[Spares], tuple[str, int]]:
        # A copy with the same numbers would write to the same files, or to any.
        return Spares, (self._directory, self._mode)

    def take(self) -> int:
        """Open an unnamed file for writing; the caller closes it.

        Raises:
            OSError: that isn't possible here.
        """
        if self._process != os.getpid():
            _close_all(self._ready)
            self._process = os.getpid()
        try:
            found = self._ready.popleft()
        except IndexError:
            found = _open_unnamed(self._directory, self._mode)
        if len(self._ready) < LEAST_SPARES:
            _spare_maker().put(self)
        return found

    def refill(self) -> None:
        """Make what is missing; called by the thread."""
        # The directory is gone, or no descriptor is left: whoever needs a file gets that error.
        with suppress(OSError):
            while len(self._ready) < MOST_SPARES:
                self._ready.append(_open_unnamed(self._directory, self._mode))


def _close_all(ready: deque[int]) -> None:
    with suppress(IndexError):  # another thread of a fork may have closed the last
        while True:
            os.close(ready.popleft())


_spare_makers: dict[int, queue.SimpleQueue[Spares]] = {}  # by process: a fork takes no thread along


def _spare_maker() -> queue.SimpleQueue[Spares]:
    found = _spare_makers.get(os.getpid())
    if found is None:
        own: queue.SimpleQueue[Spares] = queue.SimpleQueue()
        found = _spare_makers.setdefault(os.getpid(), own)
        if found is own:
            thread = threading.Thread(target=_refill_all, args=(own,), name="spare files")
            thread.daemon = True
            thread.start()
    return found


def _refill_all(asked: queue.SimpleQueue[Spares]) -> None:
    while True:
        asked.get().refill()


def _write_and_link(fd: int, path: str, parts: Sequence[memoryview], sync: bool) -> None:
    """Write an unnamed file, give it its name and close it."""
    try:
        write(fd, parts, sync)
        _link_unnamed(fd, path)
    finally:
        os.close(fd)


def _open_unnamed(directory: str, mode: int) -> int:
    """Open a new file in `directory` that has no name yet.

    Raises:
        OSError: that isn't possible here.
    """
    if not _UNNAMED:
        raise OSError(errno.ENOTSUP, "no O_TMPFILE on this system")
    return os.open(directory, os.O_WRONLY | _UNNAMED, mode)


def _link_unnamed(fd: int, path: str) -> None:
    """Give the unnamed file the name `path`, which mustn't exist."""
    # A src_dir_fd makes Python call linkat with AT_SYMLINK_FOLLOW. Which descriptor it is doesn't
    # matter, as the path is absolute.
    os.link(f"/proc/self/fd/{fd}", path, src_dir_fd=fd, follow_symlinks=True)


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
        try:
            fd = os.open(path, os.O_RDWR | _BINARY)
        except PermissionError:  # another user's, which this one may read
            fd = os.open(path, _READ_FLAGS)
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
