"""The split server: forward and backward as two independent calls, with nothing kept in between.

A forward stores what it ran on; a backward, on any replica, at any time, runs it again with the
same bits, stores the parameter gradient as a file and answers the gradients of the inputs. What
this object holds besides are caches of things that can't change (models by version, graphs of the
last few forwards): they change speed, never results.

Order matters in `backward`: a batch is acknowledged only after its gradient is on file.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from splitfed.errors import (
    AlreadyAppliedError,
    CorruptedError,
    DigestError,
    ExpiredError,
    InputError,
    SplitFedError,
    StoreError,
    UnsupportedError,
)
from splitfed.model import execution
from splitfed.model.boundary import fresh
from splitfed.model.cutpoint import CutPoint
from splitfed.model.execution import Run
from splitfed.model.fingerprint import values_beside
from splitfed.model.numerics import is_repeatable
from splitfed.model.recipes import recipe_of
from splitfed.model.rng import compute_turns
from splitfed.model.skeleton import Template, device_of, unwrap
from splitfed.model.stamp import check_stamp, stamp_of
from splitfed.protocol import pytree
from splitfed.protocol.coding import Codec
from splitfed.protocol.deltas import Lookup, kept_rows
from splitfed.protocol.fields import check_types
from splitfed.protocol.ids import BatchId, check_client_id, check_number
from splitfed.protocol.messages import (
    BackwardAnswer,
    BackwardRequest,
    ForwardAnswer,
    ForwardRecord,
    ForwardRequest,
    Housekeeping,
    LossAnswer,
    LossRequest,
    PullAnswer,
    PullRequest,
    PushAnswer,
    PushRequest,
    Recipe,
)
from splitfed.server.graphs import CallKey, Uses
from splitfed.server.halves import Halves
from splitfed.server.memory import Memory
from splitfed.server.runner import Line, Lines, RunnerSettings
from splitfed.store.batches import answer_is_lost
from splitfed.store.beginning import begin_with, check_durability
from splitfed.store.earlier import Earlier
from splitfed.store.holder import apart
from splitfed.store.quota import Quota
from splitfed.store.references import References
from splitfed.store.store import GradientStore, check_store

Loss = Callable[[Any, Any], Tensor]


class SplitServer:
    """Serves a body from a store; a `Transport`. Run as many as you like on one store.

    Args:
        body: The server's part of the network. Its weights become version 0 if the store is new;
            after that only its structure counts. It isn't kept and isn't changed.
        store: The store of the run.
        device: Where to compute; the device of the body's parameters if it isn't given, and the CPU
            if that is the meta device.
        lineage: Which line of versions to serve.
        per_client: Whether each client trains against a body of its own, `body@<id>`, which begins
            as the newest `body` (SFLV1; a `PerClient` commits and averages them).
        loss_fn: For `client.loss(x, y)`: `loss_fn(outputs, target)` returns a scalar.
        keep_graphs: How many batches keep their autograd graphs in memory, so that a backward that
            comes to this replica needn't recompute; 0 for always recomputing.
        keep_models: How many versions stay loaded.
        settings: What clients may set of the body for their calls, as `client.layer.beta = 0.5`
            does: everything plain, or patterns (`fnmatch`) of names in the body, such as
            `("*.p", "layer.beta")`. `train()` and `eval()` of its parts they may always. A setting
            is for the run of one call, but a body that adds up what it gets may be led astray by
            one: name them where clients aren't trusted.
        memory: How many bytes the calls under way and the graphs that are kept may hold, in all and
            of each client.
        quota: What each client may have open in the store: recorded calls, and bytes.
        durability: What of a batch is on file when it is acknowledged: its `"gradient"`, as many
            bytes as the body has trainable parameters, or in a `"log"` what the gradient follows
            from, as many as cross the cut: then the accumulator takes what servers have added up,
            or computes it again. Whoever begins the store says it; if nobody does, it is a log
            where a gradient is large (`docs/store.md`).

    Raises:
        ArchitectureError: the store was begun with another body, with one that was cut elsewhere,
            or with other values in buffers that no version has.
        UnsupportedError: the body is lazy, wrapped, itself split, or can't be copied; or it is on
            the meta device, and the store is new.
    """

    def __init__(
        self,
        body: nn.Module,
        store: GradientStore,
        *,
        device: torch.device | str | None = None,
        lineage: str = "body",
        per_client: bool = False,
        loss_fn: Loss | None = None,
        keep_graphs: int = 8,
        keep_models: int = 2,
        settings: bool | Iterable[str] = True,
        memory: Memory | None = None,
        quota: Quota | None = None,
        durability: str | None = None,
    ) -> None:
        check_store(store)
        check_durability(durability)
        if per_client and lineage != "body":
            raise InputError(
                f"per_client=True with lineage={lineage!r}: each client's line begins from 'body'"
            )
        if per_client and durability == "log":
            raise InputError(
                "per_client=True with durability='log': bodies of clients are committed from "
                "gradients, so leave durability out"
            )
        self.store = store
        self.lineage = lineage
        self.loss_fn = loss_fn
        self.memory = Memory() if memory is None else memory
        """What calls and kept graphs may hold."""
        self.uses = Uses()
        """How often the graph of a call was at hand."""
        _check_whole(body)
        self._settable = _patterns(settings)
        self._template = Template(body)
        self._part = stamp_of(body)
        beside = values_beside(self._template.blueprint)
        state = self._template.state(body)
        self.device = device_of(state, device)
        numerics = self._numerics = store.begin(self.device)
        begin_with(
            store.lineage(lineage),
            self._template.fingerprint(),
            state,
            part=self._part,
            durability=durability,
            inline=per_client,
        )
        store.check_beside(lineage, beside, numerics)
        self._halves = Halves(store, numerics)
        self._clients = store.registry()
        self._references = References(store.pile(lineage))
        self._confirm = store.lineage().confirm
        """Whether the run is still there is asked before anything else."""
        # In a log the recipes are as large as the call, which was charged at its forward.
        is_log = store.lineage(lineage).durability == "log" and is_repeatable(self.device)
        sizes = (state[name].nbytes for name in self._template.trainable)
        self._gradient_bytes = 0 if is_log else sum(sizes)
        runners = RunnerSettings(
            self._template,
            numerics,
            self.device,
            keep_models,
            keep_graphs,
            self.memory,
            Quota() if quota is None else quota,
            uses=self.uses,
        )
        self._lines = Lines(store, None if per_client else lineage, runners)

    def __repr__(self) -> str:
        known = self.store.lineage(self.lineage).known
        place = f"{self.store.shown!r}, lineage={self.lineage!r}"
        return f"SplitServer({place}, version={known}, device={str(self.device)!r})"

    def forward(self, request: ForwardRequest, /) -> ForwardAnswer:
        """Run one call of the body; with the client's grad mode on, record it.

        Raises:
            ExpiredError: the pinned version has left the retention window.
            BodyError: the body raised.
            InputError: the call doesn't fit the body.
            ArchitectureError: the client half was cut elsewhere than the body.
            ProtocolError: the client has resumed from a position of another run.
        """
        check_types(request)
        asked, codec = request, _answer_codec(request)
        request = asked.decoded(self._lookup(asked))
        self._confirm()
        self._check_part(request)
        self._check_settings(request)
        self._check_resumed(request)
        line = self._lines.of(check_client_id(request.client_id), request.process)
        incarnation = request.incarnation
        # A call that is repeated without grad is one that a checkpoint will make again with it.
        if incarnation is None and (request.grad or request.repeats is not None):
            incarnation = self.store.open_client(request.client_id, request.process)
        self._tidy(line, request.client_id, incarnation, request.housekeeping)
        with self.memory.claim(request.client_id, _tensors(request), request.cut) as sent:
            if request.grad and incarnation is not None:
                line.ledger.charge(request.client_id, sent, calls=1)
            earlier = _earlier(line, request, incarnation)
            pinned = _at(request, earlier.version)
            version, call, done = line.runner.run_newest(pinned)
            if request.grad and incarnation is not None:
                while not line.runner.keep(pinned, incarnation, version, call, done):
                    version, call, done = line.runner.run_newest(pinned)
                self._keep_references(line, asked, request, incarnation)
            answer = self._forward_answer(line, incarnation, version, done, earlier)
            return answer if codec is None else answer.coded(codec)

    def _forward_answer(
        self, line: Line, incarnation: int | None, version: int, done: Run, earlier: Earlier
    ) -> ForwardAnswer:
        return ForwardAnswer(
            incarnation=incarnation,
            version=version,
            outputs=pytree.unflatten(done.spec, [fresh(tensor) for tensor in done.tensors]),
            requires_grad=tuple(tensor.requires_grad for tensor in done.tensors),
            drew=done.drew,
            changed={place: fresh(tensor) for place, tensor in done.changed.items()},
            crcs=done.crcs,
            moved=done.moved,
            written=line.runner.written(),
            repeated=earlier.is_known,
        )

    def backward(self, request: BackwardRequest, /) -> BackwardAnswer:
        """Answer the gradients of a call's inputs; store its parameter gradient.

        That is the batch, or a part of it.

        Raises:
            SupersededError: the client has a newer process.
            AlreadyAppliedError: the batch is counted and its forward gone.
            ExpiredError: the forward is gone and the batch not counted.
            ReplayError: the recompute differs from the forward.
            DigestError: the batch was sent before with other content.
            InputError: a gradient of the wrong shape or dtype, or a weight that isn't positive.
        """
        check_types(request)
        request, codec = request.decoded(), _answer_codec(request)
        batch = BatchId(
            check_client_id(request.client_id),
            check_number("incarnation", request.incarnation),
            check_number("seq", request.seq),
        )
        check_number("part", request.part)
        check_number("version", request.version)
        check_number("resumed", request.resumed)
        if request.call is not None:
            check_number("call", request.call)
        self._confirm()
        self._clients.check(batch.client_id, batch.incarnation)
        line = self._lines.of(batch.client_id)
        self._tidy(line, batch.client_id, batch.incarnation, request.housekeeping)
        if request.call is None:
            if request.seal is None:
                raise InputError(
                    f"the request for batch {batch} has neither a call nor a seal: "
                    "expected one of them"
                )
            status = line.sealer.seal(batch, request.part, request.seal, None, request.resumed)
            return BackwardAnswer((), status)
        key = CallKey(
            request.version, batch.client_id, batch.incarnation, request.call, request.nonce
        )
        record = line.runner.record(key)
        if record is None:
            # Only now: a repeated backward whose record is still there is answered once more.
            raise _lost(line, batch, request)
        line.runner.check_branch(request.version)
        _check_gradients(record, request.grad_outputs)
        if line.runner.keeps(key):
            answer = self._backward(line, batch, request, key, record)
        else:
            with self.memory.claim(batch.client_id, _tensors(record), record.cut):
                answer = self._backward(line, batch, request, key, record)
        return answer if codec is None else answer.coded(codec)

    def _backward(
        self,
        line: Line,
        batch: BatchId,
        request: BackwardRequest,
        key: CallKey,
        record: ForwardRecord,
    ) -> BackwardAnswer:
        """Answer and store a backward whose call is on record."""
        sent = request.grad_outputs
        counted = request.counted
        if record.training and counted:
            line.ledger.charge(batch.client_id, self._gradient_bytes, calls=request.seal is None)
        done = line.runner.take(key, record)
        with compute_turns.of(batch.client_id):
            grad_inputs, gradients = execution.backward(done, sent, counted=counted)
        if counted:
            line.runner.check_kept(key, done, sent, (grad_inputs, gradients), batch.client_id)
        # A call in eval mode belongs to no batch.
        if not record.training or not counted:
            return BackwardAnswer(tuple(grad_inputs), "uncounted")
        # Acknowledged only once it is on file: whatever dies after this answer, the batch counts.
        digest = request.digest()
        share = done.share(gradients, digest, self._numerics, start=record.buffers)
        if line.sealer.wants_recipes:
            share = replace(share, gradients=apart(gradients, [*sent, *grad_inputs]))
            made = self._recipe(line, batch, request, key, done, grad_inputs, digest)
            share = replace(share, recipes=made)
        if request.seal is not None:
            status = line.sealer.seal(batch, request.part, request.seal, share, request.resumed)
            return BackwardAnswer(tuple(grad_inputs), status)
        line.sealer.put_part(request.version, batch, request.part, share)
        return BackwardAnswer(tuple(grad_inputs), "part")

    def _recipe(
        self,
        line: Line,
        batch: BatchId,
        request: BackwardRequest,
        key: CallKey,
        done: Run,
        answered: Sequence[Tensor | None],
        digest: str,
    ) -> tuple[Recipe, ...]:
        """What a backward follows from; () if that is on file already.

        Raises:
            SplitFedError: its forward is gone, and the batch isn't known.
        """
        # As it was stored: what is at hand may hold the client's own tensors, changed since.
        record = line.pile.forward(*key.place)
        if record is None:  # a late repetition, whose forward the client has released
            if line.sealer.is_known(batch):
                return ()
            raise _lost(line, batch, request)
        sent = request.grad_outputs
        return (recipe_of(record, done, sent, answered, part=request.part, digest=digest),)

    def loss(self, request: LossRequest, /) -> LossAnswer:
        """Forward, loss and backward in one trip.

        Raises:
            AlreadyAppliedError: the batch is counted, and the version that it ran at isn't on
                record any more: its answer can't be given again.
            InputError: this server has no `loss_fn`, or it doesn't return a scalar.
            BodyError: the body or the loss raised.
            ArchitectureError: the client half was cut elsewhere than the body.
            ProtocolError: the client has resumed from a position of another run.
        """
        if self.loss_fn is None:
            raise InputError(
                "this server computes no loss: give it one, SplitServer(body, store, loss_fn=...)"
            )
        check_types(request)
        asked, codec = request.forward, _answer_codec(request.forward)
        request = request.decoded(self._lookup(asked))
        self._confirm()
        ahead = request.forward
        self._check_part(ahead)
        self._check_settings(ahead)
        self._check_resumed(ahead)
        incarnation = ahead.incarnation
        counts = ahead.grad and ahead.training and request.counted
        line = self._lines.of(check_client_id(ahead.client_id), ahead.process)
        if counts and incarnation is None:
            incarnation = self.store.open_client(ahead.client_id, ahead.process)
        self._tidy(line, ahead.client_id, incarnation, ahead.housekeeping)
        spec, tensors = pytree.flatten(request.target)
        with self.memory.claim(ahead.client_id, [*_tensors(ahead), *tensors], ahead.cut):
            target = pytree.unflatten(spec, [fresh(tensor.to(self.device)) for tensor in tensors])
            finish = partial(_score, self.loss_fn, target)
            answer = self._loss(line, incarnation, request, finish, counts=counts)
            if counts and incarnation is not None:
                self._keep_references(line, asked, ahead, incarnation)
            return answer if codec is None else answer.coded(codec)

    def _loss(
        self,
        line: Line,
        incarnation: int | None,
        request: LossRequest,
        finish: Callable[[Any], Any],
        *,
        counts: bool,
    ) -> LossAnswer:
        """Compute a one-trip batch, and store it if it counts."""
        ahead = request.forward
        is_first, earlier = False, Earlier(is_known=False)
        version = line.runner.version(ahead)
        batch = BatchId(ahead.client_id, incarnation or 0, request.seq)
        if counts:
            self._clients.check(batch.client_id, batch.incarnation)
            line.ledger.charge(batch.client_id, self._gradient_bytes, calls=1)
            earlier = _earlier(line, ahead, incarnation)
            version = version if earlier.version is None else earlier.version
            # A retry runs at the version of the first try: at another one it would answer another
            # loss, and its digest would be refused.
            version, is_first = line.pile.pin(batch, version)
            if ahead.resumed and not line.runner.can_run(version):
                # An earlier process has noted it, and it has left the retention window since.
                line.pile.drop_pin(batch)
                version, is_first = line.pile.pin(batch, line.runner.version(ahead))
        call, done = line.runner.run(ahead, version, finish=finish)
        value = _scalar(done)
        one = torch.ones_like(value) if value.requires_grad else None
        counted = request.counted
        within = done.unfinished if counts and line.sealer.wants_recipes else ()
        with compute_turns.of(ahead.client_id):
            grad_inputs, gradients, of_outputs = execution.backward_within(
                done, [one], within, counted=counted
            )
        if one is not None and counted:
            answered = (grad_inputs, gradients)
            line.runner.check_kept(call, done, [one], answered, ahead.client_id, finish)
        status = "uncounted"
        if counts:
            digest = request.digest(batch, version)
            samples = request.num_samples
            share = done.share(gradients, digest, self._numerics, num_samples=samples)
            share = replace(share, resumed=ahead.resumed)
            if line.sealer.wants_recipes:
                share = replace(share, gradients=apart(gradients, [*of_outputs, *grad_inputs]))
                made = recipe_of(call, done, of_outputs, grad_inputs, part=0, digest=digest)
                share = replace(share, recipes=(made,))
            try:
                status = line.sealer.store(batch, share, is_one_trip=True, is_first=is_first)
            except (AlreadyAppliedError, DigestError):
                if is_first:  # it names a version that the batch didn't run at
                    line.pile.drop_pin(batch)
                _check_repeated(line, batch, request)
                raise
        return LossAnswer(
            incarnation,
            version,
            fresh(value),
            tuple(grad_inputs),
            status,
            done.drew,
            earlier.is_known,
        )

    def _lookup(self, request: ForwardRequest) -> Lookup:
        """Where the rows are that the deltas of a request refer to."""
        client_id, incarnation = request.client_id, request.incarnation
        return lambda name: self._references.get(client_id, incarnation, name)

    def _keep_references(
        self, line: Line, sent: ForwardRequest, request: ForwardRequest, incarnation: int
    ) -> None:
        """Keep what next deltas are to be the change from; before it is answered.

        Args:
            line: The client's line.
            sent: The request as it came.
            request: The same, decoded.
            incarnation: The client's process.
        """
        for rows in kept_rows(_tensors(request), sent.deltas) if sent.deltas else ():
            line.ledger.charge(request.client_id, rows.nbytes)
            self._references.keep(request.client_id, incarnation, rows)

    def _check_resumed(self, request: ForwardRequest) -> None:
        check_number("resumed", request.resumed)
        if request.resumed and request.grad and request.incarnation is not None:
            client_id = check_client_id(request.client_id)
            incarnation = check_number("incarnation", request.incarnation)
            self._clients.check_resumed(client_id, incarnation, request.process)

    def _check_settings(self, request: ForwardRequest) -> None:
        for name in request.settings:
            if f".{name}".endswith(".training"):
                continue
            if not any(fnmatchcase(name, pattern) for pattern in self._settable):
                raise InputError(
                    f"the client has set {name[:80]!r} of the body, which this server doesn't take "
                    f"from clients: allow it there, SplitServer(..., settings=({name[:80]!r},)) or "
                    f"--settings {name[:80]!r}, or leave it as it was"
                )

    def pull(self, request: PullRequest, /) -> PullAnswer:
        """The client half, newest or at a version; version -1 if nobody has published one."""
        self._confirm()
        return self._halves.pull(check_types(request))

    def hand_over(self) -> None:
        """Write what is held in memory of a log, before the process ends.

        An accumulator needn't compute it again then. It is a cache: nothing is lost without.
        """
        line = self._lines.shared
        if line is not None:
            with contextlib.suppress(StoreError, CorruptedError):
                line.sealer.hand_over()

    @property
    def unattended(self) -> bool:
        """Whether no accumulator of this process is on its store."""
        return not self.store.attended

    def push(self, request: PushRequest, /) -> PushAnswer:
        """Take a client half's update in, or begin its lineage.

        Raises:
            ArchitectureError: the half isn't the lineage's.
            SupersededError: the client has a newer process.
        """
        self._confirm()
        return self._halves.push(check_types(request))

    def _tidy(
        self, line: Line, client_id: str, incarnation: int | None, housekeeping: Housekeeping
    ) -> None:
        """Do what a request confirms."""
        if incarnation is None:
            return
        for version, call in housekeeping.released:
            line.runner.forget((version, client_id, incarnation, call))
        if housekeeping.abandoned and not self._clients.is_newest(client_id, incarnation):
            # Nothing of a process that a newer one has superseded can count any more, nor of one
            # that was never opened.
            housekeeping = replace(housekeeping, abandoned=())
        if housekeeping.references:
            self._references.drop(client_id, incarnation, housekeeping.references)
        line.sealer.tidy(client_id, incarnation, housekeeping)

    def _check_part(self, request: ForwardRequest) -> None:
        # Before all that a call may leave in the store.
        if request.part == self._part:
            return
        who = f"the half of client {request.client_id!r}"
        check_stamp(self._part, request.part, who, "the body here")


def _check_whole(body: nn.Module) -> None:
    """Refuse a body that is itself split: its versions would move while a call is under way."""
    for name, part in unwrap(body).named_modules():
        if isinstance(part, CutPoint):
            raise UnsupportedError(
                f"the body holds a client half, with a cut point at {name!r}: a recompute would "
                "run it at a newer version of the other server. Let the owner's process call the "
                "two servers one after the other, with a SplitClient for each"
            )


def _patterns(settings: bool | Iterable[str]) -> tuple[str, ...]:
    """The patterns of what clients may set."""
    if isinstance(settings, bool):
        return ("*",) if settings else ()
    return (settings,) if isinstance(settings, str) else tuple(settings)


def _tensors(call: ForwardRequest | ForwardRecord) -> Sequence[Tensor]:
    """The input tensors of a call."""
    args, kwargs = call.inputs
    # The ordinary case, without a walk through the tree.
    if not kwargs and all(type(value) is Tensor for value in args):
        found: Sequence[Tensor] = args
        return found
    return pytree.flatten(call.inputs)[1]


def _score(loss_fn: Loss, target: Any, outputs: Any) -> Tensor:
    """The loss of outputs."""
    return loss_fn(outputs, target)


def _earlier(line: Line, request: ForwardRequest, incarnation: int | None) -> Earlier:
    """What the store has of the batch that a call is to be part of, if it may be a repeated one."""
    if request.repeats is None or request.version is not None or incarnation is None:
        return Earlier(is_known=False)
    return line.runner.earlier(BatchId(request.client_id, incarnation, request.repeats))


def _at(request: ForwardRequest, version: int | None) -> ForwardRequest:
    """A request for a version, unless that is `None`."""
    return request if version is None else replace(request, version=version)


def _scalar(done: Run) -> Tensor:
    """The loss that a `loss_fn` returned."""
    value = done.tensors[0] if len(done.tensors) == 1 else None
    if value is not None and value is done.outputs and value.numel() == 1:
        return value
    raise InputError(
        f"loss_fn returned {type(done.outputs).__name__}: expected a tensor with one element"
    )


def _check_repeated(line: Line, batch: BatchId, request: LossRequest) -> None:
    """Tell a one-trip batch that is repeated from other content under its id.

    Its version has left the retention window, and the note of it with that, so it has run at
    another one now, and its digest is another.

    Raises:
        AlreadyAppliedError: it is pending, or was counted just now.
    """
    held = line.pile.peek(batch)
    base = None if held is None else held["base_version"]
    if held is None or (isinstance(base, int) and held["digest"] == request.digest(batch, base)):
        raise answer_is_lost(batch)


def _lost(line: Line, batch: BatchId, request: BackwardRequest) -> SplitFedError:
    """Why a call isn't on record any more."""
    line.runner.confirm()
    if line.sealer.is_known(batch):
        return AlreadyAppliedError(
            f"batch {batch} is counted already, and its answer was confirmed: nothing counts twice"
        )
    return ExpiredError(
        f"call {request.call} of client {batch.client_id!r} at version {request.version} "
        "isn't in the store: its graph was released, the run was finished, "
        "or its version has left the retention window (keep_versions, keep_bytes). "
        "This batch is lost and counts nowhere; the loop may go on"
    )


def _answer_codec(request: ForwardRequest | BackwardRequest) -> Codec | None:
    """What the client wants the answer to be coded by: known before anything is done for it."""
    text = request.answer_codec
    return Codec.from_wire(text, what="answers are asked for in") if text else None


def _check_gradients(record: ForwardRecord, grad_outputs: Sequence[Tensor | None]) -> None:
    if len(grad_outputs) != len(record.outputs):
        raise InputError(
            f"expected a gradient for each of {len(record.outputs)} outputs, "
            f"got {len(grad_outputs)}"
        )
    for i, gradient in enumerate(grad_outputs):
        if gradient is None:
            continue
        shape, dtype, _ = record.outputs[i]
        got = (tuple(gradient.shape), str(gradient.dtype).removeprefix("torch."))
        if got != (tuple(shape), dtype):
            raise InputError(
                f"the gradient of output {i} is {got[1]} {got[0]}: "
                f"expected {dtype} {tuple(shape)}, as the output itself"
            )
