"""Numerics: which processes compute the same bits, and comparisons of tensors bit by bit.

The same operation gives other bits on another build, with other vector instructions or another
number of threads (1 against 2 threads changes 6 of 12 gradients of a small convolutional net), and
on a CPU of another vendor, which no setting shows: so what the kernels give is a part of the class
(`kernels`). The store records the class of its version 0. A process of another class warns once,
and its batches are counted. A recompute that differs raises `ReplayError` within a class, and is
rounding between two.
"""

from __future__ import annotations

import cmath
import functools
import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from splitfed.model.kernels import kernels_digest

MIXED = "mixed"
"""In place of a class's name: what was computed in several."""

Class = dict[str, str | int | bool]


def numerics_class(device: torch.device, record: Mapping[str, Any] | None = None) -> Class:
    """The class of this process when it computes on `device`.

    Args:
        device: Where it computes.
        record: The class of a store's version 0, to be compared with. An earlier splitfed didn't
            note all that a class has now: what its record can't have is left out.
    """
    found: Class = {
        "torch": torch.__version__,
        "device": device.type,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "mkldnn": bool(torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled),
        "matmul": torch.get_float32_matmul_precision(),
        "default_dtype": str(torch.get_default_dtype()),
    }
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
        found["cudnn"] = torch.backends.cudnn.version() or 0
        found["deterministic"] = torch.are_deterministic_algorithms_enabled()
    # Where kernels don't repeat their bits, there are none to compare.
    if (record is None or "kernels" in record) and is_repeatable(device):
        found["kernels"] = _kernels(device, (*found.values(), *_precisions()))
    return found


@functools.cache
def _kernels(device: torch.device, settings: tuple[object, ...]) -> str:
    """The digest of the device's kernels, computed once under the settings of now."""
    return kernels_digest(device)


def _precisions() -> Iterable[object]:
    """Settings that change bits and are no part of a class."""
    onednn = torch.backends.mkldnn
    for name in ("matmul", "conv", "rnn"):  # which torch before 2.9 doesn't have
        yield getattr(getattr(onednn, name, None), "fp32_precision", None)
    yield torch.backends.cuda.flash_sdp_enabled()
    yield torch.backends.cuda.math_sdp_enabled()


def class_id(numerics: Mapping[str, Any]) -> str:
    """A short name of a class."""
    return hashlib.sha256(json.dumps(numerics, sort_keys=True).encode()).hexdigest()[:16]


def common_class(names: Iterable[str]) -> str:
    """The short name of the class in which all of several things were computed.

    That is `MIXED` if they weren't in one: it is no class's name, so a store counts it as foreign.
    """
    distinct = set(names)
    return distinct.pop() if len(distinct) == 1 else MIXED


def is_repeatable(device: torch.device) -> bool:
    """Whether the same operations on the same device give the same bits each time."""
    return device.type == "cpu" or torch.are_deterministic_algorithms_enabled()


def all_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite."""
    tensor = tensor.detach()
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    if tensor.itemsize == 1:
        tensor = tensor.to(torch.float32)  # float8 has no arithmetic
    # A sum is finite only if all its terms are, and takes a thirtieth of the exact test's time,
    # which is left for sums that overflow. Terms of 16 bits overflow less in a sum of 32.
    if tensor.itemsize < 4:
        total = tensor.sum(dtype=torch.float32).item()
    else:
        total = tensor.sum().item()
    return cmath.isfinite(total) or bool(tensor.isfinite().all())


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors agree in dtype, shape and every bit.

    NaN equals itself here, and -0.0 differs from 0.0.
    """
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(_bytes(a), _bytes(b))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8)
