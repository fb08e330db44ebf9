"""A batch is one backward pass, over all cut calls that it reaches.

Autograd runs a pass as a graph task. The first call that a task reaches opens the pass and queues a
callback for its end (as DDP does); each call is one part. When no other call of the client is to be
run in the task, the seal rides in the last part's request, so the ordinary batch costs no request
more. A pass that fails leaves a number that the next request gives up.

The trap: a reentrant checkpoint runs a task inside of a task. Its calls were made while the outer
one was running, and belong to that one; then only the callback at the outer end may seal.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from splitfed.client.connection import Connection
from splitfed.protocol.messages import BackwardAnswer, BackwardRequest, Chain, Seal


class Scope:
    """A `client.batch(...)` block: its calls count `num_samples` together."""

    def __init__(self, num_samples: float | None, loss_scale: float | None) -> None:
        self.num_samples = num_samples
        self.loss_scale = loss_scale


class Origin(Protocol):
    """One `client(...)` call, as a batch sees it."""

    buffers_counted: bool
    """Whether an earlier pass has taken its buffers: a retained graph passes again, but ran forward
    once."""

    @property
    def num_samples(self) -> float:
        """What the call counts."""
        ...

    @property
    def scope(self) -> Scope | None:
        """The `client.batch(...)` block around it."""
        ...


class Reached(Protocol):
    """A recorded call that a pass reaches."""

    version: int
    number: int
    training: bool

    @property
    def origin(self) -> Origin:
        """The `client(...)` call that it belongs to."""
        ...


class Passes:
    """The backward passes under way over one client's calls."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._open: dict[int, Pass] = {}
        self._lock = threading.Lock()

    def current(self, task: int) -> Pass:
        """The pass of a graph task; to be called inside of that task.

        The first call opens it and has the engine call back at the task's end.
        """
        with self._lock:
            found = self._open.get(task)
            if found is None:
                found = self._open[task] = Pass(self._connection)
                torch.autograd.Variable._execution_engine.queue_callback(lambda: self._end(task))
        return found

    def opened(self, task: int) -> Pass | None:
        """The pass of an outer task, if it is under way."""
        return self._open.get(task)

    def give_up(self) -> None:
        """Close the passes of this thread that an error ended; to be called outside of any."""
        with self._lock:
            dead = [
                task
                for task, under_way in self._open.items()
                if under_way.thread == threading.get_ident()
            ]
            for task in dead:
                self._open.pop(task).fail()

    def _end(self, task: int) -> None:
        with self._lock:
            ended = self._open.pop(task, None)
        if ended is not None:
            ended.finish()


