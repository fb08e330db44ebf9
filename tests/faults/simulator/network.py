"""The network between clients and servers: requests and answers are lost, doubled, late, and tried once more.

A request is served by a thread of the server's process, so the client may have given up, or be dead, while it is under
way, and a second try may overtake the first. The client's end retries as the HTTP transport does: what may pass, on
whichever server is there, with the very same request.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from tests.faults.simulator.process import Fault, Process
from tests.faults.simulator.scheduler import Fiber, Killed, current
from torch import Tensor

from splitfed.errors import CorruptedError, SplitFedError, StoreError, UnreachableError
from splitfed.protocol import pytree
from splitfed.protocol.ids import BatchId
from splitfed.protocol.messages import BackwardRequest, ForwardRequest, LossRequest
from splitfed.protocol.transport import Sender

if TYPE_CHECKING:
    from tests.faults.simulator.actors import Server

_PATIENCE = 40
_LATE = 300


@dataclass(eq=False)
class Sent:
    """A request of a client, and what came of it."""

    network: Network
    verb: str
    request: Any
    head: int
    """The newest version when it was sent first."""
    answer: Any = None
    error: str = ""
    came_late: bool = False
    """Whether its batch was counted already when a server answered it."""

    @property
    def batch(self) -> BatchId | None:
        """The batch that it closes, if it does."""
        request = self.request
        if isinstance(request, LossRequest):
            ahead = request.forward
            incarnation = self.answer.incarnation if self.answer is not None else ahead.incarnation
            counts = request.counted and ahead.grad and ahead.training and incarnation is not None
            return BatchId(ahead.client_id, incarnation, request.seq) if counts else None
        if isinstance(request, BackwardRequest) and request.seal is not None:
            return BatchId(request.client_id, request.incarnation, request.seq)
        return None


class Network(Sender):
    """A client's way to the servers.

    Args:
        process: The client's.
        tries: How often it sends a request before it gives up.
    """

    def __init__(self, process: Process, tries: int) -> None:
        self.process = process
        self.world = process.world
        self.is_forked = False
        """Whether another process bears the same incarnation."""
        self.calls: dict[int, Sent] = {}
        """Its answered forwards, by number."""
        self.parts: dict[tuple[int, int], Sent] = {}
        """Its backwards, by batch and part."""
        self._tries = tries

    def send(self, verb: str, request: Any, /) -> Any:
        """Have it answered by some server."""
        sent = Sent(self, verb, _copied(request), self.world.ledger.head)
        self.world.ledger.sent(sent)
        for attempt in range(self._tries):
            fault = self.process.step("request", f"{verb} {self._shown(request)} try {attempt}")
            try:
                if fault == "unsent":
                    raise UnreachableError("the request was lost")
                sent.answer = self._exchange(sent, fault)
            except (StoreError, UnreachableError) as error:
                sent.error = f"{type(error).__name__}: {error}"
                if isinstance(error, CorruptedError) or attempt + 1 == self._tries:
                    self.world.ledger.refused(sent, error)
                    raise
                self.process.pause(1 + int(self.process.choose.random() * 20))
            except SplitFedError as error:
                sent.error = f"{type(error).__name__}: {error}"
                self.world.ledger.refused(sent, error)
                raise
            else:
                self.world.ledger.answered(sent)
                return sent.answer
        raise AssertionError("at least one try")

    def _exchange(self, sent: Sent, fault: Fault | None) -> Any:
        server = self._server()
        exchange = Exchange(current())
        exchange.begin(server, sent)
        if fault == "twice":
            again = self._server()
            self.world.scheduler.after(1 + int(fault.size * _LATE), lambda: Exchange(None).begin(again, sent))
        exchange.wait(self.process, 1 + int(fault.size * _PATIENCE) if fault == "impatient" else None)
        if fault == "unanswered":
            raise UnreachableError("the answer was lost")
        if exchange.error is not None:
            # A new one: its traceback is to hold the client's frames, not the server's.
            raise exchange.error()
        return exchange.answer

    def _server(self) -> Server:
        while not self.world.servers:
            self.process.pause(10)
        servers = self.world.servers
        return servers[int(self.process.choose.random() * len(servers))]

    def _shown(self, request: Any) -> str:
        if isinstance(request, BackwardRequest):
            seal = "" if request.seal is None else " seal"
            return f"call {request.call} at {request.version}, batch {request.incarnation}/{request.seq}{seal}"
        ahead = request.forward if isinstance(request, LossRequest) else request
        return f"call {getattr(ahead, 'call', None)}"


@dataclass(eq=False)
class Exchange:
    """One try of a request at one server."""

    waiter: Fiber | None
    is_done: bool = False
    answer: Any = None
    error: Callable[[], BaseException] | None = field(default=None)

    def begin(self, server: Server, sent: Sent) -> None:
        """Have it served, in a thread of the server's process."""
        server.process.start(lambda: self._serve(server, sent), sent.verb, self._end)

    def wait(self, process: Process, patience: int | None) -> None:
        """Wait for the answer.

        Raises:
            UnreachableError: there is none in so many steps.
        """
        scheduler = process.world.scheduler
        while not self.is_done:
            scheduler.park(patience)
            if process.is_dead:
                raise Killed
            if patience is not None and not self.is_done:
                self.waiter = None
                raise UnreachableError("the answer took too long")

    def _serve(self, server: Server, sent: Sent) -> None:
        ledger = server.process.world.ledger
        incarnation = ledger.newest_incarnation(_client_of(sent.request))
        try:
            self.answer = getattr(server.app, sent.verb)(sent.request)
            ledger.served(sent, self.answer, incarnation)
        except SplitFedError as error:
            kind, text = type(error), str(error)
            self.error = lambda: kind(text)
        except Exception as error:  # noqa: BLE001 -- what a service would answer as 500
            ledger.fail(f"a server answered {sent.verb} of {sent.network.process.name} with {error!r}", error)
            self.error = lambda: UnreachableError("the server failed")

    def _end(self) -> None:
        if self.answer is None and self.error is None:
            self.error = lambda: UnreachableError("the connection was reset")
        self.is_done = True
        if self.waiter is not None:
            self.waiter.process.world.scheduler.unpark(self.waiter)


def _client_of(request: Any) -> str:
    found: str = request.client_id
    return found


def _copied(message: Any) -> Any:
    """A message with tensors of its own, as if it had crossed a wire."""
    if isinstance(message, LossRequest):
        return replace(message, forward=_copied(message.forward), target=_clone(message.target))
    if isinstance(message, ForwardRequest):
        return replace(message, inputs=_clone(message.inputs))
    if isinstance(message, BackwardRequest):
        return replace(message, grad_outputs=_clone(message.grad_outputs))
    return message


@torch.no_grad()
def _clone(tree: Any) -> Any:
    spec, tensors = pytree.flatten(tree)
    copies: list[Tensor] = [tensor.detach().clone() for tensor in tensors]
    return pytree.unflatten(spec, copies)
