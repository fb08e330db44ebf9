"""Client halves on the server's side: handing them out, and taking their updates in.

FedAvg is the same commit on another lineage: a client publishes start − end as its pseudo-gradient,
weighted by its samples, and whoever accumulates the `client` lineage with SGD at rate 1 applies
their mean (McMahan et al., arXiv 1602.05629; with another optimizer it is FedOpt, Reddi et al.,
arXiv 2003.00295). Where body and halves are committed together (`store.together`) what it publishes
is a gradient, divided by its loss scale in the mean like any batch's, and what is handed out is the
half that belongs to the newest body, with the version of that.
"""

from __future__ import annotations

from torch import Tensor

from splitfed.checks import positive
from splitfed.errors import ArchitectureError
from splitfed.model.fingerprint import check_tensors, check_whole
from splitfed.protocol.flows import checked
from splitfed.protocol.ids import BatchId, check_client_id, check_number
from splitfed.protocol.messages import (
    BufferUpdate,
    GradientRecord,
    PullAnswer,
    PullRequest,
    PushAnswer,
    PushRequest,
)
from splitfed.store.batches import Sealer
from splitfed.store.rounds import Plan
from splitfed.store.store import GradientStore

LINEAGE = "client"


class Halves:
    """Serves the `client` lineage of a store.

    Args:
        store: The store.
        numerics: The short name of this process's numerics class.
    """

    def __init__(self, store: GradientStore, numerics: str) -> None:
        self._store = store
        self._numerics = numerics
        self._lineage = store.lineage(LINEAGE)
        self._pile = store.pile(LINEAGE)
        self._sealer = Sealer(self._lineage, self._pile, numerics)
        self._together = store.together()

    def pull(self, request: PullRequest) -> PullAnswer:
        """The client half, newest or at a version, and the round; version -1 if there is none yet.

        The plan is read before the head, and whether it still holds after it: so the weights are
        never older than the round that is answered with them, and never newer unless that round is
        answered as closed.
        """
        client_id = check_client_id(request.client_id)
        self._store.join_client(client_id)
        rounds = self._store.rounds()
        plan = rounds.current()
        head = self._lineage.head()
        info = None
        if plan is not None:
            info = rounds.info(plan, client_id, self._has_update(plan, client_id))
        if head < 0 or not request.weights:
            return PullAnswer(head, None, {}, info)
        fingerprint = self._lineage.fingerprint()
        if request.version is not None or not self._together.is_begun():
            version = head if request.version is None else request.version
            return PullAnswer(version, fingerprint, self._weights(request, version), info)
        pair = self._together.newest()
        weights = self._weights(request, pair.client)
        return PullAnswer(pair.client, fingerprint, weights, info, pair.body)

    def _weights(self, request: PullRequest, version: int) -> dict[str, Tensor]:
        """A version's tensors, without the frozen parameters that the client has.

        They are the same in all versions, and the commit's record has their hash.
        """
        weights = self._lineage.checked_state(version)
        if not request.frozen or request.frozen != self._lineage.commit(version).frozen:
            return weights
        fingerprint = self._lineage.fingerprint()
        return {n: t for n, t in weights.items() if fingerprint[n]["role"] != "frozen"}

    def _has_update(self, plan: Plan, client_id: str) -> bool:
        """Whether an update of a client is pending that began in this round."""
        if not plan.barrier:
            return False
        # Below quorum the next round begins from the same version, and what was closed in the one
        # before is no answer to this.
        before = self._store.rounds().before(plan)
        for batch in self._pile.waiting(client_id):
            if before is not None and before.client.closes(batch):
                continue
            header = self._pile.peek(batch)
            base = None if header is None else header["base_version"]
            if isinstance(base, int) and base >= plan.client_version:
                return True
        return False

    def push(self, request: PushRequest) -> PushAnswer:
        """Add an update to the pending ones, or begin the lineage.

        Raises:
            ArchitectureError: the half isn't the lineage's.
            SupersededError: the client has a newer process.
            ProtocolError: the client has resumed from a position of another run.
            InputError: what it says of its samples or its flows aren't numbers that add up.
        """
        client_id = check_client_id(request.client_id)
        if request.base_version == -1:
            check_whole(request.fingerprint, request.gradients)
            self._lineage.initialise(request.fingerprint, request.gradients)
            return PushAnswer(request.incarnation, "published")
        check_number("base_version", request.base_version)
        check_number("seq", request.seq)
        incarnation = request.incarnation
        check_number("resumed", request.resumed)
        if incarnation is None:
            incarnation = self._store.open_client(client_id, request.process)
        elif request.resumed:
            self._store.registry().check_resumed(client_id, incarnation, request.process)
        self._store.check_client(client_id, incarnation)
        fingerprint = self._lineage.fingerprint()
        check_tensors(fingerprint, request.gradients, "trainable")
        check_tensors(fingerprint, request.values, "buffer")
        check_tensors(fingerprint, request.bases, "buffer")
        if request.base_version > self._lineage.head():
            raise ArchitectureError(
                f"the update starts from version {request.base_version}, which doesn't exist yet"
            )
        samples = positive("num_samples", request.num_samples)
        record = GradientRecord(
            kind="gradient",
            base_version=request.base_version,
            num_samples=samples,
            loss_scale=request.loss_scale,
            digest=request.digest(incarnation),
            numerics=self._numerics,
            gradients=dict(request.gradients),
            buffers=[BufferUpdate(dict(request.values), dict(request.bases), samples)],
            resumed=request.resumed,
            upto=check_number("upto", request.upto),
            flows=checked(request.flows),
        )
        batch = BatchId(client_id, incarnation, request.seq)
        return PushAnswer(incarnation, self._sealer.store(batch, record))
