"""Held-out figures: hand-worked, and of one's own making."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

from splitfed.errors import InputError
from splitfed.simulation.data import evaluate
from splitfed.simulation.settings import LocalTraining


class Fixed(nn.Module):
    """Answers its inputs doubled, in training mode negative."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Twice the inputs."""
        return -inputs if self.training else 2 * inputs


def test_loss_and_accuracy_of_a_classifier_by_hand() -> None:
    """Logits (2, 0) for the classes 0 and 1: half is right, the losses are log(1 + e⁻²) and log(1 + e²)."""
    held = (torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([0, 1]))
    found = evaluate(Fixed(), held, cross_entropy)
    expected = (math.log1p(math.exp(-2)) + math.log1p(math.exp(2))) / 2
    assert found == {"loss": pytest.approx(expected), "accuracy": 0.5}


def test_the_mean_is_over_examples_and_not_over_batches() -> None:
    """501 examples are two batches of 500 and 1; the one odd example weighs 1/501."""
    inputs = torch.zeros(501, 1)
    inputs[500] = 1
    found = evaluate(Fixed(), (inputs, torch.zeros(501, 1)), mse_loss)
    assert found == {"loss": pytest.approx(4 / 501)}


@pytest.mark.parametrize("form", [tuple, lambda pair: {"class": pair[0], "size": pair[1]}])
def test_targets_of_several_parts_count_by_example(form: Callable[[tuple[int, float]], object]) -> None:
    """Three examples with errors 0, 0 and 3 have a mean of 1, whether their targets are a pair or a dict."""

    def loss_fn(outputs: torch.Tensor, targets: Any) -> torch.Tensor:
        sizes = targets["size"] if isinstance(targets, dict) else targets[1]
        return (outputs[:, 0] - sizes).abs().mean()

    held = [(torch.ones(1), form((1, size))) for size in (2.0, 2.0, 5.0)]
    assert evaluate(Fixed(), held, loss_fn) == {"loss": pytest.approx(1.0)}


def test_one_logit_is_no_choice_of_a_class() -> None:
    """The highest of one is always number 0, which would make the share of zeros the accuracy."""
    held = (torch.tensor([[1.0], [-1.0]]), torch.tensor([1, 0]))
    found = evaluate(Fixed(), held, lambda outputs, targets: mse_loss(outputs[:, 0], targets.float()))
    assert found == {"loss": pytest.approx((1 + 4) / 2)}


def test_a_function_of_the_model_says_what_it_likes() -> None:
    """It gets the model in eval mode."""
    model = Fixed().train()
    assert evaluate(model, lambda given: {"f1": float(not given.training)}, cross_entropy) == {"f1": 1.0}


def test_no_figures_and_no_data_are_refused() -> None:
    """Rather than a division by zero."""
    with pytest.raises(InputError, match="evaluate returned a float"):
        evaluate(Fixed(), lambda _: 0.5, cross_entropy)  # type: ignore[arg-type, return-value]
    with pytest.raises(InputError, match="no held-out data"):
        evaluate(Fixed(), (torch.zeros(0, 2), torch.zeros(0)), cross_entropy)


def test_the_settings_of_batches_hold_for_what_is_held_out() -> None:
    """A dict's target by its key, a collate function; a last batch that is smaller counts all the same."""
    held = {"inputs": torch.tensor([[1.0, 0.0]] * 3), "y": torch.tensor([0, 1, 0])}
    local = LocalTraining(target="y", drop_last=True)
    assert evaluate(Fixed(), held, cross_entropy, local)["accuracy"] == pytest.approx(2 / 3)
    swapped = LocalTraining(collate_fn=lambda rows: (torch.stack([row[1] for row in rows]), torch.tensor([1])))
    assert evaluate(Fixed(), [(0, torch.tensor([0.0, 1.0]))], cross_entropy, swapped)["accuracy"] == 1


def test_a_loss_that_doesnt_fit_its_target_says_what_it_got() -> None:
    """One of other arguments, and one that wants a tensor and gets strings."""
    with pytest.raises(InputError, match=r"loss_fn\(outputs, target\) raised TypeError: .* as the target, a Tensor"):
        evaluate(Fixed(), (torch.ones(2, 2), torch.zeros(2)), lambda outputs: outputs.sum())  # type: ignore[arg-type, misc]
    with pytest.raises(InputError, match=r"as the target, a (list|tuple): the target is the last part of a sample"):
        evaluate(Fixed(), [(torch.ones(2), "north")], cross_entropy)
