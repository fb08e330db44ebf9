"""Folding: which pending batches count in the next commit, and what they add up to.

Sorting comes first: by their headers alone, batches are told apart into those that will be folded,
those too old, rejected or given up. Only then are the tensors read, in canonical order. Whether
they are finite is asked of their mean, as what isn't finite in a gradient isn't in the mean either;
if it isn't, each gradient is looked at. Nothing is left out silently: every batch ends in one set
of the commit's verdict.

The trap: a gradient file may come from anywhere, and it must never block the others. Whatever is
wrong with a file rejects that batch; an error of the settings, or a file that is gone because
another accumulator folded it, is no batch's fault and ends the attempt. And it is warned of once,
though it may be looked at many times before a commit closes it.

A batch of a log whose gradient comes out otherwise here, or whose body raises, is no batch's fault
either: it was acknowledged, so it stays pending for whoever can compute it.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from splitfed.accumulator.mean import StreamingMean
from splitfed.accumulator.settings import CommitSettings
from splitfed.checks import positive
from splitfed.errors import (
    ArchitectureError,
    BodyError,
    CorruptedError,
    FormatError,
    IdError,
    InputError,
    MissingError,
    ReplayError,
    SplitFedError,
)
from splitfed.model.fingerprint import check_tensors
from splitfed.model.numerics import all_finite
from splitfed.model.skeleton import Fingerprint
from splitfed.protocol.ids import BatchId, check_number
from splitfed.protocol.messages import BufferUpdate, GradientRecord
from splitfed.store.batches import OUTCOMES
from splitfed.store.batchset import BatchSet, Outcome, Verdict
from splitfed.store.sums import Sum

# What reading, checking or adding a foreign file can raise; MissingError isn't among them.
_UNFIT = (
    FormatError,
    CorruptedError,
    ArchitectureError,
    InputError,
    KeyError,
    TypeError,
    AttributeError,
)
# What computing a gradient again can raise: this process may be what is wrong.
_NOT_HERE = (ReplayError, BodyError)

Older = Mapping[int, BatchSet]
"""Batches that were computed at another version than the head, by that version."""


def sort_batches(
    batches: Iterable[BatchId],
    headers: Callable[[BatchId], Mapping[str, Any]],
    head: int,
    settings: CommitSettings,
    judged: Verdict | None = None,
    unfit: set[BatchId] | None = None,
    is_abandoned: Callable[[int], bool] = lambda version: False,
) -> tuple[Verdict, Older]:
    """Tell pending batches apart by their headers.

    Args:
        batches: In canonical order.
        headers: The plain fields of a batch, without its tensors.
        head: The version that the commit builds upon.
        settings: How old a base may be.
        judged: What was decided before; it can close a batch that would count.
        unfit: Batches that were found unfit and warned of before; those found here join them.
        is_abandoned: Whether a rollback has undone a version: its gradients are of another branch.

    Returns:
        What becomes of each batch, and those of another version than the head.
    """
    unfit = set() if unfit is None else unfit
    outcomes: dict[BatchId, Outcome] = {}
    older: dict[int, list[BatchId]] = {}
    for batch in batches:
        try:
            header = headers(batch)
            kind = header["kind"]
            base = check_number("base version", header["base_version"])
        except (FormatError, CorruptedError, IdError, KeyError) as error:
            outcomes[batch] = Outcome.REJECTED
            _warn_rejected(batch, f"its file is unreadable ({error})", unfit)
            continue
        age = head - base
        if age > 0 and kind != "skip":
            older.setdefault(base, []).append(batch)
        outcome = _outcome(batch, kind, age, settings.max_staleness, judged)
        if outcome is Outcome.FOLDED and is_abandoned(base):
            outcome = Outcome.STALE
        if outcome is None:
            outcome = Outcome.REJECTED
            shown = str(kind)[:40]
            reason = f"its kind is {shown!r} and its base version {base} of {head}"
            _warn_rejected(batch, reason, unfit)
        outcomes[batch] = outcome
    return Verdict.of(outcomes), {version: BatchSet(ids) for version, ids in sorted(older.items())}


def oldest(
    verdict: Verdict, older: Older, most: int, deferred: Container[BatchId] = ()
) -> tuple[Verdict, Older]:
    """A verdict that folds so many of the batches at most, the oldest; the others stay pending.

    They come by the version that they were computed at. Of one version each client's first come
    before anybody's second, so that a client with many doesn't make a commit alone. The order is a
    function of the ids and versions: whoever sees the same batches folds the same.

    Args:
        verdict: What becomes of each pending batch.
        older: Those of another version than the head, by version.
        most: How many are folded at most.
        deferred: Batches that can't be folded here; they take nobody's place.
    """
    version = {batch: base for base, batches in older.items() for batch in batches}
    head = max(older, default=0) + 1
    counts: Counter[tuple[int, str]] = Counter()
    places: dict[BatchId, tuple[int, int]] = {}
    for batch in verdict.folded:
        if batch in deferred:
            continue
        base = version.get(batch, head)
        places[batch] = (base, counts[base, batch.client_id])
        counts[base, batch.client_id] += 1
    first = set(sorted(places, key=lambda batch: (places[batch], batch))[:most])
    later = {batch for batch in verdict.folded if batch not in first}
    if not later:
        return verdict, older
    kept = {base: [one for one in batches if one not in later] for base, batches in older.items()}
    return verdict.without(later), {base: BatchSet(ids) for base, ids in kept.items() if ids}


def _outcome(
    batch: BatchId, kind: object, age: int, max_staleness: int | None, judged: Verdict | None
) -> Outcome | None:
    """What becomes of a batch by its header; `None` if the header makes no sense."""
    outcome = OUTCOMES.get(kind) if isinstance(kind, str) else None
    if outcome is not Outcome.FOLDED:
        return outcome
    if age < 0:  # computed at a version that doesn't exist yet
        return None
    before = None if judged is None else judged.outcome(batch)
    if before is Outcome.REJECTED:
        return before
    if before is Outcome.STALE or (max_staleness is not None and age > max_staleness):
        return Outcome.STALE
    return Outcome.FOLDED


@dataclass(slots=True, eq=False)
class Folded:
    """The sum of a commit's batches."""

    verdict: Verdict
    """What became of each batch, those included that proved unfit when they were read."""
    mean: Mapping[str, Tensor]
    """The mean gradient by parameter; one that no batch reached isn't there."""
    num_samples: float
    """Σ nᵢ of the batches in it, in examples."""
    updates: list[BufferUpdate]
    staleness: Counter[int]
    num_foreign: int
    weights: dict[int, float]
    """s(τ) of each staleness, where it isn't 1."""
    sums: list[Sum]
    """Those that are part of the mean, in their order."""
    deferred: dict[BatchId, SplitFedError]
    """Batches whose gradients couldn't be computed again here, and why: they stay pending."""

    def count(self, count: int, age: int, weight: float, *, is_foreign: bool) -> None:
        """Take note of batches that were added."""
        self.staleness[age] += count
        if weight != 1.0:
            self.weights[age] = weight
        self.num_foreign += count * is_foreign


