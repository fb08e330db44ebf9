"""Blobs as files beneath a local directory: published atomically, durable when asked, read without a copy.

`publishing` guards the race of two writers for one key. Two more live here. A directory may be removed (by a
`delete_tree` elsewhere) between its creation and the file's: then the write is begun anew. And "exists" is an answer
that the caller acknowledges on the strength of, while whoever created the object may have been killed before its own
fsync: so a durable create that finds its key syncs what it found before it says so.

Durability (power loss) takes an fsync of the file, of the directory that names it, and once of each directory above.
"""

from __future__ import annotations

import builtins
import errno
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

from filelock import FileLock

from splitfed.blobs import files
from splitfed.blobs.contract import MAX_KEY, Buffer, check_create, check_key, check_prefix, is_name, views
from splitfed.blobs.publishing import LOCKS, Publisher, Way
from splitfed.errors import BusyError, IdError, StoreError

_TRIES = 16  # each is lost only to another process that removes the directory in between
_POLL_SECONDS = 0.01
_MAX_MADE = 10_000


class LocalBlobs:
    """Files of mode 0600 in directories of mode 0700 beneath `root`, which a later chdir doesn't move.

    With `fsync=False` objects survive the death of every process but not a power loss. `way` overrides the experiment
    by which `publishing` finds out how to publish a file; all writers of one directory must then use the same.
    """

    def __init__(self, root: str | os.PathLike[str], *, fsync: bool = True, way: Way | None = None) -> None:
        self.root = os.path.abspath(os.path.expanduser(os.fspath(root)))
        self._prefix = os.path.join(self.root, "")
        self._fsync = fsync
        self._publisher = Publisher(self.root, way)
        self._made: dict[str, bool] = {}  # directories known to exist -> whether their names are durable

    def __repr__(self) -> str:
        return f"LocalBlobs({self.root!r})"

    def get(self, key: str) -> memoryview | None:
        """Return the object, mapped copy-on-write from 64 KiB on; None when absent."""
        try:
            return files.read(self._prefix + check_key(key))
        except OSError as exc:
            raise self._failed("read", key, exc) from exc

    def create(self, key: str, parts: Sequence[Buffer], *, durable: bool = True) -> bool:
        """Publish the object unless the key exists; return whether this call did."""
        flat = views(check_key(key), parts)
        sync = durable and self._fsync

        def act(directory: str, path: str) -> bool:
            created = self._publisher.create(directory, path, flat, sync)
            if not created and os.path.isdir(path):
                raise IsADirectoryError(errno.EISDIR, "it is the directory of other keys")
            if sync and not created:
                files.sync_path(path)
            return created

        return self._write("create", key, sync, act)

    def put(self, key: str, parts: Sequence[Buffer], *, durable: bool = False) -> None:
        """Create the object or replace it by a rename; who reads the old one keeps it."""
        flat = views(check_key(key), parts)
        sync = durable and self._fsync

        def act(directory: str, path: str) -> bool:
            self._publisher.replace(directory, path, flat, sync)
            return True

        self._write("put", key, sync, act)

    def delete(self, key: str) -> None:
        """Unlink the object, if it is there; its directory stays."""
        self._unlink(key)

    def delete_tree(self, prefix: str) -> int:
        """Delete all keys beneath `prefix` and the directories that this empties; return how many keys."""
        if not prefix:
            raise IdError("delete_tree of the whole store isn't allowed: expected a directory within it")
        keys, directories = self._scan(check_prefix(prefix))
        deleted = sum(self._unlink(key) for key in keys)
        for directory in reversed(directories):
            with suppress(OSError):  # not empty: somebody writes there, or a foreign file lies there
                os.rmdir(self._prefix + directory)
        self._made.clear()
        return deleted

    def list(self, prefix: str) -> builtins.list[str]:
        """Return all keys beneath `prefix`, sorted; symbolic links are not followed."""
        return sorted(self._scan(check_prefix(prefix))[0])

    def sizes(self, prefix: str) -> dict[str, int]:
        """Return the keys beneath `prefix`, sorted, with their sizes in bytes."""
        found = {}
        for key in self.list(prefix):
            try:
                found[key] = os.stat(self._prefix + key).st_size
            except FileNotFoundError:  # deleted meanwhile
                continue
            except OSError as exc:
                raise self._failed("list", key, exc) from exc
        return found

    def probe(self) -> None:
        """Race for a few keys, then remove the temporary files of processes of this host that are gone."""
        check_create(self)
        for directory in self._scan("")[1]:
            with suppress(OSError):
                self._publisher.sweep(self._prefix + directory)

    @contextmanager
    def lock(self, key: str, timeout: float) -> Iterator[bool]:
        """Hold the file lock `.locks/<key>.lock`; yield whether it was got in time."""
        path = f"{self._prefix}{LOCKS}/{check_key(key)}.lock"
        lock = FileLock(path, mode=0o600)
        held = False
        with suppress(OSError, RuntimeError, Warning):  # Timeout; no such lock here (NotImplementedError, its warning)
            self._make(os.path.dirname(path), sync=False)
            lock.acquire(timeout=max(timeout, 0.0), poll_interval=_POLL_SECONDS)
            held = True
        try:
            yield held
        finally:
            if held:
                lock.release()

    def _write(self, verb: str, key: str, sync: bool, act: Callable[[str, str], bool]) -> bool:
        """Run `act(directory, path)` in a directory that exists, again when it was removed meanwhile; then sync it."""
        parent, slash, _ = key.rpartition("/")
        directory = self._prefix + parent if slash else self.root
        try:
            for _ in range(_TRIES):
                try:
                    self._make(directory, sync)
                    done = act(directory, self._prefix + key)
                    if sync:
                        files.sync_directory(directory)
                    return done
                except FileNotFoundError:
                    self._made.clear()
        except StoreError:
            raise
        except OSError as exc:
            raise self._failed(verb, key, exc) from exc
        if os.path.islink(self.root) and not os.path.exists(self.root):
            raise StoreError(
                f"can't {verb} {key!r} in {self!r}: that is a link to {os.readlink(self.root)!r}, which isn't there; "
                "is its disk mounted?"
            )
        raise BusyError(f"can't {verb} {key!r} in {self!r}: its directory vanished {_TRIES} times; try again")

    def _make(self, directory: str, sync: bool) -> None:
        """Create `directory` and what is missing above it; with `sync`, make their names durable, whoever made them."""
        if self._made.get(directory, False) or (not sync and directory in self._made):
            return
        parent = os.path.dirname(directory)
        inside = len(directory) > len(self.root)
        if inside or not os.path.isdir(parent):
            self._make(parent, sync)
        with suppress(FileExistsError):
            os.mkdir(directory, 0o700)
        if sync:
            try:
                files.sync_directory(parent)
            except PermissionError:
                if inside:  # above the root we may be guests
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

    def _scan(self, prefix: str) -> tuple[builtins.list[str], builtins.list[str]]:
        """Return the keys and the directories beneath `prefix`, itself included; parents before children."""
        keys: list[str] = []
        directories: list[str] = []
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
                        if entry.is_dir(follow_symlinks=False):
                            waiting.append(key)
                        elif entry.is_file(follow_symlinks=False):
                            keys.append(key)
            except (FileNotFoundError, NotADirectoryError):
                continue
            except OSError as exc:
                raise self._failed("list", directory, exc) from exc
        return keys, directories

    def _failed(self, verb: str, key: str, exc: OSError) -> StoreError:
        return StoreError(f"can't {verb} {key!r} in {self!r}: {exc.strerror or exc}")
