"""Inputs from activations: ridge regression maps what crosses the first cut back to pixels.

A server that has the half, because halves are averaged, runs digits of its own through it and learns the way back from
the pairs. What it makes of an owner's activations is compared with many images: the nearest is the one that was sent,
if the attack is right. (Erdoğan et al. 2022, arXiv 2108.09033, invert halves that they don't know.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.leakage.noise import noisy_activations
from benchmarks.leakage.setting import BATCH, Seen, bottom_of
from splitfed.cli.demo.data import Digits

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)


def by_known_half(seen: Sequence[Seen], known: Digits, cut: str, deviation: float = 0.0) -> tuple[float, float]:
    """Reconstruct inputs from their activations, having the half and the held-out digits.

    Returns:
        The share of inputs that are re-identified among all training digits, and the share of the variance of the
        owners' pixels that the reconstruction explains.
    """
    bottom = bottom_of(seen[0].half, cut).train()  # in batches, as BatchNorm saw the owner's
    with torch.no_grad():
        made = torch.cat([bottom(images) for images in known.test_images.split(BATCH)])
    if deviation:
        made = noisy_activations(made, deviation)
    return judged(seen, made.flatten(1), known.test_images.flatten(1), known.train_images.flatten(1))


def by_known_inputs(seen: Sequence[Seen], known: Digits, share: float) -> tuple[float, float]:
    """As above, without the half: the server knows a share of the owner's inputs, and reconstructs the others."""
    pixels = known.train_images.flatten(1)
    right = explained = 0.0
    owners = sorted({one.owner for one in seen})
    for owner in owners:
        own = [one for one in seen if one.owner == owner]
        pairs = max(1, round(share * len(own)))
        activations = torch.cat([one.activations for one in own[:pairs]])
        inputs = pixels[torch.cat([one.examples for one in own[:pairs]])]
        found = judged(own[pairs:], activations, inputs, pixels)
        right, explained = right + found[0] / len(owners), explained + found[1] / len(owners)
    return right, explained


def judged(seen: Sequence[Seen], activations: Tensor, inputs: Tensor, candidates: Tensor) -> tuple[float, float]:
    """Learn the way back from pairs, go it with what was seen, and compare with the truth."""
    sent = torch.cat([one.activations for one in seen])
    examples = torch.cat([one.examples for one in seen])
    made = fitted(activations, inputs)(sent)
    truth = candidates[examples]
    nearest = torch.cat([torch.cdist(rows, candidates).argmin(1) for rows in made.split(256)])
    spread = (truth - truth.mean(0)).square().sum()
    explained = 1 - float((made - truth).square().sum() / spread)
    return float((nearest == examples).double().mean()), explained


def fitted(rows: Tensor, targets: Tensor) -> Callable[[Tensor], Tensor]:
    """Ridge regression from rows (M, C) to rows (M, P), with the penalty, of several, that does best on a fifth."""
    fifth = len(rows) // 5
    held, expected = rows[:fifth], targets[:fifth]

    def error(penalty: float) -> float:
        return float((ridge(rows[fifth:], targets[fifth:], penalty)(held) - expected).square().mean())

    return ridge(rows, targets, min(PENALTIES, key=error))


def ridge(rows: Tensor, targets: Tensor, penalty: float) -> Callable[[Tensor], Tensor]:
    """Ridge regression with a penalty in units of the mean square of a row's deviation."""
    centre, offset = rows.mean(0), targets.mean(0)
    centred = (rows - centre).double()
    kernel = centred @ centred.T  # (M, M): there are fewer rows than columns
    kernel.diagonal().add_(penalty * float(kernel.diagonal().mean()))
    weights = centred.T @ torch.linalg.solve(kernel, (targets - offset).double())
    return lambda others: ((others - centre).double() @ weights).float() + offset
