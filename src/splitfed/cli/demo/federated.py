"""The federated run: a simulation whose clients are the owners, whose servers are replicas, and whose store stays.

The body is committed each time that `min_batches` wait, and once more for what is left at the end of a round. Owners
take turns batch by batch, so the schedule and its bits follow from the seed alone. Then the halves are averaged by
sample count (FedAvg, McMahan et al. 2017, arXiv 1602.05629).
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from splitfed.accumulator.policies import Mode
from splitfed.cli.demo import recipe
from splitfed.cli.demo.data import Digits
from splitfed.cli.demo.model import CUT
from splitfed.cli.demo.recipe import Settings
from splitfed.simulation import partition
from splitfed.simulation.launch import simulate
from splitfed.simulation.run import Simulation
from splitfed.simulation.settings import LocalTraining
from splitfed.store.store import GradientStore
from splitfed.tracking.callbacks import AnyCallback
from splitfed.tracking.history import History


def train(
    settings: Settings, digits: Digits, model: nn.Module, store: GradientStore, callbacks: Iterable[AnyCallback]
) -> Simulation:
    """Return the run; iterate over it for a row after each round.

    Args:
        settings: How many owners, rounds and replicas, and how the digits are dealt out.
        digits: All of them; each owner gets a part of the training set.
        model: The whole model, with its initial weights. It isn't changed.
        store: Empty as yet; it gets the history too.
        callbacks: Are told of each row.
    """
    parts = deal(digits.train_labels, settings)
    width = len(str(len(parts)))
    owners = {
        f"client-{number:0{width}d}": (digits.train_images[part], digits.train_labels[part])
        for number, part in enumerate(parts)
    }
    commits = sum(recipe.num_batches(len(part)) for part in parts) // settings.min_batches
    return simulate(
        model,
        CUT,
        owners,
        loss_fn=cross_entropy,
        optimizer=recipe.optimizer,
        # The rate falls over the batches of the owner that has most; the others end at a higher one.
        local=LocalTraining(
            batch_size=recipe.BATCH,
            scheduler=recipe.schedule(settings.rounds * recipe.num_batches(max(len(part) for part in parts))),
            keep_optimizers=True,
        ),
        server_optimizer=recipe.optimizer,
        server_scheduler=recipe.schedule(settings.rounds * commits),
        rounds=settings.rounds,
        mode=Mode("buffered", min_batches=settings.min_batches),
        evaluate=lambda whole: recipe.evaluate(whole, digits.test_images, digits.test_labels),
        replicas=settings.replicas,
        store=store,
        seed=settings.seed,
        name="splitfed demo",
        callbacks=[History(store), *callbacks],
    )


def deal(labels: Tensor, settings: Settings) -> list[Tensor]:
    """Return the indices of each owner's digits: an even deal, or with skewed labels if there is an `alpha`."""
    if settings.alpha is None:
        return partition.iid(len(labels), settings.clients, seed=settings.seed)
    return partition.dirichlet(labels, settings.clients, alpha=settings.alpha, seed=settings.seed)
