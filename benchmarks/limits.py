"""What no library can be faster than: bytes written, tensors added, requests echoed."""

from __future__ import annotations

import os
import tempfile
from contextlib import ExitStack
from pathlib import Path

import torch
import urllib3

from benchmarks import rounds
from benchmarks.http_step import _serve_echo, server
from benchmarks.rounds import Step

ELEMENTS = 75_600_000
"""Of the gradient of the 75.6-million-parameter body."""
ACTIVATIONS = 32 * 64 * 32 * 32
"""Elements that cross the first cut of ResNet-18."""
BASE = "302 MB added to a float64 sum"


def run(seconds: float) -> dict[str, dict[str, float]]:
    """Milliseconds of each, and the ratio to the first."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        url = stack.enter_context(server(_serve_echo, str(folder)))
        gradient, total = torch.randn(ELEMENTS), torch.zeros(ELEMENTS, dtype=torch.float64)
        data = memoryview(gradient.numpy()).cast("B")
        steps: dict[str, Step] = {
            BASE: lambda: total.add_(gradient),
            "302 MB copied in memory": gradient.clone,
            "302 MB written to a new file": lambda: _write(folder / "new", data, os.O_CREAT | os.O_EXCL),
            "302 MB written over a file": lambda: _write(folder / "old", data, os.O_CREAT),
            "8.4 MB echoed over HTTP": _echo(url, bytes(4 * ACTIVATIONS)),
        }
        return rounds.ratios(rounds.in_turns(steps, seconds), BASE)


def _write(path: Path, data: memoryview, flags: int) -> None:
    """Write a file; one that must be new is removed behind it."""
    descriptor = os.open(path, os.O_WRONLY | flags, 0o600)
    try:
        rest = data
        while rest:
            rest = rest[os.write(descriptor, rest) :]
    finally:
        os.close(descriptor)
    if flags & os.O_EXCL:
        path.unlink()


def _echo(url: str, body: bytes) -> Step:
    pool = urllib3.PoolManager()

    def step() -> None:
        if len(pool.request("POST", url, body=body).data) != len(body):
            raise RuntimeError("the echo is another")

    return step
