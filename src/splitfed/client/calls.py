"""A call across the cut, under autograd.

Going out, the arguments of a cut point become a request, and the answer's outputs become the
outputs of an autograd function whose backward is the other request. A dummy input that requires
grad makes autograd call it even if nothing before the cut does. The grad mode is read before
`Function.apply`: inside it is always off.

The trap: `torch.utils.checkpoint` calls a cut point again inside of the backward pass, without a
client around it. The generator is restored by then, so the seed tells which call is meant, the
version is that call's, and the CRC of the outputs proves it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextvars import Token
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from splitfed.client.backward import Passes
from splitfed.client.buffers import BufferChain
from splitfed.client.connection import Connection
from splitfed.client.empty import answer_empty
from splitfed.client.inplace import guard
from splitfed.client.samples import Weight
from splitfed.errors import (
    ExpiredError,
    FormatError,
    InputError,
    ReplayError,
    UnsupportedError,
)
from splitfed.model.arguments import carried, check_gradients
from splitfed.model.boundary import uncached
from splitfed.model.cutpoint import Called, Caller, active_caller
from splitfed.model.recompute import checkpoint_frames
from splitfed.model.rng import Seed
from splitfed.model.tracing import UNBROKEN
from splitfed.protocol import pytree
from splitfed.protocol.messages import ForwardAnswer, ForwardRequest, Housekeeping


@dataclass(slots=True, eq=False)
class _Made:
    """A cut call that was made in a session, as far as a recompute must know it."""

    cut: str
    seed: int
    crcs: tuple[int, ...]
    before: _Made | None
    """The call before it, whose buffers it continues."""
    number: int | None
    """Its record's number; `None` until it is run with grad (a reentrant checkpoint runs without it
    first)."""
    nonce: int
    """What tells it from a copy's of that number."""


