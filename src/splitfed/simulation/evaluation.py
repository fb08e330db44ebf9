"""How good a model is on held-out data: the mean loss, and for classes the share of right answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from splitfed.errors import InputError
from splitfed.simulation import data
from splitfed.simulation.data import Data

Evaluation = Data | Callable[[nn.Module], Mapping[str, float]]
BATCH_SIZE = 500


@torch.no_grad()
def evaluate(model: nn.Module, how: Evaluation, loss_fn: Callable[[Any, Any], Tensor]) -> dict[str, float]:
    """Score a model in eval mode, without gradients; it is left in eval mode.

    Args:
        model: The whole model.
        how: Held-out data, or a function of the model that returns figures by name.
        loss_fn: For held-out data; the mean over a batch.

    Returns:
        `loss`, and `accuracy` where outputs are (N, classes), two of them at least, and targets integers (N,); or what
        the function returned.

    Raises:
        InputError: the function returned no mapping, or there is no data.
    """
    model.eval()
    if callable(how):
        figures = how(model)
        if not isinstance(figures, Mapping):
            raise InputError(f"evaluate returned a {type(figures).__name__}: expected a mapping of figures by name")
        return dict(figures)
    total = data.size(how)
    if not total:
        raise InputError("there is no held-out data to evaluate on: give one example at least, or evaluate=None")
    loss, right, classifies = 0.0, 0, True
    for number, (inputs, targets) in enumerate(data.batches(how, BATCH_SIZE, range(total))):
        outputs = model(inputs)
        loss += float(loss_fn(outputs, targets)) * min(BATCH_SIZE, total - number * BATCH_SIZE)
        found = num_right(outputs, targets)
        classifies = classifies and found is not None
        right += found or 0
    return {"loss": loss / total, "accuracy": right / total} if classifies else {"loss": loss / total}


def num_right(outputs: Any, targets: Any) -> int | None:
    """How many of a batch are right; `None` unless outputs are (N, classes) and targets integers (N,).

    One output for each example, as of a binary classifier with one logit, isn't a choice between classes.
    """
    if not isinstance(outputs, Tensor) or not isinstance(targets, Tensor):
        return None
    if outputs.dim() != 2 or outputs.shape[1] < 2 or targets.dim() != 1 or targets.is_floating_point():
        return None
    return int((outputs.argmax(1) == targets).sum())
