"""The traffic of a simulation: bytes that cross the cut, round trips, and when batches arrive.

Counted are the tensors of requests (up) and answers (down), each distinct tensor once, as they
travel: with compression that is coded. Names, numbers and the safetensors header, a few hundred
bytes a request, are left out. Each request with its answer is a round trip, for which a client on a
slow network waits.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple

from torch import Tensor

from splitfed.protocol.ids import BatchId
from splitfed.protocol.transport import Middleware, Transport
from splitfed.store.commit import Commit


class Crossed(NamedTuple):
    """What has crossed between one client and its server."""

    up: int = 0
    """Bytes of tensors."""
    down: int = 0
    """Bytes of tensors."""
    round_trips: int = 0
    """Requests that were answered."""

    def plus(self, other: Crossed) -> Crossed:
        """Both together."""
        return Crossed(*(one + more for one, more in zip(self, other, strict=True)))


Traffic = dict[str, Crossed]
"""By client id."""


class Arrivals:
    """The times at which pending batches arrived.

    Args:
        clock: Seconds.
        lineages: Whose batches; of others none is noted, as nobody would take it out again.
    """

    def __init__(
        self, clock: Callable[[], float], lineages: Collection[str] = ("body", "client")
    ) -> None:
        self._clock = clock
        self._lineages = frozenset(lineages)
        self._times: dict[tuple[str, BatchId], float] = {}

    def note(self, lineage: str, batch: BatchId) -> None:
        """Note that a batch has been acknowledged now; only its first time counts."""
        if lineage in self._lineages:
            self._times.setdefault((lineage, batch), self._clock())

    def take(self) -> dict[tuple[str, BatchId], float]:
        """Hand over all times."""
        taken = self._times
        self._times = {}
        return taken

    def add(self, times: Mapping[tuple[str, BatchId], float]) -> None:
        """Add times that were taken from another."""
        for key, time in times.items():
            self._times.setdefault(key, time)

    def delay(self, lineage: str, commit: Commit, now: float) -> float | None:
        """The mean seconds that a commit's batches waited until `now`; `None` if no time is known.

        All batches that the commit closed are forgotten.
        """
        for closed in (commit.stale, commit.rejected, commit.skipped):
            for batch in closed:
                self._times.pop((lineage, batch), None)
        times = [self._times.pop((lineage, batch), None) for batch in commit.folded]
        waited = [now - time for time in times if time is not None]
        return sum(waited) / len(waited) if waited else None


class Meter(Middleware):
    """A transport that counts each client's tensor bytes, in each direction, and its round trips.

    Args:
        transport: The transport that requests go on to.
        arrivals: Notes each batch that is acknowledged.
    """

    def __init__(self, transport: Transport, arrivals: Arrivals | None = None) -> None:
        super().__init__(transport)
        self._arrivals = arrivals
        self._lock = threading.Lock()
        self._total: Traffic = {}
        self._taken: Traffic = {}

    def totals(self) -> Traffic:
        """What has crossed by client, since the beginning."""
        with self._lock:
            return dict(self._total)

    def take(self) -> Traffic:
        """What has crossed by client since the last take; those without traffic are left out."""
        with self._lock:
            taken = self._taken
            self._taken = {}
            return taken

    def add(self, traffic: Mapping[str, Crossed]) -> None:
        """Add what was taken from another meter."""
        with self._lock:
            for client_id, crossed in traffic.items():
                for tally in (self._total, self._taken):
                    tally[client_id] = tally.get(client_id, Crossed()).plus(crossed)

    def send(self, verb: str, request: Any, /) -> Any:
        """The transport's answer: the request's tensors went up, the answer's came down."""
        answer = super().send(verb, request)
        client_id = request.client_id
        self.add({client_id: Crossed(num_bytes(request), num_bytes(answer), 1)})
        # Only what a commit will close is an arrival: not a part of a batch (no seal), nor a call
        # in eval mode, nor the push of initial weights that begins the lineage ("published").
        if verb == "backward" and request.seal is not None and answer.status != "uncounted":
            self._note("body", client_id, request.incarnation, request.seq)
        elif verb == "loss" and answer.status != "uncounted":
            self._note("body", client_id, answer.incarnation, request.seq)
        elif verb == "push" and answer.status != "published":
            self._note("client", client_id, answer.incarnation, request.seq)
        return answer

    def _note(self, lineage: str, client_id: str, incarnation: int | None, seq: int) -> None:
        if self._arrivals is not None and incarnation is not None:
            self._arrivals.note(lineage, BatchId(client_id, incarnation, seq))


def num_bytes(message: Any) -> int:
    """Bytes of the distinct tensors in a message: a dataclass, mapping, sequence or tensor."""
    return sum(tensor.numel() * tensor.element_size() for tensor in _tensors(message).values())


def _tensors(value: Any) -> dict[int, Tensor]:
    """The distinct tensors by identity."""
    if isinstance(value, Tensor):
        return {id(value): value}
    if is_dataclass(value):
        children: Any = [getattr(value, field.name) for field in fields(value)]
    elif isinstance(value, Mapping):
        children = value.values()
    elif isinstance(value, list | tuple):
        children = value
    else:
        return {}
    found: dict[int, Tensor] = {}
    for child in children:
        found |= _tensors(child)
    return found
