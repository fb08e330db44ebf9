"""How a tensor's strides survive a format that knows none.

Strides choose kernels (channels_last), and kernels choose bits, so a tensor enters compute with the strides that it
had. What safetensors can't say is noted beside the tensor as its layout. The rule, for a tensor with elements:

    in the order of its indices, without gaps          no layout; stored as it is
    another order (a transpose, channels_last)         {"order": [...]}; stored permuted, which is the order in memory
    gaps, or dimensions of stride 0 (expanded)         {"strides": [...]}, with "shape" if expanded; stored once, dense
    windows that overlap, memory of more than          no layout; stored as a contiguous copy, and comes back as one
    16 × the elements, expanded beyond 256 MiB

Foreign strides count only if they are what this rule gives for the tensor that they describe. So whoever wrote them
can't address memory outside of the tensor, nor make 100 bytes allocate more than 1,600.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from splitfed.errors import FormatError
from splitfed.protocol.header import MAX_EXTENT, is_sizes, shown

Layout = dict[str, list[int]]
MAX_SPREAD = 16
MAX_EXPANDED = 256 << 20


def layout_of(shape: Sequence[int], strides: Sequence[int], itemsize: int) -> Layout | None:
    """Return how a tensor of this shape, strides and bytes per element is noted, None if stored contiguous."""
    shape, strides = list(shape), list(strides)
    if 0 in shape or strides == contiguous_strides(shape):
        return None
    order = sorted(range(len(shape)), key=lambda dim: (-strides[dim], shape[dim] == 1))
    if [strides[dim] for dim in order] == contiguous_strides([shape[dim] for dim in order]):
        return {"order": order}
    core = _core(shape, strides)
    last = 0  # the farthest element of the dimensions seen so far, innermost first
    for dim in reversed(order):
        if core[dim] > 1:
            if strides[dim] <= last:
                return None
            last += (core[dim] - 1) * strides[dim]
    if last >= MAX_SPREAD * math.prod(core) or max(last, *strides) * itemsize > MAX_EXTENT:
        return None
    if core == shape:
        return {"strides": strides}
    return None if math.prod(shape) * itemsize > MAX_EXPANDED else {"shape": shape, "strides": strides}


def contiguous_strides(shape: Sequence[int]) -> list[int]:
    """Return the strides of a contiguous tensor of this shape, as torch counts them."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size or 1
    strides.reverse()
    return strides


def stored(tensor: Tensor, layout: Layout | None) -> Tensor:
    """Return the contiguous tensor that stands for `tensor` in a file: a view of it wherever it has no gaps."""
    if layout is None:
        return tensor.contiguous()
    if "order" in layout:
        return tensor.permute(layout["order"])
    return tensor.as_strided(_core(tensor.shape, tensor.stride()), tensor.stride()).contiguous()


def restored(memory: Tensor, shape: list[int], strides: list[int], layout: Layout | None) -> Tensor:
    """Return the tensor of this shape and strides of the stored elements `memory`, which it may reshape in place."""
    if layout is not None and "strides" in layout:
        core = _core(shape, strides)
        steps = contiguous_strides(core)
        if any(size > 1 and stride != step for size, stride, step in zip(core, strides, steps, strict=True)):
            spread = torch.empty_strided(core, strides, dtype=memory.dtype, device=memory.device)
            memory = spread.copy_(memory.as_strided_(core, steps))
    return memory.as_strided_(shape, strides)


def check_layout(name: str, layout: object, core: list[int], itemsize: int) -> tuple[list[int], list[int]]:
    """Return the shape and strides that a foreign layout gives to a stored tensor of shape `core`.

    Raises:
        FormatError: it is no permutation, or not what `layout_of` gives to a tensor of that shape and those strides.
    """
    if type(layout) is dict and 0 not in core and all(is_sizes(v) and len(v) == len(core) for v in layout.values()):
        if layout.keys() == {"order"} and sorted(layout["order"]) == list(range(len(core))):
            inverse, steps = sorted(range(len(core)), key=layout["order"].__getitem__), contiguous_strides(core)
            return [core[dim] for dim in inverse], [steps[dim] for dim in inverse]
        if layout.keys() in ({"strides"}, {"strides", "shape"}):
            shape, strides = layout.get("shape", core), layout["strides"]
            if _core(shape, strides) == core and layout_of(shape, strides, itemsize) == layout:
                return shape, strides
    raise FormatError(
        f"tensor {name[:80]!r} has a bad layout: expected an order or strides that fit its stored shape {core}, "
        f"got {shown(layout)}"
    )


def _core(shape: Sequence[int], strides: Sequence[int]) -> list[int]:
    return [size if stride else 1 for size, stride in zip(shape, strides, strict=True)]
