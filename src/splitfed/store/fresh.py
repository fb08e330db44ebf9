"""Gradients that this process has just computed, for an accumulator in the same process.

In a log a gradient is computed again from its recipes. Where server and accumulator share a
process, it needn't be: the last few are handed over in memory. This is a cache of what recipes
give, bit for bit, so it changes speed and never results, and may lose anything at any moment.

The trap: autograd may hand out a gradient that shares its memory with one that the client has, who
may write to it. So those are copied.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping

from torch import Tensor

from splitfed.protocol.ids import BatchId
from splitfed.protocol.messages import GradientRecord

BYTES = 256 * 2**20
"""So many bytes of gradients are kept, or two gradients if these are larger."""
_LEAST = 2


class Fresh:
    """The last gradients of one lineage; safe to share between threads.

    Args:
        most: How many bytes.
    """

    def __init__(self, most: int = BYTES) -> None:
        self._most = most
        self._records: OrderedDict[BatchId, tuple[GradientRecord, int]] = OrderedDict()
        self._num_bytes = 0
        self._lock = threading.Lock()
        self.wanted = False
        """Whether this process has an accumulator of the lineage."""

    def put(self, batch: BatchId, record: GradientRecord) -> None:
        """Keep a gradient that was acknowledged, in memory that nobody writes to."""
        if not self.wanted:
            return
        num_bytes = sum(gradient.nbytes for gradient in record.gradients.values())
        kept = record.as_gradient()
        with self._lock:
            self._drop(batch)
            self._records[batch] = (kept, num_bytes)
            self._num_bytes += num_bytes
            while self._num_bytes > self._most and len(self._records) > _LEAST:
                self._drop(next(iter(self._records)))

    def take(self, batch: BatchId, digest: str) -> GradientRecord | None:
        """Take out the gradient of a batch whose file has that digest; `None` if it is gone."""
        with self._lock:
            found = self._records.get(batch)
            self._drop(batch)
        return found[0] if found is not None and found[0].digest == digest else None

    def _drop(self, batch: BatchId) -> None:
        found = self._records.pop(batch, None)
        if found is not None:
            self._num_bytes -= found[1]


def apart(gradients: Mapping[str, Tensor], others: Iterable[Tensor | None]) -> dict[str, Tensor]:
    """Gradients that share no memory with the tensors of others."""
    taken = {_memory(tensor) for tensor in others if tensor is not None}
    return {
        name: gradient.clone() if _memory(gradient) in taken else gradient
        for name, gradient in gradients.items()
    }


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
