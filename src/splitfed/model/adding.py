"""Adding gradients up: Σ fᵢ·gᵢ in float64, in the order in which they are given.

Floating addition isn't associative, so the order is part of the result. For each element it is the
order of the arguments, however the work is cut up: chunk by chunk, and within a chunk gradient by
gradient, so that of each gradient a chunk is read once, and what it is added to stays in the cache.
If only the mean is wanted, no float64 sum of a whole parameter ever exists. Large work is shared
out to threads.

Each product is rounded before it is added. The trap is `add_(alpha=)`, which rounds product and sum
at once in some places of a tensor and not in others. It is used where the product is exact, so that
there is nothing to round: a float32 has 24 binary digits, a float64 has 53, so a factor of at most
29 (any whole number of samples below 536,870,912) leaves none over.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from splitfed.protocol import parallel

CHUNK = 1 << 15
"""Elements: they fit into the cache, and torch starts no threads of its own."""
_DIGITS = {torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}
"""The binary digits of a dtype."""
_WIDE_DIGITS = 53
_MODERATE = 2.0**200
"""Products of factors up to this, and down to its inverse, are neither infinite nor denormal."""


def as_real(gradient: Tensor) -> Tensor:
    """A complex gradient `(*S)` as a real one `(*S, 2)`; a scalar as `(1,)`."""
    if gradient.is_complex():
        return torch.view_as_real(gradient.resolve_conj())
    return gradient.reshape(1) if gradient.ndim == 0 else gradient


def flat(tensor: Tensor, like: Tensor | None = None) -> Tensor:
    """The elements of a tensor without gaps, in the order of its memory or of that of another."""
    if like is not None and tensor.stride() != like.stride():
        ordered = torch.empty_strided(
            like.shape, like.stride(), dtype=tensor.dtype, device=tensor.device
        )
        tensor = ordered.copy_(tensor)
    return tensor.as_strided((tensor.numel(),), (1,))


@torch.no_grad()
def add_products(
    total: dict[str, Tensor],
    gradients: Sequence[Mapping[str, Tensor]],
    factors: Sequence[float],
    spare: dict[str, Tensor] | None = None,
) -> None:
    """Add gradients up; if this raises, the total is of no use any more.

    Args:
        total: By name, in float64, without gaps and as real numbers; changed in place. A name that
            isn't in it yet begins with its first product.
        gradients: By name, of equal shapes; they aren't changed.
        factors: What each is multiplied by.
        spare: Totals that nobody needs any more, whose memory becomes that of these: fresh memory
            costs more than the addition. What is taken is removed.
    """
    columns = []
    for name in dict.fromkeys(name for found in gradients for name in found):
        terms = [
            (as_real(found[name].detach()), factor)
            for found, factor in zip(gradients, factors, strict=True)
            if name in found
        ]
        is_new = name not in total
        if is_new:
            total[name] = _like(terms[0][0], None if spare is None else spare.pop(name, None))
        like = total[name]
        group = [(flat(gradient, like), factor) for gradient, factor in terms]
        partial = None if is_new else flat(like)
        columns.append(Column([group], not is_new, None, partial, new_partial=flat(like)))
    add_up(columns)


def _like(gradient: Tensor, spare: Tensor | None) -> Tensor:
    """Memory for a sum of such gradients, in float64: that of another if it fits."""
    if spare is not None and (spare.shape, spare.stride(), spare.device) == (
        gradient.shape,
        gradient.stride(),
        gradient.device,
    ):
        return spare
    return torch.empty_like(gradient, dtype=torch.float64)


@dataclass(slots=True, eq=False)
class Column:
    """The work on one parameter: gradients that are to be added, and the sums of before.

    All of them are flat and in one order of elements.
    """

    groups: list[list[tuple[Tensor, float]]]
    """The gradients of each group with their factors, in order."""
    continues: bool
    """Whether the first of these groups is the open one, whose sum is `partial`."""
    total: Tensor | None
    """The sum of the groups before it, if there are any, in float64."""
    partial: Tensor | None
    """The sum of the open group so far."""
    out: Tensor | None = None
    """Where the mean is to go; without it the sums are kept in the two below."""
    divide: Callable[[Tensor], Tensor] = field(default=lambda value: value)
    """Makes the mean of the whole sum, in place."""
    new_total: Tensor | None = None
    """Where the sum of the closed groups is kept; the memory of `total`, if there was one."""
    new_partial: Tensor | None = None
    """Where that of the open group is kept; the memory of `partial`, if there was one."""

    @property
    def num_elements(self) -> int:
        """The elements of the parameter."""
        known = (self.out, self.new_total, self.new_partial)
        return next((tensor.numel() for tensor in known if tensor is not None), 0)

    @property
    def num_bytes(self) -> int:
        """The bytes that are read."""
        return sum(gradient.nbytes for group in self.groups for gradient, _ in group)

    def add_up(self, part: slice, room: Room) -> None:
        """Add up one chunk."""
        total, partial = self._begin(part, room)
        for number, group in enumerate(self.groups):
            if partial is not None and not (self.continues and number == 0):
                total = self._close(total, partial, part, room)
                partial = None
            partial = self._add(group, partial, part, room)
        if partial is not None and self.new_partial is None:
            total = self._close(total, partial, part, room)
        if self.out is not None and total is not None:
            self.out[part].copy_(self.divide(total))

    def _begin(self, part: slice, room: Room) -> tuple[Tensor | None, Tensor | None]:
        """The sums of before: copies if they are to stay as they are."""
        total = None if self.total is None else self.total[part]
        partial = None if self.partial is None else self.partial[part]
        if self.out is not None:
            if total is not None:
                total = room.total[: len(total)].copy_(total)
            if partial is not None:
                partial = room.partial[: len(partial)].copy_(partial)
        return total, partial

    def _add(
        self, group: list[tuple[Tensor, float]], partial: Tensor | None, part: slice, room: Room
    ) -> Tensor | None:
        """The sum of a group with these gradients."""
        for gradient, factor in group:
            piece = gradient[part]
            if partial is None:
                partial = room.partial[: len(piece)]
                if self.new_partial is not None:
                    partial = self.new_partial[part]
                partial.copy_(piece)
                if factor != 1:
                    partial.mul_(factor)
                continue
            wide = room.wide[: len(piece)].copy_(piece)
            if _is_exact(gradient.dtype, factor):
                partial.add_(wide, alpha=factor)
            else:
                partial.add_(wide.mul_(factor))
        return partial

    def _close(self, total: Tensor | None, partial: Tensor, part: slice, room: Room) -> Tensor:
        """The sum of the closed groups with one more."""
        if total is not None:
            return total.add_(partial)
        total = room.total[: len(partial)] if self.new_total is None else self.new_total[part]
        return total.copy_(partial)


class Room:
    """Memory for the sums of one chunk, of one thread.

    Args:
        size: The elements of a chunk.
        device: Where.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self.wide, self.partial, self.total = (
            torch.empty(size, dtype=torch.float64, device=device) for _ in range(3)
        )