class Pass:
    """One backward pass: its parts so far, and its seal."""

    def __init__(self, connection: Connection) -> None:
        self.thread = threading.get_ident()
        self._connection = connection
        self._seq: int | None = None
        self._scale = 1.0
        self._parts: list[Reached] = []
        self._skipped: list[Reached] = []
        self._sealed = False

    def backward(
        self, call: Reached, grads: tuple[Tensor | None, ...], *, may_seal: bool
    ) -> BackwardAnswer | None:
        """Send one call's gradients; `None` if there are none to send.

        Args:
            call: The recorded call.
            grads: The gradients of its outputs.
            may_seal: Whether the seal may ride along if no other call is outstanding.
        """
        if all(grad is None for grad in grads):
            self._skipped.append(call)
            return None
        if not call.training:
            # In eval mode nothing counts: the inputs get their gradients, and there is no part.
            return self._send(call, grads, -1, None)
        if self._sealed or self._seq is None:
            self._begin(call)
        self._parts.append(call)
        seal = None
        # The last part takes the seal along: the ordinary batch costs two requests and not three.
        if may_seal and not self._has_others():
            seal = self._seal(ahead=len(self._parts) - 1)
        try:
            return self._send(call, grads, len(self._parts) - 1, seal)
        except BaseException:
            self.fail()
            raise

    def finish(self) -> None:
        """Seal what the end of the pass finds open."""
        if self._seq is None or self._sealed or not self._parts:
            return
        try:
            self._send(None, (), len(self._parts), self._seal(ahead=len(self._parts)))
        except BaseException:
            self.fail()
            raise

    def fail(self) -> None:
        """Give the batch up: nothing of it counts."""
        if self._seq is not None and not self._sealed:
            self._connection.abandon(self._seq)
        self._seq = None
        self._parts = []
        self._sealed = False

    def _begin(self, call: Reached) -> None:
        scope = call.origin.scope
        own = None if scope is None else scope.loss_scale
        self._scale = self._connection.scale() if own is None else own
        # After a seal the same pass may go on: what it reaches from here is the next batch.
        self._seq = self._connection.number("batch")
        self._parts = []
        self._sealed = False

    def _has_others(self) -> bool:
        """Whether the task under way has still to reach another call that makes a part."""
        done = {id(call) for call in [*self._parts, *self._skipped]}
        return any(
            id(call) not in done and getattr(call, "training", False)
            for call in self._connection.outstanding()
        )

    def _seal(self, ahead: int) -> Seal:
        chains, total = _chains(self._parts)
        parts = tuple((call.version, number) for number, call in enumerate(self._parts[:ahead]))
        return Seal(parts, total, self._scale, chains)

    def _send(
        self, call: Reached | None, grads: tuple[Tensor | None, ...], part: int, seal: Seal | None
    ) -> BackwardAnswer:
        connection = self._connection
        with connection.housekeeping() as notes:
            answer = connection.transport.backward(
                BackwardRequest(
                    client_id=connection.client_id,
                    incarnation=connection.incarnation or 0,
                    seq=self._seq or 0,
                    part=max(part, 0),
                    version=self._parts[0].version if call is None else call.version,
                    call=None if call is None else call.number,
                    grad_outputs=grads,
                    seal=seal,
                    housekeeping=notes,
                )
            )
        if seal is not None:
            self._sealed = True
            if answer.status == "stored":
                for counted in self._parts:
                    counted.origin.buffers_counted = True
            connection.note_status(answer.status, seal.num_samples, seal.loss_scale)
        return answer


def _chains(parts: list[Any]) -> tuple[tuple[Chain, ...], float]:
    """The chains of a batch, one for each `client(...)` call that it reaches, and its weight."""
    last = _last_parts(parts)
    by_scope = _samples_by_scope(last)
    chains = []
    for origin, number in last:
        share = origin.num_samples
        scope = origin.scope
        if scope is not None and scope.num_samples is not None:
            # A block says what its calls count together: each gets its part of that.
            share = scope.num_samples * origin.num_samples / by_scope[id(scope)]
        # A retained graph passes again, but its forward moved the buffers only once.
        if not origin.buffers_counted:
            chains.append(Chain(share, number))
    total = 0.0
    for key, scope in {id(origin.scope): origin.scope for origin, _ in last}.items():
        natural = scope is None or scope.num_samples is None
        total += by_scope[key] if natural else scope.num_samples
    return tuple(chains), total


def _last_parts(parts: list[Any]) -> list[tuple[Any, int]]:
    """Each `client(...)` call among the parts, with the part whose forward came last in it."""
    last: dict[int, tuple[Any, int]] = {}
    for number, call in enumerate(parts):
        held = last.get(id(call.origin))
        # Autograd reaches the calls in reverse, but not always: what counts is the forward order.
        if held is None or parts[held[1]].number < call.number:
            last[id(call.origin)] = (call.origin, number)
    return list(last.values())


def _samples_by_scope(last: list[tuple[Any, int]]) -> dict[int, float]:
    """What the calls of each `client.batch(...)` block count by themselves, by the block's id."""
    samples: dict[int, float] = {}
    for origin, _ in last:
        key = id(origin.scope)
        samples[key] = samples.get(key, 0.0) + origin.num_samples
    return samples


def count_samples(*given: Any) -> float:
    """The default weight of a call: the first dimension of the first tensor among its arguments."""
    tensor = _first_tensor(given)
    return float(tensor.shape[0]) if tensor is not None and tensor.dim() else 1.0


def _first_tensor(value: Any) -> Tensor | None:
    if isinstance(value, torch.Tensor):
        return value
    if isinstance(value, Mapping):
        children: Iterable[Any] = value.values()
    elif isinstance(value, list | tuple):
        children = value
    else:
        return None
    for child in children:
        found = _first_tensor(child)
        if found is not None:
            return found
    return None
