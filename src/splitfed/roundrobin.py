"""Several replicas behind one transport, as a load balancer would put them: each request goes to the next one.

With two or more, a backward that follows its forward never meets the replica that served it. A live autograd graph
would be of no use; what the replica needs, it finds in the store.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from splitfed.messages import (
    BackwardAnswer,
    BackwardRequest,
    ForwardAnswer,
    ForwardRequest,
    LossAnswer,
    LossRequest,
    PullAnswer,
    PullRequest,
    PushAnswer,
    PushRequest,
)
from splitfed.transport import Transport


class RoundRobin:
    """A transport over a circle of transports."""

    def __init__(self, replicas: Sequence[Transport]) -> None:
        self._turns = itertools.cycle(replicas)

    def forward(self, request: ForwardRequest, /) -> ForwardAnswer:
        """Run a call of the body on the next replica."""
        return next(self._turns).forward(request)

    def backward(self, request: BackwardRequest, /) -> BackwardAnswer:
        """Answer gradients from the next replica: not the one that ran the forward."""
        return next(self._turns).backward(request)

    def loss(self, request: LossRequest, /) -> LossAnswer:
        """Make all of a step on the next replica."""
        return next(self._turns).loss(request)

    def push(self, request: PushRequest, /) -> PushAnswer:
        """Publish a half's update through the next replica."""
        return next(self._turns).push(request)

    def pull(self, request: PullRequest, /) -> PullAnswer:
        """Fetch the newest half through the next replica."""
        return next(self._turns).pull(request)
