"""The yardstick: the same model, unsplit, on all digits in one place, with as many passes over them."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.nn.functional import cross_entropy

from splitfed.demo import recipe
from splitfed.demo.data import Digits
from splitfed.demo.recipe import Settings
from splitfed.demo.screen import Row, Screen


def train(settings: Settings, digits: Digits, model: nn.Module, screen: Screen) -> Iterator[Row]:
    """Train `model` in place and yield a row (round, loss, accuracy) after each pass.

    Args:
        settings: Whose rounds and seed count.
        digits: All of them.
        model: The whole model, with its initial weights.
        screen: Is told how it goes.
    """
    loader = recipe.batches(digits.train_images, digits.train_labels, settings.seed)
    optimizer = recipe.optimizer(model.parameters())
    schedule = recipe.schedule(settings.rounds * len(loader))(optimizer)
    screen.begin("centralised", settings.rounds * len(loader))
    for number in range(1, settings.rounds + 1):
        model.train()
        for images, labels in loader:
            optimizer.zero_grad()
            loss = cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            schedule.step()
            screen.batch()
        test_loss, accuracy = recipe.evaluate(model, digits.test_images, digits.test_labels)
        row = {"round": number, "loss": test_loss, "accuracy": accuracy}
        screen.row(row)
        yield row
