"""The oracle: what was promised, compared with what the ledger has, once a run is over.

Each acknowledged batch is in one commit, with the gradient that the reference computes from what its client sent. The
gradients that clients were answered are the reference's. Each version has the bits of a serial replay of the records.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from tests.faults.simulator import model
from tests.faults.simulator.ledger import CLOSER, HOSTILE, Ledger
from tests.faults.simulator.network import Network, Sent
from tests.faults.simulator.reference import Body, Call, Replica, differing, same, total_of
from torch import Tensor

from splitfed.accumulator.derive import Deriver
from splitfed.errors import SplitFedError
from splitfed.model.skeleton import Template
from splitfed.protocol.ids import BatchId
from splitfed.protocol.messages import (
    BackwardRequest,
    BufferUpdate,
    ForwardRequest,
    GradientRecord,
    LossRequest,
    Seal,
)
from splitfed.protocol.packing import pack_tree
from splitfed.store.batchset import Outcome
from splitfed.store.sums import read_batch


def check(ledger: Ledger) -> None:
    """Report all that is wrong."""
    check_counted(ledger)
    derive(ledger)
    check_sums(ledger)
    check_replay(ledger)
    Answers(ledger).check()


def check_counted(ledger: Ledger) -> None:
    """Each acknowledged batch counts once, nothing waits, and the records are those that were seen."""
    waiting = ledger.store.waiting()
    if waiting:
        ledger.fail(f"still pending after all commits: {waiting}")
    found = ledger.world.open(ledger.world.observer)
    if found.latest_version() != ledger.head:
        ledger.fail(f"the newest version is {found.latest_version()}: expected {ledger.head}")
    for commit in ledger.commits:
        now = found.lineage().commit(commit.version)
        if now.nonce != commit.nonce or dict(now.verdict.items()) != dict(commit.verdict.items()):
            ledger.fail(f"the record of version {commit.version} has changed")
    for batch, acknowledgements in ledger.acknowledged.items():
        number = ledger.closed.get(batch)
        if number is None:
            ledger.fail(f"batch {batch} was acknowledged and is lost")
            continue
        outcome = ledger.commits[number].verdict.outcome(batch)
        status = acknowledgements[-1].answer.status
        expected = (Outcome.REJECTED,) if status == "rejected" else (Outcome.FOLDED, Outcome.STALE)
        if any(sent.network.is_forked and sent.came_late for sent in acknowledgements):
            continue
        if batch.client_id == HOSTILE or (ledger.is_damaged(batch) and outcome is Outcome.REJECTED):
            expected = tuple(Outcome)  # it gives up what it has sent, and sends what it has given up
        if outcome not in expected:
            ledger.fail(f"batch {batch} was acknowledged as {status} and is {outcome} in commit {number}")


def derive(ledger: Ledger) -> None:
    """Put in place of recipes what they give: it is compared with the reference like any gradient on file."""
    template = Template(model.body_of(ledger.world.plan))
    numerics = ledger.store.numerics()
    deriver = Deriver(template, lambda version: ledger.weights[version], torch.device("cpu"), numerics)
    for batch, record in ledger.files.items():
        try:
            ledger.files[batch] = deriver.gradient(record)
        except SplitFedError as error:
            ledger.fail(f"the gradient of batch {batch} doesn't follow from its recipes: {error!r}", error)


def check_sums(ledger: Ledger) -> None:
    """Each file of a sum is what its batches add up to in the order in which it lists them."""
    for found in ledger.sums:
        records = [ledger.files[read_batch(text)] for text in found.batches]
        expected = total_of(records) if len(records) > 1 else records[0].gradients
        wrong = differing(found.total, expected)
        if wrong:
            ledger.fail(f"the sum of {found.batches} isn't what they add up to: {wrong} differ")


def check_replay(ledger: Ledger) -> None:
    """Each version has the bits of a serial replay."""
    restored = {commit.restored for commit in ledger.commits if commit.restored is not None}
    replica = Replica(ledger.world.plan, ledger.weights[0], restored)
    for commit in ledger.commits[1:]:
        replica.commit(commit, ledger.files)
        wrong = differing(ledger.weights[commit.version], replica.state)
        if wrong:
            ledger.fail(f"version {commit.version} isn't what its record makes: {wrong} differ")
            return
    # Each step depends on the state before it, so that of the last version stands for all.
    held = ledger.store.lineage().optimizer(ledger.head)
    if held is not None:
        expected = {str(place): state for place, state in replica.optimizer()["state"].items()}
        if not _holds(held, expected):
            ledger.fail(f"the optimizer's state at version {ledger.head} isn't that of the replay")


def _holds(tree: object, expected: Mapping[str, Mapping[str, object]]) -> bool:
    """Whether all tensors of an optimizer's state are among those of a tree."""
    held = [bytes(part) for part in pack_tree("Optimizer", tree)]
    joined = b"".join(held)
    tensors = [value for state in expected.values() for value in state.values() if isinstance(value, Tensor)]
    return all(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() in joined for tensor in tensors)


