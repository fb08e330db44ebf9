"""The model that the demo cuts: small, and with all that makes an exact split hard in its body.

In U-shape the client keeps the first layers and the last, so that neither pixels nor labels leave it. The body has
BatchNorm, whose statistics a recompute must not count again, and dropout, whose mask it must draw again.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

CUT = "body"


class DigitNet(nn.Module):
    """A convolutional network for 28×28 digits: `bottom` and `head` for the client, `body` for the server."""

    def __init__(self) -> None:
        super().__init__()
        self.bottom = nn.Sequential(nn.Conv2d(1, 8, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2))
        self.body = nn.Sequential(
            nn.Conv2d(8, 32, 3, padding=1, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(256, 64),
            nn.ReLU(),
            nn.Dropout(0.25),
        )
        self.head = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (N, 1, 28, 28) by activations (N, 8, 14, 14) and outputs (N, 64) to logits (N, 10)."""
        return cast("Tensor", self.head(self.body(self.bottom(images))))


def build(seed: int) -> DigitNet:
    """Return the model with the initial weights of `seed`; the caller's random numbers are left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return DigitNet()
