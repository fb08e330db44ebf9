"""What every storage backend promises, the syntax of a key, and the race that tests a backend.

Exactly-once rests on one promise: of any number of writers that create one key, `create` returns
True to at most one, and what that one wrote is what all readers see, whole, from then on. The trap
is that most storage looks as if it kept the promise: "does it exist? no; then write" passes every
test with a single writer, and lets two win when they meet between the question and the write. So
`check_create` doesn't trust a backend: it creates one key twice, then lets threads race for a few.

A key is a relative path of strict names, so that no key leaves the root, globs, hides (names with a
leading dot are ours: temporary files and locks) or holds a query. Names are compared as the backend
compares them: a file system that ignores case takes `a` and `A` for one key.
"""

from __future__ import annotations

import builtins
import os
import re
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from itertools import chain
from typing import Protocol, TypeAlias

from splitfed.errors import IdError, InputError, StoreCapabilityError, StoreError

Buffer: TypeAlias = bytes | bytearray | memoryview

MAX_KEY = 512
# With the `.lock` of a lock file a name has at most 255 characters, which file systems take.
_SEGMENT = r"[A-Za-z0-9][A-Za-z0-9_.@=-]{0,249}"
_NAME = re.compile(_SEGMENT)
_KEY = re.compile(rf"{_SEGMENT}(?:/{_SEGMENT})*")
PROBES = "probe"
"""The folder of the keys that are raced for."""
_PROBE_WRITERS = 4
_PROBE_KEYS = 8
_PROBE_LANES = 2  # races at one time: some servers answer the losers of a race a second late
_PROBE_SECONDS = 60.0


