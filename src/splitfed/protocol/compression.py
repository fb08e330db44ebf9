"""Compression of what crosses the cuts: a `Middleware` at the client's end.

Four flows cross: activations and outputs at the forward, their gradients at the backward. Each may
have a codec of its own (`coding`), none by default. What goes up is coded here, and the server
decodes it; what comes down the server codes as it is asked to, and it is decoded here. So the
server needs no setting, and whatever is between, HTTP, a store or nothing, carries fewer bytes.

With `delta` only what has changed of each example travels (`deltas`), of activations alone. Which
examples a batch is of only its user knows: `compression.examples(ids)`.

With `topk` most of a tensor is left out. On the way up its error is fed back: what was left out of
one request is added to the next of its kind, at the same places (Stich et al., "Sparsified SGD with
Memory", NeurIPS 2018). There it is proven of gradients of parameters, which have the same meaning
at each step; rows of a batch are other examples each time, so here it is a heuristic, to be
measured. A server keeps nothing between requests, so nothing is fed back on the way down.

The trap is that memory. A request that is repeated has to have the same bytes, or the server takes
it for another one under the same number. So it moves on only once an answer is there, and a call
that a checkpoint repeats within its backward, known by its seed, gets what its first time got. It
is this process's: a client that is restarted begins without it, which is said, unless it loads
`state_dict()`.
"""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from operator import is_
from typing import Any

import torch
from torch import Tensor

from splitfed.checks import warn_once
from splitfed.errors import InputError, ReferenceLostError
from splitfed.protocol import pytree
from splitfed.protocol.coding import SMALL, Codec, Coded, decode, distance, encode, is_codable
from splitfed.protocol.examples import EXAMPLES, Change, Examples
from splitfed.protocol.flows import FLOWS, Flow
from splitfed.protocol.messages import BackwardRequest, ForwardRequest
from splitfed.protocol.transport import Middleware, Transport

_REMEMBERED = 64
"""So many residuals, and residuals of calls that a checkpoint may repeat, are kept of a client."""


@dataclass(frozen=True, slots=True)
class Codecs:
    """The codec of each flow, by name: 'bfloat16', 'int8', 'topk:0.1', 'zstd', 'int8+zstd'.

    Raises:
        InputError: no codec has that name, what it needs isn't installed, or it is a delta of
            another flow than the activations.
    """

    activations: str = ""
    """Up, at the first cut; '' for the exact values, 'delta+int8' for changes since last time."""
    outputs: str = ""
    """Down, at the second cut."""
    grad_outputs: str = ""
    """Up, at the second cut."""
    grad_activations: str = ""
    """Down, at the first cut."""

    def __post_init__(self) -> None:
        """Check the names."""
        for flow in FLOWS:
            name = getattr(self, flow)
            if name != "" and Codec.of(name).delta and flow != "activations":
                raise InputError(
                    f"compression of {flow} is {name!r}: only activations come again in each "
                    f"epoch, so use 'delta' for these, and for {flow} what follows it"
                )

    @classmethod
    def of(cls, given: Codecs | str | Mapping[str, str]) -> Codecs:
        """The codecs that a user gave: one for all flows, or one for each of some.

        Raises:
            InputError: it isn't that.
        """
        if isinstance(given, Codecs):
            return given
        if isinstance(given, str) and given:
            # A delta is of the activations; the other flows have what follows it.
            others = given.removeprefix("delta").removeprefix("+") if given != "delta" else ""
            return cls(given, *[others if given.startswith("delta") else given] * 3)
        if isinstance(given, Mapping) and given and given.keys() <= set(FLOWS):
            return cls(**given)
        raise InputError(
            f"compression is {given!r:.80}: expected the name of a codec, such as 'int8', or a "
            f"dict of them by flow, of {', '.join(FLOWS)}"
        )

    def codec(self, flow: str) -> Codec | None:
        """The codec of a flow; `None` if its values are exact."""
        name = getattr(self, flow)
        return Codec.of(name) if name else None


