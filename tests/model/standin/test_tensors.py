"""A tensor of the part that was cut out: what is said of it, and that its values are nobody's."""

from __future__ import annotations

import copy
import operator
from typing import Any

import numpy as np
import pytest
import torch
from bodies import sandwich
from torch import nn

import splitfed
from splitfed.errors import AbsentError, UnsupportedError
from splitfed.model.cutpoint import hole_of


@pytest.fixture
def weight() -> Any:
    """The weight `(8, 6)` of a Linear that was cut out."""
    net = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 8), nn.Linear(8, 8))
    return splitfed.split(net, "1")[0][1].weight


def test_what_shape_and_dtype_say(weight: Any) -> None:
    """All that a count, a choice of dtype or a look at who trains needs."""
    assert (weight.numel(), weight.nelement(), weight.dim(), weight.ndim, len(weight)) == (48, 48, 2, 2, 8)
    assert (weight.shape, weight.size(1), weight.stride()) == ((8, 6), 6, (6, 1))
    assert (weight.dtype, weight.itemsize, weight.element_size()) == (torch.float32, 4, 4)
    assert (weight.requires_grad, weight.is_leaf, weight.is_floating_point(), weight.is_sparse) == (
        True,
        True,
        True,
        False,
    )
    assert (weight.device, weight.is_cuda, weight.is_cpu, weight.is_meta) == (torch.device("cpu"), False, True, False)
    assert (weight.data.shape, weight.detach().shape) == ((8, 6), (8, 6))
    assert repr(weight) == "<weight, parameter (8, 6) on the other side of the cut>"


@pytest.mark.parametrize(
    "use",
    [
        lambda p: p.pow(2).sum(),
        lambda p: p + 1,
        lambda p: 1 - p,
        lambda p: p @ torch.ones(6),
        lambda p: torch.ones(8) @ p,
        lambda p: -p,
        lambda p: p == 0,
        lambda p: p != torch.ones(8, 6),
        lambda p: p > 0,
        lambda p: bool(p),
        lambda p: float(p),
        lambda p: list(p),
        lambda p: p[0],
        lambda p: operator.setitem(p, 0, 1.0),
        lambda p: operator.iadd(p, 1),
        lambda p: torch.ones(8, 6).mul_(p),
        lambda p: torch.ones(8, 6).copy_(p),
        lambda p: torch.cat([p, p]),
        lambda p: torch.stack(tensors=[p, p]),
        lambda p: nn.init.zeros_(p),
        lambda p: nn.init.xavier_uniform_(p),
        lambda p: nn.utils.clip_grad_norm_([p], 1.0),
        lambda p: nn.utils.parameters_to_vector([p]),
        lambda p: p.data.normal_(),
        lambda p: p.grad,
        lambda p: setattr(p, "data", torch.ones(8, 6)),
        lambda p: setattr(p, "grad", torch.ones(8, 6)),
        lambda p: np.asarray(p),
        lambda p: p.register_hook(print),
    ],
)
def test_no_use_of_values(weight: Any, use: Any) -> None:
    """Operators, methods, functions of torch: each names the tensor."""
    with pytest.raises(AbsentError, match=r"'weight.*the server's"):
        use(weight)


def test_freezing_is_refused_and_what_is_so_already_isnt(weight: Any) -> None:
    """The server would go on to train it."""
    weight.requires_grad = True
    assert weight.requires_grad_() is weight
    weight.grad = None
    with pytest.raises(AbsentError, match=r"requires_grad of 'weight'.*before split.*count=False"):
        weight.requires_grad = False
    with pytest.raises(AbsentError, match="requires_grad of 'weight'"):
        weight.requires_grad_(False)


def test_freezing_for_calls_without_gradients() -> None:
    """As PEFT's `disable_adapter` does: it matters to no such call, and is refused in one with gradients."""
    half: Any = splitfed.split(sandwich(nn.Sequential(nn.Linear(8, 8))), "body")[0]
    part = half.body
    with torch.no_grad():
        part.requires_grad_(False)
        hole_of(part).mirror.settings(True)
    for twin in (part, copy.deepcopy(half).body):
        assert [p.requires_grad for p in twin.parameters()] == [False, False]
        with pytest.raises(AbsentError, match=r"requires_grad of '0.weight'"):
            hole_of(twin).mirror.settings(True)
        twin.requires_grad_(True)
        assert hole_of(twin).mirror.settings(True) == {}


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_no_optimizer_takes_it(weight: Any, name: str) -> None:
    """Groups with rates of their own are the accumulator's."""
    with pytest.raises(UnsupportedError, match=r"'weight' belongs to the part.*client.parameters\(\).*param_groups"):
        getattr(torch.optim, name)([{"params": [weight]}, {"params": [nn.Parameter(torch.ones(1))]}], lr=0.1)


def test_nor_can_a_weight_of_the_half_be_tied_to_it(weight: Any) -> None:
    """After `split` it is too late."""
    with pytest.raises(UnsupportedError, match="'weight' belongs to the part"):
        nn.Linear(6, 8).weight = weight


def test_identity_and_marks() -> None:
    """Tied tensors are one, also in sets and in copies of the half; a tool may mark it."""
    body = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    body[1].weight = body[0].weight
    half: Any = splitfed.split(sandwich(body), "body")[0]
    one, other = half.body[0].weight, half.body[1].weight
    assert one is other
    assert len({one, other, half.body[0].bias}) == 2
    assert one is not None
    assert one != None  # noqa: E711 -- as code that compares so
    one._seen = True
    twin = copy.deepcopy(half)
    assert twin.body[0].weight is twin.body[1].weight is not one
    assert twin.body[0].weight._seen


def test_it_follows_the_half_to_a_dtype_and_to_no_meta_device() -> None:
    """As in the unsplit model; the meta device is where nothing has values."""
    half: Any = splitfed.split(sandwich(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))), "body")[0]
    half.to(torch.float64)
    assert half.body[0].weight.dtype is torch.float64
    assert half.body[0].weight.element_size() == 8
    assert half.body[1].num_batches_tracked.dtype is torch.int64
    half.to(torch.bfloat16)
    assert {p.dtype for p in half.body.parameters()} == {torch.bfloat16}
    half.to("meta")
    assert half.body[0].weight.device == torch.device("cpu")
