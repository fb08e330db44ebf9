"""The streaming mean of the gradients of many batches, in an order that depends on their ids alone.

    ḡ = Σ nᵢ·s(τᵢ)·gᵢ/λᵢ / Σ nᵢ

with nᵢ samples in batch i, s(τᵢ) the weight of its staleness τᵢ, and λᵢ what its loss was scaled
by. With s = 1 this is the sample-weighted mean of FedAvg (McMahan et al. 2017, arXiv 1602.05629): k
small batches equal the one large batch. s stands in the numerator only, as in FedBuff (Nguyen et
al. 2022, arXiv 2106.06639, algorithm 1), where s(τ) = 1/√(1+τ).

Floating addition isn't associative, so the same batches folded in another order would end in other
bits. The order is therefore a function of the ids: batches of one group (client, incarnation,
⌊seq/32⌋) are added up in the order of seq, and the partial sums of the groups in sorted order, all
in float64.

In a log, servers may have added up some of the batches themselves (`store.sums`), in an order of
their own. Such sums come first, in the order of their first ids, and their order is on record.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from splitfed.errors import InputError, UnsupportedError
from splitfed.model.adding import Column, add_up, as_real, flat
from splitfed.protocol.ids import BatchId

# Batches of one client whose gradients are added up before they meet those of others. Part of the
# order, so of the bits: another number makes another mean.
_GROUP = 32

_Group = tuple[str, int, int]


@dataclass(frozen=True, slots=True, eq=False)
class _Waiting:
    """A batch that is to be added in the next pass."""

    group: _Group
    gradients: dict[str, Tensor]
    factor: float


class StreamingMean:
    """The mean of gradients that are given one batch after the other.

    It holds one total and one partial sum. The sums live on the device of the first gradient of
    each name. The gradients themselves are never changed. Non-finite values aren't looked for: they
    end in the mean.

    Args:
        keeps: How many batches' gradients may be kept, to be added in one pass. Nobody may write to
            those; with 1 none is kept.
    """

    def __init__(self, keeps: int = 1) -> None:
        self._keeps = keeps
        self._waiting: list[_Waiting] = []
        self._open: _Group | None = None
        """The group whose sum so far is `_partial`."""
        self._kinds: dict[str, tuple[torch.dtype, torch.Size]] = {}
        self._like: dict[str, tuple[Tensor, torch.device]] = {}
        """By name, a tensor without memory that has the shape and strides of the sum; its place."""
        self._total: dict[str, Tensor] = {}
        self._partial: dict[str, Tensor] = {}
        self._samples_total = 0.0
        self._samples_partial = 0.0
        self._num_batches = 0
        self._last: BatchId | None = None
        # The first batch is kept unscaled until a second comes: n·g/n isn't always g in float64.
        self._first = (1.0, 1.0, 1.0)

    @property
    def num_batches(self) -> int:
        """The number of batches so far."""
        return self._num_batches

    @property
    def num_samples(self) -> float:
        """The denominator: Σ nᵢ over all batches so far."""
        return self._samples_total + self._samples_partial

    @torch.no_grad()
    def add(
        self,
        batch_id: BatchId,
        gradients: Mapping[str, Tensor],
        *,
        num_samples: float,
        weight: float = 1.0,
        loss_scale: float = 1.0,
    ) -> None:
        """Fold the gradients of one batch in; if this raises, nothing of it counts.

        Args:
            batch_id: Its id; must come after the ids of all batches before.
            gradients: A gradient per parameter name, floating or complex; a parameter that isn't
                there counts zero.
            num_samples: nᵢ, in examples.
            weight: s(τᵢ).
            loss_scale: λᵢ, what the loss was multiplied by before `backward()`.

        Raises:
            InputError: an id out of order or given twice, a number out of its range, or a gradient
                whose shape or dtype isn't that of the batches before.
            UnsupportedError: a sparse gradient.
        """
        self._check_order(batch_id)
        scaled = _check_numbers(batch_id, num_samples, weight, loss_scale)
        self._check_gradients(batch_id, gradients)
        group = _group(batch_id)
        if self._last is not None and group != _group(self._last):
            self._close_group()
        if self._num_batches == 1:
            # It is in the sums already, or is added with its factor.
            for value in (*self._total.values(), *self._partial.values()):
                value.mul_(_scale(*self._first))
        if self._num_batches == 0:
            self._first = (num_samples, weight, loss_scale)
        for name, gradient in gradients.items():
            self._kinds.setdefault(name, (gradient.dtype, gradient.shape))
        real = {name: as_real(gradient.detach()) for name, gradient in gradients.items()}
        self._waiting.append(_Waiting(group, real, scaled))
        self._samples_partial += num_samples
        self._num_batches += 1
        self._last = batch_id
        if len(self._waiting) >= self._keeps:
            self._add_up()

    @torch.no_grad()
    def add_sum(
        self,
        total: Mapping[str, Tensor],
        kinds: Mapping[str, tuple[torch.dtype, torch.Size]],
        *,
        num_batches: int,
        num_samples: float,
        weight: float = 1.0,
        loss_scale: float = 1.0,
    ) -> None:
        """Add what several batches add up to; before any single one.

        Args:
            total: Σ nᵢ·gᵢ in float64, as real numbers. It becomes part of this mean: the caller
                mustn't use it any more.
            kinds: Dtype and shape of each gradient.
            num_batches: How many they are, at least 2: the mean of one is that batch, bit for bit.
            num_samples: Σ nᵢ, in examples.
            weight: s(τ), which they share.
            loss_scale: λ, which they share.

        Raises:
            InputError: it comes too late, or a number out of its range.
        """
        if self._last is not None or num_batches < 2:
            raise InputError(
                f"a sum of {num_batches} batches after batch {self._last}: expected sums of "
                "several, before any single one"
            )
        _check_numbers("a sum", num_samples, weight, loss_scale)
        factor = weight / loss_scale
        for name, value in total.items():
            self._kinds.setdefault(name, kinds[name])
            if name not in self._like:
                like = torch.empty_like(value, dtype=kinds[name][0].to_real(), device="meta")
                self._like[name] = (like, value.device)
            if factor != 1.0:
                value.mul_(factor)
            if name in self._total:
                self._total[name].add_(value.to(self._total[name].device))
            else:
                self._total[name] = value
        self._samples_total += num_samples
        self._num_batches += num_batches

    @torch.no_grad()
    def mean(self) -> dict[str, Tensor]:
        """ḡ for every parameter that a batch reached, in the dtype of its gradients.

        What is too large for that dtype becomes infinite, as in any cast of torch. More batches may
        follow.
        """
        means = {}
        columns = []
        for name, (dtype, shape) in self._kinds.items():
            like, device = self._place(name)
            mean = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=device)
            column = self._column(name)
            column.out = flat(mean)
            column.divide = self._divide
            columns.append(column)
            mean = torch.view_as_complex(mean) if dtype.is_complex else mean
            means[name] = mean.reshape(shape)
        add_up(columns)
        return means

    def _divide(self, total: Tensor) -> Tensor:
        """The mean of a whole sum, in place."""
        if self._num_batches > 1:
            return total.div_(self.num_samples)
        _, weight, loss_scale = self._first
        return total.mul_(weight).div_(loss_scale)

    def _close_group(self) -> None:
        """End a group. Where a whole one can be kept, it is: then no sum of an open one is held."""
        if self._keeps >= _GROUP and len(self._waiting) + _GROUP > self._keeps:
            self._add_up(closing=True)
        self._samples_total += self._samples_partial
        self._samples_partial = 0.0

    def _add_up(self, *, closing: bool = False) -> None:
        """Add what waits to the sums.

        Args:
            closing: Whether the last group is complete.
        """
        waiting = self._waiting
        last = waiting[-1].group if waiting else self._open
        columns = []
        for name in {**self._partial, **{name: None for one in waiting for name in one.gradients}}:
            column = self._column(name)
            if not column.groups and last == self._open and not closing:
                continue  # its group goes on, and more may come
            if column.total is None and column.partial is not None and not column.continues:
                # The first group that is closed is the total.
                self._total[name] = self._partial.pop(name)
                column.total, column.partial = column.partial, None
            is_open = not closing and any(
                one.group == last and name in one.gradients for one in waiting
            )
            num_sums = len(column.groups) + (column.partial is not None) - column.continues
            if column.total is not None or num_sums > is_open:
                column.new_total = flat(self._held(self._total, name))
            if is_open:
                column.new_partial = flat(self._held(self._partial, name))
            else:
                self._partial.pop(name, None)
            if num_sums:
                columns.append(column)
        add_up(columns)
        self._waiting = []
        self._open = None if closing else last

    def _column(self, name: str) -> Column:
        """The work on one parameter: its gradients that wait, by group, and its sums."""
        groups: list[list[tuple[Tensor, float]]] = []
        last = None
        continues = False
        like, _ = self._place(name)
        only = self._num_batches == 1
        for one in self._waiting:
            if name not in one.gradients:
                continue
            if one.group != last:
                groups.append([])
                continues = continues or (last is None and one.group == self._open)
                last = one.group
            gradient = flat(one.gradients[name], like)
            groups[-1].append((gradient, 1.0 if only else one.factor))
        total = flat(self._total[name]) if name in self._total else None
        partial = flat(self._partial[name]) if name in self._partial else None
        return Column(groups, continues and partial is not None, total, partial)

    def _place(self, name: str) -> tuple[Tensor, torch.device]:
        """What a sum looks like, as a tensor without memory, and where it is."""
        if name not in self._like:
            first = next(one.gradients[name] for one in self._waiting if name in one.gradients)
            self._like[name] = (torch.empty_like(first, device="meta"), first.device)
        return self._like[name]

    def _held(self, sums: dict[str, Tensor], name: str) -> Tensor:
        """The sum of a parameter among these, for which there is memory from now on."""
        if name not in sums:
            like, device = self._like[name]
            sums[name] = torch.empty_strided(
                like.shape, like.stride(), dtype=torch.float64, device=device
            )
        return sums[name]

    def _check_order(self, batch_id: BatchId) -> None:
        if self._last is not None and batch_id <= self._last:
            wrong = "was folded already" if batch_id == self._last else "is out of order"
            raise InputError(
                f"batch {batch_id} {wrong}: expected an id after {self._last}; "
                "sort the ids, each once"
            )

    def _check_gradients(self, batch_id: BatchId, gradients: Mapping[str, Tensor]) -> None:
        for name, gradient in gradients.items():
            if gradient.layout != torch.strided:
                raise UnsupportedError(
                    f"the gradient of {name!r} in batch {batch_id} is {gradient.layout}: "
                    "expected a dense one; "
                    "use sparse=False for the embedding, or gradient.to_dense()"
                )
            dtype, shape = self._kinds.get(name, (gradient.dtype, gradient.shape))
            if not (dtype.is_floating_point or dtype.is_complex):
                raise InputError(
                    f"the gradient of {name!r} in batch {batch_id} is {dtype}: "
                    "expected float or complex"
                )
            if (gradient.dtype, gradient.shape) != (dtype, shape):
                raise InputError(
                    f"the gradient of {name!r} in batch {batch_id} "
                    f"is {gradient.dtype} {tuple(gradient.shape)}: "
                    f"expected {dtype} {tuple(shape)} as in the batches before it"
                )


def _group(batch_id: BatchId) -> _Group:
    return batch_id.client_id, batch_id.incarnation, batch_id.seq // _GROUP


def _scale(num_samples: float, weight: float, loss_scale: float) -> float:
    return num_samples * weight / loss_scale


def _check_numbers(
    batch_id: BatchId | str, num_samples: float, weight: float, loss_scale: float
) -> float:
    """The factor of a batch's gradients, after a check of the numbers that it is made of."""
    for name, value, is_in_range, expected in (
        ("num_samples", num_samples, num_samples > 0, "more than 0"),
        ("weight", weight, weight >= 0, "0 or more"),
        ("loss_scale", loss_scale, loss_scale != 0, "other than 0"),
    ):
        if not (is_in_range and math.isfinite(value)):
            raise InputError(
                f"{name} of batch {batch_id} is {value!r}: expected a finite number {expected}"
            )
    scaled = _scale(num_samples, weight, loss_scale)
    if not math.isfinite(scaled):  # each is finite, and still their quotient may not be
        raise InputError(
            f"num_samples * weight / loss_scale of batch {batch_id} is {scaled}: "
            "expected a finite number"
        )
    return scaled
