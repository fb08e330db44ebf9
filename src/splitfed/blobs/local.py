"""The storage backend of a local directory: an object is a file, published atomically.

`files` guards the race of two writers for one key. Two more races live here. A directory may be
removed (by a `delete_tree` elsewhere) between its creation and the file's: then the write begins
again. And a caller acknowledges a batch on the answer "exists", while the process that created the
object may have been killed before its own fsync: so a durable create that finds its key taken syncs
what it found before it returns False.

A folder of a store may be a symbolic link, to another disk for one: reads and writes go through it,
so listings must do so too, or a batch would be acknowledged and never found. A link that leads
nowhere, or to a folder that has a name in the store already, is refused wherever it is met: its
keys would be lost, or be there twice. Nothing is deleted through a link but single keys.

Durability (against power loss) takes an fsync of the file, of the directory that names it, and once
of each directory above.
"""

from __future__ import annotations

import builtins
import errno
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from filelock import BaseFileLock, FileLock

from splitfed.blobs import files
from splitfed.blobs.contract import (
    MAX_KEY,
    PROBES,
    Buffer,
    check_create,
    check_key,
    check_prefix,
    is_name,
    views,
)
from splitfed.errors import BusyError, IdError, StoreError

_TRIES = 16  # each is lost only to another process that removes the directory in between
_FAR_TRIES = 4
"""So many are made with the temporary file elsewhere; then it holds its directory."""
_POLL_SECONDS = 0.01
_MAX_MADE = 10_000


