"""The server's end of the mailbox: a worker, for clients that reach nothing but the store.

It lists `post/`, claims a request by a create-once file, lets a `SplitServer` answer it, and
creates the answer. A claim saves duplicate work, nothing else. It expires when a worker has seen it
without an answer for so many seconds of the worker's own clock: clocks of two machines are never
compared, and one that is wrong costs a computation done twice. Whoever takes over creates the next
claim, so one of several wins.

Clients take turns: of each one request is answered, then the store is looked at again, so that a
client with many requests delays another's by one answer. Limits are those of the HTTP service, as
far as they are about messages; a request that is too large isn't even read.

Two traps. A request that kills its workers would kill them all, one after another, for ever: after
`MAX_CLAIMS` claims it is answered with an error. And files without their request are rubbish, since
a request exists before any claim and its client deletes it before the rest; so they can be swept as
soon as a listing shows them.
"""

from __future__ import annotations

import json
import logging
import os
import random
import socket
import threading
import time
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from typing import Any

from splitfed.checks import positive
from splitfed.errors import BodyError, IdError, SplitFedError, TooLargeError
from splitfed.protocol import checksum
from splitfed.protocol.backoff import looking
from splitfed.protocol.packing import kind_of, pack, pack_error, unpack
from splitfed.protocol.transport import VERBS, Transport, verb_of
from splitfed.service.limits import MessageLimits, check_body, check_message
from splitfed.service.observer import Observer
from splitfed.store import layout
from splitfed.store.store import GradientStore, check_store

MAX_CLAIMS = 5
"""Claims of one request after which it is given up."""
_log = logging.getLogger("splitfed.mailbox")


@dataclass(slots=True)
class _Post:
    """The files of one request, by the last parts of their names."""

    client_id: str
    ends: list[str] = field(default_factory=list)
    num_bytes: int = 0
    """Size of the request."""

    @property
    def claims(self) -> int:
        """Number of claims."""
        return sum(end.startswith("claim-") for end in self.ends)

    @property
    def is_waiting(self) -> bool:
        """Whether it is a request without an answer."""
        return "request" in self.ends and "answer" not in self.ends