def fold(
    verdict: Verdict,
    read: Callable[[BatchId], GradientRecord | None],
    fingerprint: Fingerprint,
    head: int,
    settings: CommitSettings,
    numerics: str,
    unfit: set[BatchId] | None = None,
    sums: Iterable[Sum] = (),
    keeps: int = 1,
) -> Folded:
    """Read the batches to fold and add them up; one that proves unfit is rejected.

    Args:
        verdict: What becomes of each batch, by its header.
        read: The gradient of a batch; `None` if it is gone.
        fingerprint: The tensors that their gradients must fit.
        head: The version that the commit builds upon.
        settings: The weight s(τ).
        numerics: The class of version 0; batches of another are counted.
        unfit: As for `sort_batches`.
        sums: What some of them add up to; those that are used become part of the mean.
        keeps: How many gradients may be held at a time; more than 1 if they are mapped files, which
            take no memory.

    Raises:
        MissingError: a batch has gone meanwhile; ordinarily another accumulator has won this
            version.
        InputError: the weight isn't one.
    """
    warned = set() if unfit is None else unfit
    adding = _Adding(verdict, read, fingerprint, head, settings, numerics, warned, keeps)
    folded = adding.add_up(sums, tested=False)
    if all(all_finite(mean) for mean in folded.mean.values()):
        return folded
    # Sums have become part of that mean: their batches are looked at one by one, too.
    return adding.add_up((), tested=True)


