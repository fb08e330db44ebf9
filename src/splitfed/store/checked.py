"""The door to a store's files: each is written with its checksum, and compared with it when read.

Whatever reads a store reads through it, so no file is used that was damaged, whoever wrote it.
Stores of format 1 have no checksums; there what has one is compared, and the rest is taken as it
is.
"""

from __future__ import annotations

import builtins
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from typing import Any

from splitfed.blobs.contract import PROBES, Blobs, Buffer
from splitfed.errors import CorruptedError, FormatError, StoreCapabilityError
from splitfed.protocol import checksum
from splitfed.protocol.packing import read_json
from splitfed.store import layout


class Checked:
    """A storage backend whose objects carry checksums.

    Args:
        raw: The backend itself.
    """

    def __init__(self, raw: Blobs) -> None:
        self.raw = raw
        """The backend, for who wants the bytes as they are."""
        self._required: bool | None = None
        self._is_swept = False
        """Whether nothing was left of probes; who probes comes before, or is `doctor`."""

    def __repr__(self) -> str:
        return repr(self.raw)

    def __getattr__(self, name: str) -> Any:
        """What a backend has besides, such as its root or its URL."""
        if name == "raw":
            raise AttributeError(name)
        return getattr(self.raw, name)

    @property
    def required(self) -> bool:
        """Whether each object must have one: not in a store of format 1."""
        if self._required is None:
            data = self.raw.get(layout.FORMAT)
            if data is None:  # a store that is to be begun
                return True
            with suppress(FormatError):
                self._required = read_json(data, layout.FORMAT).get("format") != 1
        return self._required is not False

    def note_format(self, version: int) -> None:
        """Take note of the format of the store, which somebody has read."""
        self._required = version > 1

    def get(self, key: str) -> memoryview | None:
        """The object, compared with its checksum; None when absent.

        Raises:
            CorruptedError: they differ.
            FormatError: there is no checksum.
        """
        return self._checked(key, header_only=False)

    def peek(self, key: str) -> memoryview | None:
        """As `get`, for who reads a safetensors header: the rest isn't compared."""
        return self._checked(key, header_only=True)

    def create(self, key: str, parts: Sequence[Buffer], *, durable: bool = True) -> bool:
        """Store the object with its checksum unless the key exists; whether this call did."""
        return self.raw.create(key, checksum.sealed(parts), durable=durable)

    def put(self, key: str, parts: Sequence[Buffer], *, durable: bool = False) -> None:
        """Create the object, with its checksum, or replace it."""
        self.raw.put(key, checksum.sealed(parts), durable=durable)

    def delete(self, key: str) -> None:
        """Delete the object; one that is absent is fine."""
        self.raw.delete(key)

    def delete_tree(self, prefix: str) -> int:
        """Delete all keys beneath a directory; return how many this call did."""
        return self.raw.delete_tree(prefix)

    def prune(self, prefix: str) -> None:
        """Remove empty folders beneath a directory, where a backend has folders."""
        prune = getattr(self.raw, "prune", None)
        if prune is not None:
            prune(prefix)

    def sweep(self) -> None:
        """Remove what killed processes have left: files that never got their names, and probes."""
        sweep = getattr(self.raw, "sweep", None)
        if sweep is not None:
            sweep()
        if not self._is_swept:
            self._is_swept = self.raw.delete_tree(PROBES) == 0

    def list(self, prefix: str) -> builtins.list[str]:
        """All keys beneath a directory, sorted."""
        return self.raw.list(prefix)

    def sizes(self, prefix: str) -> dict[str, int]:
        """The size in bytes of each key that `list` would return."""
        return self.raw.sizes(prefix)

    def probe(self) -> None:
        """Race for a few keys: whether the backend can be relied on."""
        try:
            self.raw.probe()
        except StoreCapabilityError:
            if self.raw.get(layout.FORMAT) is None:
                raise
            # In a store that was begun, an accumulator may have taken them for leftovers: once.
            self.raw.probe()

    def lock(self, key: str, timeout: float) -> AbstractContextManager[bool]:
        """Hold the lock of that name on this host."""
        return self.raw.lock(key, timeout)

    def _checked(self, key: str, *, header_only: bool) -> memoryview | None:
        data = self.raw.get(key)
        if data is None:
            return None
        try:
            checksum.check(data, header_only=header_only)
        except CorruptedError as error:
            raise CorruptedError(f"{key!r} is damaged: {error}. {_CURE}") from error
        except FormatError as error:
            if self.required:
                raise FormatError(f"{key!r} can't be used: {error}. {_CURE}") from error
        return data


_CURE = (
    "Restore it from a copy, or run `splitfed repair`, which rebuilds what it can and sets the "
    "rest aside; `splitfed verify` lists all that is wrong"
)
