"""Client halves on the server's side: handing them out, and taking their updates in.

FedAvg is the same commit on another lineage: a client publishes start − end as its pseudo-gradient, weighted by its
samples, and whoever accumulates the `client` lineage with SGD at rate 1 applies their mean (McMahan et al., arXiv
1602.05629; with another optimizer it is FedOpt, Reddi et al., arXiv 2003.00295). In synchronous mode what it publishes
is a gradient, divided by its loss scale in the mean like any batch's.
"""

from __future__ import annotations

from splitfed.checks import positive
from splitfed.errors import ArchitectureError
from splitfed.model.fingerprint import check_tensors, check_whole
from splitfed.protocol.ids import BatchId, check_client_id, check_number
from splitfed.protocol.messages import BufferUpdate, GradientRecord, PullAnswer, PullRequest, PushAnswer, PushRequest
from splitfed.store.rounds import Plan
from splitfed.store.sealing import Sealer
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
        self._versions, self._pile = store.lineage(LINEAGE), store.pile(LINEAGE)
        self._sealer = Sealer(self._versions, self._pile, numerics)

    def pull(self, request: PullRequest) -> PullAnswer:
        """The client half, newest or at a version, and the round; version -1 if nobody has published a half.

        The plan is read before the head, and whether it still holds after it: so the weights are never older than the
        round that is answered with them, and never newer unless it is said to be closed.
        """
        client_id = check_client_id(request.client_id)
        rounds = self._store.rounds()
        rounds.join(client_id)
        plan = rounds.current()
        head = self._versions.head()
        info = rounds.info(plan, client_id, self._has_update(plan, client_id)) if plan else None
        if head < 0 or not request.weights:
            return PullAnswer(head, None, {}, info)
        version = head if request.version is None else request.version
        return PullAnswer(version, self._versions.fingerprint(), self._versions.checked_state(version), info)

    def _has_update(self, plan: Plan, client_id: str) -> bool:
        """Whether an update of a client waits that began from this round's version or a newer one.

        Below quorum the next round begins from the same version; what was refused there isn't an answer to this one.
        """
        if not plan.barrier:
            return False
        before = self._store.rounds().before(plan)
        waiting = self._pile.waiting(client_id)
        headers = (self._pile.peek(batch) for batch in waiting if before is None or not before.client.closes(batch))
        bases = (header["base_version"] for header in headers if header is not None)
        return any(isinstance(base, int) and base >= plan.client_version for base in bases)

    def push(self, request: PushRequest) -> PushAnswer:
        """Add an update to the pile, or begin the lineage.

        Raises:
            ArchitectureError: the half isn't the lineage's.
            SupersededError: the client has a newer process.
        """
        client_id = check_client_id(request.client_id)
        if request.base_version != -1:
            check_number("base_version", request.base_version)
        else:
            check_whole(request.fingerprint, request.gradients)
            self._versions.initialise(request.fingerprint, request.gradients)
            return PushAnswer(request.incarnation, "published")
        incarnation = request.incarnation
        if incarnation is None:
            incarnation = self._store.open_client(client_id, request.process)
        self._store.check_client(client_id, incarnation)
        fingerprint = self._versions.fingerprint()
        check_tensors(fingerprint, request.gradients, "trainable")
        check_tensors(fingerprint, request.values, "buffer")
        check_tensors(fingerprint, request.bases, "buffer")
        if request.base_version > self._versions.head():
            raise ArchitectureError(f"the update starts from version {request.base_version}, which doesn't exist yet")
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
        )
        return PushAnswer(incarnation, self._sealer.store(BatchId(client_id, incarnation, request.seq), record))
