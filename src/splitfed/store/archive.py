"""The archive: what folded gradients follow from, kept after they were counted (`keep_forwards`).

A gradient is as large as the body and is deleted once it is counted. It follows from the record of
its forward, the gradient at the cut and the weights of its version, so these are kept in its place:
`replay` computes it again. An update that a client sent as it is (of its half, or the change of a
body of its own) follows from nothing in the store: its own file is kept.

A batch's file is created before its gradient is acknowledged, so what is counted can be replayed.
The trap: a request may die in between, and the batch be made by another one. So what is there is
replaced as long as the batch isn't known.
"""

from __future__ import annotations

from collections.abc import Callable

from splitfed.protocol import checksum
from splitfed.protocol.ids import BatchId
from splitfed.protocol.messages import GradientRecord, KeptCall, KeptSeal
from splitfed.protocol.packing import kind_of, pack, peek, unpack
from splitfed.store.checked import Checked
from splitfed.store.layout import Keys

Kept = KeptCall | KeptSeal | GradientRecord
_KINDS: dict[str, type[Kept]] = {cls.__name__: cls for cls in (KeptCall, KeptSeal, GradientRecord)}


class Archive:
    """The archive of one lineage.

    Args:
        blobs: The storage backend.
        keys: The lineage's keys.
    """

    def __init__(self, blobs: Checked, keys: Keys) -> None:
        self._blobs = blobs
        self._keys = keys

    def put(
        self,
        batch: BatchId,
        part: int | None,
        kept: KeptCall | KeptSeal,
        is_known: Callable[[BatchId], bool],
    ) -> None:
        """Keep what a batch, or an earlier part of it, follows from.

        Args:
            batch: The batch.
            part: Which part; `None` for what closes the batch.
            kept: What it follows from.
            is_known: Whether a batch is counted or pending.
        """
        key = self._keys.kept(batch, part)
        parts = checksum.sealed(pack(kept))
        if self._blobs.create(key, parts):
            return
        data = self._blobs.peek(key)
        is_same = (
            data is not None
            and kind_of(data) == type(kept).__name__
            and peek(type(kept), data, ("digest",))["digest"] == kept.digest
        )
        if not is_same and not is_known(batch):
            self._blobs.put(key, parts, durable=True)

    def adopt(self, batch: BatchId) -> None:
        """Keep the file of a counted gradient, if nothing is kept that it follows from."""
        key = self._keys.kept(batch)
        if self._blobs.raw.get(key) is not None:
            return
        data = self._blobs.get(self._keys.gradient(batch))
        if data is not None and peek(GradientRecord, data, ("kind",))["kind"] == "gradient":
            self._blobs.create(key, [data])

    def read(self, batch: BatchId, part: int | None = None) -> Kept | None:
        """What is kept of a batch, or of an earlier part of it; `None` if nothing is.

        Raises:
            CorruptedError: the file is damaged.
            FormatError: it is none of ours.
        """
        data = self._blobs.get(self._keys.kept(batch, part))
        if data is None:
            return None
        return unpack(_KINDS.get(kind_of(data), GradientRecord), data)
