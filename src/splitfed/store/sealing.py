"""Closing a batch: what its parts add up to becomes one gradient file, created once.

Parts add up in the order in which autograd reached the calls, in the gradients' own dtype, as autograd itself would
have done it. A gradient that isn't finite is answered like any other (GradScaler makes Inf by design) but closes its
id as rejected.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from splitfed.checks import positive
from splitfed.errors import BusyError, ExpiredError, FormatError, InputError
from splitfed.model.numerics import all_finite
from splitfed.protocol.ids import BatchId
from splitfed.protocol.messages import BufferUpdate, Chain, GradientRecord, Housekeeping, Seal
from splitfed.store.batches import Pile
from splitfed.store.batchset import MAX_GAPS
from splitfed.store.versions import Versions

_STATUS = {"gradient": "stored", "rejected": "rejected", "skip": "rejected"}


class Sealer:
    """Closes the batches of one lineage.

    Args:
        versions: Tells which batches are counted.
        pile: Where gradients wait.
        numerics: The short name of this process's numerics class.
    """

    def __init__(self, versions: Versions, pile: Pile, numerics: str) -> None:
        self._versions = versions
        self._pile = pile
        self._numerics = numerics

    def is_known(self, batch: BatchId) -> bool:
        """Whether a batch is counted, or waits to be."""
        return self._is_applied(batch) or self._pile.peek(batch) is not None

    def store(self, batch: BatchId, record: GradientRecord) -> str:
        """Add a batch to the pile, as rejected if it isn't finite; a repeated call changes nothing.

        Returns:
            'stored' or 'rejected'.

        Raises:
            DigestError: the batch was sent before with other content.
            BusyError: too many of the client's earlier batches are missing.
        """
        positive("num_samples", record.num_samples)
        if not math.isfinite(record.loss_scale) or record.loss_scale == 0:
            raise InputError(
                f"loss_scale of batch {batch} is {record.loss_scale}: expected a finite number other than 0"
            )
        if self._is_applied(batch):
            return self._versions.outcome(batch)
        if not all(all_finite(gradient) for gradient in record.gradients.values()):
            record = replace(record, kind="rejected", gradients={}, buffers=[])
        return _STATUS[self._pile.create(batch, record)]

    def seal(self, batch: BatchId, own: int, seal: Seal, share: GradientRecord | None) -> str:
        """Make a batch of its parts and, last, the share of the call that rides along as part number `own`.

        Returns:
            'stored' or 'rejected'.

        Raises:
            ExpiredError: a part is gone and the batch isn't known: it is lost, and counts nowhere.
        """
        parts: dict[int, GradientRecord] = {}
        for version, number in seal.parts:
            part = self._pile.part(version, batch, number)
            if part is not None and len(part.buffers) != 1:
                raise FormatError(f"part {number} of batch {batch} isn't one call's share: {len(part.buffers)} of them")
            if part is None:
                if self.is_known(batch):
                    return self._outcome(batch)
                raise ExpiredError(
                    f"part {number} of batch {batch} has left the store, so the batch is lost and counts nowhere: "
                    "go on with the next one"
                )
            parts[number] = part
        if share is not None:
            parts[own] = share
        if not parts:
            raise InputError(f"the seal of batch {batch} names no part: expected at least one")
        record = GradientRecord(
            kind="gradient",
            base_version=min(part.base_version for part in parts.values()),
            num_samples=seal.num_samples,
            loss_scale=seal.loss_scale,
            digest=seal.digest(batch) if share is None else share.digest,
            numerics=self._numerics,
            gradients=_sum([part.gradients for part in parts.values()]),
            buffers=[_chain(chain, parts) for chain in seal.chains],
        )
        status = self.store(batch, record)
        for version, number in seal.parts:
            self._pile.drop_part(version, batch, number)
        return status

    def tidy(self, client_id: str, incarnation: int, housekeeping: Housekeeping) -> None:
        """Forget what a client has confirmed, and close the numbers that it gave up."""
        for version, call in housekeeping.released:
            self._pile.drop_forward(version, client_id, incarnation, call)
        for seq in housekeeping.answered:
            self._pile.drop_pin(BatchId(client_id, incarnation, seq))
        for seq in housekeeping.abandoned:
            batch = BatchId(client_id, incarnation, seq)
            if not self.is_known(batch):
                self._pile.create(batch, GradientRecord("skip", 0, 0.0, 1.0, "", self._numerics, {}, []))

    def _outcome(self, batch: BatchId) -> str:
        waiting = self._pile.peek(batch)
        return self._versions.outcome(batch) if waiting is None else _STATUS.get(str(waiting["kind"]), "stored")

    def _is_applied(self, batch: BatchId) -> bool:
        applied = self._versions.counted()
        if applied.gaps(batch.client_id) > MAX_GAPS and batch not in applied and not applied.fills_gap(batch):
            raise BusyError(
                f"client {batch.client_id!r} has more than {MAX_GAPS} holes in its sequence of batches: earlier "
                "ones are still "
                "under way or lost. Try again after the next commit"
            )
        return batch in applied


def _sum(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    for part in parts:
        for name, gradient in part.items():
            total[name] = total[name] + gradient if name in total else gradient
    return total


def _chain(chain: Chain, parts: Mapping[int, GradientRecord]) -> BufferUpdate:
    if chain.last_part not in parts:
        raise InputError(f"a seal names part {chain.last_part}, which isn't among its parts {sorted(parts)}")
    last = parts[chain.last_part].buffers[0]
    return replace(last, num_samples=positive("num_samples", chain.num_samples))
