"""What the split and the centralised run share, so that comparing them is fair: optimizer, rate, batches, evaluation.

The rate falls linearly to a twentieth: at a constant one, which batch came last moves the last accuracy by a point.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LinearLR, LRScheduler
from torch.utils.data import DataLoader, TensorDataset

from splitfed.simulation import data as held_out

BATCH = 64
_RATE = 4e-3


@dataclass(frozen=True, slots=True)
class Settings:
    """What a run is told, apart from where the digits are and where to write."""

    clients: int = 5
    rounds: int = 10
    replicas: int = 2
    alpha: float | None = None
    """The Dirichlet concentration of the label skew; `None` for an even deal."""
    seed: int = 0
    min_batches: int = 2
    """The body is committed when so many batches wait."""


def optimizer(parameters: Iterable[Any]) -> Optimizer:
    """Make the one optimizer of the demo: for client halves, the body and the centralised model alike."""
    return AdamW(parameters, lr=_RATE)


def schedule(steps: int) -> Callable[[Optimizer], LRScheduler]:
    """Return a factory that lets the rate fall over so many steps, and keeps it there."""
    return functools.partial(LinearLR, start_factor=1.0, end_factor=0.05, total_iters=max(1, steps))


def batches(images: Tensor, labels: Tensor, seed: int) -> DataLoader[tuple[Tensor, ...]]:
    """Return a loader of shuffled batches: images (N, 1, 28, 28) and labels (N,)."""
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(TensorDataset(images, labels), batch_size=BATCH, shuffle=True, generator=generator)


def num_batches(num_examples: int) -> int:
    """Return how many batches a pass over so many examples has."""
    return -(-num_examples // BATCH)


def evaluate(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, float]:
    """Return the mean loss and the accuracy of a model on a test set; the model is left in eval mode."""
    return held_out.evaluate(model, (images, labels), cross_entropy)
