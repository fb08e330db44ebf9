"""The files of batches under way: forwards, parts, and the gradients that pile up until a commit folds them.

A gradient is created once under its batch id. A retry finds it there: with the same digest it is a success, with
another it is an error, and either way nothing is counted twice. Forwards and parts are transient: their loss costs
one batch a retry, so they are never fsynced.
"""

from __future__ import annotations

from collections.abc import Iterable

from splitfed.blobs.contract import Blobs
from splitfed.errors import DigestError, FormatError
from splitfed.protocol.ids import BatchId, check_client_id
from splitfed.protocol.messages import ForwardRecord, GradientRecord
from splitfed.protocol.packing import pack, peek, unpack
from splitfed.store.layout import Keys

_PLAIN = ("kind", "base_version", "num_samples", "loss_scale", "digest", "numerics")


class Pile:
    """The batches of one lineage."""

    def __init__(self, blobs: Blobs, keys: Keys) -> None:
        self.blobs = blobs
        self.keys = keys

    def put_forward(self, version: int, client_id: str, incarnation: int, call: int, record: ForwardRecord) -> None:
        """Keep a forward until its backward is confirmed or its version expires."""
        self.blobs.put(self.keys.forward(version, client_id, incarnation, call), pack(record))

    def forward(self, version: int, client_id: str, incarnation: int, call: int) -> ForwardRecord | None:
        """A forward that is kept, or `None`."""
        data = self.blobs.get(self.keys.forward(version, client_id, incarnation, call))
        return None if data is None else unpack(ForwardRecord, data)

    def drop_forward(self, version: int, client_id: str, incarnation: int, call: int) -> None:
        """Forget a forward."""
        self.blobs.delete(self.keys.forward(version, client_id, incarnation, call))

    def pin(self, batch: BatchId, version: int) -> int:
        """The version that this one-trip batch runs at: `version`, unless an earlier try of it took another."""
        key = self.keys.pin(batch)
        if self.blobs.create(key, [str(version).encode()], durable=False):
            return version
        found = self.blobs.get(key)
        return version if found is None else int(bytes(found))

    def drop_pin(self, batch: BatchId) -> None:
        """Forget the version of a one-trip batch."""
        self.blobs.delete(self.keys.pin(batch))

    def put_part(self, version: int, batch: BatchId, part: int, record: GradientRecord) -> None:
        """Keep one call's share of a batch until the batch is sealed.

        Raises:
            DigestError: this part was sent before with other content.
        """
        self._create(self.keys.part(version, batch, part), record, f"part {part} of batch {batch}", durable=False)

    def part(self, version: int, batch: BatchId, part: int) -> GradientRecord | None:
        """A share that is kept, or `None`."""
        data = self.blobs.get(self.keys.part(version, batch, part))
        return None if data is None else unpack(GradientRecord, data)

    def drop_part(self, version: int, batch: BatchId, part: int) -> None:
        """Forget a share."""
        self.blobs.delete(self.keys.part(version, batch, part))

    def create(self, batch: BatchId, record: GradientRecord) -> str:
        """Add a batch to the pile, once; answer the kind of what lies there.

        Raises:
            DigestError: that id was used before with other content.
        """
        return self._create(self.keys.gradient(batch), record, f"batch {batch}", durable=True)

    def read(self, batch: BatchId) -> GradientRecord | None:
        """A batch that waits, or `None`.

        Raises:
            FormatError: its file isn't a gradient of ours.
        """
        data = self.blobs.get(self.keys.gradient(batch))
        return None if data is None else unpack(GradientRecord, data)

    def peek(self, batch: BatchId) -> dict[str, object] | None:
        """What a waiting batch says of itself, without its tensors; `None` if it doesn't wait."""
        data = self.blobs.get(self.keys.gradient(batch))
        return None if data is None else peek(GradientRecord, data, _PLAIN)

    def waiting(self, client_id: str | None = None) -> list[BatchId]:
        """The batches that lie in the pile, in canonical order; those of a crashed clean-up among them.

        Args:
            client_id: Only those of one client.
        """
        folder = self.keys.gradients if client_id is None else f"{self.keys.gradients}/{check_client_id(client_id)}"
        found = (self.keys.parse_gradient(key) for key in self.blobs.list(folder))
        return sorted(batch for batch in found if batch is not None)

    def drop(self, batches: Iterable[BatchId]) -> None:
        """Take batches off the pile; only those that the head's applied table holds may be."""
        for batch in batches:
            self.blobs.delete(self.keys.gradient(batch))

    def _create(self, key: str, record: GradientRecord, what: str, *, durable: bool) -> str:
        if self.blobs.create(key, pack(record), durable=durable):
            return record.kind
        data = self.blobs.get(key)
        if data is None:  # folded and dropped meanwhile: it was there, and counted
            return record.kind
        found = peek(GradientRecord, data, ("kind", "digest"))
        if found["digest"] != record.digest:
            if found["kind"] == "skip":
                raise DigestError(f"{what} was given up by its client: take a new number")
            raise DigestError(
                f"{what} was sent before with other content: expected {record.digest}, got {found['digest']}"
            )
        if not isinstance(found["kind"], str):
            raise FormatError(f"the file of {what} has no kind")
        return found["kind"]
