"""Several replicas behind one transport, as a load balancer would put them: each request goes to the next one.

With two or more, a backward that follows its forward never meets the replica that served it. A live autograd graph
would be of no use; what the replica needs, it finds in the store.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from splitfed.protocol.transport import Relay, Transport


class RoundRobin(Relay):
    """A transport over a circle of transports."""

    def __init__(self, replicas: Sequence[Transport]) -> None:
        self._turns = itertools.cycle(replicas)

    def _ask(self, method: str, request: Any) -> Any:
        """The next replica's answer: with two or more, so another one's for a backward than for its forward."""
        return getattr(next(self._turns), method)(request)
