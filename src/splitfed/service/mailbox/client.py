"""The client's end of the mailbox: a transport for clients that share only a store with a server.

A client posts its request as a file; any worker (`worker`) claims it, computes, and posts the
answer. All safety is that of the protocol itself, in which every call may be repeated: a worker
that dies, two that answer, an answer that comes too late or a request that is posted again change
nothing but the time that it takes.

An answer is created once, and the first one stays: two workers may have run a forward at different
versions, and the client must see one. A request is deleted before its answer, so whatever is there
without a request is rubbish, and anybody may sweep it.

A client writes beneath `post/<its id>/` and nowhere else, and lists nothing; a bucket's policy can
restrict it to that. The trap is what S3 then says of an answer that isn't there yet: to a client
that may not list, it is "403", not "404". So once the request was put, a refusal means "not yet"
(`_peek`), unless a request that was put a moment ago can't be read either.
"""

from __future__ import annotations

import contextlib
import os
import threading
import warnings
from typing import Any

from splitfed.blobs.url import open_blobs
from splitfed.checks import positive
from splitfed.errors import (
    BusyError,
    CorruptedError,
    InputError,
    StoreCapabilityError,
    StoreError,
)
from splitfed.protocol import checksum
from splitfed.protocol.backoff import Backoff, growing
from splitfed.protocol.ids import check_client_id
from splitfed.protocol.packing import pack, unpack_answer
from splitfed.protocol.transport import Sender
from splitfed.store import layout

_FIRST_POLL = 0.002  # seconds
_PATIENCE = 10.0  # seconds until the user is warned that no worker has taken a request


def connect(
    url: str, *, client_id: str, token: str | None = None, **options: Any
) -> StoreTransport:
    """Return the transport of one client through the store at `url`.

    Raises:
        InputError: the URL isn't a store's, or a token is given: a store has no tokens.
    """
    if token is not None:
        raise InputError(
            f"a token is for http:// and https://, and {url!r} is a store: "
            "give its credentials as the storage's own options, or in the environment"
        )
    return StoreTransport(url, client_id=client_id, **options)


class StoreTransport(Sender):
    """A `Transport` whose requests and answers are files in a store.

    Args:
        url: The store's URL, as the workers have it.
        client_id: The client that the requests are from.
        timeout: How long to wait for an answer, in seconds.
        poll: Longest pause between two looks, in seconds; the first ones are much shorter.
        pauses: Seconds before each further try, if the storage fails or a worker is busy.
        storage_options: Passed to the fsspec filesystem.

    Raises:
        IdError: the id can't be part of a key.
        InputError: the URL isn't a store's, or a time isn't positive.
    """

    def __init__(
        self,
        url: str,
        *,
        client_id: str,
        timeout: float = 600.0,
        poll: float = 0.25,
        pauses: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0),
        **storage_options: Any,
    ) -> None:
        self.client_id = check_client_id(client_id)
        self.timeout = positive("timeout", timeout)
        self._poll = positive("poll", poll)
        self._pauses = pauses
        # No fsync: a request that a crash of the machine takes is posted again.
        self._blobs = open_blobs(url, fsync=False, **storage_options)
        self._lock = threading.Lock()
        self._process = (0, "")
        """The process's pid, and its name in keys."""
        self._number = 0

    def __repr__(self) -> str:
        return f"StoreTransport({self._blobs!r}, client_id={self.client_id!r})"

    def send(self, verb: str, request: Any, /) -> Any:
        """Return the answer, after at most as many further tries as there are pauses."""
        parts = checksum.sealed(pack(request))
        tries = Backoff(self._pauses)
        while True:
            place = self._place()
            try:
                answer = self._exchange(place, parts)
                if answer is not None:
                    checksum.check(answer, required=False)
                    return unpack_answer(verb, answer)
            except (StoreCapabilityError, CorruptedError):
                raise
            except StoreError:  # BusyError, a worker's answer, is one too
                if not tries.wait():
                    raise
            else:
                raise self._timeout_error(place)

    def _exchange(self, place: str, parts: list[checksum.Buffer]) -> memoryview | None:
        """Post a request, wait for its answer, and leave nothing behind.

        Returns:
            The answer; `None` if none comes in time.
        """
        try:
            self._blobs.put(f"{place}.request", parts)
            return self._await(place, parts)
        finally:
            # The request first: an answer without one may be swept by anybody. What can't be
            # deleted here is swept by a worker.
            with contextlib.suppress(StoreError):
                self._blobs.delete(f"{place}.request")
                self._blobs.delete(f"{place}.answer")

    def _await(self, place: str, parts: list[checksum.Buffer]) -> memoryview | None:
        looks = Backoff(
            growing(_FIRST_POLL, 1.5), most=self._poll, within=self.timeout, last_look=True
        )
        patience = _PATIENCE
        while True:
            answer = self._peek(f"{place}.answer")
            if answer is not None or looks.expired:
                return answer
            if looks.elapsed >= patience:
                patience *= 2
                self._look_after(place, parts, looks.elapsed)
            looks.wait()

    def _look_after(self, place: str, parts: list[checksum.Buffer], elapsed: float) -> None:
        """Post a swept request again, and warn if no worker has taken one."""
        if self._peek(f"{place}.request") is None:
            # This machine slept so long that a worker has swept it, or the storage refuses reads.
            # In the latter case reading what was put a moment ago raises here.
            self._blobs.put(f"{place}.request", parts)
            self._blobs.get(f"{place}.request")
        elif self._peek(f"{place}.claim-0000") is None:
            warnings.warn(
                f"no worker has taken a request of client {self.client_id!r} in {self._blobs!r} "
                f"for {elapsed:.0f} seconds: does one run there? splitfed work APP --store URL",
                stacklevel=2,
            )

    def _timeout_error(self, place: str) -> BusyError:
        """The error of a request without an answer, with the likeliest reason."""
        is_claimed = self._peek(f"{place}.claim-0000") is not None
        # A policy may well refuse this client to read the format: that says nothing of the store.
        is_store = self._peek(layout.FORMAT, refused=memoryview(b"")) is not None
        if is_claimed:
            why = "a worker has taken it: it died, or needs longer (timeout=)"
        elif is_store:
            why = "no worker has taken it: start one with splitfed work APP --store URL"
        else:
            why = (
                "nobody has begun a store there: is the URL that of splitfed work APP --store URL?"
            )
        return BusyError(
            f"client {self.client_id!r} had no answer from {self._blobs!r} "
            f"within {self.timeout:g} seconds; {why}"
        )

    def _peek(self, key: str, refused: memoryview | None = None) -> memoryview | None:
        """Return the bytes at a key, or `None` if there are none.

        Args:
            key: The key.
            refused: Returned if the storage refuses to say whether there are any.
        """
        try:
            return self._blobs.get(key)
        except StoreError as error:
            if isinstance(error.__cause__, PermissionError):
                return refused
            raise

    def _place(self) -> str:
        """The beginning of the next request's keys; a forked process has a name of its own."""
        with self._lock:
            # Else parent and child would take each other's answers.
            if self._process[0] != os.getpid():
                self._process = (os.getpid(), os.urandom(16).hex())
            number = self._number
            self._number += 1
            return layout.post(self.client_id, self._process[1], number)
