"""References: what a client's next deltas are the change from, as files that any replica reads.

Each is some rows of activations under the hash of what they hold (`protocol/deltas`). So a file is
never rewritten, two tries of one request make the same file, and what is cached of it can't be
wrong. It is a cache itself: a reference may be lost at any time, and its client sends all then.

A client says in a later request which ones it gives up. What a killed process leaves goes when the
client's next process keeps its first one, or with the run's open calls at its end.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable

from torch import Tensor

from splitfed.errors import CorruptedError, FormatError
from splitfed.protocol.deltas import name_of
from splitfed.protocol.packing import pack_tree, unpack_tree
from splitfed.store.batches import Pile
from splitfed.store.cache import Bounded

CACHE_BYTES = 64 << 20
_KIND = "Reference"
_PROCESSES = 4096


class References:
    """The references of a lineage's clients.

    Args:
        pile: The files of its batches; theirs lie beside them.
        cache_bytes: How many bytes of them stay in memory.
    """

    def __init__(self, pile: Pile, cache_bytes: int = CACHE_BYTES) -> None:
        self._blobs = pile.blobs
        self._keys = pile.keys
        self._cache_bytes = cache_bytes
        self._cached: OrderedDict[str, Tensor] = OrderedDict()
        self._num_bytes = 0
        self._begun: Bounded[tuple[str, int], bool] = Bounded(_PROCESSES)
        self._lock = threading.Lock()

    def get(self, client_id: str, incarnation: int | None, name: str) -> Tensor | None:
        """The rows of a client's process under a name, (M, *C); `None` if they aren't there.

        Raises:
            IdError: the name isn't one.
        """
        if incarnation is None:
            return None
        key = self._keys.reference(client_id, incarnation, name)
        with self._lock:
            found = self._cached.get(key)
            if found is not None:
                self._cached.move_to_end(key)
                return found
        try:
            data = self._blobs.get(key)
            rows = None if data is None else unpack_tree(_KIND, data)
        except (CorruptedError, FormatError):
            return None
        # A copy: the memory of a file may be another's once that is deleted.
        return self._cache(key, rows.clone()) if isinstance(rows, Tensor) else None

    def keep(self, client_id: str, incarnation: int, rows: Tensor) -> None:
        """Keep rows (M, *C) under the hash of what they hold."""
        self._end_older(client_id, incarnation)
        key = self._keys.reference(client_id, incarnation, name_of(rows))
        self._blobs.create(key, pack_tree(_KIND, rows), durable=False)
        self._cache(key, rows)

    def drop(self, client_id: str, incarnation: int, names: Iterable[str]) -> None:
        """Delete what a process has given up.

        Raises:
            IdError: a name isn't one.
        """
        for name in names:
            key = self._keys.reference(client_id, incarnation, name)
            with self._lock:
                self._forget(key)
            self._blobs.delete(key)

    def _end_older(self, client_id: str, incarnation: int) -> None:
        """Delete what earlier processes of a client have left, once."""
        if self._begun.get((client_id, incarnation)):
            return
        self._begun.put((client_id, incarnation), value=True)
        for key in self._blobs.list(self._keys.references(client_id)):
            owner = self._keys.parse_call(key)
            if owner is not None and owner[1] < incarnation:
                self._blobs.delete(key)

    def _cache(self, key: str, rows: Tensor) -> Tensor:
        with self._lock:
            self._forget(key)
            self._cached[key] = rows
            self._num_bytes += rows.nbytes
            while self._num_bytes > self._cache_bytes:
                self._forget(next(iter(self._cached)))
        return rows

    def _forget(self, key: str) -> None:
        rows = self._cached.pop(key, None)
        if rows is not None:
            self._num_bytes -= rows.nbytes