class Compression(Middleware):
    """A transport whose tensors travel in fewer bytes.

    Args:
        inner: The transport that requests go on to.
        codecs: The codec of all four flows, or a dict by flow, or a `Codecs`.

    Raises:
        InputError: no codec has that name, or what it needs isn't installed.
    """

    def __init__(self, inner: Transport, codecs: Codecs | str | Mapping[str, str]) -> None:
        super().__init__(inner)
        self.codecs = Codecs.of(codecs)
        self._codecs = {flow: self.codecs.codec(flow) for flow in FLOWS}
        changes = self._codecs["activations"]
        self._delta = changes if changes is not None and changes.delta else None
        if self._delta is not None:  # what has no earlier value, as of an evaluation
            self._codecs["activations"] = self._delta.of_new
        self._examples = Examples()
        self._named = threading.local()
        """The examples that the calls of this thread are of."""
        self._flows = dict.fromkeys(FLOWS, Flow())
        self._memory = _Memory()
        self._told: set[str] = set()
        self._is_loaded = False
        """Whether it goes on from what an earlier process remembered, be it nothing."""
        self._lock = threading.Lock()

    @property
    def flows(self) -> dict[str, Flow]:
        """What it has done so far, by flow."""
        with self._lock:
            return dict(self._flows)

    @property
    def unattended(self) -> bool:
        """Whether nobody in this process commits, as the transport within says it."""
        return bool(getattr(self.inner, "unattended", False))

    def state_dict(self) -> dict[str, Tensor]:
        """What it remembers, for a checkpoint; empty without `topk` and `delta`.

        That is what error feedback has still to send, and what the server saw last of each example.
        """
        return {**self._memory.state_dict(), **self._examples.state_dict()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from `state_dict()`."""
        self._is_loaded = True
        self._memory.load_state_dict(state)
        self._examples.load_state_dict(state)

    @contextmanager
    def examples(self, ids: Sequence[int] | Tensor) -> Iterator[None]:
        """Say of which examples the calls within the block are, for a codec with 'delta'.

        The numbers stay in this process.

        Args:
            ids: A number for each example of the batch, (N,), the same in each epoch: its place in
                the data set.

        Raises:
            InputError: they aren't whole numbers.
        """
        plain = ids.tolist() if isinstance(ids, Tensor) else [*ids]
        if not isinstance(plain, list) or not all(type(number) is int for number in plain):
            raise InputError(
                f"examples are {ids!r:.80}: expected a whole number for each example of the batch, "
                "such as its place in the data set"
            )
        around = getattr(self._named, "ids", None)
        self._named.ids = plain
        try:
            yield
        finally:
            self._named.ids = around

    def send(self, verb: str, request: Any, /) -> Any:
        """The answer, decoded; the request has travelled coded, and so has the answer."""
        if verb == "forward":
            wanted = replace(request, answer_codec=self._wire("outputs"))
            answer = self._call(wanted, lambda ahead: super(Compression, self).send(verb, ahead))
            self._memory.note_call(request)
            return self._received("outputs", answer, pytree.flatten(answer.outputs)[1])
        if verb == "backward":
            return self._backward(request)
        if verb == "loss":
            wanted = replace(request.forward, answer_codec=self._wire("grad_activations"))
            answer = self._call(
                wanted,
                lambda ahead: super(Compression, self).send(verb, replace(request, forward=ahead)),
            )
            return self._received("grad_activations", answer, answer.grad_inputs)
        return super().send(verb, request)

    def _call(self, request: ForwardRequest, send: Callable[[ForwardRequest], Any]) -> Any:
        """Send a forward, coded; once more without reference to what the server has lost."""
        sent, done, changes = self._coded_call(request)
        try:
            try:
                answer = send(sent)
            except ReferenceLostError:
                for change in changes:
                    self._examples.lost(change)
                # The same values: nobody can tell from what is recorded how they have travelled.
                whole = [change.whole() for change in changes]
                sent = _with_changes(sent, whole)
                answer = send(sent)
                self._settle(whole)
            else:
                self._settle(changes)
        finally:
            for change in changes:
                self._examples.ended(change)
        self._examples.told(sent.housekeeping.references)
        done()
        return answer

    def _settle(self, changes: Iterable[Change]) -> None:
        """A request has arrived: what has changed is at the server now."""
        tally = Flow()
        for change in changes:
            self._examples.moved(change)
            exact = change.delta.num_bytes
            error, norm = change.squared_error, change.squared_norm
            tally += Flow(1, 1, exact, change.num_sent, error, norm)
        with self._lock:
            self._flows["activations"] += tally

    def _coded_call(self, request: ForwardRequest) -> tuple[ForwardRequest, Any, list[Change]]:
        """A forward as it travels, what is to be called once its answer is there, its changes."""
        spec, exact = pytree.flatten(request.inputs)
        tensors = exact
        # Where a gradient flows that is the activations; masks and positions stay exact.
        wanted = request.requires_grad if any(request.requires_grad) else [True] * len(tensors)
        given = [t if w else None for t, w in zip(tensors, wanted, strict=True)]
        feeds = request.training and request.grad
        key = (request.client_id, request.cut, request.seed) if feeds else None
        self._tell_resumed(request.client_id, request.resumed)
        kind = f"{request.client_id}|activations|{request.cut}"
        changes: list[Change] = []
        if self._delta is not None and feeds:
            tensors, changes = self._changes(self._delta, kind, tensors, given)
        found, coding, done = self._encoded("activations", given, kind if feeds else None, key)
        sent = [t if f is None else f for t, f in zip(tensors, found, strict=True)]
        is_plain = not coding and all(map(is_, sent, exact))
        inputs = request.inputs if is_plain else pytree.unflatten(spec, sent)
        request = replace(request, inputs=inputs, coding=coding)
        return _with_changes(request, changes, self._examples.given_up()), done, changes

    def _changes(
        self, codec: Codec, kind: str, tensors: list[Tensor], given: list[Tensor | None]
    ) -> tuple[list[Tensor], list[Change]]:
        """What of a call's activations travels as changes; they are taken out of `given`.

        Raises:
            InputError: no activation has as many rows as there are examples.
        """
        tensors, changes = list(tensors), []
        ids = getattr(self._named, "ids", None)
        repeats = _in_backward()
        if ids is None and not repeats:
            self._tell_unnamed()
            return tensors, []
        codable = [p for p, t in enumerate(given) if t is not None and is_codable(t)]
        for place in codable:
            tensor = tensors[place]
            name = f"{kind}|{place}"
            if repeats:
                made = self._examples.made_of(name, tensor)
                if made is not None:
                    tensors[place], given[place] = made, None
                    self._count("activations", [made], ())
            elif ids is not None and len(tensor) == len(ids) and tensor.dim() > 1:
                changes.append(self._examples.change(name, ids, tensor, place, codec))
                given[place] = None
        if codable and not changes and not repeats:
            shapes = [tuple(tensors[place].shape) for place in codable]
            raise InputError(
                f"compression.examples(...) names {len(ids or ())} examples, and the activations "
                f"are {shapes}: expected one for each row of the batch"
            )
        return tensors, changes

    def _backward(self, request: BackwardRequest) -> Any:
        cut = self._memory.cut_of(request)
        kind = f"{request.client_id}|grad_outputs|{cut}" if request.counted else None
        grads, coding, done = self._encoded("grad_outputs", request.grad_outputs, kind, None)
        coded = replace(
            request,
            grad_outputs=tuple(grads),
            coding=coding,
            answer_codec=self._wire("grad_activations"),
        )
        answer = super().send("backward", coded)
        done()
        return self._received("grad_activations", answer, answer.grad_inputs)

    def _wire(self, flow: str) -> str:
        codec = self._codecs[flow]
        return "" if codec is None else codec.on_wire()

    def _received(self, flow: str, answer: Any, tensors: Iterable[Tensor | None]) -> Any:
        """An answer, decoded and counted."""
        self._count(flow, list(tensors), answer.coding)
        return answer.decoded()

    def _encoded(
        self, flow: str, tensors: Iterable[Tensor | None], kind: str | None, key: Any
    ) -> tuple[list[Tensor | None], tuple[Coded, ...], Any]:
        """Tensors as they travel, how, and what to call once they have arrived.

        Args:
            flow: Which one.
            tensors: Those of a message; `None` for what stays as it is.
            kind: Under which name an error is fed back; `None` for not at all.
            key: What tells the call, if it may be repeated within its backward.
        """
        codec = self._codecs[flow]
        found = list(tensors)
        if codec is None:
            self._count(flow, found, ())
            return found, (), _nothing
        feeds = codec.values == "topk" and kind is not None
        coding: list[Coded] = []
        residuals: dict[str, Tensor] = {}
        exact = list(found)
        for place, tensor in enumerate(exact):
            if tensor is None:
                continue
            name = f"{kind}|{place}|{tuple(tensor.shape[1:])}"
            wanted = self._memory.with_residual(name, tensor, key) if feeds else tensor
            made = encode(wanted, codec, place)
            if made is None:
                self._tell_exact(flow, tensor)
                continue
            found[place], coded = made
            if feeds:
                decoded = decode(*made)
                residuals[name] = wanted.detach() - decoded
                error, norm = distance(tensor.detach(), decoded)
                coded = replace(coded, squared_error=error, squared_norm=norm)
            coding.append(coded)

        def done() -> None:
            self._count(flow, found, coding)
            self._memory.advance(residuals, key)

        return found, tuple(coding), done

    def _count(self, flow: str, tensors: list[Tensor | None], coding: Iterable[Coded]) -> None:
        by_place = {coded.place: coded for coded in coding}
        tally = Flow()
        for place, tensor in enumerate(tensors):
            coded = by_place.get(place)
            if tensor is None:
                continue
            if coded is None:
                tally += Flow(1, 0, tensor.nbytes, tensor.nbytes)
                continue
            sent = tensor.nbytes + sum(extra.nbytes for extra in coded.extra)
            error, norm = coded.squared_error, coded.squared_norm
            tally += Flow(1, 1, coded.num_bytes, sent, error, norm)
        with self._lock:
            self._flows[flow] += tally

    def _tell_exact(self, flow: str, tensor: Tensor) -> None:
        """Warn, once for each kind, of a tensor of a size that counts which can't be coded."""
        if not (tensor.is_floating_point() or tensor.is_complex()) or tensor.nbytes < SMALL:
            return
        why = f"its dtype is {str(tensor.dtype).removeprefix('torch.')}"
        if is_codable(tensor):
            if not bool(tensor.isfinite().all()):
                return  # as under GradScaler: ordinary, and counted
            why += f", of which {getattr(self.codecs, flow)!r} makes nothing smaller"
        elif tensor.is_floating_point():
            why = "it is expanded, or has gaps: contiguous() makes it a plain one"
        warn_once(
            self._told,
            f"{flow} {why}",
            f"compression of {flow}: a tensor {tuple(tensor.shape)} travels as it is, since {why}",
            5,
        )

    def _tell_unnamed(self) -> None:
        warn_once(
            self._told,
            "unnamed",
            f"compression {self.codecs.activations!r} sends whole activations, since it isn't told "
            "which examples they are of: call the client within "
            "client.compression.examples(numbers), with each one's place in the data set",
            6,
        )

    def _tell_resumed(self, client_id: str, resumed: int) -> None:
        codecs = [codec for codec in (self._delta, *self._codecs.values()) if codec is not None]
        feeds = any(codec.values == "topk" or (codec.delta and codec.values) for codec in codecs)
        if not resumed or not feeds or self._is_loaded:
            return
        if self._memory.has(client_id) or self._examples.has(client_id):
            return
        if f"resumed {client_id}" not in self._told:
            self._told.add(f"resumed {client_id}")
            warnings.warn(
                f"client {client_id!r} goes on after a restart, and the error feedback of its "
                "compression begins with nothing: what was still to be sent is lost, and bits "
                "differ from a run without the restart. Save client.compression.state_dict() with "
                "the checkpoint, and load it before the first batch",
                stacklevel=5,
            )


class _Memory:
    """What error feedback has still to send, by kind of tensor."""

    def __init__(self) -> None:
        self._residuals: OrderedDict[str, Tensor] = OrderedDict()
        self._before: OrderedDict[Any, dict[str, Tensor | None]] = OrderedDict()
        """What the residuals were at calls that a checkpoint may repeat."""
        self._cuts: OrderedDict[tuple[str, int], str] = OrderedDict()
        self._lock = threading.Lock()

    def with_residual(self, name: str, tensor: Tensor, key: Any) -> Tensor:
        """A tensor with what is still to be sent of its kind."""
        with self._lock:
            repeats = key is not None and _in_backward()
            known: Mapping[str, Tensor | None] = self._residuals
            if repeats:
                known = self._before.get(key, {})
            residual = known.get(name)
        if residual is None:
            return tensor
        rows = min(len(tensor), len(residual))
        made = tensor.detach().clone()
        made[:rows] += residual[:rows].to(made.device)
        return made

    def advance(self, residuals: Mapping[str, Tensor], key: Any) -> None:
        """Requests have arrived: this is what was left out of them."""
        with self._lock:
            if key is not None:
                if _in_backward():
                    return
                self._before[key] = {name: self._residuals.get(name) for name in residuals}
            for name, residual in residuals.items():
                before = self._residuals.pop(name, None)
                if before is not None and len(before) > len(residual):
                    # A smaller batch: what lies beyond it waits on.
                    before = before.clone()
                    before[: len(residual)] = residual
                    self._residuals[name] = before
                else:
                    self._residuals[name] = residual
            for kept in (self._residuals, self._before):
                while len(kept) > _REMEMBERED:
                    kept.popitem(last=False)

    def note_call(self, request: ForwardRequest) -> None:
        """Remember at which cut a call was: its backward only names its number."""
        if not request.grad:
            return
        with self._lock:
            self._cuts[request.client_id, request.call] = request.cut
            while len(self._cuts) > 16 * _REMEMBERED:
                self._cuts.popitem(last=False)

    def cut_of(self, request: BackwardRequest) -> str:
        """The cut of the call that a backward is of."""
        with self._lock:
            return self._cuts.get((request.client_id, request.call or 0), "")

    def has(self, client_id: str) -> bool:
        """Whether there is something of a client."""
        with self._lock:
            return any(name.startswith(f"{client_id}|") for name in self._residuals)

    def state_dict(self) -> dict[str, Tensor]:
        """All residuals by name."""
        with self._lock:
            return {name: residual.clone() for name, residual in self._residuals.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take residuals up."""
        if not isinstance(state, Mapping) or not all(isinstance(t, Tensor) for t in state.values()):
            raise InputError(f"expected what Compression.state_dict() returned, got {state!r:.80}")
        with self._lock:
            own = ((n, t.clone()) for n, t in state.items() if not n.startswith(EXAMPLES))
            self._residuals = OrderedDict(own)
            self._before.clear()


def compression_of(transport: Transport) -> Compression | None:
    """The compression that a client's requests go through; `None` if all is exact."""
    while isinstance(transport, Middleware) and not isinstance(transport, Compression):
        transport = transport.inner
    return transport if isinstance(transport, Compression) else None


def _with_changes(
    request: ForwardRequest, changes: Sequence[Change], given_up: tuple[str, ...] | None = None
) -> ForwardRequest:
    """A request in which some tensors travel as changes.

    Args:
        request: It, with those tensors in whatever form.
        changes: What takes their place.
        given_up: The references that it gives up; `None` for those that it gives up already.
    """
    if given_up and request.incarnation is not None:
        notes = replace(request.housekeeping, references=given_up)
        request = replace(request, housekeeping=notes)
    if not changes:
        return request
    places = {change.delta.place for change in changes}
    spec, tensors = pytree.flatten(request.inputs)
    for change in changes:
        tensors[change.delta.place] = change.payload
    coding = [coded for coded in request.coding if coded.place not in places]
    coding += [change.coded for change in changes if change.coded is not None]
    return replace(
        request,
        inputs=pytree.unflatten(spec, tensors),
        coding=tuple(coding),
        deltas=tuple(change.delta for change in changes),
    )


def _in_backward() -> bool:
    """Whether a call is made within a backward: by a checkpoint, which repeats one."""
    return torch._C._current_graph_task_id() != -1


def _nothing() -> None:
    """There is nothing to do."""
