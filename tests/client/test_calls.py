"""A call across the cut under autograd: what it refuses, and inputs that a body changes in place."""

from __future__ import annotations

import uuid
from typing import Any

import pytest
import torch
from bodies import sandwich
from harness import Split, sgd
from torch import Tensor, nn

from splitfed.errors import InPlaceError, UnsupportedError


def split(model: nn.Module | None = None) -> Split:
    """A split model in memory."""
    return Split(model or sandwich(nn.Linear(8, 8)), "body", f"memory://{uuid.uuid4()}", optimizer=sgd)


def x(count: int = 4) -> Tensor:
    """A batch `(N, 6)`."""
    return torch.randn(count, 6)


def test_gradients_of_gradients_are_refused() -> None:
    """create_graph says what to do instead, and nothing waits."""
    made = split()
    loss = made.client(x()).sum()
    with pytest.raises(UnsupportedError, match=r"create_graph=True can't cross the cut.*within the client half"):
        torch.autograd.grad(loss, list(made.client.parameters()), create_graph=True)
    assert made.store.waiting() == []


def in_place(use: Any) -> nn.Module:
    """A body that begins in place, in a half that uses its input `h` elsewhere too."""
    net = sandwich(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(8, 8)))

    def forward(m: Any, given: Tensor) -> Tensor:
        h = m.bottom(given)
        return m.head(use(m.body, h))

    net.run = forward
    return net


@pytest.mark.parametrize(
    ("use", "error", "said"),
    [
        (
            lambda cut, h: cut(h) + h,
            InPlaceError,
            "input 0 in place, and the client uses it elsewhere too.*inplace=False",
        ),
        (lambda cut, h: cut(h) * h, InPlaceError, "clone"),
        (lambda cut, h: [h + cut(h)][0], InPlaceError, "in place"),
        (lambda cut, h: (lambda square: cut(h) + square)(h * h), RuntimeError, "modified by an inplace operation"),
    ],
    ids=["added", "multiplied", "before", "saved"],
)
def test_an_input_changed_in_place_cant_be_used_elsewhere(use: Any, error: type[Exception], said: str) -> None:
    """The other use would see other values than in the unsplit model; torch's own error where it sees it first."""
    made = split(in_place(use))
    with pytest.raises(error, match=said):
        made.client(x()).sum().backward()


def test_an_input_changed_in_place_may_be_used_in_the_cut_only() -> None:
    """Or cloned: as the message says."""
    for use in (lambda cut, h: cut(h), lambda cut, h: cut(h.clone()) + h):
        made = split(in_place(use))
        made.client(x()).sum().backward()
        assert len(made.waiting()) == 1


def test_a_graph_runs_backward_once() -> None:
    """As in torch: a second time raises, unless the graph was retained; no second batch comes of it."""
    made = split()
    loss = made.client(x()).sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()
    assert len(made.waiting()) == 1


@pytest.mark.parametrize("transform", [torch.func.vmap, torch.func.grad], ids=["vmap", "grad"])
def test_functional_transforms_are_refused(transform: Any) -> None:
    """The cut can't be seen through by vmap, grad and the like."""
    made = split(sandwich(nn.Linear(8, 8)))
    with pytest.raises(UnsupportedError, match=r"inside of torch.func transforms.*loss.backward"):
        transform(lambda one: made.client(one).sum())(x())


@pytest.mark.parametrize("how", ["frozen_bottom", "no_grad"])
def test_an_input_changed_in_place_that_needs_no_gradient(how: str) -> None:
    """There is no gradient to tell by, so a use elsewhere sees what it would see in the unsplit model."""
    net = in_place(lambda cut, h: cut(h) + h)
    net.bottom.requires_grad_(False)
    made, given = split(net), x()
    with torch.set_grad_enabled(how == "frozen_bottom"):
        try:
            got = made.client(given)
        except InPlaceError:
            return
        assert torch.equal(got, net(given))
