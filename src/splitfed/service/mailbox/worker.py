"""The worker: a server for clients that reach nothing but the store.

It looks through `post/`, claims a request by a create-once file, lets a `SplitServer` answer it, and creates the
answer. A claim saves duplicate work, no more. It expires when a worker has seen it stand unanswered for so many seconds
of its own clock: clocks of two machines are never compared, and one that is wrong costs a computation done twice.
Whoever takes over creates the next claim, so one of several wins.

Two traps. A request that kills its workers would kill them all, one after another, for ever: after so many claims it is
answered with an error. And what lies there without its request is rubbish, since a client deletes the request first
and a request is there before any claim; so a listing that shows such may be swept on the spot.
"""

from __future__ import annotations

import json
import logging
import os
import random
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from splitfed.checks import positive
from splitfed.errors import BodyError, IdError, SplitFedError
from splitfed.protocol.backoff import Backoff, growing
from splitfed.protocol.packing import kind_of, pack, pack_error, unpack
from splitfed.protocol.transport import VERBS, Transport, verb_of
from splitfed.store import layout
from splitfed.store.store import GradientStore, check_store

MAX_CLAIMS = 5
_log = logging.getLogger("splitfed.mailbox")

_FIRST_POLL = 0.005


@dataclass(slots=True)
class _Post:
    """What lies at one place: ends of its keys."""

    client_id: str
    ends: list[str] = field(default_factory=list)

    @property
    def claims(self) -> int:
        return sum(end.startswith("claim-") for end in self.ends)


class Worker:
    """Answers the requests that clients post in a store. Run as many as you like on one store.

    Args:
        server: Who computes.
        store: Where the clients post.
        claim_seconds: A claim that stands unanswered for so long is taken over; longer than a call takes to compute.
        keep_seconds: An answer that its client hasn't fetched for so long is deleted.
        clock: Seconds that never go back.

    Raises:
        InputError: `store` isn't one, or a time isn't positive.
    """

    def __init__(
        self,
        server: Transport,
        store: GradientStore,
        *,
        claim_seconds: float = 60.0,
        keep_seconds: float = 3600.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        check_store(store)
        self.claim_seconds = positive("claim_seconds", claim_seconds)
        self.keep_seconds = positive("keep_seconds", keep_seconds)
        self._server = server
        self._blobs = store.blobs
        self._clock = clock
        self._seen: dict[str, float] = {}
        """When this worker first saw a claim or an answer that is still there."""
        self._order = random.Random()
        self._stop = threading.Event()

    def step(self, stop: threading.Event | None = None) -> int:
        """Answer what waits and can be claimed, once through; sweep what is left of what is done.

        Args:
            stop: Once it is set, no further request is begun.

        Returns:
            How many requests this worker answered.

        Raises:
            StoreError: the storage failed; nothing is lost, and a later step continues.
        """
        posts = self._look()
        waiting = [place for place, post in posts.items() if "request" in post.ends and "answer" not in post.ends]
        self._order.shuffle(waiting)  # so that workers don't all reach for the same one
        answered = 0
        for place in waiting:
            if self._stop.is_set() or (stop is not None and stop.is_set()):
                break
            post = posts[place]
            if self._claim(place, post.claims):
                answered += self._answer(place, post)
        self._sweep(posts)
        return answered

    def run(
        self,
        stop: threading.Event | None = None,
        *,
        poll: float = 0.5,
        on_answer: Callable[[int], object] | None = None,
    ) -> int:
        """Answer requests until told to stop.

        Args:
            stop: Set it to stop; or call `stop()`.
            poll: How long to wait at most before looking again, in seconds, when nothing waits.
            on_answer: Called with the number of requests, after each look that found some.

        Returns:
            How many requests were answered.
        """
        ends = self._stop if stop is None else stop
        looks = Backoff(growing(_FIRST_POLL, 1.5), most=poll, stop=ends)
        made = 0
        while not ends.is_set() and not self._stop.is_set():
            answered = self.step(ends)
            made += answered
            if not answered:
                looks.wait()
                continue
            looks = Backoff(growing(_FIRST_POLL, 1.5), most=poll, stop=ends)
            if on_answer is not None:
                on_answer(answered)
        return made

    def stop(self) -> None:
        """End `run()`, also one that begins later; a request under way is answered."""
        self._stop.set()

    def _look(self) -> dict[str, _Post]:
        """All that lies beneath post/, by place."""
        found: dict[str, _Post] = {}
        timed: set[str] = set()
        for key in self._blobs.list(layout.POST):
            parsed = layout.parse_post(key)
            if parsed is None:
                continue
            client_id, place, end = parsed
            found.setdefault(place, _Post(client_id)).ends.append(end)
            if end != "request":
                timed.add(key)
                self._seen.setdefault(key, self._clock())
        self._seen = {key: since for key, since in self._seen.items() if key in timed}
        return found

    def _claim(self, place: str, claims: int) -> bool:
        """Try to be who answers."""
        if claims and not self._is_older(f"{place}.claim-{claims - 1:04d}", self.claim_seconds):
            return False
        whose = json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode()  # for people; nothing reads it
        return self._blobs.create(f"{place}.claim-{claims:04d}", [whose], durable=False)

    def _answer(self, place: str, post: _Post) -> bool:
        """Create the answer; whether there was a request."""
        data = self._blobs.get(f"{place}.request")
        if data is None:
            return False
        if post.claims >= MAX_CLAIMS:
            parts = pack_error(self._given_up(post))
        else:
            parts = self._compute(post.client_id, data)
        self._blobs.create(f"{place}.answer", parts, durable=False)
        return True

    def _compute(self, client_id: str, data: memoryview) -> list[memoryview | bytes]:
        try:
            verb = verb_of(kind_of(data))
            request: Any = unpack(VERBS[verb][0], data)
            if request.client_id != client_id:
                raise IdError(
                    f"a request of client {request.client_id!r} lies in the folder of {client_id!r}: expected its own"
                )
            return pack(getattr(self._server, verb)(request))
        except SplitFedError as error:
            return pack_error(error)
        except Exception as error:  # noqa: BLE001 -- the last border: its text stays in the log
            _log.exception("a request of client %r failed", client_id)
            return pack_error(error)

    def _given_up(self, post: _Post) -> BodyError:
        return BodyError(
            f"{post.claims} workers have taken this request and none has answered: it ends them (out of memory?), or "
            f"takes longer than their claim_seconds, which is {self.claim_seconds:g} here"
        )

    def _sweep(self, posts: dict[str, _Post]) -> None:
        """Delete what belongs to no request any more, and answers that nobody fetches, request first."""
        for place, post in posts.items():
            forgotten = "answer" in post.ends and self._is_older(f"{place}.answer", self.keep_seconds)
            if "request" in post.ends and not forgotten:
                continue
            for end in sorted(post.ends, reverse=True):
                self._blobs.delete(f"{place}.{end}")

    def _is_older(self, key: str, seconds: float) -> bool:
        return self._clock() - self._seen.get(key, self._clock()) >= seconds
