"""Sums: what the gradients of several batches of a log add up to, as a server has added them.

In a log a batch is acknowledged on its recipes, and its gradient can always be computed again. A
sum saves that: it is a cache of what recipes give. It may be deleted at any moment, and nothing is
lost but time.

    Σ nᵢ·gᵢ, in float64, in the order in which the batches came

Its batches share a base version, a loss scale and the numerics class of the server. A sum holds all
that a commit needs of them besides: their digests, their numbers of examples, and what they did to
the buffers.

The trap: floating addition isn't associative, so the order is part of what a version follows from.
A commit that uses a sum puts the order on record. And a sum can be used only as a whole: by a
commit that folds each of its batches, with the content that is on file.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from splitfed.errors import ArchitectureError, CorruptedError, FormatError, IdError
from splitfed.model.adding import add_products, as_real
from splitfed.model.fingerprint import check_tensors
from splitfed.model.numerics import all_finite
from splitfed.model.skeleton import Fingerprint
from splitfed.protocol.ids import BatchId, check_client_id, check_number
from splitfed.protocol.messages import BufferUpdate, GradientRecord, SumRecord
from splitfed.protocol.packing import peek
from splitfed.store.checked import Checked

Kinds = dict[str, tuple[torch.dtype, torch.Size]]
Shared = tuple[int, float, str]
"""What the batches of a sum share: base version, loss scale, numerics class."""


class Added(NamedTuple):
    """A batch of a sum."""

    digest: str
    num_samples: float
    buffers: Sequence[BufferUpdate]


def extent(updates: Iterable[BufferUpdate]) -> tuple[int, int]:
    """The tensors of changed buffers, and their bytes; what they began with is their version's."""
    values = [value for update in updates for value in update.values.values()]
    return 2 * len(values), sum(value.nbytes for value in values)


def shared_of(record: GradientRecord) -> Shared:
    """What a gradient must share with the others of a sum."""
    return record.base_version, record.loss_scale, record.numerics


@dataclass(slots=True, eq=False)
class Sum:
    """Several gradients, added up."""

    shared: Shared
    batches: dict[BatchId, Added] = field(default_factory=dict)
    """In the order in which they were added."""
    only: GradientRecord | None = None
    """The gradient of its first batch, as long as there is no other: n·g/n isn't always g."""
    total: dict[str, Tensor] = field(default_factory=dict)
    """Σ nᵢ·gᵢ by name, in float64 and as real numbers."""
    num_buffers: tuple[int, int] = (0, 0)
    """Tensors and bytes of the changes of buffers that it holds."""
    kinds: Kinds = field(default_factory=dict)
    """Dtype and shape of each gradient."""
    files: list[str] = field(default_factory=list)
    """The keys of what was written of it, the newest last."""
    num_written: int = 0
    """How many batches the newest file has."""
    spare: dict[str, Tensor] = field(default_factory=dict)
    """Memory for `total`, by name: the totals of another sum that nobody needs any more."""

    @property
    def base_version(self) -> int:
        """The version that all of its batches were computed at."""
        return self.shared[0]

    @property
    def loss_scale(self) -> float:
        """λ of all of its batches."""
        return self.shared[1]

    @property
    def num_samples(self) -> float:
        """Σ nᵢ, in examples."""
        return sum(added.num_samples for added in self.batches.values())

    def place(self) -> tuple[int, BatchId, int]:
        """Where it comes among others: by base version, first batch, and the larger one first."""
        return self.base_version, next(iter(self.batches)), -len(self.batches)

    def add(self, block: Sequence[tuple[BatchId, GradientRecord]]) -> None:
        """Add gradients, one after the other; if this raises, the sum is of no use any more."""
        if not self.batches and len(block) == 1:
            self.only = block[0][1]
        else:
            records = [record for _, record in block]
            if self.only is not None:
                records.insert(0, self.only)
                self.only = None
            factors = [record.num_samples for record in records]
            gradients = [record.gradients for record in records]
            add_products(self.total, gradients, factors, self.spare)
        for batch, record in block:
            self.batches[batch] = Added(record.digest, record.num_samples, record.buffers)
            more = extent(record.buffers)
            self.num_buffers = (self.num_buffers[0] + more[0], self.num_buffers[1] + more[1])
            for name, gradient in record.gradients.items():
                self.kinds.setdefault(name, (gradient.dtype, gradient.shape))

    def is_usable(self, headers: Mapping[BatchId, Mapping[str, Any]]) -> bool:
        """Whether each of its batches is among these, with the content that is in the sum."""
        expected = {"base_version": self.base_version, "loss_scale": self.loss_scale}
        for batch, added in self.batches.items():
            header = headers.get(batch)
            if header is None:
                return False
            found = {"digest": added.digest, "num_samples": added.num_samples, **expected}
            if any(header[name] != value for name, value in found.items()):
                return False
        return True

    def pack(self) -> SumRecord:
        """As a file holds it; its tensors share their memory."""
        if self.only is not None:
            return single(next(iter(self.batches)), self.only)
        added = self.batches.values()
        return SumRecord(
            *self.shared,
            batches=tuple(map(str, self.batches)),
            digests=tuple(one.digest for one in added),
            num_samples=tuple(one.num_samples for one in added),
            num_updates=tuple(len(one.buffers) for one in added),
            buffers=[update for one in added for update in one.buffers],
            total=self.total,
        )


