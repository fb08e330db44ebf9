"""Labels from gradients: the gradient of a loss for one example's outputs points away from its label.

The gradient of cross entropy for the logits is p - e_y, so at the cut it is Wᵀ(p - e_y) / N with the weights W of the
head. A server that has the head tries each label and takes the one that fits. A server that doesn't have it, since the
head is personal, finds the classes as clusters of directions; what they are called, one known example of each tells.
(Li et al. 2022, arXiv 2102.08504, for two classes.)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize, one_hot

from benchmarks.leakage.setting import DEMO, Seen, head_of

CLASSES = 10


def by_known_head(seen: Sequence[Seen], cut: str) -> float:
    """The share of labels that a server finds that has the head: the label whose gradient is nearest."""
    right = total = 0
    for one in seen:
        head = head_of(one.half, cut).eval()
        outputs = one.outputs.clone().requires_grad_()
        distances = []
        for label in range(CLASSES):
            loss = cross_entropy(head(outputs), torch.full_like(one.labels, label))
            (expected,) = torch.autograd.grad(loss, outputs)
            distances.append((one.gradients - expected.flatten(1)).norm(dim=1))
        found = torch.stack(distances).argmin(0)
        right += int((found == one.labels).sum())
        total += len(found)
    return right / total


def by_prediction(seen: Sequence[Seen], cut: str) -> float:
    """The share of labels that the model itself predicts of what it was sent: no gradient is needed for it."""
    right = total = 0
    for one in seen:
        with torch.no_grad():
            found = head_of(one.half, cut).eval()(one.outputs).argmax(1)
        right += int((found == one.labels).sum())
        total += len(found)
    return right / total


def by_clusters(seen: Sequence[Seen], seed: int = 0) -> float:
    """The share of examples in the cluster of their class, by owner, with the best of all namings of clusters."""
    right = total = 0
    for owner in sorted({one.owner for one in seen}):
        own = [one for one in seen if one.owner == owner]
        directions = normalize(torch.cat([one.gradients * len(one.labels) for one in own]).double())
        labels = torch.cat([one.labels for one in own])
        clusters = k_means(directions, CLASSES, seed)
        table = one_hot(clusters, CLASSES).T @ one_hot(labels, CLASSES)
        rows, columns = linear_sum_assignment(table.numpy(), maximize=True)
        right += int(table[rows, columns].sum())
        total += len(labels)
    return right / total


def k_means(directions: Tensor, number: int, seed: int, tries: int = 10) -> Tensor:
    """Cluster unit vectors (N, C) by angle; returns the cluster of each (N,): the best of several tries.

    First centres are drawn far from each other (k-means++; Arthur and Vassilvitskii 2007).
    """
    generator = torch.Generator().manual_seed(seed)
    best, closest = torch.zeros(len(directions), dtype=torch.int64), -1.0
    for _ in range(tries):
        centres = directions[torch.randint(len(directions), (1,), generator=generator)]
        while len(centres) < number:
            away = (1 - (directions @ centres.T).amax(1)).clamp(min=1e-12)
            centres = torch.cat([centres, directions[torch.multinomial(away, 1, generator=generator)]])
        for _ in range(50):
            clusters = (directions @ centres.T).argmax(1)
            centres = normalize(one_hot(clusters, number).double().T @ directions)
        cosine = float((directions @ centres.T).amax(1).mean())
        if cosine > closest:
            best, closest = clusters, cosine
    return best


def by_histogram(seen: Sequence[Seen]) -> float:
    """The share of batches whose numbers of each label follow exactly from the published gradient of the head's bias.

    It is the mean of p - e_y over the batch, and the server that made the outputs can compute p.
    """
    exact = 0
    for one in seen:
        with torch.no_grad():
            shares = head_of(one.half, DEMO)(one.outputs).softmax(1)
        counts = (shares.sum(0) - len(one.labels) * one.pushed["15.bias"]).round().long()
        exact += torch.equal(counts, torch.bincount(one.labels, minlength=CLASSES))
    return exact / len(seen)