class LocalBlobs:
    """Files beneath one root directory, for their owner alone or for a group (`files`).

    Args:
        root: The directory; a later chdir doesn't move it.
        fsync: Whether `durable` means anything. If False, objects survive the death of every
            process but not a power loss.
        way: How files are published, instead of the experiment of `files`. All writers of one
            directory must use the same.
        shared: Whether the group may be let in although the folder around isn't setgid.
    """

    is_near = True
    """A read takes microseconds."""
    is_mapped = True
    """A large object that is read takes no memory."""

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        fsync: bool = True,
        way: files.Way | None = None,
        shared: bool = False,
    ) -> None:
        self.root = os.path.abspath(os.path.expanduser(os.fspath(root)))
        self._prefix = os.path.join(self.root, "")
        self._fsync = fsync
        self._publisher = files.Publisher(self.root, way, shared=shared)
        # Directories known to exist -> whether their names are durable.
        self._made: dict[str, bool] = {}
        self._is_begun = False
        """Whether something was written: then the root isn't made again, should it be gone."""

    def __repr__(self) -> str:
        return f"LocalBlobs({self.root!r})"

    def get(self, key: str) -> memoryview | None:
        """Return the object, mapped copy-on-write from 64 KiB on; None when absent."""
        path = self._prefix + check_key(key)
        try:
            found = files.read(path)
            if found is None and os.path.islink(path):
                _check_linked(path)
        except OSError as exc:
            raise self._failed("read", key, exc) from exc
        return found

    # `create` and `put` have the same loop: as one function for both, it would be one more call in
    # the deepest stack of every request.

    def create(self, key: str, parts: Sequence[Buffer], *, durable: bool = True) -> bool:
        """Publish the object unless the key exists; return whether this call did."""
        return self._publish("create", key, parts, durable, replace=False)

    def put(self, key: str, parts: Sequence[Buffer], *, durable: bool = False) -> None:
        """Create the object or replace it; a reader of the old one keeps what it has."""
        self._publish("put", key, parts, durable, replace=True)

    def _publish(
        self, verb: str, key: str, parts: Sequence[Buffer], durable: bool, *, replace: bool
    ) -> bool:
        """Publish the object; return whether this call did, which it always does with `replace`."""
        flat = views(check_key(key), parts)
        sync = durable and self._fsync
        path = self._prefix + key
        folder = key.rpartition("/")[0]
        directory = self._prefix + folder if folder else self.root
        for number in range(_TRIES):
            try:
                self._make(directory, sync)
                near = number >= _FAR_TRIES
                published = self._publisher.publish(
                    directory, path, flat, sync, replace=replace, near=near
                )
                self._is_begun = True
                if not published:
                    _check_existing(path, sync)
                if sync:
                    files.sync_directory(directory)
                return published
            except FileNotFoundError:
                self._made.clear()
                if self._is_begun and not os.path.isdir(self.root):
                    break
            except OSError as exc:
                raise self._failed(verb, key, exc) from exc
        raise self._vanished(verb, key)

    def delete(self, key: str) -> None:
        """Unlink the object, if it is there; its directory stays."""
        self._unlink(key)

    def delete_tree(self, prefix: str) -> int:
        """Delete all keys beneath `prefix` and the directories that this empties.

        What a symbolic link beneath it leads to stays, and so does the link.

        Returns:
            The number of keys that this call deleted.
        """
        if not prefix:
            raise IdError(
                "delete_tree of the whole store isn't allowed: expected a directory within it"
            )
        keys, directories = self._scan(check_prefix(prefix), follow=False)
        deleted = sum(self._unlink(key) for key in keys)
        for directory in reversed(directories):
            # It may not be empty: somebody writes there, or a foreign file is in it.
            with suppress(OSError):
                os.rmdir(self._prefix + directory)
        self._made.clear()
        return deleted

    def prune(self, prefix: str) -> None:
        """Remove the directories beneath `prefix` that are empty."""
        if not prefix:
            self._publisher.prune()
        _, directories = self._scan(check_prefix(prefix), follow=False)
        for directory in reversed(directories[1:]):
            # One that isn't stays, and one that somebody is about to write to is made again.
            with suppress(OSError):
                os.rmdir(self._prefix + directory)
                self._made.pop(self._prefix + directory, None)

    def list(self, prefix: str) -> builtins.list[str]:
        """Return all keys beneath `prefix`, sorted, those in linked folders included.

        Raises:
            StoreError: a symbolic link leads nowhere, or to where another key leads.
        """
        return sorted(self._scan(check_prefix(prefix))[0])

    def sizes(self, prefix: str) -> dict[str, int]:
        """Return the keys beneath `prefix`, sorted, with their sizes in bytes."""
        found = {}
        for key in self.list(prefix):
            try:
                found[key] = os.stat(self._prefix + key).st_size
            except FileNotFoundError:  # deleted since the listing
                continue
            except OSError as exc:
                raise self._failed("list", key, exc) from exc
        return found

    def probe(self) -> None:
        """Race for a few keys, then sweep."""
        check_create(self)
        # Nothing stays of it, unless somebody else is at it too.
        with suppress(OSError):
            os.rmdir(f"{self._prefix}{PROBES}")
        self._made.clear()
        self.sweep()

    def sweep(self) -> None:
        """Remove what killed writers have left behind in the middle of a write."""
        self._publisher.sweep()

    @contextmanager
    def lock(self, key: str, timeout: float) -> Iterator[bool]:
        """Hold the file lock `.locks/<key>.lock`; yield whether it was got in time."""
        path = f"{self._prefix}{files.LOCKS}/{check_key(key)}.lock"
        lock: BaseFileLock | None = None
        # filelock raises Timeout (an OSError). Where the system has no such lock it raises
        # NotImplementedError (a RuntimeError), or warns, which a user may have made an error.
        with suppress(OSError, RuntimeError, Warning):
            directory = os.path.dirname(path)
            self._make(directory, sync=False)
            wanted = FileLock(path, mode=files.lock_mode(directory))
            wanted.acquire(timeout=max(timeout, 0.0), poll_interval=_POLL_SECONDS)
            lock = wanted
        try:
            yield lock is not None
        finally:
            if lock is not None:
                lock.release()

    def _make(self, directory: str, sync: bool) -> None:
        """Create `directory` and all that is missing above it.

        With `sync` their names are durable afterwards, whoever created them.
        """
        durable = self._made.get(directory)
        if durable or (durable is not None and not sync):
            return
        parent = os.path.dirname(directory)
        inside = len(directory) > len(self.root)
        if not inside and self._is_begun:
            # A run that was deleted mustn't rise again from a process that still has it open.
            os.stat(self.root)
        if inside or not os.path.isdir(parent):
            self._make(parent, sync)
        with suppress(FileExistsError):
            self._publisher.make_directory(directory)
        if sync:
            try:
                files.sync_directory(parent)
            except PermissionError:
                # A directory above the root may be another user's, which we can't open.
                if inside:
                    raise
        if len(self._made) >= _MAX_MADE:
            self._made.clear()
        self._made[directory] = sync

    def _unlink(self, key: str) -> bool:
        try:
            os.unlink(self._prefix + check_key(key))
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return False
        except OSError as exc:
            raise self._failed("delete", key, exc) from exc
        return True

    def _scan(
        self, prefix: str, *, follow: bool = True
    ) -> tuple[builtins.list[str], builtins.list[str]]:
        """Return the keys and the directories beneath `prefix`, itself included.

        Parents come before their children. Directories that vanish meanwhile are left out.

        Args:
            prefix: Where to look.
            follow: Whether symbolic links are followed, or left out.
        """
        keys: list[str] = []
        directories: list[str] = []
        linked: set[str] = set()
        waiting = [prefix]
        while waiting:
            directory = waiting.pop()
            try:
                with os.scandir(self._prefix + directory) as entries:
                    directories.append(directory)
                    for entry in entries:
                        key = f"{directory}/{entry.name}" if directory else entry.name
                        if not is_name(entry.name) or len(key) > MAX_KEY:
                            continue
                        # Asked first: an ordinary entry costs no further system call.
                        if entry.is_dir(follow_symlinks=False):
                            waiting.append(key)
                        elif entry.is_file(follow_symlinks=False):
                            keys.append(key)
                        elif follow and entry.is_symlink():
                            self._follow(key, linked, keys, waiting)
            except OSError as exc:
                self._check_vanished(exc, directory, named=follow and directory == prefix)
        return keys, directories

    def _check_vanished(self, exc: OSError, directory: str, *, named: bool) -> None:
        """Pass over a directory that isn't there; other errors of a listing are the caller's.

        Args:
            exc: What was raised.
            directory: Which was to be listed.
            named: Whether the caller asked for it by name: then a link to nowhere may hide it.

        Raises:
            StoreError: it can't be listed.
        """
        if isinstance(exc, StoreError):
            raise exc
        if not isinstance(exc, FileNotFoundError | NotADirectoryError):
            raise self._failed("list", directory, exc) from exc
        if named:
            self._check_way("list", directory)

    def _follow(
        self,
        key: str,
        linked: set[str],
        keys: builtins.list[str],
        directories: builtins.list[str],
    ) -> None:
        """List a symbolic link as what it leads to.

        Args:
            key: Where the link is.
            linked: Where other links of this listing lead; this one's place joins them.
            keys: If it leads to a file, it joins these ...
            directories: ... and if to a directory, these.

        Raises:
            StoreError: it leads nowhere, or to where another key leads.
        """
        path = self._prefix + key
        try:
            _check_linked(path)
            mode = os.stat(path).st_mode
        except FileNotFoundError:  # deleted since the listing
            return
        except OSError as exc:
            raise self._failed("list", key, exc) from exc
        root, target = os.path.realpath(self.root), os.path.realpath(path)
        inside = target == root or target.startswith(os.path.join(root, ""))
        around = root.startswith(os.path.join(target, ""))
        if inside or around or target in linked:
            raise StoreError(
                f"can't list {key!r} in {self!r}: it is a symbolic link to {target!r}, which has a "
                "name in the store already, so each object there would count twice. Remove the "
                "link"
            )
        linked.add(target)
        if stat.S_ISDIR(mode):
            directories.append(key)
        elif stat.S_ISREG(mode):
            keys.append(key)

    def _check_way(self, verb: str, key: str) -> None:
        """Refuse a link to nowhere on the way to a key, as a disk leaves it that isn't mounted.

        Raises:
            StoreError: there is one.
        """
        step = os.path.join(self.root, key) if key else self.root
        while len(step) >= len(self.root):
            try:
                _check_linked(step)
            except OSError as exc:
                raise self._failed(verb, key, exc) from exc
            step = os.path.dirname(step)

    def _failed(self, verb: str, key: str, exc: OSError) -> StoreError:
        why = str(exc.strerror or exc)
        if isinstance(exc, PermissionError):
            why += self._shut_out(self._prefix + key, writes=verb not in ("read", "list"))
        return StoreError(f"can't {verb} {key!r} in {self!r}: {why}")

    def _shut_out(self, path: str, *, writes: bool) -> str:
        """Which file or folder doesn't let this process in, whose it is, and what to do."""
        shut = _first_shut(path, self.root, writes)
        if shut is None or not hasattr(os, "geteuid"):
            return ""
        found = os.stat(shut)
        return (
            f": {shut!r} is of mode {stat.S_IMODE(found.st_mode):04o} and belongs to user "
            f"{found.st_uid} and group {found.st_gid}, this process is user {os.geteuid()}. "
            "A store is its owner's alone unless the folder that holds it is setgid "
            "(chmod g+rwxs) or it is opened with shared=True (--shared), "
            "and each process has a umask that leaves the group its bits, such as 007. "
            f"For what is there, its owner can run: chmod -R g+rwX {self.root}"
        )

    def _vanished(self, verb: str, key: str) -> StoreError:
        """Return the error of a write whose directory was gone at each try."""
        self._check_way(verb, key)
        if self._is_begun and not os.path.isdir(self.root):
            return StoreError(
                f"can't {verb} {key!r} in {self!r}: the store was deleted while it was open, and "
                "isn't made again by what had it open. Start that process again"
            )
        return BusyError(
            f"can't {verb} {key!r} in {self!r}: its directory vanished {_TRIES} times; try again"
        )


