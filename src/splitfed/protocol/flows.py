"""Flows: what crosses the cuts in each direction, how many bytes it took, and what coding changed.

A client counts its own; they add up over calls, clients and rounds. A relative error doesn't, so
what is kept and sent are the sums of squares that it follows from.

The trap is that a client may say anything of itself: what comes from one is checked before it
becomes part of a sum, or one client's infinity would be everybody's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from typing import Any

from splitfed.errors import FormatError, InputError

FLOWS = ("activations", "outputs", "grad_outputs", "grad_activations")
_MOST = 2.0**80


@dataclass(frozen=True, slots=True)
class Flow:
    """What compression has done to one flow."""

    tensors: int = 0
    coded: int = 0
    """Tensors that were coded; the others have travelled as they are."""
    exact_bytes: int = 0
    """Bytes of all tensors as they are."""
    sent_bytes: int = 0
    """Bytes that have travelled for them."""
    squared_error: float = 0.0
    """Σ ‖x − x̂‖² over coded tensors."""
    squared_norm: float = 0.0
    """Σ ‖x‖² over coded tensors."""

    @property
    def ratio(self) -> float:
        """Bytes that have travelled, as a share of what would have."""
        return self.sent_bytes / self.exact_bytes if self.exact_bytes else 1.0

    @property
    def relative_error(self) -> float:
        """‖x − x̂‖ / ‖x‖ over all coded tensors."""
        return math.sqrt(self.squared_error / self.squared_norm) if self.squared_norm else 0.0

    def __add__(self, other: Flow) -> Flow:
        return Flow(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __sub__(self, other: Flow) -> Flow:
        return Flow(*(getattr(self, f.name) - getattr(other, f.name) for f in fields(self)))


Flows = Mapping[str, Flow]
"""Flows by name, of `FLOWS`; one that isn't there is empty."""


def added(each: Iterable[Flows]) -> dict[str, Flow]:
    """The sum of several, by flow; empty if nothing was coded in any."""
    total: dict[str, Flow] = {}
    for flows in each:
        for name, flow in flows.items():
            total[name] = total.get(name, Flow()) + flow
    return total


def errors(flows: Flows) -> dict[str, float]:
    """The relative error of each flow that was coded, as a row has it: 'activations_error'."""
    return {f"{name}_error": flow.relative_error for name, flow in flows.items() if flow.coded}


def entry(flows: Flows) -> dict[str, Any]:
    """What the row of a round says of compression; nothing where nothing was coded."""
    if not any(flow.coded for flow in flows.values()):
        return {}
    shown = {
        name: {
            "exact_bytes": flow.exact_bytes,
            "sent_bytes": flow.sent_bytes,
            "ratio": flow.ratio,
            "error": flow.relative_error,
        }
        for name, flow in flows.items()
        if flow.tensors
    }
    return {**errors(flows), "compression": shown}


def to_plain(flows: Flows) -> dict[str, list[float]]:
    """Flows as plain numbers, in the order of the fields; those that are empty are left out."""
    return {name: list(astuple(flow)) for name, flow in flows.items() if flow.tensors}


def from_plain(plain: Mapping[str, Sequence[float]]) -> dict[str, Flow]:
    """Flows of such numbers.

    Raises:
        FormatError: they aren't that.
    """
    found = {}
    for name, numbers in plain.items():
        is_right = isinstance(numbers, list | tuple) and len(numbers) == len(fields(Flow))
        if name not in FLOWS or not is_right or not all(map(_is_number, numbers)):
            raise FormatError(f"{str((name, numbers))[:80]} isn't a flow: expected six numbers")
        found[name] = Flow(*map(int, numbers[:4]), *map(float, numbers[4:]))
    return found


def checked(plain: Mapping[str, Sequence[float]]) -> Mapping[str, Sequence[float]]:
    """What a client says of its flows, if it may be part of a sum.

    Raises:
        InputError: a number in it is negative, not finite or beyond all bytes.
    """
    try:
        from_plain(plain)
    except FormatError as error:
        raise InputError(f"the flows of a push aren't ones: {error}") from error
    return plain


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= _MOST
