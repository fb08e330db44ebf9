"""The seam between client and server: five verbs, whichever way they travel.

`SplitServer` has these methods, so in one process it *is* the transport; an HTTP client or a queue
of files has them too. Whatever has them can be given to `SplitClient`. Every call may be retried or
doubled: the server answers a repeated request as it did the first.

What stands between a client and a server (a meter, a replica picked by turn, compression, a fault
for a test) is a `Middleware`: one method, `send`, through which all five verbs go.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol, runtime_checkable

from splitfed.errors import FormatError
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

VERBS: Mapping[str, tuple[type, type]] = MappingProxyType(
    {
        "forward": (ForwardRequest, ForwardAnswer),
        "backward": (BackwardRequest, BackwardAnswer),
        "loss": (LossRequest, LossAnswer),
        "push": (PushRequest, PushAnswer),
        "pull": (PullRequest, PullAnswer),
    }
)
"""The methods of `Transport`: what each takes and what it answers."""


@runtime_checkable
class Transport(Protocol):
    """What a client needs of a server: requests in, answers out, errors of `splitfed.errors`."""

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


class Sender(ABC):
    """A `Transport` whose five verbs all go through one method, `send`."""

    @abstractmethod
    def send(self, verb: str, request: Any, /) -> Any:
        """The answer to a request.

        Args:
            verb: A key of `VERBS`.
            request: Of the class that the table names.
        """

    def forward(self, request: ForwardRequest, /) -> ForwardAnswer:
        """Have a call of the body run and recorded."""
        answer: ForwardAnswer = self.send("forward", request)
        return answer

    def backward(self, request: BackwardRequest, /) -> BackwardAnswer:
        """Have a recorded call's gradients computed, and its parameter gradient stored."""
        answer: BackwardAnswer = self.send("backward", request)
        return answer

    def loss(self, request: LossRequest, /) -> LossAnswer:
        """Have forward, loss and backward made in one trip."""
        answer: LossAnswer = self.send("loss", request)
        return answer

    def push(self, request: PushRequest, /) -> PushAnswer:
        """Publish a client half's update."""
        answer: PushAnswer = self.send("push", request)
        return answer

    def pull(self, request: PullRequest, /) -> PullAnswer:
        """Fetch the newest client half."""
        answer: PullAnswer = self.send("pull", request)
        return answer


class Middleware(Sender):
    """A transport around another: what it overrides of `send` happens on the way there and back.

    Args:
        inner: The transport that requests go on to.
    """

    def __init__(self, inner: Transport) -> None:
        self.inner = inner

    def send(self, verb: str, request: Any, /) -> Any:
        """Pass a request on, and its answer back."""
        return getattr(self.inner, verb)(request)


class RoundRobin(Sender):
    """Several replicas behind one transport: each request goes to the next one.

    With two or more, a backward that follows its forward never meets the replica that served it. A
    live autograd graph would be of no use; what the replica needs, it finds in the store.
    """

    def __init__(self, replicas: Sequence[Transport]) -> None:
        self._turns = itertools.cycle(replicas)

    def send(self, verb: str, request: Any, /) -> Any:
        """The next replica's answer."""
        return getattr(next(self._turns), verb)(request)


def verb_of(kind: str) -> str:
    """The verb that takes requests of this kind.

    Raises:
        FormatError: none does.
    """
    for verb, (request, _) in VERBS.items():
        if request.__name__ == kind:
            return verb
    expected = ", ".join(request.__name__ for request, _ in VERBS.values())
    raise FormatError(f"a {kind[:60]!r} isn't a request: expected one of {expected}")
