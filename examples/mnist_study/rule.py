"""The update rule of the study that this library builds on, and the same with the mean: why the study's curve swings.

The study (its code is the public repository frogdance/MicroSFL) runs a round like this: every client sends all its
batches. The gradients of each batch are stored as files, for the body at the server, for the head at the client. At the
end of the round both are **summed** and take one step, SGD with rate 1e-4 at the server and 1e-3 at the clients; the
heads are averaged. The bottom is a frozen linear encoder, trained so that an adversarial decoder can't invert it,
with Gaussian noise of deviation 0.1 added to its outputs.

This module does all of that with splitfed. A sum equals a mean with the rate multiplied by the number of batches: with
945 of them, 1e-4 is 0.09. The encoder's outputs have squared norms in the thousands, since it evades its decoder by
growing. The curvature of the loss grows with them: the step is too long, and longer with more data. With the mean
instead, a rate that fits still fits with more data.
"""

from __future__ import annotations

import copy
import functools
import time
import uuid
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

import splitfed
from mnist_study import baselines
from mnist_study.baselines import Row
from mnist_study.recipe import BATCH, Deal
from splitfed.simulation.traffic import Crossed, Meter

SUM_RATES = (1e-4, 1e-3)
"""The study's rates, of the server and of a client, for sums."""
MEAN_RATES = (3e-2, 1e-2)
"""Rates for means, chosen on held-out training digits."""
_NOISE = 0.1
_MEAN, _STD = 0.1307, 0.3081  # what splitfed.cli.demo.data normalises by; the study's pixels are from 0 to 1


class Noise(nn.Module):
    """Adds Gaussian noise, when the model is judged too."""

    def forward(self, codes: Tensor) -> Tensor:
        """Map codes (N, 64) to noisy ones."""
        return codes + _NOISE * torch.randn_like(codes)


class Pixels(nn.Module):
    """Undoes the normalisation: pixels from 0 to 1."""

    def forward(self, images: Tensor) -> Tensor:
        """Map normalised images (N, 784) to pixels."""
        return images * _STD + _MEAN


def pretrain(deal: Deal, seed: int, passes: int = 20) -> nn.Linear:
    """Train the study's encoder: a decoder learns to invert it, and it learns to make that hard.

    One digit in five takes part. What is decoded is the code plus an embedding of the label.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder, labels = nn.Linear(784, 64), nn.Embedding(10, 64)
        decoder = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 784), nn.Sigmoid())
        evading = torch.optim.Adam([*encoder.parameters(), *labels.parameters()], lr=1e-3)
        inverting = torch.optim.Adam(decoder.parameters(), lr=1e-3)
        pixels, some = Pixels()(deal.images), torch.randperm(len(deal.labels))[: len(deal.labels) // 5]
        for _ in range(passes):
            for batch in some[torch.randperm(len(some))].split(BATCH):
                for optimizer, weight in ((inverting, 1.0), (evading, -0.1)):
                    optimizer.zero_grad()
                    codes = encoder(pixels[batch]) + labels(deal.labels[batch])
                    (weight * mse_loss(decoder(codes), pixels[batch])).backward()
                    optimizer.step()
    return encoder.requires_grad_(False)


def train(deal: Deal, encoder: nn.Linear, rounds: int, seed: int, *, mean: bool) -> Iterator[Row]:
    """Train by the study's rule, or with the mean instead of the sum; yield a row per round.

    Args:
        deal: The owners' digits.
        encoder: The frozen bottom.
        rounds: How many, of one pass each.
        seed: Of weights, orders and noise.
        mean: Whether gradients are averaged instead of summed.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        bottom = (Pixels(), encoder, Noise())
        model = nn.Sequential(*bottom, nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        owners = _Owners(deal, model, mean, seed)
        start = time.perf_counter()
        for number in range(1, rounds + 1):
            owners.one_round()
            figures = baselines.judge(owners.whole(), deal.test)
            yield baselines.row(number, *figures, start, *owners.traffic())


class _Owners:
    """The owners, their server and the two accumulators, on a store in memory."""

    def __init__(self, deal: Deal, model: nn.Module, mean: bool, seed: int) -> None:
        self._deal, self._mean = deal, mean
        self._generator = torch.Generator().manual_seed(seed)
        self._half, body = splitfed.split(model, "3:5")
        self._store = splitfed.GradientStore(f"memory://study-{uuid.uuid4().hex}")
        self._meter = Meter(splitfed.SplitServer(body, self._store))
        # The mean over batches times their number is their sum, if each batch has the same weight: see `_one_pass`.
        batches = sum(-(-len(part) // BATCH) for part in deal.parts)
        server, self._rate = MEAN_RATES if mean else (SUM_RATES[0] * batches, SUM_RATES[1])
        sgd = functools.partial(torch.optim.SGD, lr=server)
        self._bodies = splitfed.Accumulator(body, self._store, sgd, min_batches=batches)
        average = functools.partial(torch.optim.SGD, lr=1.0)
        self._halves = splitfed.Accumulator(
            self._half, self._store, average, lineage="client", min_batches=len(deal.parts)
        )
        names = [f"client-{number}" for number in range(len(deal.parts))]
        self._clients = [splitfed.SplitClient(copy.deepcopy(self._half), self._meter, name) for name in names]

    def one_round(self) -> None:
        """Every owner's pass, then the heads' average and the body's one step, as the study does."""
        for client, part in zip(self._clients, self._deal.parts, strict=True):
            client.pull()
            self._one_pass(client, part)
            client.push(num_samples=len(part))
        self._halves.step()
        self._bodies.step()

    def whole(self) -> nn.Module:
        """The whole model as it is after the last round."""
        self._half.load_state_dict(self._store.load_weights(lineage="client"))
        return splitfed.join(self._half, self._store.load_weights())

    def traffic(self) -> Crossed:
        """What has crossed since the last call, of all owners together."""
        return functools.reduce(Crossed.plus, self._meter.take().values(), Crossed())

    def _one_pass(self, client: splitfed.SplitClient, part: Tensor) -> None:
        """Add up the gradients of a pass, and take the head's one step with them.

        In a sum every batch weighs 1, however few digits the last one has; in a mean every digit does.
        """
        optimizer = torch.optim.SGD((p for p in client.parameters() if p.requires_grad), lr=self._rate)
        optimizer.zero_grad()
        for batch in baselines.shuffled(part, self._generator):
            weight = len(batch) / len(part) if self._mean else 1.0
            with client.batch(num_samples=len(batch) if self._mean else 1, loss_scale=weight):
                (weight * cross_entropy(client(self._deal.images[batch]), self._deal.labels[batch])).backward()
        optimizer.step()
