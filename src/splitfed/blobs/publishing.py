"""How a written file gets its name: at once, whole, and for a create only if nobody else has that name.

The race: `open(path, "x")` creates atomically but shows readers a file that is still being written, and a writer killed
half-way leaves half a file for good; "exists? no; then write and rename" lets two writers win. So the bytes go to a
file that no reader can name, which is then *linked* to its key: a link fails when the key exists, and what it names is
whole. The file system is asked once, by an experiment at the first create, which of three ways it has:

- `unnamed` (Linux): a file without a name, linked through /proc. A killed writer leaves nothing at all.
- `named`: a temporary file in the same directory, linked, then unlinked. A killed writer may leave a `.tmp-*`, which
  no listing shows and which `sweep` removes once its process is gone.
- `locked`, where there are no hard links (FAT, some network and FUSE mounts): exists and rename under a file lock.
  **Writers on one host only**: another host may not see the lock, and two could win one key.

All writers of a directory must come to the same answer, since a lock doesn't stop who links: that is why it is the
outcome of an experiment in the store's root and never of an error met later.
"""

from __future__ import annotations

import errno
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Literal, TypeAlias

from filelock import FileLock

from splitfed.blobs import files
from splitfed.blobs.spares import Spares

Way: TypeAlias = Literal["unnamed", "named", "locked"]

LOCKS = ".locks"
_TEMPORARY = re.compile(r"\.tmp-([0-9a-f]{8})-([0-9]+)-[0-9a-f]+")
_NO_LINKS = (errno.EPERM, errno.EACCES, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EINVAL)
_LOCK_SECONDS = 60.0
_POLL_SECONDS = 0.005
_LOCK_FILES = 64


class Publisher:
    """Creates and replaces files in existing directories beneath `root`; `way` None is to be found by experiment."""

    def __init__(self, root: str, way: Way | None = None) -> None:
        self._root = root
        self._way = way
        self._host = files.host_tag()
        self._spares = Spares(root)

    def create(self, directory: str, path: str, parts: Sequence[memoryview], sync: bool) -> bool:
        """Publish a new file at `path` in `directory`; return False if there is one already."""
        if self._way is None:
            self._way = self._experiment()
        try:
            if self._way == "unnamed":
                self._link_unnamed(directory, path, parts, sync)
                return True
            with self._temporary(directory, parts, sync) as temporary:
                if self._way == "locked":
                    return self._rename_locked(temporary, path)
                try:
                    os.link(temporary, path)
                except FileExistsError:  # or ours, after all: NFS repeats a link whose reply was lost
                    return os.stat(temporary).st_nlink > 1
                return True
        except FileExistsError:
            return False

    def replace(self, directory: str, path: str, parts: Sequence[memoryview], sync: bool) -> None:
        """Publish a file at `path`, whatever is there."""
        if self._way == "unnamed":  # the ordinary key is new, and this is one system call less
            with suppress(FileExistsError):
                self._link_unnamed(directory, path, parts, sync)
                return
        with self._temporary(directory, parts, sync) as temporary:
            os.replace(temporary, path)

    def sweep(self, directory: str) -> None:
        """Remove the temporary files that processes of this host left in `directory` when they died."""
        for name in os.listdir(directory):
            match = _TEMPORARY.fullmatch(name)
            if match and match[1] == self._host and not files.is_alive(int(match[2])):
                with suppress(FileNotFoundError):
                    os.unlink(os.path.join(directory, name))

    def _link_unnamed(self, directory: str, path: str, parts: Sequence[memoryview], sync: bool) -> None:
        try:
            _link(self._spares.take(), path, parts, sync)
        except OSError as exc:
            if exc.errno != errno.EXDEV:
                raise
            _link(files.create_unnamed(directory), path, parts, sync)  # another file system is mounted there

    def _rename_locked(self, temporary: str, path: str) -> bool:
        # One of a few lock files, by hash: a lock file can't be removed safely, so one per key would pile up.
        locks = os.path.join(self._root, LOCKS)
        with suppress(FileExistsError):
            os.mkdir(locks, 0o700)
        lock = FileLock(os.path.join(locks, f".create-{zlib.crc32(path.encode()) % _LOCK_FILES}"), mode=0o600)
        with lock.acquire(timeout=_LOCK_SECONDS, poll_interval=_POLL_SECONDS):
            if os.path.lexists(path):
                return False
            os.replace(temporary, path)
            return True

    def _name(self, directory: str) -> str:
        return f"{directory}/.tmp-{self._host}-{os.getpid()}-{os.urandom(8).hex()}"

    @contextmanager
    def _temporary(self, directory: str, parts: Sequence[memoryview], sync: bool) -> Iterator[str]:
        path = self._name(directory)
        files.create_named(path, parts, sync)
        try:
            yield path
        finally:
            with suppress(FileNotFoundError):
                os.unlink(path)

    def _experiment(self) -> Way:
        target, parts = self._name(self._root), [memoryview(b"experiment")]
        with suppress(OSError):  # whatever it was: the next way meets it too, if it wasn't that way's own
            _link(files.create_unnamed(self._root), target, parts, sync=False)
            os.unlink(target)
            return "unnamed"
        with self._temporary(self._root, parts, sync=False) as temporary:
            try:
                os.link(temporary, target)
            except OSError as exc:
                if exc.errno not in _NO_LINKS:
                    raise
                return "locked"
            os.unlink(target)
            return "named"


def _link(fd: int, path: str, parts: Sequence[memoryview], sync: bool) -> None:
    """Write an unnamed file, give it its name and close it."""
    try:
        files.write(fd, parts, sync)
        files.link_unnamed(fd, path)
    finally:
        os.close(fd)
