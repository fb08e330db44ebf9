"""Mutants of the log: what is held of gradients, the sums that are made of them, and what a commit does with both."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from tests.faults.simulator.table import Changes, mutant

from splitfed.accumulator import accumulator as accumulating
from splitfed.accumulator import fold as folding
from splitfed.accumulator.accumulator import Accumulator
from splitfed.model import execution
from splitfed.protocol.ids import BatchId
from splitfed.protocol.messages import GradientRecord
from splitfed.store import holder as holding
from splitfed.store.batches import Pile, Sealer
from splitfed.store.commit import Commit
from splitfed.store.holder import Holder
from splitfed.store.sums import Sum, shared_of

# ------------------------------------------------------------------------------------------- what is held


@mutant
def added_on_exists() -> Changes:
    """A server holds the gradient of a batch that it has found on file, made by another."""
    real = Pile.create

    def create(self: Pile, *given: Any, **options: Any) -> tuple[str, bool]:
        return real(self, *given, **options)[0], True

    yield Pile, "create", create


@mutant
def added_before_the_create() -> Changes:
    """A server holds a gradient whose record it is about to create."""
    real = Sealer._as_stored

    def as_stored(self: Sealer, batch: BatchId, record: GradientRecord, **options: Any) -> GradientRecord:
        stored = real(self, batch, record, **options)
        if self._holder is not None and stored.holder:
            self._holder.put(batch, record)
        return stored

    yield Sealer, "_as_stored", as_stored


@mutant
def listed_in_another_order_than_added() -> Changes:
    """A sum lists its batches by their ids."""
    real = Sum.add

    def add(self: Sum, block: Any) -> None:
        real(self, block)
        self.batches = dict(sorted(self.batches.items(), reverse=True))

    yield Sum, "add", add


@mutant
def two_loss_scales_in_one_sum() -> Changes:
    """Gradients of one version are added up, whatever their losses were scaled by."""
    yield holding, "shared_of", lambda record: (record.base_version, 1.0, record.numerics)


@mutant
def two_versions_in_one_sum() -> Changes:
    """Gradients are added up, whatever version they are of."""
    yield holding, "shared_of", lambda record: (0, *shared_of(record)[1:])


@mutant
def written_under_one_name() -> Changes:
    """A sum that goes on takes the name of its last file."""
    real = Holder._create

    def create(self: Holder, *given: Any) -> str:
        self._num_written = 0
        return real(self, *given)

    yield Holder, "_create", create


# ---------------------------------------------------------------------------------------- what is committed


@mutant
def sum_judged_by_its_first_batch() -> Changes:
    """A sum is used if its first batch is folded."""
    real = Sum.is_usable

    def is_usable(self: Sum, headers: Mapping[BatchId, Mapping[str, Any]]) -> bool:
        first = next(iter(self.batches))
        return real(replace(self, batches={first: self.batches[first]}), headers)

    yield Sum, "is_usable", is_usable


@mutant
def sum_with_batches_that_arent_pending() -> Changes:
    """Of a sum only those batches are looked at that are to be folded."""
    real = Sum.is_usable

    def is_usable(self: Sum, headers: Mapping[BatchId, Mapping[str, Any]]) -> bool:
        known = {batch: added for batch, added in self.batches.items() if batch in headers}
        return bool(known) and real(replace(self, batches=known), headers)

    yield Sum, "is_usable", is_usable


@mutant
def sums_that_overlap() -> Changes:
    """A batch may be in two sums of a commit."""
    real = folding._Adding._add_sums

    def add_sums(self: Any, folded: Any, streaming: Any, sums: Iterable[Sum]) -> Any:
        updated: dict[BatchId, Any] = {}
        for one in sorted(sums, key=Sum.place):
            updated |= real(self, folded, streaming, [one])
        return updated

    yield folding._Adding, "_add_sums", add_sums


@mutant
def computed_beside_its_sum() -> Changes:
    """A batch of a sum is computed and added besides."""
    real = folding._Adding._add_sums

    def add_sums(*given: Any) -> Any:
        real(*given)
        return {}

    yield folding._Adding, "_add_sums", add_sums


@mutant
def groups_that_arent_on_record() -> Changes:
    """What servers have added up isn't told in the record of the commit."""
    yield accumulating, "Commit", lambda **fields: Commit(**{**fields, "groups": ()})


@mutant
def computed_at_the_newest_version() -> Changes:
    """A gradient is computed again from the weights of now, and nobody compares its outputs."""
    real = Accumulator._read

    def read(self: Accumulator, batch: BatchId, head: int) -> GradientRecord | None:
        gradient = self._deriver.gradient

        def at_head(record: GradientRecord) -> GradientRecord:
            return gradient(replace(record, recipes=[replace(each, version=head) for each in record.recipes]))

        self._deriver.gradient = at_head  # type: ignore[method-assign]
        try:
            return real(self, batch, head)
        finally:
            del self._deriver.gradient

    yield Accumulator, "_read", read
    yield execution, "check_replay", lambda *_: None
