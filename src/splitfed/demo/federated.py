"""The federated run: owners train their halves in turn through stateless replicas, and only files connect these.

An owner's loop is the reader's own training loop with `client` where the model was. The body is committed each time
that `min_batches` wait, and once more for what is left at the end of a pass. Then the halves are averaged by sample
count: every owner pushes start − end, and SGD with rate 1 applies the mean (FedAvg, McMahan et al. 2017,
arXiv 1602.05629). Owners take turns batch by batch, so the schedule and its bits follow from the seed alone.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from splitfed import partition
from splitfed.accumulator import Accumulator
from splitfed.client import SplitClient
from splitfed.commits import Commit
from splitfed.cutting import join, split
from splitfed.demo import recipe
from splitfed.demo.data import Digits
from splitfed.demo.model import CUT
from splitfed.demo.recipe import Settings
from splitfed.demo.roundrobin import RoundRobin
from splitfed.demo.screen import Row, Screen
from splitfed.server import SplitServer
from splitfed.store import GradientStore
from splitfed.transport import Transport


class Owner:
    """One data owner: its digits, its half of the model and its optimizer stay in here."""

    def __init__(
        self, number: int, half: nn.Module, server: Transport, digits: tuple[Tensor, Tensor], settings: Settings
    ) -> None:
        self.num_samples = len(digits[0])
        self.client = SplitClient(copy.deepcopy(half), server, client_id=f"client-{number}")
        self.loader = recipe.batches(*digits, seed=settings.seed + 1000 * number)
        self.optimizer = recipe.optimizer(self.client.parameters())
        self.schedule = recipe.schedule(settings.rounds * len(self.loader))(self.optimizer)

    def one_pass(self) -> Iterator[float]:
        """Train on every digit once; yield the summed loss of each batch, so that owners can take turns."""
        self.client.train()
        for images, labels in self.loader:
            self.optimizer.zero_grad()
            loss = cross_entropy(self.client(images), labels)
            loss.backward()
            self.optimizer.step()
            self.schedule.step()
            yield loss.item() * len(labels)


class Federation:
    """Owners, replicas and accumulators on one store.

    Args:
        settings: How many of each, and how the digits are dealt out.
        digits: All of them; each owner gets a part of the training set.
        model: The whole model, with its initial weights. It isn't changed.
        store: Empty as yet.
    """

    def __init__(self, settings: Settings, digits: Digits, model: nn.Module, store: GradientStore) -> None:
        half, body = split(model, CUT)
        replicas = RoundRobin([SplitServer(body, store) for _ in range(settings.replicas)])
        self.settings = settings
        self.digits = digits
        self.store = store
        self.owners = [
            Owner(number, half, replicas, (digits.train_images[part], digits.train_labels[part]), settings)
            for number, part in enumerate(deal(digits.train_labels, settings))
        ]
        steps = settings.rounds * self.batches_per_round // settings.min_batches
        self._body = Accumulator(
            body,
            store,
            optimizer=recipe.optimizer,
            lr_scheduler=recipe.schedule(steps),
            min_batches=settings.min_batches,
        )
        self._halves = Accumulator(
            half,
            store,
            lineage="client",
            optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1.0),
            min_batches=settings.clients,
        )

    @property
    def batches_per_round(self) -> int:
        """How many batches all owners together make of their digits in one pass."""
        return sum(len(owner.loader) for owner in self.owners)

    def rounds(self, screen: Screen) -> Iterator[Row]:
        """Train, and yield a row of figures after each round.

        Args:
            screen: Is told how it goes.
        """
        screen.begin("federated", self.settings.rounds * self.batches_per_round)
        for owner in self.owners:
            owner.client.pull()
        for number in range(1, self.settings.rounds + 1):
            losses, commits = self._train(screen)
            self._average()
            version = self.store.latest_version()
            model = join(self.owners[0].client, self.store.load_weights(version))
            loss, accuracy = recipe.evaluate(model, self.digits.test_images, self.digits.test_labels)
            row = {
                "round": number,
                "loss": loss,
                "accuracy": accuracy,
                "train_loss": sum(losses) / sum(owner.num_samples for owner in self.owners),
                "version": version,
                "client_version": self.store.latest_version("client"),
                "batches": len(losses),
                "gradients_folded": sum(commit.num_batches for commit in commits),
                "gradients_stale": sum(commit.num_stale for commit in commits),
                "gradients_rejected": sum(commit.num_rejected for commit in commits),
                "gradients_waiting": len(self.store.waiting()),
            }
            screen.row(row)
            yield row

    def _train(self, screen: Screen) -> tuple[list[float], list[Commit]]:
        losses, commits = [], []
        for loss in take_turns(owner.one_pass() for owner in self.owners):
            losses.append(loss)
            commits.append(self._body.step())
            screen.batch()
        commits.append(self._body.step(min_batches=1))
        return losses, [commit for commit in commits if commit is not None]

    def _average(self) -> None:
        for owner in self.owners:
            owner.client.push(num_samples=owner.num_samples)
        self._halves.step()
        for owner in self.owners:
            owner.client.pull()


def deal(labels: Tensor, settings: Settings) -> list[Tensor]:
    """Return the indices of each owner's digits: an even deal, or with skewed labels if there is an `alpha`."""
    if settings.alpha is None:
        return partition.iid(len(labels), settings.clients, seed=settings.seed)
    return partition.dirichlet(labels, settings.clients, alpha=settings.alpha, seed=settings.seed)


def take_turns(passes: Iterable[Iterator[float]]) -> Iterator[float]:
    """Advance each iterator in turn until all are exhausted."""
    running = list(passes)
    while running:
        for one in list(running):
            try:
                yield next(one)
            except StopIteration:
                running.remove(one)
