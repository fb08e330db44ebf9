"""Session affinity: a key by which a load balancer finds the replica that holds a call's graph.

Any replica answers any request, and one that doesn't have the graph of a forward computes it again.
So a balancer needs no affinity, but where the backward goes to the replica that ran the forward,
that time is saved. Both requests carry the same key in a header (`contract.AFFINITY`). So does a
call that goes on from the buffers of another one: of the same `client(...)`, or of the one before
it at the same version.

Two kinds of balancer can use it. One hashes the key, and needs to know nothing else. The other
sends a key that it doesn't know wherever it likes, and puts the name of the replica into the same
header of the answer: from then on the requests carry that name.

Every batch that doesn't go on from another has a key of its own, so the balancer places a client
again and again: a replica that was added gets work, and two busy clients on one replica don't stay
there. A request that is repeated after a failure carries no key, since the replica that it names
may be the one that failed.

The trap is the name: it comes from an answer and goes into a request, so only printable ASCII is
taken.
"""

from __future__ import annotations

import re
import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable
from operator import attrgetter
from typing import Any

CALLS = 16
"""At most so many calls that go on from one another have one key."""
_CALLS: dict[str, Callable[[Any], Any]] = {
    "forward": lambda request: request,
    "loss": attrgetter("forward"),
    "backward": lambda request: request,
}
"""Where a request names its call; requests of other verbs are for any replica."""
_OPEN = 1024
"""Calls whose keys are known; a client has few without a backward."""
_NAME = re.compile(r"[\x20-\x7e]{1,256}")


class _Key:
    """What the requests of some calls carry."""

    __slots__ = ("calls", "value")

    def __init__(self, value: str) -> None:
        self.value = value
        self.calls = 0


class Affinity:
    """The keys of one transport's requests; threads may share it."""

    def __init__(self) -> None:
        self._keys: OrderedDict[tuple[str, int], _Key] = OrderedDict()
        self._lock = threading.Lock()

    def key(self, verb: str, request: Any) -> str | None:
        """The key that a request carries; `None` if any replica is as good as another.

        Args:
            verb: A key of `protocol.transport.VERBS`.
            request: Of the class that the table names.
        """
        call = _call(verb, request)
        if call is None:
            return None
        with self._lock:
            found = self._keys.get(call) if verb == "backward" else self._begin(verb, request, call)
        return _drawn(call) if found is None else found.value

    def note(self, verb: str, request: Any, name: str | None) -> None:
        """Take note of the replica that an answer names, if it names one."""
        call = _call(verb, request)
        if call is None or name is None or not _NAME.fullmatch(name):
            return
        with self._lock:
            found = self._keys.get(call)
            if found is not None:
                found.value = name

    def _begin(self, verb: str, request: Any, call: tuple[str, int]) -> _Key:
        """The key of a call that is made now."""
        previous = _CALLS[verb](request).previous
        found = None if previous is None else self._keys.get((call[0], previous))
        if found is None or found.calls >= CALLS:
            found = _Key(_drawn(call))
        found.calls += 1
        self._keys[call] = found
        self._keys.move_to_end(call)
        if len(self._keys) > _OPEN:
            self._keys.popitem(last=False)
        return found


def _call(verb: str, request: Any) -> tuple[str, int] | None:
    """The client and the number of a request's call."""
    number = _CALLS[verb](request).call if verb in _CALLS else None
    return None if number is None else (request.client_id, number)


def _drawn(call: tuple[str, int]) -> str:
    """A key that says nothing of the client to whoever reads a balancer's log."""
    return f"{zlib.crc32(f'{call[0]}/{call[1]}'.encode()):08x}"
