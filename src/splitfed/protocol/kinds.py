"""The kinds of tensors that have a place in a file, and the error for one that hasn't.

Those are dense tensors in memory, of a dtype with a code in the format, of at most 8 dimensions.
One dtype more is stored as another: complex128, as pairs of float64. The trap is a class that has
other values than its memory says: by its dtype and shape it would fit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from splitfed.errors import ContainerError
from splitfed.protocol import header

PAIRED = torch.complex128
"""The dtype that is stored as pairs of float64."""
CODES = {dtype: code for code, dtype in header.DTYPES.items()} | {PAIRED: "F64"}
"""Of each dtype, the code that it is stored under."""
_OWN = frozenset((Tensor, nn.Parameter))


def fits(tensor: Tensor) -> bool:
    """Whether the format has a place for a tensor of this kind, dtype and shape."""
    if type(tensor) not in _OWN and is_wrapper(tensor):
        return False
    if tensor.dtype not in CODES or tensor.layout is not torch.strided or tensor.is_nested:
        return False
    if tensor.is_meta or (tensor.dim() >= header.MAX_DIMS and tensor.dim() > _most_dims(tensor)):
        return False
    # A tensor without elements has no bytes that would bound its shape, and a reader multiplies it.
    return tensor.numel() > 0 or (header.extent(tensor.shape, tensor.itemsize) <= header.MAX_EXTENT)


def _most_dims(tensor: Tensor) -> int:
    return header.MAX_DIMS - 1 if tensor.dtype is PAIRED else header.MAX_DIMS


def is_wrapper(tensor: Tensor) -> bool:
    """Whether its class has other values than its memory says: DTensor, MaskedTensor and the like.

    Such a class answers torch's operations itself, by `__torch_dispatch__`.
    """
    own: Any = type(tensor).__torch_dispatch__
    return own is not Tensor.__torch_dispatch__


def unfit(tensor: object, which: str) -> ContainerError:
    """The error for a tensor that has no place in the format: what it is, and what to do."""
    expected, hint = "a torch.Tensor", "turn it into one, or keep it on its side of the cut"
    got = type(tensor).__name__
    if isinstance(tensor, Tensor):
        kind = "nested" if tensor.is_nested else tensor.layout
        got = f"{tensor.dtype}, {kind}, of {tensor.dim()} dimensions"
        if is_wrapper(tensor) and not tensor.is_nested:
            expected, got = "a plain torch.Tensor", f"a {type(tensor).__qualname__}, {got}"
            hint = "take its values out first, as .full_tensor() does of a DTensor"
        elif tensor.is_nested or tensor.layout is not torch.strided:
            expected, hint = "a dense one", "call .to_dense() or pad it first"
            if tensor.is_nested:
                hint += " (of nn.TransformerEncoder: enable_nested_tensor=False)"
        elif tensor.is_meta:
            expected, hint = "one with memory, not on the device meta", "load its values first"
        elif tensor.is_quantized:
            expected, hint = "one that isn't quantized", "call .dequantize() first"
        elif tensor.dtype not in CODES:
            expected = f"a dtype of {', '.join(header.DTYPES)} or complex128"
            hint = "convert it by .to(torch.complex64) first"
            if not tensor.is_complex():
                hint = "convert it by .to() first, or keep its bytes by .view(torch.uint8)"
        else:
            expected = f"at most {_most_dims(tensor)} dimensions that an address can count"
            hint = "reshape it first"
    return ContainerError(
        f"{which} can't travel or be stored: expected {expected}, got {got}; {hint}"
    )
