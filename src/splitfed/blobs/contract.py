"""What every storage backend promises, the shape of a key, and the race by which a backend is put to the test.

Everything above rests on one promise: of any number of writers that create one key, at most one is told "created", and
what it wrote is what all readers see, whole, from then on. The trap is that most storage looks as if it kept the
promise: "does it exist? no; then write" passes every test with a single writer and lets two win when they meet between
the question and the write. So `check_create` doesn't trust a backend's word: it creates one key twice, then lets
threads race for a few keys.

A key is a relative path of strict names, so no key leaves the root, globs, hides (a leading dot is ours: temporary
files and locks) or holds a query. Names are compared as the backend compares them: a file system that ignores case
takes `a` and `A` for one key.
"""

from __future__ import annotations

import builtins
import os
import re
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from typing import Protocol, TypeAlias

from splitfed.errors import IdError, InputError, StoreCapabilityError, StoreError

Buffer: TypeAlias = bytes | bytearray | memoryview

MAX_KEY = 512
_SEGMENT = r"[A-Za-z0-9][A-Za-z0-9_.@=-]{0,249}"
_NAME = re.compile(_SEGMENT)
_KEY = re.compile(rf"{_SEGMENT}(?:/{_SEGMENT})*")
_PROBE_WRITERS = 4
_PROBE_KEYS = 8
_PROBE_ABREAST = 2  # races at one time: a loser may be told late, by a second on some servers


class Blobs(Protocol):
    """Whole, never empty byte strings under keys; safe to share between threads, and to use after a fork.

    No key may be the directory of another (`a` beside `a/b`). Every method raises `IdError` for a malformed key and
    `StoreError` when the storage fails; after a `StoreError` from `create` or `put` the object may or may not be
    there, whole: read it back.
    """

    def get(self, key: str) -> memoryview | None:
        """Return the whole object, private and writable: changes never reach the store. None when absent."""

    def create(self, key: str, parts: Sequence[Buffer], *, durable: bool = True) -> bool:
        """Store the joined `parts` unless the key exists, atomically: a reader sees nothing or all of it.

        True: this call created it. False: it existed already, and with `durable` it is durable now. Behind a network
        False can also mean that an earlier try of this very call was stored and its reply lost: who must know who won
        puts a nonce into the object, reads it back and compares.

        Raises:
            InputError: `parts` hold no byte.
        """

    def put(self, key: str, parts: Sequence[Buffer], *, durable: bool = False) -> None:
        """Create the object or replace it, atomically.

        Raises:
            InputError: `parts` hold no byte.
        """

    def delete(self, key: str) -> None:
        """Delete the object; one that is absent is fine."""

    def delete_tree(self, prefix: str) -> int:
        """Delete all keys beneath the directory `prefix`, which mustn't be empty; return how many this call deleted."""

    def list(self, prefix: str) -> builtins.list[str]:
        """Return all keys beneath the directory `prefix` ("" is the root), recursively, sorted; none when absent.

        What isn't a key (temporary files, locks, foreign names) is left out.
        """

    def sizes(self, prefix: str) -> dict[str, int]:
        """Return the size in bytes of each key that `list` would return, in the same order, without reading any."""

    def probe(self) -> None:
        """Race for a few keys beneath `probe/`, and clean up; to be called once before a backend is relied on.

        Raises:
            StoreCapabilityError: `create` isn't an atomic create-if-absent here.
        """

    def lock(self, key: str, timeout: float) -> AbstractContextManager[bool]:
        """Try for at most `timeout` seconds to be the only holder on this host; yield whether that succeeded.

        It saves duplicate work and never raises; nothing may rest on it.
        """


def check_key(key: object) -> str:
    """Return `key` if it is one: names of A-Z a-z 0-9 _ . @ = - that begin with a letter or digit, joined by '/'.

    Raises:
        IdError: it is not, or it has more than 512 characters (250 in one name).
    """
    if not isinstance(key, str) or len(key) > MAX_KEY or not _KEY.fullmatch(key):
        raise IdError(
            f"key {str(key)[:80]!r} isn't allowed: expected at most {MAX_KEY} characters, names of the characters "
            "A-Z a-z 0-9 _ . @ = - that begin with a letter or digit, joined by '/', such as 'grad/a/1-2.safetensors'"
        )
    return key