class Blobs(Protocol):
    """A storage backend: whole, never empty byte strings under keys.

    It is safe to share between threads, and to use after a fork. No key may be the directory of
    another (`a` beside `a/b`). Every method raises `IdError` for a malformed key and `StoreError`
    when the storage fails; after a `StoreError` from `create` or `put` the object may or may not be
    there, whole: read it back.

    Three members are optional: `prune(prefix)`, which removes empty folders beneath a directory;
    `is_near = True`, which says that a read takes microseconds, so that it may be asked often; and
    `is_mapped = True`, which says that a large object that is read is mapped and takes no memory,
    so that many may be held at a time.
    """

    def get(self, key: str) -> memoryview | None:
        """Return the whole object, None when absent.

        The memory is private and writable: changes never reach the store.
        """

    def create(self, key: str, parts: Sequence[Buffer], *, durable: bool = True) -> bool:
        """Store the joined `parts` unless the key exists, atomically.

        A reader sees nothing or all of it. True: this call created it. False: it existed already,
        and with `durable` it is durable now. Behind a network False can also mean that an earlier
        try of this very call was stored and its reply lost: a caller that must know who won puts a
        nonce into the object, reads it back and compares.

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
        """Delete all keys beneath the directory `prefix`, not ""; return how many this call did."""

    def list(self, prefix: str) -> builtins.list[str]:
        """Return all keys beneath the directory `prefix`, recursively, sorted; none when absent.

        The root is "". What isn't a key (temporary files, locks, foreign names) is left out.
        """

    def sizes(self, prefix: str) -> dict[str, int]:
        """Return the size in bytes of each key that `list` would return, in the same order.

        No object is read for it.
        """

    def probe(self) -> None:
        """Race for a few keys beneath `probe/`, and delete them.

        To be called once before a backend is relied on.

        Raises:
            StoreCapabilityError: `create` isn't an atomic create-if-absent here.
        """

    def lock(self, key: str, timeout: float) -> AbstractContextManager[bool]:
        """Hold the lock of that name on this host; yield whether it was got in `timeout` seconds.

        It saves duplicate work and never raises; correctness must not rest on it.
        """


def check_key(key: object) -> str:
    """Return `key` if it is one.

    A key is names of A-Z a-z 0-9 _ . @ = - that begin with a letter or digit, joined by '/'.

    Raises:
        IdError: it is not, or it has more than 512 characters (250 in one name).
    """
    if not isinstance(key, str) or len(key) > MAX_KEY or not _KEY.fullmatch(key):
        raise IdError(
            f"key {str(key)[:80]!r} isn't allowed: expected at most {MAX_KEY} characters, "
            "names of the characters A-Z a-z 0-9 _ . @ = - that begin with a letter or digit, "
            "joined by '/', such as 'grad/a/1-2.safetensors'"
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
    """Tell whether `name`, found in a listing, may be one segment of a key."""
    return _NAME.fullmatch(name) is not None


def views(key: str, parts: Sequence[Buffer]) -> list[memoryview]:
    """Return `parts` as flat views of bytes, empty ones left out.

    Raises:
        InputError: nothing is left. S3 would truncate the object of an existing key, instead of
            refusing, when it meets an empty body.
    """
    flat = [view.cast("B") for view in [memoryview(part) for part in parts] if view.nbytes]
    if not flat:
        raise InputError(f"object {key!r} would be empty: expected at least one byte")
    return flat


def check_create(blobs: Blobs) -> None:
    """Create a key twice, then let threads race for a few.

    The keys are beneath `probe/`, and are deleted.

    Raises:
        StoreCapabilityError: a key had two winners, none, or other content than its winner's.
    """
    base = f"{PROBES}/{os.urandom(8).hex()}"
    try:
        _check_twice(blobs, f"{base}/twice")
        _check_race(blobs, base)
    except BaseException:
        # The refusal is what the user must see, not that the clean-up after it failed too.
        with suppress(StoreError):
            blobs.delete_tree(base)
        raise
    blobs.delete_tree(base)


def _check_twice(blobs: Blobs, key: str) -> None:
    answers = [blobs.create(key, [body], durable=False) for body in (b"first", b"second")]
    if answers != [True, False] or _content(blobs, key) != b"first":
        raise _unfit(blobs, "a second create of one key was taken for the first")


def _check_race(blobs: Blobs, base: str) -> None:
    for number, won in enumerate(_race(blobs, base)):
        if sum(won) != 1:
            raise _unfit(blobs, f"{sum(won)} of {_PROBE_WRITERS} racing writers won one key")
        if _content(blobs, f"{base}/{number}") != b"writer %d" % won.index(True):
            raise _unfit(blobs, "one racing writer won a key, another's object stands there")


def _race(blobs: Blobs, base: str) -> list[list[bool]]:
    """Let writers create the same keys at once; return, key by key, what `create` told each.

    Each lane has writers of its own, which start together on one key after another.
    """
    starts = [threading.Barrier(_PROBE_WRITERS) for _ in range(_PROBE_LANES)]

    def write(lane: int, writer: int) -> dict[int, bool]:
        body = b"writer %d" % writer
        answers = {}
        try:
            for number in range(lane, _PROBE_KEYS, _PROBE_LANES):
                starts[lane].wait(_PROBE_SECONDS)
                answers[number] = blobs.create(f"{base}/{number}", [body], durable=False)
        except BaseException:
            # Else the other writers would wait for this one.
            for start in starts:
                start.abort()
            raise
        return answers

    writers = range(_PROBE_WRITERS)
    with ThreadPoolExecutor(_PROBE_WRITERS * _PROBE_LANES) as pool:
        lanes = [
            [pool.submit(write, lane, writer) for writer in writers] for lane in range(_PROBE_LANES)
        ]
    _raise_cause([*chain.from_iterable(lanes)])
    return [
        [future.result()[number] for future in lanes[number % _PROBE_LANES]]
        for number in range(_PROBE_KEYS)
    ]


def _raise_cause(futures: Sequence[Future[dict[int, bool]]]) -> None:
    """Raise the error of a writer that failed, rather than the broken barriers of the others."""
    errors = [error for error in (future.exception() for future in futures) if error is not None]
    for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
        raise error


def _content(blobs: Blobs, key: str) -> bytes | None:
    data = blobs.get(key)
    return None if data is None else data.tobytes()


def _unfit(blobs: Blobs, reason: str) -> StoreCapabilityError:
    return StoreCapabilityError(
        f"{blobs!r} doesn't honour create-if-absent: {reason}; expected exactly one winner. "
        "Gradients could be counted twice or lost on it; "
        "use a local directory, or an object store with conditional writes (S3, GCS, Azure)"
    )