class Worker:
    """Answers the requests that clients post in a store. Several may run on one store.

    Args:
        server: Computes the answers.
        store: The store that the clients post in.
        claim_seconds: A claim without an answer is taken over after so many seconds; more than any
            call takes to compute.
        keep_seconds: An answer that its client hasn't fetched is deleted after so many seconds.
        limits: What a request may be; by default the defaults of `MessageLimits`.
        observer: Counts the answers, by `post/` and their verb.
        clock: A clock in seconds that never goes back.

    Raises:
        InputError: `store` isn't a store, or a time isn't positive.
    """

    def __init__(
        self,
        server: Transport,
        store: GradientStore,
        *,
        claim_seconds: float = 60.0,
        keep_seconds: float = 3600.0,
        limits: MessageLimits | None = None,
        observer: Observer | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        check_store(store)
        self.claim_seconds = positive("claim_seconds", claim_seconds)
        self.keep_seconds = positive("keep_seconds", keep_seconds)
        self.limits = MessageLimits() if limits is None else limits
        self.limits.govern(server)
        self._server = server
        self._store = store
        self._blobs = store.blobs
        self._clock = clock
        self._observer = observer
        self._seen: dict[str, float] = {}
        """When this worker first saw each claim and answer that still exists."""
        self._random = random.Random()  # of its own: the module's state is the user's seed
        self._stop = threading.Event()

    def step(self, stop: threading.Event | None = None) -> int:
        """Answer each request that can be claimed, then sweep the rubbish.

        Args:
            stop: Once it is set, no further request is begun.

        Returns:
            Number of requests that this worker answered.

        Raises:
            StoreError: the storage failed; nothing is lost, and a later step continues.
            CorruptedError: the run was deleted, or another one was begun in its place.
        """
        # A folder that was deleted looks like one in which nobody asks for anything.
        self._store.confirm()
        posts = self._look()
        left = _waiting(posts)
        stops = [self._stop] if stop is None else [self._stop, stop]
        answered = 0
        while left and not any(event.is_set() for event in stops):
            # In an order of its own, or all workers would try to claim the same request first.
            clients = list(left)
            self._random.shuffle(clients)
            for client_id in clients:
                if any(event.is_set() for event in stops):
                    break
                place = left[client_id].pop()
                answered += self._claim(place, posts[place].claims) and self._answer(
                    place, posts[place]
                )
            left = {client_id: places for client_id, places in left.items() if places}
            if left:
                # Who has come meanwhile needn't wait for all that one client has posted.
                found = self._look()
                posts |= found
                left = {**_waiting(found, but=left), **left}
        self._sweep(posts)
        return answered

    def run(
        self,
        stop: threading.Event | None = None,
        *,
        poll: float = 0.5,
        on_answer: Callable[[int], object] | None = None,
    ) -> int:
        """Answer requests until it is stopped.

        Args:
            stop: Set it to stop; or call `stop()`.
            poll: Longest pause between two looks without a request, in seconds.
            on_answer: Called after each look that found some, with the number of answers.

        Returns:
            Number of requests answered.
        """
        ends = self._stop if stop is None else stop
        looks = looking(poll, ends)
        made = 0
        while not ends.is_set() and not self._stop.is_set():
            answered = self.step(ends)
            made += answered
            if not answered:
                looks.wait()
                continue
            looks = looking(poll, ends)
            if on_answer is not None:
                on_answer(answered)
        return made

    def stop(self) -> None:
        """End `run()`, also one that begins later; the request under way is answered."""
        self._stop.set()

    def _look(self) -> dict[str, _Post]:
        """Everything beneath post/, by place."""
        found: dict[str, _Post] = {}
        timed: set[str] = set()
        for key, size in self._blobs.sizes(layout.POST).items():
            parsed = layout.parse_post(key)
            if parsed is None:
                continue
            client_id, place, end = parsed
            post = found.setdefault(place, _Post(client_id))
            post.ends.append(end)
            if end == "request":
                post.num_bytes = size
            else:
                timed.add(key)
                self._seen.setdefault(key, self._clock())
        # What is gone is forgotten: else this would grow for ever.
        self._seen = {key: since for key, since in self._seen.items() if key in timed}
        return found

    def _claim(self, place: str, claims: int) -> bool:
        """Whether this worker is the one to answer: it has created the request's next claim."""
        if claims and not self._is_older(f"{place}.claim-{claims - 1:04d}", self.claim_seconds):
            return False
        # For people who look for a worker that hangs; no program reads it.
        owner = json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode()
        return self._blobs.create(f"{place}.claim-{claims:04d}", [owner], durable=False)

    def _answer(self, place: str, post: _Post) -> bool:
        """Create the answer; false if the client has withdrawn its request meanwhile."""
        try:
            check_body(post.num_bytes, self.limits)
        except TooLargeError as error:
            self._blobs.create(f"{place}.answer", pack_error(error), durable=False)
            return True
        data = self._blobs.raw.get(f"{place}.request")
        if data is None:
            return False
        if post.claims >= MAX_CLAIMS:
            parts = pack_error(self._claims_error(post))
        else:
            parts = self._compute(post.client_id, data)
        # Create, not put: if another worker was faster, the client sees that one's answer only.
        self._blobs.create(f"{place}.answer", parts, durable=False)
        return True

    def _compute(self, client_id: str, data: memoryview) -> list[memoryview | bytes]:
        began = time.perf_counter()
        verb = "unknown"
        failure: Exception | None = None
        try:
            checksum.check(data, required=False)
            verb = verb_of(kind_of(data))
            limits = self.limits
            request: Any = unpack(
                VERBS[verb][0], data, max_tensors=limits.tensors, max_header=limits.header
            )
            # A bucket's policy binds a client to its folder; this binds the folder to its id.
            if request.client_id != client_id:
                raise IdError(
                    f"a request of client {request.client_id!r} lies in the folder of "
                    f"{client_id!r}: expected its own"
                )
            check_message(request, limits)
            parts = pack(getattr(self._server, verb)(request))
        except SplitFedError as error:
            failure, parts = error, pack_error(error)
        except Exception as error:  # noqa: BLE001 -- the last border: its text stays in the log
            _log.exception("a request of client %r failed", client_id)
            failure, parts = error, pack_error(error)
        if self._observer is not None:
            status = 200 if failure is None else getattr(failure, "status", 500)
            sent = sum(memoryview(part).nbytes for part in parts)
            seconds = time.perf_counter() - began
            self._observer.count(f"post/{verb}", status, seconds, len(data), sent)
            if failure is not None:
                self._observer.error(type(failure).__name__)
        return parts

    def _claims_error(self, post: _Post) -> BodyError:
        return BodyError(
            f"{post.claims} workers have taken this request and none has answered: "
            "it ends them (out of memory?), or takes longer than their claim_seconds, "
            f"which is {self.claim_seconds:g} here"
        )

    def _sweep(self, posts: dict[str, _Post]) -> None:
        """Delete files without a request, and requests whose answer nobody fetches."""
        for place, post in posts.items():
            is_answered = "answer" in post.ends
            is_forgotten = is_answered and self._is_older(f"{place}.answer", self.keep_seconds)
            if "request" in post.ends and not is_forgotten:
                continue
            # In reverse, the request comes first: a sweep that dies leaves rubbish, not a request
            # that has lost its answer and is computed once more.
            for end in sorted(post.ends, reverse=True):
                self._blobs.delete(f"{place}.{end}")

    def _is_older(self, key: str, seconds: float) -> bool:
        return self._clock() - self._seen.get(key, self._clock()) >= seconds


def _waiting(posts: Mapping[str, _Post], but: Container[str] = ()) -> dict[str, list[str]]:
    """The requests without an answer, by client; without some clients."""
    found: dict[str, list[str]] = {}
    for place in sorted(posts, reverse=True):  # the first of each client at the end of its list
        post = posts[place]
        if post.is_waiting and post.client_id not in but:
            found.setdefault(post.client_id, []).append(place)
    return found
