"""Buffers over several `client(...)` calls: which call continues which, and which ones count.

In the unsplit model each forward in train mode moves the statistics, whoever uses its outputs. So
a call begins with the buffers that the client's call before it left, whether that is of the same
loss or of none (an adversarial pass, a generator's step): until a batch of that version is stored.
From then on each call begins with the version's own, as the calls of all other clients do, and a
commit advances the statistics by what each batch saw.

The trap: calls that continue each other may end in different batches, in any order. What a batch
stores is always the change from the last call that counts already; a call that counts as part of a
later one's change counts no more when its own pass comes. And a call whose record can't be read
must not stop all that would continue it: whatever fails there ends the chain.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol


class BufferChain:
    """Calls of one version that continue each other, by place."""

    def __init__(self, version: int) -> None:
        self.version = version
        self.length = 0
        self.is_open = True
        """Whether a further call may join."""
        self.unused: list[int] = []
        """Those whose graph has gone while it was open."""
        self._upto = -1
        self._apart: set[int] = set()

    def join(self) -> int:
        """The place of another call."""
        self.length += 1
        return self.length - 1

    def counts(self, place: int) -> bool:
        """Whether some batch has that call's change."""
        return place <= self._upto or place in self._apart

    def after(self, place: int, parts: dict[int, int]) -> int | None:
        """What the change of a call is measured from, as `messages.Chain.after` has it.

        Args:
            place: The call.
            parts: The last part of each call that its batch has besides, by place.
        """
        last = max([self._upto, *(other for other in self._apart if other < place)])
        before = max((other for other in parts if other < place), default=-1)
        if before > last:
            return parts[before]
        return None if last < 0 else -1

    def note(self, place: int, after: int | None) -> None:
        """A batch has the call's change."""
        if after == -1:
            self._apart.add(place)
        else:
            self._upto = max(self._upto, place)


class Continued(Protocol):
    """One `client(...)` call, as far as its buffers go."""

    chain: BufferChain | None
    place: int
    buffers_counted: bool
    """Whether a batch has what it left, if it continues no call and none continues it."""
    in_batch: bool
    """Whether a batch has it as a part, be it rejected in the end."""


class Recorded(Protocol):
    """A recorded call, the last of a `client(...)`."""

    version: int

    @property
    def origin(self) -> Any:
        """The `client(...)` call that it belongs to."""
        ...


def is_counted(origin: Continued) -> bool:
    """Whether a batch has what this call left in the buffers."""
    chain = origin.chain
    return origin.buffers_counted or (chain is not None and chain.counts(origin.place))


class Continuation:
    """The chain under way of one client."""

    def __init__(self) -> None:
        self.tip: Recorded | None = None
        """The call that the next one continues; its record has to stay."""
        self.lost = 0
        """Calls that moved statistics, and will count in no batch."""
        self.closed = -1
        """Up to this version a batch is stored, so that calls begin anew."""

    @property
    def num_unused(self) -> int:
        """The calls so far, of those that continue each other, that have no graph any more."""
        return 0 if self.tip is None else len(self.tip.origin.chain.unused)

    def before(self, version: int | None) -> Recorded | None:
        """The call that one continues which is asked for at this version; `None` for the newest."""
        tip = self.tip
        return tip if tip is not None and version in (None, tip.version) else None

    def moved(self, call: Recorded) -> None:
        """A call in train mode has run, and has moved buffers."""
        origin = call.origin
        if origin.chain is None:
            if self.tip is not None and self.tip.version != call.version:
                self.close(self.tip.version)
            if call.version == self.closed:
                return
            origin.chain = BufferChain(call.version)
            origin.place = origin.chain.join()
        if origin.chain.is_open:
            self.tip = call

    def follow(self, origin: Continued, before: Recorded) -> None:
        """A `client(...)` call continues another one."""
        chain = before.origin.chain
        if chain is not None:
            origin.chain = chain
            origin.place = chain.join()

    def close(self, version: int, *, stored: bool = True) -> None:
        """A batch of that version is stored, or rejected: what comes now begins anew."""
        if stored:
            self.closed = max(self.closed, version)
        tip = self.tip
        if tip is None or tip.version > version:
            return
        chain = tip.origin.chain
        chain.is_open = False
        self.lost += sum(not chain.counts(place) for place in chain.unused)
        self.tip = None

    def drop(self, calls: Sequence[Any] | None = None) -> None:
        """What comes now begins anew: the last call can't be continued.

        Args:
            calls: Only if it is among the `client(...)` calls of these.
        """
        tip = self.tip
        if tip is None:
            return
        if calls is None or any(call.origin is tip.origin for call in calls):
            self.close(tip.version, stored=False)

    def gone(self, call: Any) -> None:
        """The graph of a call that moved buffers has gone."""
        origin = call.origin
        if origin.in_batch or is_counted(origin):
            return
        if origin.chain is not None and origin.chain.is_open:
            if origin.place not in origin.chain.unused:
                origin.chain.unused.append(origin.place)
        else:
            self.lost += 1
