"""Folding what waits: which batches count in the next commit, and what they add up to.

Sorting comes first: by their headers alone, batches are told apart into those that will be folded, those too old,
rejected or given up. Only then are the tensors read, one batch at a time, in canonical order. Nothing is left out
silently: every id that waits ends in one of the commit's lists.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from splitfed.accumulator.mean import StreamingMean
from splitfed.checks import positive
from splitfed.errors import ArchitectureError, FormatError, IdError, InputError, MissingError
from splitfed.model.fingerprint import check_tensors
from splitfed.model.numerics import all_finite
from splitfed.model.skeleton import Fingerprint
from splitfed.protocol.ids import BatchId, check_number
from splitfed.protocol.messages import BufferUpdate, GradientRecord
from splitfed.store.batches import Pile
from splitfed.store.selection import Selection

_UNFIT = (FormatError, ArchitectureError, InputError, KeyError, TypeError, AttributeError)


@dataclass(slots=True)
class Sorted:
    """Waiting batches by what becomes of them, each in canonical order."""

    ready: list[BatchId] = field(default_factory=list)
    stale: list[BatchId] = field(default_factory=list)
    rejected: list[BatchId] = field(default_factory=list)
    skipped: list[BatchId] = field(default_factory=list)
    older: dict[int, list[BatchId]] = field(default_factory=dict)
    """Those computed at another version than the head, by version."""

    @property
    def closed(self) -> list[BatchId]:
        """All of them: the ids that a commit closes."""
        return [*self.ready, *self.stale, *self.rejected, *self.skipped]


def sort_batches(
    batches: Iterable[BatchId],
    headers: Callable[[BatchId], Mapping[str, Any]],
    head: int,
    max_staleness: int | None,
    judged: Selection | None = None,
) -> Sorted:
    """Tell waiting batches apart by their headers.

    Args:
        batches: In canonical order.
        headers: What a batch says of itself, without its tensors.
        head: The version that the commit builds upon.
        max_staleness: The oldest base that still counts, in commits behind `head`; `None` for any.
        judged: What was decided before; it can close a batch that would count.
    """
    found = Sorted()
    judged = judged or Selection()
    for batch in batches:
        try:
            header = headers(batch)
            kind, age = header["kind"], head - check_number("base version", header["base_version"])
        except (FormatError, IdError, KeyError) as error:
            _reject(found, batch, f"its file is unreadable ({error})")
            continue
        if age > 0 and kind != "skip":
            found.older.setdefault(head - age, []).append(batch)
        if kind == "skip":
            found.skipped.append(batch)
        elif kind == "rejected":
            found.rejected.append(batch)
        elif kind != "gradient" or age < 0:
            _reject(found, batch, f"its kind is {str(kind)[:40]!r} and its base version {head - age} of {head}")
        elif batch in judged.rejected:
            found.rejected.append(batch)
        elif batch in judged.stale or (max_staleness is not None and age > max_staleness):
            found.stale.append(batch)
        else:
            found.ready.append(batch)
    return found


@dataclass(slots=True, eq=False)
class Folded:
    """The sum of a commit's batches."""

    mean: StreamingMean
    updates: list[BufferUpdate]
    staleness: Counter[int]
    num_foreign: int


def fold(
    found: Sorted,
    pile: Pile,
    fingerprint: Fingerprint,
    head: int,
    weight: Callable[[int], float],
    numerics: str,
) -> Folded:
    """Read the ready batches and fold them; one that proves unreadable moves to `found.rejected`.

    Args:
        found: The sorted batches.
        pile: Where they lie.
        fingerprint: What their gradients must fit.
        head: The version that the commit builds upon.
        weight: s(τ).
        numerics: The class of version 0; batches of another are counted.

    Raises:
        MissingError: a batch has gone meanwhile; ordinarily another accumulator has won this version.
        InputError: `weight` answers what is no weight.
    """
    folded = Folded(StreamingMean(), [], Counter(), 0)
    for batch in list(found.ready):
        try:
            record = pile.read(batch)
            if record is None:
                raise MissingError(f"batch {batch} is gone")
            age = head - record.base_version
            updates = _checked(record, fingerprint)
        except _UNFIT as error:
            _leave_out(found, batch, error)
            continue
        share = _share(weight, age)  # a function that is wrong is no batch's fault
        try:
            numbers = {"num_samples": record.num_samples, "weight": share, "loss_scale": record.loss_scale}
            folded.mean.add(batch, record.gradients, **numbers)
        except _UNFIT as error:
            _leave_out(found, batch, error)
            continue
        folded.updates.extend(updates)
        folded.staleness[age] += 1
        folded.num_foreign += record.numerics != numerics
    return folded


def _share(weight: Callable[[int], float], age: int) -> float:
    value = weight(age)
    try:
        share = float(value)
    except (TypeError, ValueError):
        share = math.nan
    if not 0 <= share < math.inf:
        raise InputError(f"staleness_weight({age}) is {value!r}: expected a finite number of 0 or more")
    return share


def _leave_out(found: Sorted, batch: BatchId, error: Exception) -> None:
    found.ready.remove(batch)
    _reject(found, batch, f"it doesn't fit ({error})")
    found.rejected.sort()


def _checked(record: GradientRecord, fingerprint: Fingerprint) -> list[BufferUpdate]:
    """The buffer updates of a record, all of which was checked: its file may come from anywhere.

    Raises:
        ArchitectureError: tensors that aren't the lineage's.
        InputError: numbers out of their range, or a gradient that isn't finite.
    """
    positive("num_samples", record.num_samples)
    check_tensors(fingerprint, record.gradients, "trainable")
    if not all(all_finite(gradient) for gradient in record.gradients.values()):
        raise InputError("a gradient isn't finite")
    if abs(record.loss_scale) < 1 and not all(all_finite(g / record.loss_scale) for g in record.gradients.values()):
        raise InputError(f"a gradient isn't finite any more once divided by its loss scale {record.loss_scale}")
    for update in record.buffers:
        check_tensors(fingerprint, update.values, "buffer")
        check_tensors(fingerprint, update.bases, "buffer")
        if set(update.values) != set(update.bases):
            raise InputError(f"buffers {sorted(set(update.values) ^ set(update.bases))} have no value or no base")
        positive("num_samples", update.num_samples)
    return list(record.buffers)


def _reject(found: Sorted, batch: BatchId, why: str) -> None:
    found.rejected.append(batch)
    warnings.warn(f"batch {batch} is rejected: {why}. It counts nowhere", stacklevel=2)
