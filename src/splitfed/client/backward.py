"""A batch is one backward pass, over all cut calls that it reaches.

Autograd runs a pass as a graph task. The first call that a task reaches opens the pass and queues a
callback for its end (as DDP does); each call is one part. When no other call of the client is to be
run in the task, the seal rides in the last part's request, so the ordinary batch costs no request
more. A pass that fails leaves a number that the next request gives up. Passes that a block sums
leave their parts in one batch, which the end of the block seals.

The trap: a reentrant checkpoint runs a task inside of a task. Its calls were made while the outer
one was running, and belong to that one; then only the callback at the outer end may seal.
"""

from __future__ import annotations

import sys
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from splitfed.client.blocks import Scope, Sum, is_accumulating
from splitfed.client.buffers import BufferChain
from splitfed.client.connection import Connection
from splitfed.client.seal import chains_of
from splitfed.client.watch import Watch
from splitfed.errors import InputError
from splitfed.protocol.messages import BackwardAnswer, BackwardRequest, Seal


class Origin(Protocol):
    """One `client(...)` call, as a batch sees it."""

    chain: BufferChain | None
    """The calls that it continues, and those that continue it."""
    place: int
    buffers_counted: bool
    """Whether an earlier pass has taken its buffers: a retained graph passes again, but ran forward
    once."""
    in_batch: bool
    doubt: str | None
    """Why what it counts may be another number."""

    @property
    def num_samples(self) -> float:
        """What the call counts."""
        ...

    @property
    def scope(self) -> Scope | None:
        """The `client.batch(...)` blocks around it."""
        ...


class Reached(Protocol):
    """A recorded call that a pass reaches."""

    version: int
    number: int
    nonce: int
    training: bool
    counts: bool
    """Whether a pass that accumulates parameter gradients counts here: not in a frozen half."""

    @property
    def origin(self) -> Origin:
        """The `client(...)` call that it belongs to."""
        ...


class Passes:
    """The backward passes under way over one client's calls, and the batch that a block holds open.

    Args:
        connection: The client's process.
        watch: What is told of the passes.
    """

    def __init__(self, connection: Connection, watch: Watch) -> None:
        self.scope: Scope | None = None
        """The `client.batch(...)` blocks that are open."""
        self.watch = watch
        self.has_trainer = False
        """Whether Accelerate has prepared the client."""
        self.pipeline: Callable[[], Any] | None = None
        """A weak reference to the pipeline that was asked last for a batch."""
        self._connection = connection
        self._sum: Sum | None = None
        self._open: dict[int, Pass] = {}
        self._lock = threading.Lock()
        # Weakly: the watch is told of, and is no reason to keep a client.
        watch.settle = weakref.WeakMethod(self.settle)

    def current(self, task: int) -> Pass:
        """The pass of a graph task; to be called inside of that task.

        The first call opens it and has the engine call back at the task's end.
        """
        with self._lock:
            found = self._open.get(task)
            if found is None:
                found = self._open[task] = Pass(self, self._held())
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

    @property
    def open_seq(self) -> int | None:
        """The number of the batch that is held open, if it has one."""
        seq: int | None = None if self._sum is None else self._sum.batch.seq
        return seq

    def check_between(self) -> None:
        """Refuse a look at the numbers while a batch is under way: it would be lost.

        Raises:
            InputError: a pass is running, or a block or trainer sums several.
        """
        ahead = 0 if self.pipeline is None else getattr(self.pipeline(), "num_ahead", 0)
        if ahead:
            raise InputError(
                f"client.position() was called in a pipeline, whose forwards are {ahead} batches "
                "ahead of its last result: call it where a pipeline has ended. To save within an "
                "epoch, give it the loader's batches in parts, by itertools.islice(batches, n)"
            )
        running = torch._C._current_graph_task_id() != -1
        if not running:
            self.give_up()
            with self._lock:
                running = bool(self._open)
        held = self._sum
        summing = held is not None and (not held.automatic or held.batch.seq is not None)
        if running or summing:
            where = "a backward pass" if running else "client.batch(), or while gradients add up"
            raise InputError(
                f"client.position() was called within {where}, where a batch is half done: "
                "call it between two steps of the optimizer"
            )

    def end_forward(self, first: int) -> None:
        """Take a forward as one whose backward has come, though it is still to come.

        A forward that is made before it begins with the buffers that it would begin with after it.

        Args:
            first: The number of its first call.
        """
        for call in self._connection.calls_from(first):
            call.origin.in_batch = True  # or it would be missed, if it is given up
        tip: Any = self._connection.buffers.tip
        is_held = self._sum is not None and self._sum.is_held
        if tip is not None and self.counts(tip, True) and not is_held:
            self._connection.buffers.drop()

    def counts(self, call: Reached, accumulates: bool) -> bool:
        """Whether the pass under way counts at a call.

        Args:
            call: The call.
            accumulates: Whether it accumulates parameter gradients, as `loss.backward()` does.
        """
        # What is said at the backward comes first, then what was said at the forward.
        for scope in (self.scope, call.origin.scope):
            if scope is not None and scope.count is not None:
                return scope.count
        return accumulates and call.counts

    # --------------------------------------------------------------------- passes that are summed

    def open_sum(self) -> Sum | None:
        """Sum the passes from here on; `None` if an outer block does so already."""
        if self._sum is not None and not self._sum.automatic:
            return None
        self.settle()
        self._sum = self.watch.block = Sum(self._new(), automatic=False)
        return self._sum

    def close_sum(self, opened: Sum) -> None:
        """Seal what the block has summed."""
        self._sum = self.watch.block = None
        self.give_up()
        if opened.is_broken:
            opened.batch.fail()
            warnings.warn(
                f"a backward pass within client.batch() of client {self._connection.client_id!r} "
                "has failed, so nothing that the block has summed counts: "
                "the body gets no gradient of it",
                stacklevel=5,
            )
        opened.batch.seal()

    def drop_sum(self, opened: Sum, error: BaseException) -> None:
        """Give up what the block has summed, and say so on the error that ends it."""
        self._sum = self.watch.block = None
        self.give_up()
        if opened.num_passes and opened.batch.parts:
            self.watch.note_dropped()
            said = (
                f"{opened.num_passes} backward passes that client.batch() had summed were dropped: "
                "nothing of them counts for the body"
            )
            if sys.version_info >= (3, 11):
                error.add_note(said)
            else:
                warnings.warn(said, stacklevel=5)
        opened.batch.fail()

    def settle(self) -> None:
        """Seal what a trainer has accumulated so far: its optimizer steps now."""
        held = self._sum
        if held is not None and held.automatic:
            self._sum = None
            held.batch.seal()

    def note_loss(self) -> None:
        """A `client.loss(...)` is about to count, by itself.

        Raises:
            InputError: it is in a block that sums.
        """
        held = self._sum
        if held is None or held.automatic:
            return
        if held.has_loss or held.batch.parts:
            raise _not_summed()
        held.has_loss = True

    def _held(self) -> Sum | None:
        held = self._sum
        if (
            held is None
            and self.has_trainer
            and is_accumulating()
            and not self._connection.scale_is_said(self.scope)
        ):
            held = self._sum = Sum(self._new(), automatic=True)
        return held

    def _new(self) -> Batch:
        return Batch(self._connection, self)

    def _end(self, task: int) -> None:
        with self._lock:
            ended = self._open.pop(task, None)
        if ended is None:
            return
        ended.finish()
        if self._sum is not None and not self._sum.is_held:
            self._sum = None


