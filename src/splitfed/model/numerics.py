"""Numbers: which class of processes computes the same bits, and whether all elements of a tensor are finite.

The same kernel gives other bits on another build, with other vector instructions or another number of threads (1
against 2 threads changes 6 of 12 gradients of a small convolutional net). The store records the class of its version
0; a process of another class says so once, its batches are counted, and a recompute that differs raises `ReplayError`.
"""

from __future__ import annotations

import cmath
import hashlib
import json
import math

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


def all_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite.

    A sum is finite only if all its terms are, and 30 times as fast as the exact test, which is for sums that overflow.
    """
    tensor = tensor.detach()
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    if tensor.itemsize < 4:
        if tensor.itemsize == 1:
            tensor = tensor.to(torch.float32)  # float8 has no arithmetic
        return math.isfinite(tensor.sum(dtype=torch.float32).item()) or bool(
            tensor.isfinite().all()
        )
    return cmath.isfinite(tensor.sum().item()) or bool(tensor.isfinite().all())


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors agree in dtype, shape and every bit: NaN equals itself here, and -0.0 differs from 0.0."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(
        *(t.detach().cpu().reshape(-1).contiguous().view(torch.uint8) for t in (a, b))
    )
