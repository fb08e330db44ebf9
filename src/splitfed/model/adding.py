"""Adding gradients up: total += Σ fᵢ·gᵢ, in float64, in the order in which they are given.

Floating addition isn't associative, so the order is part of the result. For each element it is the
order of the arguments, however the work is cut up: chunk by chunk, and within a chunk gradient by
gradient, so that the total is read and written once for all of them. Each product is rounded before
it is added: torch's `add_(alpha=)` may fuse the two, in some places of a tensor and not in others.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

CHUNK = 1 << 15
"""Elements: they fit into the cache, and torch starts no threads of its own."""
MANY = 1 << 22
"""From so many elements on, two threads share the work."""
_Terms = list[tuple[Tensor, float]]


def as_real(gradient: Tensor) -> Tensor:
    """A complex gradient `(*S)` as a real one `(*S, 2)`; a scalar as `(1,)`."""
    if gradient.is_complex():
        return torch.view_as_real(gradient.resolve_conj())
    return gradient.reshape(1) if gradient.ndim == 0 else gradient


@torch.no_grad()
def add_products(
    total: dict[str, Tensor], gradients: Sequence[Mapping[str, Tensor]], factors: Sequence[float]
) -> None:
    """Add gradients up.

    Args:
        total: By name, in float64 and as real numbers; changed in place. A name that isn't in it
            yet begins with its first product.
        gradients: By name, of equal shapes; they aren't changed.
        factors: What each is multiplied by.
    """
    work: list[tuple[Tensor, _Terms]] = []
    for name in dict.fromkeys(name for found in gradients for name in found):
        terms = [
            (as_real(found[name].detach()), factor)
            for found, factor in zip(gradients, factors, strict=True)
            if name in found
        ]
        if name not in total:
            gradient, factor = terms.pop(0)
            total[name] = gradient.to(torch.float64, copy=True).mul_(factor)
        if terms:
            work.extend(_pieces(total[name], terms))
    if sum(target.numel() for target, _ in work) < MANY or any(not at.is_cpu for at, _ in work):
        _add(work)
        return
    # Of each pair of pieces one: pieces are as good as equal in size.
    halves = [threading.Thread(target=_add, args=(work[start::2],)) for start in (0, 1)]
    for thread in halves:
        thread.start()
    for thread in halves:
        thread.join()


def _pieces(total: Tensor, terms: _Terms) -> Iterator[tuple[Tensor, _Terms]]:
    """A tensor and what is added to it, in pieces that fit into the cache."""
    if total.is_contiguous() and all(gradient.is_contiguous() for gradient, _ in terms):
        total = total.view(-1)
        terms = [(gradient.view(-1), factor) for gradient, factor in terms]
    rows = max(1, CHUNK * len(total) // max(1, total.numel()))
    parts = [torch.split(gradient, rows) for gradient, _ in terms]
    for target, *pieces in zip(torch.split(total, rows), *parts, strict=True):
        factors = (factor for _, factor in terms)
        yield target, list(zip(pieces, factors, strict=True))


@torch.no_grad()
def _add(work: Sequence[tuple[Tensor, _Terms]]) -> None:
    scratch = torch.empty(0, dtype=torch.float64)
    for target, terms in work:
        size = target.numel()
        if scratch.numel() < size or scratch.device != target.device:
            scratch = torch.empty(max(CHUNK, size), dtype=torch.float64, device=target.device)
        product = scratch[:size].view(target.shape)
        for gradient, factor in terms:
            target.add_(product.copy_(gradient).mul_(factor))