class Pass:
    """One backward pass over the calls of a client.

    Args:
        passes: Those of its client.
        held: The sum that it is part of, if there is one.
    """

    def __init__(self, passes: Passes, held: Sum | None) -> None:
        self.thread = threading.get_ident()
        self._passes = passes
        self._held = held
        self._batch: Batch = passes._new() if held is None else held.batch
        self._done: set[int] = set()
        self._begun = False

    def backward(
        self,
        call: Reached,
        grads: tuple[Tensor | None, ...],
        *,
        may_seal: bool,
        accumulates: bool = True,
    ) -> BackwardAnswer | None:
        """Send one call's gradients; `None` if there are none to send.

        Args:
            call: The recorded call.
            grads: The gradients of its outputs.
            may_seal: Whether the seal may ride along if no other call is outstanding.
            accumulates: Whether the pass accumulates parameter gradients.
        """
        self._done.add(id(call))
        if all(grad is None for grad in grads):
            return None
        if not call.training:
            # In eval mode nothing counts: the inputs get their gradients, and there is no part.
            self._passes.watch.note_eval()
            return self._batch.send(call, grads)
        if not self._passes.counts(call, accumulates):
            self._passes.watch.note_uncounted()
            return self._batch.send(call, grads, counted=False)
        try:
            self._begin(call)
            # The last part takes the seal along: the ordinary batch costs two requests and not
            # three.
            ends = self._held is None or not self._held.is_held
            return self._batch.add(call, grads, seal=may_seal and ends and not self._has_others())
        except BaseException:
            self.fail()
            raise

    def finish(self) -> None:
        """Seal what the end of the pass finds open."""
        if self._held is not None:
            self._held.num_passes += self._begun
            if self._held.is_held:
                return
        self._batch.seal()

    def fail(self) -> None:
        """Give the batch up: nothing of it counts."""
        if self._held is not None and self._held.num_passes:
            self._held.is_broken = True
        self._batch.fail()

    def _begin(self, call: Reached) -> None:
        if self._held is not None and self._held.has_loss:
            raise _not_summed()
        if not self._begun:
            self._begun = True
            self._passes.watch.note_pass(self._batch.join(call))

    def _has_others(self) -> bool:
        """Whether the task under way has still to reach another call that makes a part."""
        outstanding: list[Any] = self._passes._connection.outstanding()
        return any(
            id(call) not in self._done and call.training and self._passes.counts(call, True)
            for call in outstanding
        )