def _first_shut(path: str, root: str, writes: bool) -> str | None:
    """The first folder on the way to `path`, or the file there, that this process may not use."""
    effective = os.access in os.supports_effective_ids
    steps = [path]
    while steps[-1] != os.path.dirname(steps[-1]):
        steps.append(os.path.dirname(steps[-1]))
    for step in reversed(steps):
        if not os.path.exists(step):
            return None
        needed = os.X_OK if os.path.isdir(step) else os.R_OK
        if len(step) >= len(root):
            needed |= os.R_OK
        if writes and step == os.path.dirname(path):
            needed |= os.W_OK
        if not os.access(step, needed, effective_ids=effective):
            return step
    return None


def _check_linked(path: str) -> None:
    """Refuse a symbolic link that leads nowhere: what it names looks absent, and can't be created.

    Raises:
        OSError: it does.
    """
    if os.path.islink(path) and not os.path.exists(path):
        raise OSError(
            errno.ENOLINK,
            f"{path!r} is a link to {os.readlink(path)!r}, which isn't there; is its disk mounted?",
        )


def _check_existing(path: str, sync: bool) -> None:
    """Refuse a directory, or a link to nowhere, where a create found its name taken.

    With `sync`, make a file durable.
    """
    _check_linked(path)
    if os.path.isdir(path):
        raise IsADirectoryError(errno.EISDIR, "it is the directory of other keys")
    if sync:
        files.sync_path(path)