def single(batch: BatchId, record: GradientRecord) -> SumRecord:
    """One gradient as a file of a sum holds it: as it is, since n·g/n isn't always g."""
    return SumRecord(
        *shared_of(record),
        batches=(str(batch),),
        digests=(record.digest,),
        num_samples=(record.num_samples,),
        num_updates=(len(record.buffers),),
        buffers=record.buffers,
        total=record.gradients,
    )


def from_file(record: SumRecord, fingerprint: Fingerprint) -> Sum | tuple[BatchId, GradientRecord]:
    """What a file holds: a sum, or the gradient of one batch.

    Args:
        record: The file's; its tensors are copied.
        fingerprint: The tensors that they must fit.

    Raises:
        FormatError: it isn't one of ours, or damaged before it was written.
        ArchitectureError: its tensors aren't the lineage's.
    """
    batches = [read_batch(text) for text in record.batches]
    counts = {len(batches), len(record.digests), len(record.num_samples), len(record.num_updates)}
    if len(counts) != 1 or not batches or len(set(batches)) != len(batches):
        raise FormatError(f"a sum names {len(batches)} batches, and has other numbers of the rest")
    updates = iter(record.buffers)
    buffers = [list(islice(updates, count)) for count in record.num_updates]
    if len(batches) == 1:
        check_tensors(fingerprint, record.total, "trainable")
        if not all(map(all_finite, record.total.values())):
            raise FormatError(f"the gradient of batch {batches[0]} isn't finite, and was")
        return batches[0], GradientRecord(
            kind="gradient",
            base_version=record.base_version,
            num_samples=record.num_samples[0],
            loss_scale=record.loss_scale,
            digest=record.digests[0],
            numerics=record.numerics,
            gradients=record.total,
            buffers=buffers[0],
        )
    shared = (record.base_version, record.loss_scale, record.numerics)
    found = Sum(shared, kinds=kinds_of(fingerprint))
    added = map(Added, record.digests, record.num_samples, buffers)
    found.batches.update(zip(batches, added, strict=True))
    for name, value in record.total.items():
        if name not in found.kinds:
            raise ArchitectureError(f"a sum has a tensor {name[:80]!r}, which doesn't train here")
        dtype, shape = found.kinds[name]
        expected = as_real(torch.empty(shape, dtype=dtype, device="meta")).shape
        if value.dtype != torch.float64 or value.shape != expected:
            raise ArchitectureError(
                f"a sum has {name[:80]!r} as {value.dtype} {tuple(value.shape)}: "
                f"expected {torch.float64} {tuple(expected)}"
            )
        found.total[name] = value.clone()
    return found


def batches_in(blobs: Checked, key: str) -> list[BatchId]:
    """The batches of a sum on file; none if it can't be read.

    Raises:
        StoreError: the storage failed.
    """
    with contextlib.suppress(CorruptedError, FormatError, IdError, TypeError):
        data = blobs.peek(key)
        if data is not None:
            named = peek(SumRecord, data, ("batches",))["batches"]
            return [read_batch(text) for text in named]
    return []


def kinds_of(fingerprint: Fingerprint) -> Kinds:
    """Dtype and shape of each tensor that trains."""
    return {
        name: (getattr(torch, entry["dtype"]), torch.Size(entry["shape"]))
        for name, entry in fingerprint.items()
        if entry.get("role") == "trainable"
    }


def read_batch(text: str) -> BatchId:
    """The batch whose id was written as text.

    Raises:
        FormatError: it is none.
    """
    client_id, incarnation, seq = (*text.split("/"), "", "")[:3]
    if text.count("/") != 2 or not (incarnation.isdecimal() and seq.isdecimal()):
        raise FormatError(f"{text[:80]!r} isn't the id of a batch: expected client/process/number")
    return BatchId(
        check_client_id(client_id),
        check_number("incarnation", int(incarnation)),
        check_number("seq", int(seq)),
    )
