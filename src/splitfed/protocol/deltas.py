"""Temporal deltas: of each example only what has changed since it was last sent.

The same examples come again in each epoch, and a half that is frozen or moves slowly makes nearly
the same activations of them. Both ends have what the other end saw last of an example, x̂; the next
x travels as C(x − x̂), with any codec C, and both go on with x̂ + C(x − x̂). So what a lossy C leaves
out is part of the next difference, and the error falls with how little the half moves: Wang et al.,
"Fine-tuning Language Models over Slow Networks using Activation Compression with Guarantees"
(AQ-SGD), arXiv 2206.01299, who prove that it converges. Without a codec the rows that have changed
travel as they are, the others not at all, and nothing is lost.

There both ends keep x̂ in memory. Here no server may: x̂ is a file (a *reference*), under the hash
of its rows, so it can't change. A request names the files and rows that it refers to, and whichever
replica serves it reads the same bytes or none. If one is gone, `ReferenceLostError` says so before
anything is done, and the client sends its x̂ whole: the decoded tensor is the same either way, so
records, digests and retries never tell how it travelled.

The trap is that both ends compute x̂, and the name of what one keeps is the hash of what the other
one has. These are single operations of IEEE 754, each rounded for itself, which are the same
everywhere; if some end did differ, its names would be found nowhere, and all would travel whole.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from splitfed.errors import FormatError, InputError, ReferenceLostError
from splitfed.protocol import safetensors
from splitfed.protocol.coding import dense_template, float_dtype, may_grow

CODEC = "delta/1"
_DIGITS = 16
_NOWHERE = -1

Lookup = Callable[[str], Tensor | None]
"""The rows that are kept under a name, (M, *C); `None` if they aren't there."""


@dataclass(frozen=True, slots=True, eq=False)
class Delta:
    """How one tensor (N, *C) of a message follows from rows on file and rows that travel."""

    place: int
    """Which tensor of the message it is; there the rows travel, (M, *C)."""
    codec: str
    """What it was made by, with its version: 'delta/1'."""
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    references: tuple[str, ...]
    """The names of the files that it refers to."""
    rows: Tensor
    """(N,), int32: which row of these files, one after another, each begins from; -1 for zeros."""
    sent: Tensor
    """(N,), bool: which M rows travel."""
    adds: bool
    """Whether what travels is added to what is on file; if not, it takes its place."""
    keeps: bool
    """Whether the rows that travelled are to be kept, as they are then."""

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor that it makes."""
        return math.prod(self.shape) * float_dtype(self.dtype).itemsize

    @property
    def num_sent(self) -> int:
        """The bytes that it adds to a message."""
        names = sum(len(name) for name in self.references)
        return self.rows.nbytes + self.sent.nbytes + names


def name_of(rows: Tensor) -> str:
    """The name of rows that are kept: the beginning of the SHA-256 of what they hold."""
    text, memory = safetensors.content(rows)
    hasher = hashlib.sha256(text.encode())
    hasher.update(memory)
    return hasher.hexdigest()[:_DIGITS]


def restored(payload: Tensor, delta: Delta, lookup: Lookup) -> Tensor:
    """The tensor that a delta makes of the rows that travelled; both ends compute it so.

    Of each file only the rows that are wanted stay in memory.

    Raises:
        ReferenceLostError: what it refers to isn't there.
        InputError: this end doesn't have its codec.
        FormatError: the parts don't fit each other, or it would be too large.
    """
    _check(payload, delta)
    order = torch.argsort(delta.rows, stable=True)
    ordered = delta.rows[order]
    picked: list[tuple[Tensor, Tensor, Tensor]] = []
    total, known = 0, payload.nbytes
    for name in delta.references:
        rows = _file(payload, delta, name, lookup)
        ends = torch.searchsorted(ordered, torch.tensor([total, total + len(rows)]).int())
        places = order[int(ends[0]) : int(ends[1])]
        wanted, which = (delta.rows[places] - total).long().unique(return_inverse=True)
        picked.append((places, which, rows[wanted]))
        total += len(rows)
        known += picked[-1][2].nbytes
    if int(ordered[0]) < _NOWHERE or int(ordered[-1]) >= total:
        raise _misfit(delta, f"rows beyond the {total} of its references")
    if not may_grow(known, delta.num_bytes):
        raise _misfit(delta, f"{known} bytes for {delta.num_bytes}")
    base = payload.new_zeros(delta.shape)
    for places, which, rows in picked:
        base[places] = rows[which]
    places = delta.sent.nonzero().view(-1)
    base[places] = base[places] + payload if delta.adds else payload
    if base.stride() == delta.strides:
        return base
    return torch.empty_strided(delta.shape, delta.strides, dtype=base.dtype).copy_(base)


def _file(payload: Tensor, delta: Delta, name: str, lookup: Lookup) -> Tensor:
    """The rows under a name that a delta refers to."""
    rows = lookup(name)
    if rows is None:
        raise ReferenceLostError(
            f"reference {name[:40]!r} of a delta isn't in the store: expected the client to send "
            "the whole tensor then, as SplitClient does"
        )
    if rows.dtype != payload.dtype or tuple(rows.shape[1:]) != delta.shape[1:] or not len(rows):
        raise _misfit(delta, f"references of {rows.dtype} {tuple(rows.shape)}")
    return rows


def restore_all(tensors: Sequence[Any], deltas: Iterable[Delta], lookup: Lookup) -> list[Any]:
    """The tensors of a message, those that travelled as deltas among them.

    Raises:
        ReferenceLostError: as `restored`.
        FormatError: as `restored`, or there is no such tensor.
    """
    found = list(tensors)
    for delta in deltas:
        if not 0 <= delta.place < len(found) or not isinstance(found[delta.place], Tensor):
            raise FormatError(f"a message has no tensor {delta.place} that could be a delta")
        found[delta.place] = restored(found[delta.place], delta, lookup)
    return found


def kept_rows(tensors: Sequence[Any], deltas: Iterable[Delta]) -> list[Tensor]:
    """The rows of a message's tensors that are to be kept, once these are whole again."""
    return [
        tensors[delta.place].detach().contiguous()[delta.sent]
        for delta in deltas
        if delta.keeps and bool(delta.sent.any())
    ]


def nothing(name: str) -> Tensor | None:
    """The rows under a name at an end that has no store: none."""
    del name
    return None


def _check(payload: Tensor, delta: Delta) -> None:
    """Refuse parts that don't fit each other: they may come from anywhere."""
    if delta.codec != CODEC:
        raise InputError(
            f"a tensor travels as {delta.codec[:40]!r}, and this end has {CODEC!r}: "
            "give both ends the same release of splitfed, or another codec"
        )
    shape, strides, count = delta.shape, delta.strides, len(delta.rows)
    template = dense_template(shape, strides, float_dtype(delta.dtype))
    if template is None or not shape or shape[0] != count:
        raise _misfit(delta, f"shape {shape} with strides {strides} and {count} rows")
    if delta.rows.dtype != torch.int32 or delta.rows.dim() != 1 or not count:
        raise _misfit(delta, "rows that aren't whole numbers in a line")
    if delta.sent.dtype != torch.bool or tuple(delta.sent.shape) != (count,):
        raise _misfit(delta, "no line that says which rows travel")
    expected = (int(delta.sent.sum()), *shape[1:])
    if payload.dtype != template.dtype or tuple(payload.shape) != expected:
        raise _misfit(delta, f"a payload {tuple(payload.shape)} of {payload.dtype}")


def _misfit(delta: Delta, why: str) -> FormatError:
    return FormatError(f"tensor {delta.place} of a message isn't a delta: it has {why}")