@dataclass(frozen=True, slots=True, eq=False)
class _Adding:
    """What `fold` is given."""

    verdict: Verdict
    read: Callable[[BatchId], GradientRecord | None]
    fingerprint: Fingerprint
    head: int
    settings: CommitSettings
    numerics: str
    warned: set[BatchId]
    keeps: int

    def add_up(self, sums: Iterable[Sum], *, tested: bool) -> Folded:
        """As `fold`, where what isn't finite ends in the mean unless each gradient is `tested`."""
        streaming = StreamingMean(self.keeps)
        folded = Folded(self.verdict, {}, 0.0, [], Counter(), 0, {}, [], {})
        updated = self._add_sums(folded, streaming, sums)
        rejected: dict[BatchId, Outcome] = {}
        for batch in self.verdict.folded:
            if batch in updated:
                continue
            try:
                record = self.read(batch)
                if record is None:
                    raise MissingError(f"batch {batch} is gone")
                age = self.head - record.base_version
                updates = _checked(record, self.fingerprint, tested=tested)
            except _NOT_HERE as error:
                folded.deferred[batch] = error
                continue
            except _UNFIT as error:
                rejected[batch] = Outcome.REJECTED
                _warn_rejected(batch, f"it doesn't fit ({error})", self.warned)
                continue
            # Outside of both try blocks: a function that is wrong is no batch's fault.
            weight = _weight(self.settings.staleness_weight, age)
            try:
                streaming.add(
                    batch,
                    record.gradients,
                    num_samples=record.num_samples,
                    weight=weight,
                    loss_scale=record.loss_scale,
                )
            except _UNFIT as error:
                rejected[batch] = Outcome.REJECTED
                _warn_rejected(batch, f"it doesn't fit ({error})", self.warned)
                continue
            updated[batch] = updates
            folded.count(1, age, weight, is_foreign=record.numerics != self.numerics)
        folded.mean = streaming.mean()
        folded.num_samples = streaming.num_samples
        # In canonical order, whoever has added the gradients up.
        folded.updates.extend(update for batch in sorted(updated) for update in updated[batch])
        if rejected:
            folded.verdict = Verdict.of({**dict(self.verdict.items()), **rejected})
        if folded.deferred:
            folded.verdict = folded.verdict.without(folded.deferred)
        return folded

    def _add_sums(
        self, folded: Folded, streaming: StreamingMean, sums: Iterable[Sum]
    ) -> dict[BatchId, Sequence[BufferUpdate]]:
        """Add sums that share no batch; the buffer updates of their batches."""
        updated: dict[BatchId, Sequence[BufferUpdate]] = {}
        for one in sorted(sums, key=Sum.place):
            if not updated.keys().isdisjoint(one.batches) or not _is_sound(one, self.fingerprint):
                continue
            age, count = self.head - one.base_version, len(one.batches)
            weight = _weight(self.settings.staleness_weight, age)
            streaming.add_sum(
                one.total,
                one.kinds,
                num_batches=count,
                num_samples=one.num_samples,
                weight=weight,
                loss_scale=one.loss_scale,
            )
            folded.sums.append(one)
            folded.count(count, age, weight, is_foreign=one.shared[2] != self.numerics)
            updated.update((batch, added.buffers) for batch, added in one.batches.items())
        return updated


def _is_sound(one: Sum, fingerprint: Fingerprint) -> bool:
    """Whether a sum may be used; if not, its batches are looked at one by one."""
    try:
        for added in one.batches.values():
            positive("num_samples", added.num_samples)
            _check_updates(added.buffers, fingerprint)
    except _UNFIT:
        return False
    scale = one.loss_scale
    return abs(scale) >= 1 or all(all_finite(total / scale) for total in one.total.values())


def _weight(staleness_weight: Callable[[int], float], age: int) -> float:
    value = staleness_weight(age)
    try:
        weight = float(value)
    except (TypeError, ValueError):
        weight = math.nan
    if not 0 <= weight < math.inf:
        raise InputError(
            f"staleness_weight({age}) is {value!r}: expected a finite number of 0 or more"
        )
    return weight


def _checked(
    record: GradientRecord, fingerprint: Fingerprint, *, tested: bool
) -> list[BufferUpdate]:
    """The buffer updates of a record, all of which was checked: its file may come from anywhere.

    Args:
        record: The record.
        fingerprint: The tensors that it must fit.
        tested: Whether its gradient is tested too, as stored. Once divided it always is.

    Raises:
        ArchitectureError: tensors that aren't the lineage's.
        InputError: numbers out of their range, or a gradient that isn't finite.
    """
    positive("num_samples", record.num_samples)
    check_tensors(fingerprint, record.gradients, "trainable")
    gradients = record.gradients.values()
    if tested and not all(all_finite(gradient) for gradient in gradients):
        raise InputError("a gradient isn't finite")
    # Dividing by a loss scale below 1 makes gradients larger, and may take them out of range.
    scale = record.loss_scale
    if abs(scale) < 1 and not all(all_finite(gradient / scale) for gradient in gradients):
        raise InputError(f"a gradient isn't finite any more once divided by its loss scale {scale}")
    _check_updates(record.buffers, fingerprint)
    return list(record.buffers)


def _check_updates(updates: Iterable[BufferUpdate], fingerprint: Fingerprint) -> None:
    for update in updates:
        check_tensors(fingerprint, update.values, "buffer")
        check_tensors(fingerprint, update.bases, "buffer")
        lonely = set(update.values) ^ set(update.bases)
        if lonely:
            raise InputError(f"buffers {sorted(lonely)} have no value or no base")
        positive("num_samples", update.num_samples)


def _warn_rejected(batch: BatchId, reason: str, warned: set[BatchId]) -> None:
    if batch in warned:
        return
    warned.add(batch)
    warnings.warn(f"batch {batch} is rejected: {reason}. It counts nowhere", stacklevel=2)
