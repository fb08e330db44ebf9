"""What crosses the cut, in bytes, and when it arrives: a transport that counts and passes everything on.

Counted are the tensors of requests (up) and answers (down), each distinct tensor once, as they would travel
uncompressed; names, numbers and the safetensors header are a few hundred bytes a request and left out.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor

from splitfed.protocol.ids import BatchId
from splitfed.protocol.transport import Middleware, Transport
from splitfed.store.commit import Commit

Traffic = dict[str, tuple[int, int]]
"""Bytes (up, down) by client id."""


class Arrivals:
    """When batches arrived that no commit has taken up yet.

    Args:
        clock: Seconds.
        lineages: Whose batches; what is never asked for needn't be noted.
    """

    def __init__(
        self, clock: Callable[[], float], lineages: Collection[str] = ("body", "client")
    ) -> None:
        self._clock = clock
        self._lineages = frozenset(lineages)
        self._times: dict[tuple[str, BatchId], float] = {}

    def note(self, lineage: str, batch: BatchId) -> None:
        """A batch has been acknowledged now; only its first time counts."""
        if lineage in self._lineages:
            self._times.setdefault((lineage, batch), self._clock())

    def take(self) -> dict[tuple[str, BatchId], float]:
        """Hand over what was noted."""
        taken, self._times = self._times, {}
        return taken

    def add(self, times: Mapping[tuple[str, BatchId], float]) -> None:
        """Note what another has taken."""
        for key, time in times.items():
            self._times.setdefault(key, time)

    def delay(self, lineage: str, commit: Commit, now: float) -> float | None:
        """The mean seconds that a commit's batches waited until `now`, or `None` if that isn't known of any.

        All that the commit closed is forgotten.
        """
        for closed in (commit.stale, commit.rejected, commit.skipped):
            for batch in closed:
                self._times.pop((lineage, batch), None)
        times = [self._times.pop((lineage, batch), None) for batch in commit.folded]
        waited = [now - time for time in times if time is not None]
        return sum(waited) / len(waited) if waited else None


class Meter(Middleware):
    """Counts the tensor bytes of each client, in each direction.

    Args:
        transport: Whom it passes requests on to.
        arrivals: Is told of each batch that is acknowledged.
    """

    def __init__(self, transport: Transport, arrivals: Arrivals | None = None) -> None:
        super().__init__(transport)
        self._arrivals = arrivals
        self._lock = threading.Lock()
        self._total: Traffic = {}
        self._taken: Traffic = {}

    def totals(self) -> Traffic:
        """Bytes (up, down) by client, since the beginning."""
        with self._lock:
            return dict(self._total)

    def take(self) -> Traffic:
        """Bytes (up, down) by client since the last take; clients without traffic are left out."""
        with self._lock:
            taken, self._taken = self._taken, {}
            return taken

    def add(self, traffic: Mapping[str, tuple[int, int]]) -> None:
        """Count what another meter has taken."""
        with self._lock:
            for client_id, (up, down) in traffic.items():
                for tally in (self._total, self._taken):
                    before = tally.get(client_id, (0, 0))
                    tally[client_id] = (before[0] + up, before[1] + down)

    def send(self, verb: str, request: Any, /) -> Any:
        """The transport's answer: what the request holds went up, what the answer holds came down."""
        answer = super().send(verb, request)
        client_id = request.client_id
        self.add({client_id: (num_bytes(request), num_bytes(answer))})
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
