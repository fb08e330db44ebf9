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

import torch
from torch import Tensor

from splitfed.errors import InputError, UnsupportedError
from splitfed.model.adding import add_products
from splitfed.protocol.ids import BatchId

# Batches of one client whose gradients are added up before they meet those of others. Part of the
# order, so of the bits: another number makes another mean.
_GROUP = 32


class StreamingMean:
    """The mean of gradients that are given one batch after the other.

    It holds one total and one partial sum, and no batch. The sums live on the device of the first
    gradient of each name. The gradients themselves are never changed or kept. Non-finite values
    aren't looked for: they end in the mean.
    """

    def __init__(self) -> None:
        self._kinds: dict[str, tuple[torch.dtype, torch.Size]] = {}
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
        if self._num_batches == 1:
            for value in self._partial.values():
                value.mul_(_scale(*self._first))
        if self._last is not None and _group(batch_id) != _group(self._last):
            self._close_group()
        if self._num_batches == 0:
            self._first = (num_samples, weight, loss_scale)
            scaled = 1.0
        for name, gradient in gradients.items():
            self._kinds.setdefault(name, (gradient.dtype, gradient.shape))
        add_products(self._partial, [gradients], [scaled])
        self._samples_partial += num_samples
        self._num_batches += 1
        self._last = batch_id

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
        return {
            name: self._mean(name).to(dtype).reshape(shape)
            for name, (dtype, shape) in self._kinds.items()
        }

    def _mean(self, name: str) -> Tensor:
        if self._num_batches == 1:
            _, weight, loss_scale = self._first
            mean = (self._partial[name] * weight).div_(loss_scale)
        else:
            sums = [held[name] for held in (self._total, self._partial) if name in held]
            if len(sums) == 2:
                mean = (sums[0] + sums[1]).div_(self.num_samples)
            else:
                mean = sums[0] / self.num_samples
        return torch.view_as_complex(mean) if self._kinds[name][0].is_complex else mean

    def _close_group(self) -> None:
        for name, value in self._partial.items():
            if name in self._total:
                self._total[name].add_(value.to(self._total[name].device))
            else:
                self._total[name] = value
        self._samples_total += self._samples_partial
        self._partial = {}
        self._samples_partial = 0.0

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


def _group(batch_id: BatchId) -> tuple[str, int, int]:
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
