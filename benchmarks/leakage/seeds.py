"""The seed of a client's generator, found from one request, and the noise that was drawn from it, subtracted.

Torch's generator of the CPU takes 64 bits of a seed and uses the lower 32: whoever sets it, it has 2³² streams. A
client draws the seed of each call from that generator, after its half has drawn its noise, and sends a hash. So a
server tries seeds: it draws as the half would, hashes, and compares. What fits is the stream, with all noise to come.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import splitfed
from benchmarks.leakage.setting import Tap, build, digits
from splitfed.simulation.launch import temporary_store

SPACE = 2**16
EXAMPLES = 4


@dataclass(frozen=True)
class Search:
    """How a search for a seed went."""

    found: int | None
    tried: int
    seconds: float
    residual: float
    """The largest difference between the activations without noise and those from which noise was subtracted."""

    def rows(self) -> list[list[str]]:
        """Rows of a table."""
        rate = self.tried / self.seconds
        return [
            ["seed found", "no" if self.found is None else f"yes, of {SPACE:,} that were possible"],
            ["largest residual after the noise is subtracted", f"{self.residual:.1e}"],
            ["tried per second, one core, in Python", f"{rate:,.0f}"],
            ["so all 2³² seeds take", f"{2**32 / rate / 3600:,.0f} hours of one core"],
        ]


class Noisy(nn.Module):
    """Adds normal noise. Where it is drawn is the whole difference."""

    def __init__(self, draw: Callable[[torch.Size], Tensor]) -> None:
        super().__init__()
        self._draw = draw

    def forward(self, activations: Tensor) -> Tensor:
        """Map activations to noisy ones."""
        return activations + self._draw(activations.shape)


def demonstrate(
    secret: int,
    draw: Callable[[torch.Size], Tensor] = torch.randn,
    space: int = SPACE,
    images: Tensor | None = None,
) -> Search:
    """Let an owner seed torch, and add noise to what it sends; then be the server.

    Args:
        secret: The owner's seed, below `space`.
        draw: Draws its noise.
        space: How many seeds are tried.
        images: What it sends; the first digits if not given.
    """
    model = build()
    bottom, body = model[:3], nn.Sequential(*model[3:15])
    half = nn.Sequential(*bottom, Noisy(draw), splitfed.CutPoint(), model[15])
    tap = Tap(splitfed.SplitServer(body, temporary_store(shared=False)))
    client = splitfed.SplitClient(half, tap, client_id="owner")
    images = digits().train_images[:EXAMPLES] if images is None else images

    torch.manual_seed(secret)
    client(images)

    request = tap.newest["forward"][0]
    (sent,), _ = request.inputs
    started = time.process_time()
    found, tried = search(request.seed, sent.shape, range(space))
    seconds = time.process_time() - started
    generator = torch.Generator().manual_seed(found or 0)
    with torch.no_grad():
        residual = sent - torch.randn(sent.shape, generator=generator) - bottom(images)
    return Search(found, tried, seconds, float(residual.abs().max()))


def search(seed: int, shape: torch.Size, candidates: Iterable[int]) -> tuple[int | None, int]:
    """Find the `manual_seed` of a client whose half drew normal noise of one shape before its first call.

    Args:
        seed: What the server got with that call.
        shape: Of the noise: that of the activations.
        candidates: The seeds to try.

    Returns:
        The seed, or `None` if none fits; and how many were tried.
    """
    generator = torch.Generator()
    tried = 0
    for candidate in candidates:
        tried += 1
        generator.manual_seed(candidate)
        torch.randn(shape, generator=generator)
        if sent_seed(generator) == seed:
            return candidate, tried
    return None, tried


def sent_seed(generator: torch.Generator) -> int:
    """The seed that a client in this state sends with its next call, as in `splitfed.model.rng`."""
    drawn = int(torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, generator=generator))
    digest = hashlib.sha256(drawn.to_bytes(8, "little", signed=True)).digest()
    return int.from_bytes(digest[:8], "little")
