"""A store as the way to a server: for clients that share nothing with one but a bucket.

A client posts its request as a file; any worker (`working`) claims it, computes, and posts the answer. All safety
is that of the protocol itself, in which every call may be repeated: a worker that dies, two that answer, an answer
that comes too late or a request that is posted anew change nothing but how long it takes.

An answer is created once, and the first one stands: two workers may have run a forward at different versions, and the
client must see one. A request is deleted before its answer, so that whatever lies there without a request is rubbish
and anybody may sweep it.

A client writes beneath `post/<its id>/` and nowhere else, and lists nothing; a bucket's policy can hold it to that. The
trap is what S3 then says of an answer that isn't there yet: without leave to list it is "403", not "404". So once the
request was put, a refusal means "not yet" (`_peek`), until a request that was put a moment ago can't be read either.
"""

from __future__ import annotations

import contextlib
import os
import threading
import warnings
from typing import Any

from splitfed.blobs.url import open_blobs
from splitfed.checks import positive
from splitfed.errors import BusyError, CorruptedError, InputError, StoreCapabilityError, StoreError
from splitfed.protocol.backoff import Backoff, growing
from splitfed.protocol.ids import check_client_id
from splitfed.protocol.packing import pack, unpack_answer
from splitfed.protocol.transport import Sender
from splitfed.store import layout

_FIRST_POLL = 0.002
_PATIENCE = 10.0


def connect(url: str, *, client_id: str, token: str | None = None, **options: Any) -> StoreTransport:
    """The transport of one client through the store at `url`.

    Raises:
        InputError: the URL isn't a store's, or a token is given: access is the storage's own matter.
    """
    if token is not None:
        raise InputError(
            f"a token is for http:// and https://, and {url!r} is a store: give its credentials as the storage's own "
            "options, or in the environment"
        )
    return StoreTransport(url, client_id=client_id, **options)


class StoreTransport(Sender):
    """Requests and answers as files; a `Transport`.

    Args:
        url: The store's, as the workers have it.
        client_id: Whose requests these are.
        timeout: How long to wait for an answer, in seconds.
        poll: How long to wait at most between two looks, in seconds; it begins with much less.
        pauses: Seconds before each further try, when the storage fails or a worker says that it is busy.
        storage_options: Passed to the fsspec filesystem.

    Raises:
        IdError: the id may not become a key.
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
        self._blobs = open_blobs(url, fsync=False, **storage_options)
        self._lock = threading.Lock()
        self._process = (0, "")
        self._number = 0

    def __repr__(self) -> str:
        return f"StoreTransport({self._blobs!r}, client_id={self.client_id!r})"

    def send(self, verb: str, request: Any, /) -> Any:
        """The answer, after as many tries as there are pauses; a repeated request is answered as the first was."""
        parts = pack(request)
        tries = Backoff(self._pauses)
        while True:
            place = self._place()
            try:
                answer = self._exchange(place, parts)
                if answer is not None:
                    return unpack_answer(verb, answer)
            except (StoreCapabilityError, CorruptedError):
                raise
            except StoreError:
                if not tries.wait():
                    raise
            else:
                raise self._unanswered(place)

    def _exchange(self, place: str, parts: list[memoryview | bytes]) -> memoryview | None:
        """Post a request, wait for what answers it, and leave nothing behind; `None` if nothing does in time."""
        try:
            self._blobs.put(f"{place}.request", parts)
            return self._await(place, parts)
        finally:
            with contextlib.suppress(StoreError):  # what stays is swept by a worker
                self._blobs.delete(f"{place}.request")
                self._blobs.delete(f"{place}.answer")

    def _await(self, place: str, parts: list[memoryview | bytes]) -> memoryview | None:
        looks = Backoff(growing(_FIRST_POLL, 1.5), most=self._poll, within=self.timeout, last_look=True)
        patience = _PATIENCE
        while True:
            answer = self._peek(f"{place}.answer")
            if answer is not None or looks.expired:
                return answer
            if looks.elapsed >= patience:
                patience *= 2
                self._look_after(place, parts, looks.elapsed)
            looks.wait()

    def _look_after(self, place: str, parts: list[memoryview | bytes], waited: float) -> None:
        """Post a request again that a worker has swept (this machine slept), and say so if nobody takes it."""
        if self._peek(f"{place}.request") is None:
            self._blobs.put(f"{place}.request", parts)
            self._blobs.get(f"{place}.request")  # it is there: refused now, this client has no leave to read
        elif self._peek(f"{place}.claim-0000") is None:
            warnings.warn(
                f"no worker has taken a request of client {self.client_id!r} in {self._blobs!r} for {waited:.0f} "
                "seconds: does one run there? splitfed work APP --store URL",
                stacklevel=2,
            )

    def _unanswered(self, place: str) -> BusyError:
        taken = self._peek(f"{place}.claim-0000") is not None
        begun = self._peek(layout.FORMAT, refused=memoryview(b"")) is not None  # a policy may well refuse it
        why = (
            "a worker has taken it: it died, or needs longer (timeout=)"
            if taken
            else "no worker has taken it: start one with splitfed work APP --store URL"
            if begun
            else "nobody has begun a store there: is the URL that of splitfed work APP --store URL?"
        )
        return BusyError(
            f"client {self.client_id!r} had no answer from {self._blobs!r} within {self.timeout:g} seconds; {why}"
        )

    def _peek(self, key: str, refused: memoryview | None = None) -> memoryview | None:
        """What lies at a key; `refused` if the storage doesn't say whether anything does."""
        try:
            return self._blobs.get(key)
        except StoreError as error:
            if isinstance(error.__cause__, PermissionError):
                return refused
            raise

    def _place(self) -> str:
        """The keys of the next request; a forked process takes a name of its own."""
        with self._lock:
            if self._process[0] != os.getpid():
                self._process = os.getpid(), os.urandom(16).hex()
            self._number += 1
            return layout.post(self.client_id, self._process[1], self._number - 1)
