"""A client's process, as the server sees it: its numbers, and what it still has to confirm.

Calls are numbered at the forward, batches at the backward. What a request confirms rides along with
it: graphs that are gone (their records may go too) and numbers that were given up. A request that
fails hands that back, to ride with the next.

The trap: a fork inherits all of this, and both processes would number alike under one incarnation.
So a fork begins anew, as its first step: what it inherited is the parent's.

A process that is started in place of one that was killed goes on under its numbers instead, from a
`Position`. It is told apart by a random number, from which it also numbers its calls and parts.
"""

from __future__ import annotations

import math
import os
import secrets
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from typing import Any, Protocol

import torch

from splitfed.checks import warn_once
from splitfed.client.blocks import Scope
from splitfed.client.buffers import Continuation
from splitfed.client.position import Position
from splitfed.client.sharing import Sharing
from splitfed.errors import InputError, UnsupportedError
from splitfed.protocol.messages import Housekeeping
from splitfed.protocol.transport import Transport

LossScale = float | Callable[[], float]
MOST_NOTES = 1024
"""So many of a kind ride with one request; a service takes no more."""


class Recorded(Protocol):
    """A call whose forward is on record at the server."""

    version: int
    number: int


@dataclass(frozen=True, slots=True)
class Counted:
    """What the stored batches of a client add up to."""

    num_samples: float = 0.0
    loss_scale: float = 0.0
    """Σ λᵢ: the half's `.grad` holds Σ λᵢgᵢ, so divided by this it is their mean."""
    rejected: float = 0.0
    """In samples: batches that aren't finite, and count nowhere."""

    def __add__(self, other: Counted) -> Counted:
        samples, scale = self.num_samples + other.num_samples, self.loss_scale + other.loss_scale
        return Counted(samples, scale, self.rejected + other.rejected)

    def __sub__(self, other: Counted) -> Counted:
        samples, scale = self.num_samples - other.num_samples, self.loss_scale - other.loss_scale
        return Counted(samples, scale, self.rejected - other.rejected)


