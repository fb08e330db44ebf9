"""The door to a store's files: each is written with its checksum, and compared with it when read.

Whatever reads a store reads through it, so no file is used that was damaged, whoever wrote it.
Stores of format 1 have no checksums; there what has one is compared, and the rest is taken as it
is.

What comes damaged is read once more. Bytes that were damaged on the way come otherwise then; a file
that is damaged comes as it came before, and only that is called damaged: who is told so gives a
batch up for good.
"""

from __future__ import annotations

import builtins
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from typing import Any

from splitfed.blobs.contract import PROBES, Blobs, Buffer
from splitfed.errors import (
    CorruptedError,
    FormatError,
    SplitFedError,
    StoreCapabilityError,
    StoreError,
)
from splitfed.protocol import checksum
from splitfed.protocol.packing import read_json
from splitfed.store import layout

LOOK_EVERY = 64
"""Where a read takes milliseconds, whether the run is still the same is looked at so seldom: once
in so many requests, and wherever a file is missing that must be there."""


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
        self._format: bytes | None = None
        self._asked = 0

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

    @property
    def is_near(self) -> bool:
        """Whether a read takes microseconds."""
        return getattr(self.raw, "is_near", False)

    @property
    def is_mapped(self) -> bool:
        """Whether large objects that are read take no memory."""
        return getattr(self.raw, "is_mapped", False)

    def note_format(self, version: int, record: Buffer) -> None:
        """Take note of the format of the store, which somebody has read, and of its whole record.

        A store of no run any more hasn't got it (`has_format`).
        """
        self._required = version > 1
        self._format = bytes(record)

    def is_look_due(self) -> bool:
        """Whether to look if the run is still there, asked once for each call.

        Where a read costs next to nothing it always is, elsewhere once in `LOOK_EVERY`: by count
        and not by time, so that what a process asks of the storage follows from what it is asked.
        """
        self._asked += 1
        return self.is_near or self._asked % LOOK_EVERY == 0

    def has_format(self) -> bool:
        """Whether the format's record is what it was when it was read; nothing is, if none was."""
        if self._format is None:
            return True
        found = self.raw.get(layout.FORMAT)
        if found is not None and bytes(found) != self._format:
            # Other bytes: damaged, which is said as that, or another run's.
            found = self.get(layout.FORMAT)
        return found is not None and bytes(found) == self._format

    def gone(self) -> CorruptedError:
        """The error of a store that is of no run any more, or of another one."""
        return CorruptedError(
            f"the run in {getattr(self.raw, 'url', repr(self.raw))} isn't there any more, or is "
            "another: it was deleted or begun anew while a server or accumulator used it. That "
            "process has to be started again; batches of the old run count in no other"
        )

    def get(self, key: str) -> memoryview | None:
        """The object, compared with its checksum; None when absent.

        Raises:
            CorruptedError: they differ.
            FormatError: there is no checksum.
            StoreError: it comes with other bytes each time.
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
        damage = self._damage(key, data, header_only=header_only)
        if damage is None:
            return data
        again = self.raw.get(key)
        if again is None:  # deleted meanwhile
            return None
        if bytes(again) == bytes(data):
            raise damage
        if self._damage(key, again, header_only=header_only) is None:
            return again
        raise StoreError(
            f"{key!r} came with other bytes each time it was read: is the way to the storage, or "
            "its memory, sound? Try again"
        )

    def _damage(self, key: str, data: memoryview, *, header_only: bool) -> SplitFedError | None:
        """What is wrong with the bytes of an object, if anything is."""
        try:
            checksum.check(data, header_only=header_only)
        except CorruptedError as error:
            return CorruptedError(f"{key!r} is damaged: {error}. {_CURE}")
        except FormatError as error:
            if self.required:
                return FormatError(f"{key!r} can't be used: {error}. {_CURE}")
        return None


_CURE = (
    "Restore it from a copy, or run `splitfed repair`, which rebuilds what it can and sets the "
    "rest aside; `splitfed verify` lists all that is wrong"
)
