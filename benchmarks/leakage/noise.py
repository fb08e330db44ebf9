"""Noise that nobody can search for: from the system's randomness, and from no generator that has a seed."""

from __future__ import annotations

import os

import torch
from torch import Tensor


def system_normal(shape: torch.Size) -> Tensor:
    """Draw from the standard normal distribution with the system's randomness.

    52 bits make a number between 0 and 1, without both ends; the quantile function makes it normal.
    """
    drawn = torch.frombuffer(bytearray(os.urandom(8 * shape.numel())), dtype=torch.int64)
    uniform = ((drawn & (2**52 - 1)).double() + 0.5) / 2**52
    return torch.special.ndtri(uniform).float().view(shape)


def noisy_activations(activations: Tensor, deviation: float) -> Tensor:
    """Add noise of so many deviations of the activations themselves."""
    return activations + deviation * activations.detach().std() * system_normal(activations.shape)


def noisy_gradients(gradients: Tensor, deviation: float, bound: float = 0.5) -> Tensor:
    """Clip each example's gradient, and add noise of so many times the bound (Abadi et al. 2016, arXiv 1607.00133).

    A row of the mean loss over N examples is clipped to the norm `bound / N`.
    """
    most = bound / len(gradients)
    norms = gradients.flatten(1).norm(dim=1)
    kept = gradients * (most / norms.clamp(min=most)).view(-1, *[1] * (gradients.dim() - 1))
    return kept + deviation * most * system_normal(gradients.shape)
