"""Memory whose bytes may become tensors: aligned as torch aligns its own, since the address decides a matmul's bits."""

from __future__ import annotations

from typing import Any

import torch


def aligned(num_bytes: int) -> memoryview:
    """So many bytes, not set to anything, in memory of their own."""
    array: Any = torch.empty(num_bytes, dtype=torch.uint8, device="cpu").numpy()
    return memoryview(array)
