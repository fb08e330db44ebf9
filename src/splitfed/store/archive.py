"""The archive: what folded gradients follow from, kept after they were counted (`keep_forwards`).

A gradient is as large as the body and is deleted once it is counted. Its recipes are kept in its
place: `replay` computes it again. An update that a client sent as it is (of its half, or the change
of a body of its own) follows from nothing in the store: its own file is kept.

A batch's file is created before its gradient is acknowledged, so what is counted can be replayed.
The trap: a request may die in between, and the batch be made by another one. So what is there is
replaced as long as the batch isn't known.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from splitfed.errors import CorruptedError, FormatError
from splitfed.protocol import checksum
from splitfed.protocol.ids import BatchId
from splitfed.protocol.messages import GradientRecord
from splitfed.protocol.packing import pack, peek, unpack
from splitfed.store.checked import Checked
from splitfed.store.layout import Keys


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
        self, batch: BatchId, record: GradientRecord, is_known: Callable[[BatchId], bool]
    ) -> None:
        """Keep the recipes of a batch.

        Args:
            batch: The batch.
            record: Its record; the gradient in it isn't kept.
            is_known: Whether a batch is counted or pending.
        """
        key = self._keys.kept(batch)
        parts = checksum.sealed(pack(record.as_recipes()))
        if self._blobs.create(key, parts):
            return
        data = self._blobs.peek(key)
        found = {} if data is None else peek(GradientRecord, data, ("digest",))
        if found.get("digest") != record.digest and not is_known(batch):
            self._blobs.put(key, parts, durable=True)

    def adopt(self, batch: BatchId) -> None:
        """Keep the file of a counted gradient, if nothing is kept that it follows from.

        One that was damaged is kept nowhere: who went on about it would never go on.
        """
        key = self._keys.kept(batch)
        if self._blobs.raw.get(key) is not None:
            return
        with contextlib.suppress(CorruptedError, FormatError):
            data = self._blobs.get(self._keys.gradient(batch))
            if data is not None and peek(GradientRecord, data, ("kind",))["kind"] == "gradient":
                self._blobs.create(key, [data])

    def read(self, batch: BatchId) -> GradientRecord | None:
        """What is kept of a batch, its recipes or its gradient; `None` if nothing is.

        Raises:
            CorruptedError: the file is damaged.
            FormatError: it is none of ours.
        """
        data = self._blobs.get(self._keys.kept(batch))
        return None if data is None else unpack(GradientRecord, data)
