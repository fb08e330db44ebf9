"""Numerics: which processes compute the same bits, and comparisons of tensors bit by bit.

The same kernel gives other bits on another build, with other vector instructions or another number
of threads (1 against 2 threads changes 6 of 12 gradients of a small convolutional net). The store
records the class of its version 0. A process of another class warns once, its batches are counted,
and a recompute that differs raises `ReplayError`.
"""

from __future__ import annotations

import cmath
import hashlib
import json

import torch
from torch import Tensor


def numerics_class(device: torch.device) -> dict[str, str | int | bool]:
    """The class of this process when it computes on `device`."""
    found: dict[str, str | int | bool] = {
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
    return found


def class_id(numerics: dict[str, str | int | bool]) -> str:
    """A short name of a class."""
    return hashlib.sha256(json.dumps(numerics, sort_keys=True).encode()).hexdigest()[:16]


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