class Answers:
    """What clients were answered, and the gradient files that came of it.

    Args:
        ledger: What happened.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._body = Body(ledger.world.plan, ledger.weights)
        self._calls: dict[tuple[Network, int], Call] = {}

    def check(self) -> None:
        """Compare all of it with the reference."""
        candidates: dict[BatchId, list[Sent]] = {}
        for sent in self._ledger.requests:
            if sent.request.client_id == HOSTILE:
                continue
            if sent.answer is not None:
                self._check_answer(sent)
            if sent.batch is not None:
                candidates.setdefault(sent.batch, []).append(sent)
            elif isinstance(sent.request, LossRequest):
                # Its first request, which opens the process, and no answer: the number isn't known here.
                unknown = BatchId(sent.request.client_id, -1, sent.request.seq)
                candidates.setdefault(unknown, []).append(sent)
        for batch, record in self._ledger.files.items():
            if batch.client_id not in (HOSTILE, CLOSER) and record.kind != "skip":
                unknown = batch._replace(incarnation=-1)
                self._check_file(batch, record, [*candidates.get(batch, []), *candidates.get(unknown, [])])

    def _check_answer(self, sent: Sent) -> None:
        name = sent.network.process.name
        request, answer = sent.request, sent.answer
        if isinstance(request, ForwardRequest):
            call = self._call(sent)
            if not same(answer.outputs, call.outputs.detach()):
                self._ledger.fail(f"{name} got other outputs of call {request.call} at {answer.version}")
        elif isinstance(request, BackwardRequest) and request.call is not None:
            made = self._call(sent.network.calls[request.call])
            if request.grad_outputs[0] is None:
                return
            expected, _ = made.gradients(request.grad_outputs[0])
            if not same(answer.grad_inputs[0], expected):
                self._ledger.fail(f"{name} got other gradients of call {request.call} at {request.version}")
        elif isinstance(request, LossRequest):
            made = self._loss(sent, answer.version)
            if not same(answer.loss, made.outputs.detach()):
                self._ledger.fail(f"{name} got another loss of call {request.forward.call} at {answer.version}")
            expected, _ = made.gradients(torch.ones_like(made.outputs))
            if not same(answer.grad_inputs[0], expected):
                self._ledger.fail(f"{name} got other gradients of the loss of call {request.forward.call}")

    def _check_file(self, batch: BatchId, record: GradientRecord, candidates: list[Sent]) -> None:
        """A gradient file is what one of the requests under its id makes: the acknowledged one, if one was."""
        acknowledged = self._ledger.acknowledged.get(batch, [])
        for sent in acknowledged or candidates:
            if acknowledged and sent.network.is_forked and sent.came_late:
                # Known: the digest of a batch that is counted is on file no more, so what another process sends
                # under its id can't be told from a retry.
                continue
            reason = self._difference(sent, record)
            if reason and acknowledged:
                name = sent.network.process.name
                self._ledger.fail(f"batch {batch} of {name} was acknowledged, and its file is another's: {reason}")
            if not reason and not acknowledged:
                return
        if not acknowledged:
            self._ledger.fail(f"the file of batch {batch} is none of {len(candidates)} requests")

    def _difference(self, sent: Sent, record: GradientRecord) -> str:
        """What differs between a gradient file and the one that a request makes."""
        expected = self._record(sent, record.base_version)
        if expected.kind == "rejected" and record.kind == "rejected":
            return ""
        for name in ("kind", "base_version", "num_samples", "loss_scale"):
            if getattr(record, name) != getattr(expected, name):
                return f"its {name} is {getattr(record, name)!r}, expected {getattr(expected, name)!r}"
        wrong = differing(record.gradients, expected.gradients)
        if wrong:
            return f"gradients {wrong}"
        if len(record.buffers) != len(expected.buffers):
            return f"{len(record.buffers)} changes of the buffers, expected {len(expected.buffers)}"
        for own, other in zip(record.buffers, expected.buffers, strict=True):
            wrong = differing(own.values, other.values) + differing(own.bases, other.bases)
            if wrong or own.num_samples != other.num_samples:
                return f"buffers {wrong}, {own.num_samples} samples, expected {other.num_samples}"
        return ""

    def _record(self, sent: Sent, version: int) -> GradientRecord:
        """The gradient file that a request makes."""
        request = sent.request
        if isinstance(request, LossRequest):
            made = self._loss(sent, version)
            _, gradients = made.gradients(torch.ones_like(made.outputs))
            update = made.update(request.num_samples)
            buffers = [] if update is None else [update]
            return _record(version, request.num_samples, 1.0, gradients, buffers)
        calls, shares = self._parts(sent)
        seal: Seal = request.seal
        return _record(
            min(call.version for call in calls.values()),
            seal.num_samples,
            seal.loss_scale,
            _total(shares),
            _chained(seal, calls),
        )

    def _parts(self, sent: Sent) -> tuple[dict[int, Call], list[dict[str, Tensor]]]:
        """The calls of a batch by part, and the gradients of each, in the order of the seal."""
        request = sent.request
        numbers = [number for _, number in request.seal.parts]
        if request.call is not None:
            numbers.append(request.part)
        calls, shares = {}, []
        for number in numbers:
            part = sent if number == request.part and request.call is not None else None
            asked = (part or sent.network.parts[request.seq, number]).request
            calls[number] = self._call(sent.network.calls[asked.call])
            shares.append(calls[number].gradients(asked.grad_outputs[0])[1])
        return calls, shares

    def _call(self, sent: Sent) -> Call:
        request: ForwardRequest = sent.request
        key = (sent.network, request.call)
        if key not in self._calls:
            start = self._start(sent.network, request, sent.answer.version)
            self._calls[key] = self._body.call(request, sent.answer.version, start)
        return self._calls[key]

    def _loss(self, sent: Sent, version: int) -> Call:
        ahead = sent.request.forward
        start = self._start(sent.network, ahead, version)
        return self._body.call(ahead, version, start, sent.request.target)

    def _start(self, network: Network, request: ForwardRequest, version: int) -> Mapping[str, Tensor] | None:
        """The buffers that a call begins with, if they aren't the version's."""
        if request.previous is None or request.previous_version not in (None, version):
            return None
        return self._call(network.calls[request.previous]).end


def _record(
    version: int, samples: float, scale: float, gradients: dict[str, Tensor], buffers: list[BufferUpdate]
) -> GradientRecord:
    is_finite = all(bool(torch.isfinite(gradient).all()) for gradient in gradients.values())
    kind = "gradient" if is_finite else "rejected"
    return GradientRecord(kind, version, samples, scale, "", "", gradients, buffers)


def _total(shares: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    for share in shares:
        for name, gradient in share.items():
            total[name] = total[name] + gradient if name in total else gradient
    return total


def _chained(seal: Seal, calls: Mapping[int, Call]) -> list[BufferUpdate]:
    """What the chains of a batch did to the buffers."""
    found: dict[int, BufferUpdate] = {}
    for chain in seal.chains:
        update = calls[chain.last_part].update(chain.num_samples, own=chain.after == -1)
        if update is None:
            continue
        if chain.after is not None and chain.after >= 0:
            earlier = found.pop(chain.after)
            total = earlier.num_samples + update.num_samples
            update = replace(update, bases={**update.bases, **earlier.bases}, num_samples=total)
        found[chain.last_part] = update
    return list(found.values())
