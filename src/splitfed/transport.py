"""The seam between client and server.

`SplitServer` has these methods, so in one process it *is* the transport; an HTTP client or a queue of files has them
too. Whatever has them can be given to `SplitClient`. Every call may be retried or doubled: the server answers a
repeated request as it did the first.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

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


@runtime_checkable
class Transport(Protocol):
    """What a client needs of a server: requests in, answers out, errors as the classes of `splitfed.errors`."""

    def forward(self, request: ForwardRequest, /) -> ForwardAnswer:
        """Run a call of the body and record it, if the client's grad mode is on."""
        ...

    def backward(self, request: BackwardRequest, /) -> BackwardAnswer:
        """Answer the gradients of a recorded call's inputs; store its parameter gradient."""
        ...

    def loss(self, request: LossRequest, /) -> LossAnswer:
        """Forward, loss and backward in one trip; the labels travel with the activations."""
        ...

    def push(self, request: PushRequest, /) -> PushAnswer:
        """Publish a client half's update."""
        ...

    def pull(self, request: PullRequest, /) -> PullAnswer:
        """Fetch the newest client half."""
        ...
