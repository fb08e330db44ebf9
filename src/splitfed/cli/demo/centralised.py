"""The yardstick: the same model, unsplit, on all digits in one place, with as many passes over them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn
from torch.nn.functional import cross_entropy

from splitfed.cli.demo import recipe
from splitfed.cli.demo.data import Digits
from splitfed.cli.demo.recipe import Settings
from splitfed.store.rows import Row
from splitfed.tracking.callbacks import AnyCallback, Callbacks


def train(settings: Settings, digits: Digits, model: nn.Module, callbacks: Iterable[AnyCallback] = ()) -> Iterator[Row]:
    """Train `model` in place and yield a row (round, loss, accuracy) after each pass.

    Args:
        settings: Whose rounds and seed count.
        digits: All of them.
        model: The whole model, with its initial weights.
        callbacks: Are told of each row.
    """
    loader = recipe.batches(digits.train_images, digits.train_labels, settings.seed)
    optimizer = recipe.optimizer(model.parameters())
    schedule = recipe.schedule(settings.rounds * len(loader))(optimizer)
    with Callbacks(callbacks) as watchers:
        watchers.on_row({"kind": "run", "name": "centralised", "settings": {"rounds": settings.rounds}})
        for number in range(1, settings.rounds + 1):
            model.train()
            for images, labels in loader:
                optimizer.zero_grad()
                loss = cross_entropy(model(images), labels)
                loss.backward()
                optimizer.step()
                schedule.step()
            row = {"kind": "round", "round": number}
            row |= recipe.evaluate(model, digits.test_images, digits.test_labels)
            watchers.on_row(row)
            yield row
