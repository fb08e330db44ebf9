"""Random streams of their own, for many clients in one process.

A client on a machine of its own has torch's default generator to itself. Virtual clients share one process, so each
gets a stream that follows from the run's seed and its name alone: what it draws doesn't depend on who else is active,
in which order they take turns or in which worker process it runs, and the caller's own stream is left as it was.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from splitfed.model.rng import compute_lock


def derive(*words: str | int) -> int:
    """A seed of 63 bits that follows from these words; unlike words give unrelated seeds."""
    return int.from_bytes(hashlib.sha256(json.dumps(words).encode()).digest()[:8], "little") >> 1


def uniform(*words: str | int) -> float:
    """One draw from [0, 1) that follows from these words."""
    return derive(*words) / 2**63


class Stream:
    """Torch's default CPU generator as one client would have it.

    Args:
        words: What the stream follows from.
    """

    def __init__(self, *words: str | int) -> None:
        self.generator = torch.Generator().manual_seed(derive("order", *words))
        """For what isn't drawn from the default generator: the order of examples."""
        self._state = torch.Generator().manual_seed(derive("default", *words)).get_state()

    @contextmanager
    def active(self) -> Iterator[None]:
        """Run the block on this stream, where it was left; then put the process's generator back."""
        with compute_lock:
            before = torch.default_generator.get_state()
            torch.default_generator.set_state(self._state)
            try:
                yield
            finally:
                self._state = torch.default_generator.get_state()
                torch.default_generator.set_state(before)