def _is_exact(dtype: torch.dtype, factor: float) -> bool:
    """Whether the product of any number of a dtype with a factor has no digit to round."""
    digits = _WIDE_DIGITS - _DIGITS.get(dtype, _WIDE_DIGITS)
    mantissa, _ = math.frexp(factor)
    is_moderate = 1 / _MODERATE <= abs(factor) <= _MODERATE
    return digits > 0 and is_moderate and (mantissa * 2.0**digits).is_integer()


def add_up(columns: Sequence[Column]) -> None:
    """Do the work of columns whose tensors are on one device each.

    Args:
        columns: The work.
    """
    pieces = [
        (column, slice(start, min(start + CHUNK, column.num_elements)))
        for column in columns
        for start in range(0, column.num_elements, CHUNK)
    ]
    on_cpu = all(_device(column).type == "cpu" for column in columns)
    if on_cpu and parallel.is_worth_it(sum(column.num_bytes for column in columns)):
        half = len(pieces) // 2
        parallel.together(lambda: _work(pieces[:half]), lambda: _work(pieces[half:]))
    else:
        _work(pieces)


def _work(pieces: Sequence[tuple[Column, slice]]) -> None:
    rooms: dict[torch.device, Room] = {}
    size = max((part.stop - part.start for _, part in pieces), default=0)
    for column, part in pieces:
        device = _device(column)
        if device not in rooms:
            rooms[device] = Room(size, device)
        column.add_up(part, rooms[device])


def _device(column: Column) -> torch.device:
    known = (column.new_total, column.new_partial, column.out)
    return next((tensor.device for tensor in known if tensor is not None), torch.device("cpu"))
