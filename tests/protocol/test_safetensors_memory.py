"""Memory that tensors are made of."""

from __future__ import annotations

import pytest
import torch

from splitfed.protocol.safetensors import ALIGNMENT, aligned


@pytest.mark.parametrize("num_bytes", [0, 1, 63, 64, 100_003])
def test_it_is_aligned_writable_and_its_own(num_bytes: int) -> None:
    """As a tensor's own memory is."""
    first, second = aligned(num_bytes), aligned(num_bytes)
    assert len(first) == num_bytes
    if num_bytes:
        assert torch.frombuffer(first, dtype=torch.uint8).data_ptr() % ALIGNMENT == 0
        first[:], second[:] = b"a" * num_bytes, b"b" * num_bytes
        assert bytes(first) == b"a" * num_bytes
