"""The seam between client and server.

`SplitServer` has these methods, so in one process it *is* the transport; an HTTP client or a queue of files has them
too. Whatever has them can be given to `SplitClient`. Every call may be retried or doubled: the server answers a
repeated request as it did the first.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Protocol, runtime_checkable

from splitfed.protocol.messages import (
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


class Relay(ABC):
    """A `Transport` whose requests all go one way, whatever they ask for."""

    def forward(self, request: ForwardRequest, /) -> ForwardAnswer:
        """Have a call of the body run and recorded."""
        answer: ForwardAnswer = self._ask("forward", request)
        return answer

    def backward(self, request: BackwardRequest, /) -> BackwardAnswer:
        """Have the gradients of a recorded call's inputs computed, and its parameter gradient stored."""
        answer: BackwardAnswer = self._ask("backward", request)
        return answer

    def loss(self, request: LossRequest, /) -> LossAnswer:
        """Have forward, loss and backward made in one trip."""
        answer: LossAnswer = self._ask("loss", request)
        return answer

    def push(self, request: PushRequest, /) -> PushAnswer:
        """Publish a client half's update."""
        answer: PushAnswer = self._ask("push", request)
        return answer

    def pull(self, request: PullRequest, /) -> PullAnswer:
        """Fetch the newest client half."""
        answer: PullAnswer = self._ask("pull", request)
        return answer

    @abstractmethod
    def _ask(self, method: str, request: Any) -> Any:
        """The answer to a request of a method of `Transport`."""