def check_prefix(prefix: object) -> str:
    """Return the directory `prefix` without a trailing slash; "" is the root.

    Raises:
        IdError: it is neither empty nor a well-formed key.
    """
    if prefix == "":
        return ""
    return check_key(prefix.removesuffix("/") if isinstance(prefix, str) else prefix)


def is_name(name: str) -> bool:
    """Tell whether `name`, met in a listing, may be one segment of a key."""
    return _NAME.fullmatch(name) is not None


def views(key: str, parts: Sequence[Buffer]) -> list[memoryview]:
    """Return `parts` as flat views of bytes, empty ones left out.

    Raises:
        InputError: nothing is left. S3 truncates instead of refusing when an empty body meets an existing key.
    """
    flat = [view.cast("B") for view in [memoryview(part) for part in parts] if view.nbytes]
    if not flat:
        raise InputError(f"object {key!r} would be empty: expected at least one byte")
    return flat


def check_create(blobs: Blobs) -> None:
    """Create a key twice, then let threads race for a few; the keys lie beneath `probe/` and are deleted.

    Raises:
        StoreCapabilityError: a key had two winners, none, or other content than its winner's.
    """
    base = f"probe/{os.urandom(8).hex()}"
    try:
        _check_twice(blobs, f"{base}/twice")
        _check_race(blobs, base)
    except BaseException:
        with suppress(StoreError):
            blobs.delete_tree(base)
        raise
    blobs.delete_tree(base)


def _check_twice(blobs: Blobs, key: str) -> None:
    answers = [blobs.create(key, [body], durable=False) for body in (b"first", b"second")]
    if answers != [True, False] or _bytes(blobs.get(key)) != b"first":
        raise StoreCapabilityError(_refusal(blobs, "a second create of one key was taken for the first"))


def _check_race(blobs: Blobs, base: str) -> None:
    together = [threading.Barrier(_PROBE_WRITERS) for _ in range(_PROBE_ABREAST)]

    def race(lane: int, writer: int) -> dict[int, bool]:
        won = {}
        try:
            for number in range(lane, _PROBE_KEYS, _PROBE_ABREAST):
                together[lane].wait(60)
                won[number] = blobs.create(f"{base}/{number}", [b"writer %d" % writer], durable=False)
        except BaseException:
            for barrier in together:  # so that the other writers don't wait for this one
                barrier.abort()
            raise
        return won

    with ThreadPoolExecutor(_PROBE_WRITERS * _PROBE_ABREAST) as pool:
        lanes = [[pool.submit(race, lane, w) for w in range(_PROBE_WRITERS)] for lane in range(_PROBE_ABREAST)]
    failed = [error for futures in lanes for future in futures if (error := future.exception()) is not None]
    for error in sorted(failed, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
        raise error  # the cause rather than its echo in the other writers
    for number in range(_PROBE_KEYS):
        won = [future.result()[number] for future in lanes[number % _PROBE_ABREAST]]
        if sum(won) != 1:
            raise StoreCapabilityError(_refusal(blobs, f"{sum(won)} of {_PROBE_WRITERS} racing writers won one key"))
        if _bytes(blobs.get(f"{base}/{number}")) != b"writer %d" % won.index(True):
            raise StoreCapabilityError(_refusal(blobs, "one racing writer won a key, another's object stands there"))


def _bytes(data: memoryview | None) -> bytes | None:
    return None if data is None else data.tobytes()


def _refusal(blobs: Blobs, what: str) -> str:
    return (
        f"{blobs!r} doesn't honour create-if-absent: {what}; expected exactly one winner. Gradients could be counted "
        "twice or lost on it; use a local directory, or an object store with conditional writes (S3, GCS, Azure)"
    )
