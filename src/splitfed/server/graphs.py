"""The graphs of the last few forwards: with them a backward is no recompute.

They change speed, never results: a graph that isn't here is made again with the same bits. What is
kept is counted in batches, as the cut calls of one `client(...)` are needed together, and in bytes.
If it is too much, the client that has most kept loses its oldest: one that never sends a backward
displaces its own graphs and no other's. The newest is kept whatever its size.

The trap: two processes that are copies of one number their calls alike. A graph is of the call that
bears its nonce too; for another it isn't here.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from dataclasses import dataclass, field
from typing import NamedTuple

from splitfed.model.execution import Run
from splitfed.protocol.messages import ForwardRecord
from splitfed.server.memory import Memory

Place = tuple[int, str, int, int]
"""(version, client id, incarnation, number of the call)"""
MOST_CALLS = 256
"""Graphs of one `client(...)` call; of more, the earlier ones are computed again."""


class CallKey(NamedTuple):
    """A call that is on record."""

    version: int
    client_id: str
    incarnation: int
    number: int
    nonce: int = 0
    """What tells it from that of a copy of the client's process."""

    @property
    def place(self) -> Place:
        """Where its record is."""
        return self[:4]


@dataclass(slots=True, eq=False)
class _Group:
    """The calls of one `client(...)`."""

    client_id: str
    keys: list[Place] = field(default_factory=list)
    num_bytes: int = 0


@dataclass(slots=True, eq=False)
class _Held:
    """One graph."""

    nonce: int
    record: ForwardRecord
    done: Run
    group: _Group
    num_bytes: int


class Uses:
    """How often a graph was at hand, and how often it took a recompute; safe to share."""

    KEPT = "kept"
    """A backward found the graph of its forward."""
    RECOMPUTED = "recomputed"
    """A backward ran the forward again."""
    CONTINUED = "continued"
    """A forward ran the one before it again, for the buffers that it had left."""

    def __init__(self) -> None:
        self._counts = dict.fromkeys((self.KEPT, self.RECOMPUTED, self.CONTINUED), 0)
        self._lock = threading.Lock()

    def count(self, use: str) -> None:
        """Count one."""
        with self._lock:
            self._counts[use] += 1

    def counts(self) -> dict[str, int]:
        """All so far, by use."""
        with self._lock:
            return dict(self._counts)


class Graphs:
    """The graphs that one line keeps; safe to share between threads.

    Args:
        most: Batches; 0 keeps none.
        memory: How many bytes.
    """

    def __init__(self, most: int, memory: Memory) -> None:
        self._most = most
        self._memory = memory
        self._entries: dict[Place, _Held] = {}
        self._groups: OrderedDict[int, _Group] = OrderedDict()
        self._lock = threading.Lock()

    def __contains__(self, key: CallKey) -> bool:
        return self._find(key) is not None

    def get(self, key: CallKey) -> tuple[ForwardRecord, Run] | None:
        """A record with its run, now among the most recent; `None` if it isn't here."""
        with self._lock:
            held = self._find(key)
            if held is None:
                return None
            self._groups.move_to_end(id(held.group))
            return held.record, held.done

    def put(
        self,
        key: CallKey,
        record: ForwardRecord,
        done: Run,
        num_bytes: int = 0,
        previous: CallKey | None = None,
    ) -> None:
        """Keep a graph, and drop others beyond the bounds.

        Args:
            key: Its call.
            record: What the call ran on.
            done: Its run.
            num_bytes: What it holds, roughly.
            previous: The call of the same `client(...)` before it.
        """
        if self._most < 1:
            return
        with self._lock:
            self._remove(key.place)
            before = None if previous is None else self._find(previous)
            group = _Group(key.client_id) if before is None else before.group
            group.keys.append(key.place)
            group.num_bytes += num_bytes
            self._memory.kept += num_bytes
            self._entries[key.place] = _Held(key.nonce, record, done, group, num_bytes)
            self._groups[id(group)] = group
            self._groups.move_to_end(id(group))
            if len(group.keys) > MOST_CALLS:
                self._remove(group.keys[0])
            self._shrink(group)

    def pop(self, key: CallKey) -> tuple[ForwardRecord, Run] | None:
        """Take a graph out."""
        with self._lock:
            held = self._find(key)
            if held is None:
                return None
            self._remove(key.place)
            return held.record, held.done

    def drop(self, place: Place) -> None:
        """Drop the graph of a call, whichever of that number it is."""
        with self._lock:
            self._remove(place)

    def _find(self, key: CallKey) -> _Held | None:
        held = self._entries.get(key.place)
        return held if held is not None and held.nonce == key.nonce else None

    def _shrink(self, newest: _Group) -> None:
        """Drop the oldest groups beyond the bounds, never the newest."""
        while len(self._groups) > self._most or self._memory.kept > self._memory.total:
            counts = Counter(group.client_id for group in self._groups.values())
            if len(self._groups) == 1:
                break
            # The oldest one decides between those that have equally many.
            others = [group for group in self._groups.values() if group is not newest]
            self._drop(max(others, key=lambda group: counts[group.client_id]))
        if self._memory.kept <= self._memory.client:  # all together, so those of one client too
            return
        own = [group for group in self._groups.values() if group.client_id == newest.client_id]
        total = sum(group.num_bytes for group in own)
        for group in own[:-1]:
            if total <= self._memory.client:
                break
            total -= group.num_bytes
            self._drop(group)

    def _drop(self, group: _Group) -> None:
        for place in list(group.keys):
            self._remove(place)

    def _remove(self, place: Place) -> None:
        held = self._entries.pop(place, None)
        if held is not None:
            held.group.keys.remove(place)
            held.group.num_bytes -= held.num_bytes
            self._memory.kept -= held.num_bytes
            if not held.group.keys:
                self._groups.pop(id(held.group), None)
