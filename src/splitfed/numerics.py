"""The numerics class: what must be equal for two processes to compute the same bits.

The same kernel gives other bits on another build, with other vector instructions or another number of threads (1
against 2 threads changes 6 of 12 gradients of a small convolutional net). The store records the class of its version
0; a process of another class says so once, its batches are counted, and a recompute that differs raises `ReplayError`.
"""

from __future__ import annotations

import hashlib
import json

import torch


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
