"""Random streams of virtual clients: each its own, though they share a process.

A client on a machine of its own has torch's default generator to itself. Virtual clients share one
process, so each gets a stream that follows from the run's seed, its id and the round alone. What it
draws doesn't depend on who else trains, in which order they take turns or in which worker process
it runs, and the caller's own stream is left as it was.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from splitfed.model.rng import compute_lock, generator_of


def derive(*words: str | int) -> int:
    """A seed of 63 bits that follows from these words; unlike words give unrelated seeds."""
    # As JSON, so that ("a", "bc") and ("ab", "c") differ; 63 bits, as torch's seeds are signed.
    digest = hashlib.sha256(json.dumps(words).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def uniform(*words: str | int) -> float:
    """One draw from [0, 1) that follows from these words."""
    return derive(*words) / 2**63


class Stream:
    """Torch's default generators as one client would have them.

    Args:
        words: What the stream follows from.
        device: Where the client computes, besides the CPU.
    """

    def __init__(self, *words: str | int, device: torch.device | None = None) -> None:
        self.generator = torch.Generator().manual_seed(derive("order", *words))
        """For what isn't drawn from the default generator: the order of examples."""
        self._generators = [torch.default_generator]
        own = None if device is None else generator_of(device)
        if own is not None:
            self._generators.append(own)
        seed = derive("default", *words)
        self._states = [
            torch.Generator(generator.device).manual_seed(seed).get_state()
            for generator in self._generators
        ]

    @contextmanager
    def active(self) -> Iterator[None]:
        """Run the block on this stream, where it was left; then put the process's generators back.

        The lock keeps out bodies that run in other threads: they draw from the same generator.
        """
        with compute_lock:
            before = self._exchange(self._states)
            try:
                yield
            finally:
                self._states = self._exchange(before)

    def _exchange(self, states: list[torch.Tensor]) -> list[torch.Tensor]:
        """Put states into the process's generators; returns those that were there."""
        before = [generator.get_state() for generator in self._generators]
        for generator, state in zip(self._generators, states, strict=True):
            generator.set_state(state)
        return before
