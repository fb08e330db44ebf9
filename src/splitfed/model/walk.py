"""A walk through what an attribute holds, to see whether it has changed from within.

Two walks over the same objects give equal lists as long as nothing in them was changed. Nothing is
copied but plain values: a tensor is told by its version counter, or by the CRC of its content where
two walks are over different objects.

The trap: a walk must end, and cost little. What was met before isn't entered again; an attribute
with too many values, or too deep, is given up and counts as unchanged.
"""

from __future__ import annotations

import types
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from splitfed.errors import ContainerError
from splitfed.protocol import safetensors

_FAR = 10_000
_DEEP = 50
_ATOMS = frozenset(
    (type(None), bool, int, float, str, bytes, complex, torch.dtype, torch.device, torch.Size)
)
_OPAQUE = (
    type,
    types.FunctionType,
    types.MethodType,
    types.BuiltinFunctionType,
    types.ModuleType,
    weakref.ref,
)
_SEQUENCES = (list, tuple, set, frozenset, deque)

Told = Callable[[Tensor], tuple[object, ...]]


class Walk:
    """One walk through several attributes.

    Args:
        of_tensor: What tells a tensor: `of_identity` or `of_content`.
        known: Modules that aren't entered, as they are looked at by themselves.
    """

    def __init__(self, of_tensor: Told, known: Iterable[nn.Module] = ()) -> None:
        self._of_tensor = of_tensor
        self._known = {id(module) for module in known}
        self._met: dict[int, object] = {}
        """By id; what is held can't be replaced by another of the same id meanwhile."""
        self._found: list[Any] = []

    def through(self, named: Iterable[tuple[str, Any]]) -> dict[str, list[Any]]:
        """What the walk meets in each of them."""
        walked = {}
        for name, value in named:
            self._found = []
            try:
                self._step(value, 0)
            except _GivenUpError:
                self._found = []
            walked[name] = self._found
        return walked

    def _step(self, value: Any, depth: int) -> None:
        kind = type(value)
        if len(self._found) > _FAR or depth > _DEEP:
            raise _GivenUpError
        if kind in _ATOMS:
            # By its text, as a NaN isn't even equal to itself.
            self._found.append((kind, repr(value) if kind in (float, complex) else value))
        elif isinstance(value, Tensor):
            self._found.append(self._of_tensor(value))
        elif isinstance(value, _OPAQUE) or id(value) in self._known:
            self._found.append((kind, id(value)))
        elif id(value) in self._met:
            self._found.append(kind)
        else:
            self._met[id(value)] = value
            self._found.append(kind)
            for held in _held_by(value):
                self._step(held, depth + 1)


class _GivenUpError(Exception):
    """An attribute holds too much to be walked through."""


def of_identity(tensor: Tensor) -> tuple[object, ...]:
    """What tells whether a tensor is the same one, and unchanged."""
    return id(tensor), None if tensor.is_inference() else tensor._version


def of_content(tensor: Tensor) -> tuple[object, ...]:
    """What tells whether two tensors hold the same, as plain JSON: shape, dtype and CRC-32."""
    kind = [list(tensor.shape), str(tensor.dtype).removeprefix("torch.")]
    try:
        return (*kind, safetensors.crc32(tensor.detach()))
    except ContainerError:  # sparse, or on the meta device
        return tuple(kind)


def is_atom(value: Any) -> bool:
    """Whether nothing in a value can change."""
    kind = type(value)
    if kind is tuple:
        return all(map(is_atom, value))
    return kind in _ATOMS or isinstance(value, _OPAQUE)


def _held_by(value: Any) -> Iterable[Any]:
    """What an object consists of, in an order that stays."""
    if isinstance(value, dict):
        return chain.from_iterable(value.items())
    if isinstance(value, _SEQUENCES):
        return value
    if isinstance(value, torch.Generator):
        return [bytes(value.get_state().tolist())]
    try:
        # As a copy would be made: an object says by itself what it is made of.
        reduced = value.__reduce_ex__(4)
    except Exception:  # noqa: BLE001 -- code of the user's own, or what can't be told
        return [getattr(value, "__dict__", id(value))]
    return reduced if isinstance(reduced, tuple) else [reduced]