class Batch:
    """One batch: its number, its parts so far, and its seal.

    Args:
        connection: The client's process.
        passes: Those of its client.
    """

    def __init__(self, connection: Connection, passes: Passes) -> None:
        self.parts: list[Any] = []
        self._connection = connection
        self._passes = passes
        self._process = ""
        self.seq: int | None = None
        """Its number, from its first part on."""
        self._scale: float | None = None
        self._says_scale = False

    def join(self, call: Reached) -> float:
        """A pass that begins at a call is to be part of it.

        Returns:
            What its loss is multiplied by.

        Raises:
            InputError: the loss scale isn't that of the passes before, or is no number.
        """
        scope = call.origin.scope
        own = None if scope is None else scope.loss_scale
        scale = self._connection.scale() if own is None else own
        if self.parts and scale != self._scale:
            raise InputError(
                f"client.batch() sums passes of one loss scale: expected {self._scale} "
                f"as in the first, got {scale}"
            )
        self._scale = scale
        self._says_scale = self._connection.scale_is_said(scope)
        return scale

    def add(self, call: Reached, grads: tuple[Tensor | None, ...], *, seal: bool) -> BackwardAnswer:
        """Send a part, with the seal if it is the last one."""
        if self.seq is None:
            self._process = self._connection.process
            self.seq = self._connection.number("batch")
        self.parts.append(call)
        call.origin.in_batch = True
        ahead = len(self.parts) - 1
        return self.send(call, grads, ahead, self._seal(ahead) if seal else None)

    def seal(self) -> None:
        """Seal it, if it has parts."""
        if self.seq is None or not self.parts:
            return
        try:
            ahead = len(self.parts)
            self.send(None, (), ahead, self._seal(ahead))
        except BaseException:
            self.fail()
            raise

    def fail(self) -> None:
        """Give it up: nothing of it counts, and no call continues what it reached."""
        self._connection.buffers.drop(self.parts)
        # The numbers of a forked process are its own.
        if self.seq is not None and self._process == self._connection.process:
            self._connection.abandon(self.seq)
        self._reset()

    def _reset(self) -> None:
        self.seq = None
        self.parts = []

    def _seal(self, ahead: int) -> Seal:
        chains, total = chains_of(self.parts)
        for call in self.parts:
            self._connection.doubt(call.origin)
        first = self._connection.resumed
        parts = tuple((call.version, n) for n, call in enumerate(self.parts[:ahead], first))
        if first:
            chains = tuple(chain.numbered_from(first) for chain in chains)
        return Seal(parts, total, 1.0 if self._scale is None else self._scale, chains)

    def send(
        self,
        call: Reached | None,
        grads: tuple[Tensor | None, ...],
        part: int = 0,
        seal: Seal | None = None,
        *,
        counted: bool = True,
    ) -> BackwardAnswer:
        """Send the gradients of a call, the seal, or both."""
        connection = self._connection
        with connection.housekeeping() as notes:
            answer = connection.transport.backward(
                BackwardRequest(
                    client_id=connection.client_id,
                    incarnation=connection.incarnation or 0,
                    seq=self.seq or 0,
                    part=connection.resumed + part,
                    version=self.parts[0].version if call is None else call.version,
                    call=None if call is None else call.number,
                    grad_outputs=grads,
                    seal=seal,
                    housekeeping=notes,
                    counted=counted,
                    resumed=connection.resumed,
                    nonce=0 if call is None else call.nonce,
                )
            )
        if seal is not None:
            self._note(seal, answer.status)
        return answer

    def _note(self, seal: Seal, status: str) -> None:
        """Take note of what became of it. The pass may go on: then the next batch begins."""
        parts = self.parts
        self._reset()
        stored = status == "stored"
        first = self._connection.resumed
        for chain in seal.chains if stored else ():
            origin = parts[chain.last_part - first].origin
            if origin.chain is not None and not origin.buffers_counted:
                origin.chain.note(origin.place, chain.after)
            origin.buffers_counted = True
        version = max(call.version for call in parts)
        self._connection.buffers.close(version, stored=stored)
        self._passes.watch.note_batch(status, parts[0].version, says_scale=self._says_scale)
        self._connection.note_status(status, seal.num_samples, seal.loss_scale)


def _not_summed() -> InputError:
    return InputError(
        "client.loss() counts by itself, at the forward, so client.batch() can't sum it with other "
        "passes: call client(x) and compute the loss here, or put each client.loss() into a block "
        "of its own"
    )