class Connection:
    """One `SplitClient`'s side of the protocol.

    Args:
        transport: The server.
        client_id: Whose it is.
        loss_scale: What losses are multiplied by before `backward()`.
    """

    def __init__(self, transport: Transport, client_id: str, loss_scale: LossScale) -> None:
        self.transport = transport
        self.client_id = client_id
        self.loss_scale = loss_scale
        self.seen = 0
        self.counted = Counted()
        """The batches stored since the last push or pull."""
        self.sharing: Sharing | None = None
        """Who else trains its half."""
        self.process = ""
        """What this process calls itself."""
        self.incarnation: int | None = None
        """The number of this process, once a server has opened it."""
        self._warned: set[str] = set()
        self._begin()
        _connections.add(self)

    def _begin(self) -> None:
        """Begin as a process of its own."""
        # A lock that another thread held at the fork would stay locked in the child.
        self._lock = threading.RLock()
        self.incarnation = None
        self.process = os.urandom(16).hex()
        self.buffers = Continuation()
        """Which call continues whose buffers."""
        self.resumed = 0
        """What tells this process from those whose numbers it has taken up; 0 if they are its own.
        Its calls and parts are numbered from here."""
        self._repeats = False
        """Whether the next batch may be one that the store has from such a process."""
        self._expected: int | None = None
        """The number of the batch that calls are to be part of, if others come before it."""
        self._next = {"call": 0, "batch": 0, "push": 0}
        self._live: list[tuple[Recorded, Callable[[], Any]]] = []
        self._abandoned: list[int] = []
        self._answered: list[int] = []
        self._released: list[tuple[int, int]] = []

    @property
    def is_used(self) -> bool:
        """Whether it has numbered anything, or goes on under the numbers of another process."""
        return self.incarnation is not None or any(self._next.values())

    def position(self) -> Position:
        """The place between two batches, but for what the half's versions add to it."""
        with self._lock:
            return Position(
                client_id=self.client_id,
                process=self.process,
                incarnation=self.incarnation,
                batch=self._next["batch"],
                push=self._next["push"],
                abandoned=tuple(self._abandoned),
                seen=self.seen,
                closed=self.buffers.closed,
                counted=astuple(self.counted),
            )

    def resume(self, position: Position) -> None:
        """Go on under the numbers of an earlier process."""
        with self._lock:
            self.process = position.process
            self.incarnation = position.incarnation
            # Small enough that what is added to it stays a number that may become a key.
            self.resumed = 2**32 + secrets.randbelow(2**39)
            self._repeats = True
            self._next = {
                "call": self.resumed,
                "batch": position.batch,
                "push": position.push,
            }
            self._abandoned = [*position.abandoned]
            self.seen = position.seen
            self.counted = Counted(*position.counted)
            if position.closed >= 0:
                self.buffers.close(position.closed)

    def ahead(self, seq: int | None = None) -> int | None:
        """The batch that a call is to be part of, if it may be one that the store has.

        Args:
            seq: Its number, if it has one already; by default it is the next.
        """
        with self._lock:
            if not self._repeats:
                return None
            expected = self._next["batch"] if self._expected is None else self._expected
            return expected if seq is None else seq

    def next(self, kind: str) -> int:
        """The number that the next 'call' or 'batch' will have."""
        return self._next[kind]

    def calls_from(self, number: int) -> list[Any]:
        """The calls on record that have this number or a later one."""
        with self._lock:
            return [call for call, _ in self._live if call.number >= number]

    @contextmanager
    def expecting(self, seq: int) -> Iterator[None]:
        """A block whose calls are to be part of a batch that isn't the next one."""
        self._expected = seq
        try:
            yield
        finally:
            self._expected = None

    def note_repeated(self, asked: int | None, repeated: bool) -> None:
        """Take note of whether the store has the batch that was asked for: none follows if not."""
        if asked is not None and not repeated:
            self._repeats = False

    def check_process(self, process: str) -> None:
        """Refuse the graph of a call that another process has made.

        Raises:
            UnsupportedError: it was forked after that call.
        """
        if process != self.process:
            raise UnsupportedError(
                f"client {self.client_id!r} made this forward before the process was forked, and "
                "its record belongs to the parent: call client(...) and backward() in one process. "
                "A fork is a process of its own; where several train, give each a SplitClient with "
                "a client_id of its own"
            )

    def number(self, kind: str) -> int:
        """The next number of a 'call', 'batch' or 'push'."""
        with self._lock:
            self._next[kind] += 1
            return self._next[kind] - 1

    def opened(self, incarnation: int | None, version: int) -> None:
        """Take note of what an answer says."""
        with self._lock:
            self.incarnation = incarnation if self.incarnation is None else self.incarnation
            self.seen = max(self.seen, version)

    def watch(self, call: Recorded, node: Any) -> None:
        """Keep a call on record for as long as its node of the graph can still be run."""
        with self._lock:
            self._live.append((call, weakref.ref(node)))

    def keep(self, call: Recorded) -> None:
        """Keep a call on record that has no graph, for as long as the next one may continue it."""
        with self._lock:
            self._live.append((call, lambda: None))

    def release(self, call: Recorded) -> None:
        """A recorded call that has no graph needs no record."""
        with self._lock:
            self._released.append((call.version, call.number))

    def abandon(self, seq: int) -> None:
        """A batch whose pass failed: its number is closed with the next request."""
        with self._lock:
            self._abandoned.append(seq)

    def answered(self, seq: int) -> None:
        """A one-trip batch whose answer has arrived."""
        with self._lock:
            self._answered.append(seq)

    def outstanding(self) -> list[Recorded]:
        """The recorded calls that the backward pass under way reaches, done or not."""
        with self._lock:
            nodes = [(call, node()) for call, node in self._live]
        return [
            call
            for call, node in nodes
            if node is not None and torch._C._will_engine_execute_node(node)
        ]

    def housekeeping(self) -> Confirming:
        """What the request within confirms; handed back if it fails."""
        return Confirming(self)

    def take_notes(self) -> Housekeeping:
        """What the next request confirms."""
        with self._lock:
            self._live = self._needed()
            if not (self._released or self._abandoned or self._answered):
                return _NOTHING
            held: tuple[list[Any], ...] = (self._released, self._abandoned, self._answered)
            notes = Housekeeping(*[tuple(numbers[:MOST_NOTES]) for numbers in held])
            for numbers in held:
                del numbers[:MOST_NOTES]
            return notes

    def hand_back(self, notes: Housekeeping) -> None:
        """A request has failed: what it confirmed rides with the next."""
        with self._lock:
            # In front: they are confirmed in the order in which they came.
            self._released[:0] = notes.released
            self._abandoned[:0] = notes.abandoned
            self._answered[:0] = notes.answered

    def _needed(self) -> list[tuple[Recorded, Callable[[], Any]]]:
        """The calls whose record is needed; the others are released."""
        kept, gone = [], []
        for call, node in self._live:
            if _can_run(node()):
                kept.append((call, node))
            else:
                gone.append((call, node))
        if gone:
            # A call continues another one's buffers: the next one, or one that is recomputed.
            continued = {id(getattr(call, "before", None)) for call, _ in kept}
            continued.add(id(self.buffers.tip))
            for call, node in gone:
                if getattr(call, "moved", False):
                    self.buffers.gone(call)
                if id(call) in continued:
                    kept.append((call, node))
                else:
                    self._released.append((call.version, call.number))
        return kept

    def scale_is_said(self, scope: Scope | None) -> bool:
        """Whether the user has said what losses are multiplied by, be it for accumulation.

        The scale of GradScaler says nothing of how many passes a step has.
        """
        if scope is not None and scope.loss_scale is not None:
            return True
        if isinstance(getattr(self.loss_scale, "__self__", None), torch.amp.GradScaler):
            return False
        return callable(self.loss_scale) or self.loss_scale != 1

    def doubt(self, origin: Any) -> None:
        """Warn, once, that what a call counts is doubtful, if nobody has said it."""
        scope = origin.scope
        if origin.doubt is None or (scope is not None and scope.weigher is not None):
            return
        self.warn_once(
            "weight",
            f"a batch of client {self.client_id!r} counts {origin.num_samples:g} examples, "
            f"and that may be wrong: {origin.doubt} among the arguments of the call. "
            "Say the number of examples: with client.batch(num_samples=...)",
        )

    def scale(self) -> float:
        """The loss scale now.

        Raises:
            InputError: it isn't a finite number other than zero.
        """
        value = self.loss_scale() if callable(self.loss_scale) else self.loss_scale
        try:
            found = float(value)
        except (TypeError, ValueError):
            found = math.nan
        if not math.isfinite(found) or found == 0:
            raise InputError(
                f"loss_scale is {value!r}: expected a finite number other than 0, "
                "or a function that returns one"
            )
        return found

    def note_status(self, status: str, num_samples: float, loss_scale: float) -> None:
        """Count a batch, or warn, once, that one was rejected."""
        with self._lock:
            if status == "stored":
                self.counted = self.counted + Counted(num_samples, loss_scale)
            elif status == "rejected":
                self.counted = self.counted + Counted(rejected=num_samples)
        if status == "stored" and num_samples and self.sharing is not None:
            self.sharing.counted(self.client_id)
        if status == "rejected":
            self.warn_once(
                status,
                f"a gradient of client {self.client_id!r} isn't finite (NaN or Inf): "
                "the batch is closed as rejected and counts nowhere. "
                "Under GradScaler that is ordinary; later ones are only counted",
            )
        if status == "skipped":
            self.warn_once(
                status,
                f"client {self.client_id!r} repeats a batch that it gave up before it was "
                "restarted, as its pass failed or was ended: its number is closed, and it counts "
                "nowhere",
            )

    def warn_once(self, what: str, text: str) -> None:
        """Warn of something, unless this client has warned of it before."""
        with self._lock:
            warn_once(self._warned, what, text, 3)


class Confirming:
    """What a request confirms, for the block that makes it.

    A class, as `contextlib.contextmanager` costs more, in each forward and backward.

    Args:
        connection: The client's process.
    """

    __slots__ = ("_connection", "_notes")

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def __enter__(self) -> Housekeeping:
        self._notes = self._connection.take_notes()
        return self._notes

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is not None:
            self._connection.hand_back(self._notes)


_NOTHING = Housekeeping()
_connections: weakref.WeakSet[Connection] = weakref.WeakSet()


def _begin_all() -> None:
    for connection in _connections:
        connection._begin()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_all)


def _can_run(node: Any) -> bool:
    """Whether a node of the graph is alive and its buffers haven't been freed by a backward."""
    if node is None:
        return False
    try:
        # Raises once they are freed; unlike `saved_tensors` it unpacks nothing.
        node._raw_saved_tensors  # noqa: B018
    except RuntimeError:
        return False
    return True
