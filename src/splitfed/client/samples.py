"""What a call counts, in examples, if nobody says it: the leading dimension of its first tensor.

A list of tensors, or of dicts of tensors, is one example each, as detection models take images of
many sizes; a tuple is several inputs of the same examples. What can't be read off (a scalar first,
a batch object such as a graph's, no tensor at all) counts as it always did, with a doubt that the
client tells once it matters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn


class Weight(NamedTuple):
    """The weight of a call."""

    samples: float
    doubt: str | None
    """Why it may be another number; `None` if it is plain."""


def weigh(*given: Any) -> Weight:
    """The weight of a call by its arguments."""
    objects: list[str] = []
    found = _first(given, objects)
    if found is None:
        return Weight(1.0, f"{objects[0]} comes first" if objects else "no tensor is among them")
    if not isinstance(found, Tensor):
        return Weight(float(len(found)), None)
    if not found.dim():
        return Weight(1.0, "a scalar tensor comes first")
    return Weight(float(found.size(0)), f"{objects[0]} comes first" if objects else None)


def _first(value: Any, objects: list[str]) -> Tensor | list[Any] | None:
    """The first tensor, or list of examples; batch objects that come before it are noted."""
    if isinstance(value, Tensor):
        return value
    children: Any = ()
    if isinstance(value, tuple):
        children = value
    elif isinstance(value, list):
        if any(_has_tensor(item) for item in value):
            return value
        children = value
    elif isinstance(value, Mapping):
        children = value.values()
    elif _is_batch(value):
        objects.append(f"a {type(value).__name__}")
    for child in children:
        found = _first(child, objects)
        if found is not None:
            return found
    return None


def _has_tensor(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(_has_tensor(item) for item in value.values())
    if isinstance(value, list | tuple):
        return any(_has_tensor(item) for item in value)
    return isinstance(value, Tensor)


def _is_batch(value: Any) -> bool:
    """Whether an object of another class may hold tensors, as batches of graphs do."""
    if value is None or isinstance(value, type | str | bytes | int | float | complex | nn.Module):
        return False
    if is_dataclass(value):
        return any(_has_tensor(getattr(value, field.name, None)) for field in fields(value))
    # A batch is moved to a device, or is an array; settings, functions and enums are neither.
    return hasattr(value, "to") or hasattr(value, "__array__")
