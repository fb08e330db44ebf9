"""The storage backend in the memory of this process, for tests, simulation and notebooks.

fsspec's own memory filesystem doesn't do: its create asks first and then writes (50 of 400 racing
keys had two winners), and readers of one object share a seek position. Here a create is one
dictionary lookup and insertion under a lock, the stored bytes are immutable, and a reader gets a
copy of its own.

Two opens of one name share their content, as with fsspec: hence the one registry of this package,
guarded by a lock. It is the storage itself, not a setting or a cache. A forked child has a copy,
and shares nothing with its parent.
"""

from __future__ import annotations

import builtins
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from splitfed.blobs.contract import Buffer, check_create, check_key, check_prefix, views
from splitfed.errors import IdError


class _Content:
    """The objects of one name, and the locks that were asked for."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.objects: dict[str, bytes] = {}
        self.names: dict[str, set[str]] = {}
        """What is in each directory, by name: so a listing costs what it lists. None is empty."""
        self.held: dict[str, threading.Lock] = {}

    def store(self, key: str, data: bytes) -> None:
        """Create or replace an object."""
        if key not in self.objects:
            path = key
            while path:
                directory, _, name = path.rpartition("/")
                names = self.names.setdefault(directory, set())
                is_new = not names
                names.add(name)
                path = directory if is_new else ""
        self.objects[key] = data

    def remove(self, key: str) -> bool:
        """Delete an object; whether it was there."""
        if self.objects.pop(key, None) is None:
            return False
        path = key
        while path:
            directory, _, name = path.rpartition("/")
            names = self.names[directory]
            names.discard(name)
            path = "" if names else directory
            if not names:
                del self.names[directory]
        return True

    def beneath(self, directory: str) -> list[str]:
        """All keys beneath a directory."""
        found = []
        waiting = [directory]
        while waiting:
            above = waiting.pop()
            for name in self.names.get(above, ()):
                path = f"{above}/{name}" if above else name
                if path in self.objects:
                    found.append(path)
                if path in self.names:
                    waiting.append(path)
        return found


_REGISTRY: dict[str, _Content] = {}
_REGISTRY_LOCK = threading.Lock()


class MemoryBlobs:
    """The objects under one process-wide `name`; `durable` has no meaning here."""

    is_near = True
    """A read takes microseconds."""

    def __init__(self, name: str) -> None:
        self.name = name
        with _REGISTRY_LOCK:
            self._content = _REGISTRY.setdefault(name, _Content())

    def __repr__(self) -> str:
        return f"MemoryBlobs({self.name!r})"

    def get(self, key: str) -> memoryview | None:
        """Return a writable copy of the object; None when absent."""
        data = self._content.objects.get(check_key(key))
        return None if data is None else memoryview(bytearray(data))

    def create(self, key: str, parts: Sequence[Buffer], *, durable: bool = True) -> bool:
        """Store the object unless the key exists; return whether this call did."""
        data = b"".join(views(check_key(key), parts))
        with self._content.lock:
            if key in self._content.objects:
                return False
            self._content.store(key, data)
        return True

    def put(self, key: str, parts: Sequence[Buffer], *, durable: bool = False) -> None:
        """Create or replace the object."""
        data = b"".join(views(check_key(key), parts))
        with self._content.lock:
            self._content.store(key, data)

    def delete(self, key: str) -> None:
        """Delete the object, if it is there."""
        with self._content.lock:
            self._content.remove(check_key(key))

    def delete_tree(self, prefix: str) -> int:
        """Delete all keys beneath `prefix`; return how many."""
        if not prefix:
            raise IdError(
                "delete_tree of the whole store isn't allowed: expected a directory within it"
            )
        keys = self.list(prefix)
        with self._content.lock:
            return sum(map(self._content.remove, keys))

    def list(self, prefix: str) -> builtins.list[str]:
        """Return all keys beneath `prefix`, sorted."""
        with self._content.lock:
            return sorted(self._content.beneath(check_prefix(prefix)))

    def sizes(self, prefix: str) -> dict[str, int]:
        """Return the keys beneath `prefix`, sorted, with their sizes in bytes."""
        objects = {key: self._content.objects.get(key) for key in self.list(prefix)}
        return {key: len(data) for key, data in objects.items() if data is not None}

    def probe(self) -> None:
        """Race for a few keys, as every backend does."""
        check_create(self)

    @contextmanager
    def lock(self, key: str, timeout: float) -> Iterator[bool]:
        """Hold a lock among the threads of this process; yield whether it was got in time."""
        with self._content.lock:
            lock = self._content.held.setdefault(check_key(key), threading.Lock())
        held = lock.acquire(timeout=min(max(timeout, 0.0), threading.TIMEOUT_MAX))
        try:
            yield held
        finally:
            if held:
                lock.release()
