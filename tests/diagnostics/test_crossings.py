"""What crosses a cut, by hand: a linear body of known sizes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from splitfed.diagnostics.crossings import inspect
from splitfed.errors import BodyError
from splitfed.model.cut import split
from splitfed.model.cutpoint import CutPoint


def model() -> nn.Module:
    """Linear maps from 3 over 4 and 5 to 2."""
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5), nn.Linear(5, 2))


def test_a_cut_model() -> None:
    """Activations (7, 4) go and come back as gradients, outputs (7, 5) the other way; four bytes a number."""
    found = inspect(*split(model(), "1"), torch.ones(7, 3))
    assert [(one.what, one.shape, one.dtype, one.num_bytes) for one in found.crossings] == [
        ("activations", (7, 4), "float32", 112),
        ("outputs", (7, 5), "float32", 140),
        ("grad_outputs", (7, 5), "float32", 140),
        ("grad_activations", (7, 4), "float32", 112),
    ]
    assert {(one.cut, one.call) for one in found.crossings} == {("", 0)}
    assert (found.client_parameters, found.body_parameters, found.body_bytes) == (16 + 12, 25, 100)
    assert set(found.messages) == {f"{way} {kind}" for way in ("forward", "backward") for kind in ("request", "answer")}
    assert all(found.messages[f"{way} answer"] > 112 for way in ("forward", "backward"))


def test_several_cuts_are_told_apart() -> None:
    """Each tensor says at which cut it crossed, in the order of the pass."""
    found = inspect(*split(model(), ["0", "2"]), torch.ones(7, 3))
    forward = [(one.cut, one.call, one.shape) for one in found.crossings if one.what == "outputs"]
    assert forward == [("0", 0, (7, 4)), ("2", 1, (7, 2))]
    backward = [one.cut for one in found.crossings if one.what == "grad_outputs"]
    assert backward == ["2", "0"]


def test_a_body_alone_and_integers() -> None:
    """A body by itself stands behind a lone cut point; no gradient of an index crosses."""
    found = inspect(CutPoint(), nn.Embedding(10, 4), torch.zeros(2, 3, dtype=torch.int64))
    assert [(one.what, one.shape, one.dtype) for one in found.crossings] == [
        ("activations", (2, 3), "int64"),
        ("outputs", (2, 3, 4), "float32"),
        ("grad_outputs", (2, 3, 4), "float32"),
    ]


def test_without_gradients_there_is_no_way_back() -> None:
    """A body whose outputs need no gradient is only asked for its forward."""
    found = inspect(CutPoint(), nn.Embedding(10, 4).requires_grad_(False), torch.zeros(2, 3, dtype=torch.int64))
    assert [one.what for one in found.crossings] == ["activations", "outputs"]


def test_a_wrong_example_is_told() -> None:
    """What the body raises comes as our error."""
    with pytest.raises(BodyError, match="shapes cannot be multiplied"):
        inspect(CutPoint(), nn.Linear(3, 4), torch.ones(7, 5))