class Session:
    """One `client(...)` call: all its cut calls run at one version and hand their buffers on.

    Args:
        connection: The client's process.
        passes: Its backward passes.
        weight: What the call counts.
        version: Pinned version; `None` for the newest at the first cut call.
        training: The client's mode.
        counts: Whether passes over it may count: not in a frozen half.
    """

    def __init__(
        self,
        connection: Connection,
        passes: Passes,
        weight: Weight,
        version: int | None,
        training: bool,
        counts: bool = True,
    ) -> None:
        self.connection = connection
        self.passes = passes
        self.num_samples, self.doubt = weight
        self.scope = passes.scope
        self.version = version
        self.training = training
        self.counts = counts
        self.chain: BufferChain | None = None
        self.place = -1
        self.buffers_counted = False
        self.in_batch = False
        self.passed: dict[str, Any] = {}
        """By the name of a run of layers, which of them was called last; see `model/runs`."""
        self._made: list[_Made] = []
        self._token: Token[Caller | None] | None = None

    def __enter__(self) -> Session:
        """Make this the session that cut points hand their calls to."""
        self._token = active_caller.set(self)
        return self

    # Where torch.compile ends a graph in any case; under fullgraph=True this says why.
    __enter__._torchdynamo_disable = True  # type: ignore[attr-defined]
    __enter__._torchdynamo_disable_msg = UNBROKEN  # type: ignore[attr-defined]

    def __exit__(self, *exception: object) -> None:
        token = self._token
        # A token holds the whole context that it was made in, and graphs hold sessions for long.
        self._token = None
        if token is not None:
            active_caller.reset(token)

    def call(self, point: Called, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Answer a cut call of this session."""
        if self.num_samples == 0 and torch.is_grad_enabled():
            found = answer_empty(point, args, kwargs, lambda: self._call(point, args, kwargs))
            if found is not NotImplemented:
                return found
        return self._call(point, args, kwargs)

    def _call(self, point: Called, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if torch._C._current_graph_task_id() == -1:
            self.passes.give_up()
        seed = Seed()
        with self.connection.housekeeping() as notes, uncached():
            before, continued = self._before(point)
            request, tensors = self.request(point, args, kwargs, seed, before, notes)
            if continued is not None:
                request = replace(request, previous_version=continued.version)
            try:
                answer = self.connection.transport.forward(request)
            except (ExpiredError, FormatError, InputError, ReplayError):
                if continued is None:
                    raise
                # The record that it continues may be the one at fault, which its own backward will
                # say: this call begins anew.
                self.connection.buffers.drop()
                before = continued = None
                request = replace(request, previous=None, previous_version=None, previous_nonce=0)
                answer = self.connection.transport.forward(request)
        self.connection.note_repeated(request.repeats, answer.repeated)
        self._note(answer, seed)
        point.note(answer.written)
        if continued is not None:
            if continued.version == answer.version:
                self.connection.buffers.follow(self, continued)
            else:
                before = continued = None
        self._made.append(
            _Made(
                request.cut,
                request.seed,
                answer.crcs,
                before,
                request.call if request.grad else None,
                request.nonce,
            )
        )
        outputs, recorded = self._connect(request, answer, tensors)
        if answer.moved:
            self._note_moved(recorded, continued)
        return outputs

    def _before(self, point: Called) -> tuple[_Made | None, RecordedCall | None]:
        """The call whose buffers the next one continues; if it is another session's, its record."""
        if self._made:
            return self._made[-1], None
        if not point.mode_in(self.training) or not torch.is_grad_enabled():
            return None, None
        tip: Any = self.connection.buffers.before(self.version)
        return (None, None) if tip is None else (tip.made, tip)

    def _note_moved(self, recorded: RecordedCall | None, before: RecordedCall | None) -> None:
        """A call in train mode has moved buffers."""
        if recorded is None:
            if not checkpoint_frames():
                self.passes.watch.note_without_grad()
            return
        recorded.moved = True
        recorded.made = replace(self._made[-1], before=None)
        recorded.before = before
        buffers = self.connection.buffers
        buffers.moved(recorded)
        self.passes.watch.note_buffers(buffers)

    def recompute(
        self,
        point: Called,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        earlier: Sequence[Any],
        alone: bool,
    ) -> Any:
        """Answer a cut call that is made again inside of a backward pass.

        The checkpoint has put the generator back, so the seed finds the calls that may be meant.
        Two calls may have drawn the same seed (a user may seed before each step): the outputs tell.

        Raises:
            ReplayError: no earlier call gave these outputs.
        """
        if any(session.num_samples == 0 for session in earlier):  # which leaves no record to find
            found = answer_empty(point, args, kwargs, lambda: self._call(point, args, kwargs))
            if found is not NotImplemented:
                return found
        seed = Seed()
        candidates = _calls_with_seed(earlier, point.name, seed.value)
        if not candidates and not alone:
            seed.put_back()
            return NotImplemented
        for session, made in candidates:
            request, tensors = session.request(point, args, kwargs, seed, made.before)
            try:
                with uncached():
                    answer = session.connection.transport.forward(request)
            except ExpiredError:
                # The call before it has had its backward, so it isn't this one that is recomputed.
                continue
            if answer.crcs == made.crcs:
                session._note(answer, seed)
                if request.grad and made.number is None:
                    made.number, made.nonce = request.call, request.nonce
                return session._connect(request, answer, tensors)[0]
            if request.grad:
                session.connection.release(RecordedCall(session, request, answer.version))
        raise ReplayError(
            "a cut point was called inside of a backward pass, as torch.utils.checkpoint does, "
            f"and none of {len(candidates)} earlier calls with that random state had the same "
            "outputs: keep preserve_rng_state=True, the client half free of state, and all "
            "replicas in one numerics class"
        )

    def request(
        self,
        point: Called,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        seed: Seed,
        before: _Made | None,
        notes: Housekeeping = Housekeeping(),  # noqa: B008 -- frozen
    ) -> tuple[ForwardRequest, list[Tensor]]:
        """The request for a cut call, and its distinct input tensors."""
        args, kwargs, tensors = carried(args, kwargs, self.connection.warn_once)
        device = tensors[0].device.type if tensors else "cpu"
        autocast = None
        if torch.is_autocast_enabled(device):
            autocast = str(torch.get_autocast_dtype(device)).removeprefix("torch.")
        training = point.mode_in(self.training)
        return ForwardRequest(
            client_id=self.connection.client_id,
            incarnation=self.connection.incarnation,
            process=self.connection.process,
            call=self.connection.number("call"),
            cut=point.name,
            inputs=(args, kwargs),
            requires_grad=tuple(tensor.requires_grad for tensor in tensors),
            training=training,
            grad=torch.is_grad_enabled(),
            seed=seed.value,
            autocast=autocast,
            version=self.version,
            seen=self.connection.seen,
            previous=None if before is None else before.number,
            housekeeping=notes,
            part=point.part,
            settings=point.settings(training),
            resumed=self.connection.resumed,
            nonce=int.from_bytes(os.urandom(4), "little"),
            previous_nonce=0 if before is None else before.nonce,
            repeats=self._repeats(training),
        ), tensors

    def _repeats(self, training: bool) -> int | None:
        """The batch that the call is to be part of, if an earlier process may have stored it."""
        if self.version is not None or not training:
            return None
        seq = self.connection.ahead(self.passes.open_seq)
        if seq is None or torch.is_grad_enabled() or checkpoint_frames():
            return seq
        return None

    def _note(self, answer: ForwardAnswer, seed: Seed) -> None:
        if not answer.drew:
            seed.put_back()
        self.connection.opened(answer.incarnation, answer.version)
        self.version = answer.version

    @staticmethod
    def _apply_changes(
        changed: Mapping[int, Tensor], tensors: list[Tensor], recorded: RecordedCall | None
    ) -> None:
        """Let the client's inputs show what the body changed in place."""
        watched = set()
        # All guards come first: a copy moves the version counter, which an input may share with a
        # view that is still to be guarded.
        for index in changed:
            if recorded is not None and tensors[index].requires_grad:
                guard(tensors[index], index, partial(recorded.answered, index))
                watched.add(index)
        for index, value in changed.items():
            if index not in watched:
                with torch.no_grad():
                    # No gradient could show that this tensor has another use: its values have to.
                    tensors[index].copy_(value)

    def _connect(
        self, request: ForwardRequest, answer: ForwardAnswer, tensors: list[Tensor]
    ) -> tuple[Any, RecordedCall | None]:
        """The outputs, as autograd should see them, and the call if it may have a backward."""
        spec, outputs = pytree.flatten(answer.outputs)
        if tensors:
            outputs = [output.to(tensors[0].device) for output in outputs]
        recorded = RecordedCall(self, request, answer.version) if request.grad else None
        # In a frozen half nothing requires grad that doesn't come in with it.
        live = any(answer.requires_grad) and (self.counts or any(request.requires_grad))
        if recorded is not None and live:
            crossing = (recorded, answer.requires_grad, outputs, dummy(), *tensors)
            outputs = list(_Cross.apply(*crossing))  # type: ignore[no-untyped-call]
        elif recorded is not None and not (answer.moved and request.training):
            self.connection.release(recorded)
        elif recorded is not None:
            self.connection.keep(recorded)
        self._apply_changes(answer.changed, tensors, recorded)
        return pytree.unflatten(spec, outputs), recorded


def _calls_with_seed(
    earlier: Sequence[Session], cut: str, seed: int
) -> list[tuple[Session, _Made]]:
    """The calls of a cut in earlier sessions that had this seed, newest first in each session."""
    found = []
    for session in earlier:
        for made in reversed(session._made):
            if made.cut == cut and made.seed == seed:
                found.append((session, made))
    return found


class RecordedCall:
    """A cut call whose forward is on record: what its node of the graph holds."""

    def __init__(self, origin: Session, request: ForwardRequest, version: int) -> None:
        self.origin = origin
        self.version = version
        self.number = request.call
        self.nonce = request.nonce
        self.training = request.training
        self.counts = origin.counts
        self.moved = False
        """Whether it has moved buffers, so that another call may continue it ..."""
        self.made: _Made | None = None
        self.before: RecordedCall | None = None
        """... and the call of an earlier session that it continues."""
        self._process = origin.connection.process
        self.task = torch._C._current_graph_task_id()
        """The graph task that the call was made in, if it is a recompute; else -1."""
        self._answered: tuple[Tensor | None, ...] = ()

    def backward(
        self, grads: tuple[Tensor | None, ...], accumulates: bool
    ) -> tuple[Tensor | None, ...]:
        """The gradients of the inputs, from the server; empty if there are none.

        Raises:
            UnsupportedError: the process was forked since the forward.
        """
        self.origin.connection.check_process(self._process)
        outer = self.origin.passes.opened(self.task)
        under_way = outer or self.origin.passes.current(torch._C._current_graph_task_id())
        answer = under_way.backward(self, grads, may_seal=outer is None, accumulates=accumulates)
        self._answered = () if answer is None else answer.grad_inputs
        return self._answered

    def answered(self, index: int) -> Tensor | None:
        """The gradient of an input, as the last backward answered it."""
        return self._answered[index] if self._answered else None


class _Cross(torch.autograd.Function):
    """Outputs of a recorded call forward; its gradients, by request, backward."""

    @staticmethod
    def forward(
        ctx: Any,
        call: RecordedCall,
        requires_grad: tuple[bool, ...],
        outputs: list[Tensor],
        dummy: Tensor,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        """The outputs, as they came."""
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(dummy)
        plain = [t for t, needed in zip(outputs, requires_grad, strict=True) if not needed]
        ctx.mark_non_differentiable(*plain)
        ctx.call = call
        ctx.devices = [tensor.device for tensor in tensors]
        call.origin.connection.watch(call, ctx)
        if call.task != -1:
            call.origin.passes.current(call.task)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        """The gradients of the inputs."""
        refuse_second_order()
        # Asked for because it raises, as a local model would, if the graph was freed.
        ctx._raw_saved_tensors  # noqa: B018
        check_gradients(grads)
        # The node after the dummy accumulates its gradient, empty as it is, exactly where a pass
        # accumulates those of parameters: not under torch.autograd.grad or backward(inputs=...).
        accumulates = torch._C._will_engine_execute_node(ctx.next_functions[0][0])
        found = ctx.call.backward(grads, accumulates) or [None] * len(ctx.devices)
        moved = [
            None if grad is None else grad.to(device)
            for grad, device in zip(found, ctx.devices, strict=False)
        ]
        return None, None, None, None, *moved


def refuse_second_order() -> None:
    """Refuse `create_graph=True`; to be called in a backward.

    Raises:
        UnsupportedError: gradients of gradients are asked for.
    """
    if torch.is_grad_enabled():
        raise UnsupportedError(
            "create_graph=True can't cross the cut: the server answers gradients, not their graph. "
            "Compute what needs second derivatives (gradient penalties, meta-learning) within the "
            "client half"
        )


def dummy() -> Tensor:
    """An empty tensor that requires grad.

    With it autograd runs the backward of a crossing even if nothing before the cut requires grad.
    """
    return torch.empty(0, requires_grad=True, device="cpu")
