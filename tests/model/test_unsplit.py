"""The reference: a copy that computes in one piece what the halves would, and is otherwise the model itself."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from bodies import Calls, sandwich, twice
from torch import Tensor, nn

from splitfed.errors import CutError, UnknownCutError
from splitfed.model.unsplit import reference


def model() -> nn.Module:
    """A body that draws nothing."""
    return sandwich(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(inplace=True)))


def gradients(module: nn.Module, x: Tensor) -> dict[str, Any]:
    """Of the sum of squares."""
    module.zero_grad()
    module(x).pow(2).sum().backward()
    return {name: parameter.grad.clone() for name, parameter in module.named_parameters()}


@pytest.mark.parametrize("at", ["body", "body.0", "body.0:2", ["bottom", "body.1"], ""], ids=str)
def test_without_randomness_it_is_the_model(at: Any) -> None:
    """Outputs, gradients and buffers, bit for bit, wherever the cut is."""
    raw, x = model(), torch.randn(4, 6)
    same = reference(raw, at)
    expected, got = gradients(raw, x), gradients(same, x)
    assert list(got) == list(expected)
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    assert all(torch.equal(a, b) for a, b in zip(same.buffers(), raw.buffers(), strict=True))
    assert torch.equal(same.eval()(x), raw.eval()(x))


def test_names_classes_and_the_model_stay() -> None:
    """The same keys, isinstance holds, hooks run, and the caller's model is neither changed nor shared."""
    raw = model()
    seen: list[str] = []
    raw.body.register_forward_hook(lambda m, args, out: seen.append("hook"))
    same = reference(raw, "body")
    assert list(same.state_dict()) == list(raw.state_dict())
    assert isinstance(same.body, nn.Sequential)
    assert type(same.body).__name__ == "Sequential"
    assert type(raw.body) is nn.Sequential
    same(torch.randn(4, 6))
    assert seen == ["hook"]
    with torch.no_grad():
        for parameter in same.parameters():
            parameter.zero_()
    assert all(bool(parameter.any()) for name, parameter in raw.named_parameters() if name.endswith("weight"))


def test_a_body_that_draws_nothing_costs_the_stream_nothing() -> None:
    """What is drawn after the call is what the raw model would draw; with dropout it is one seed further on."""
    x, state = torch.randn(4, 6), torch.get_rng_state()
    reference(model(), "body")
    torch.set_rng_state(state)
    same = reference(model(), "body")
    state = torch.get_rng_state()
    same(x)
    assert torch.equal(torch.get_rng_state(), state)
    dropping = reference(sandwich(nn.Dropout(0.5)), "body")
    state = torch.get_rng_state()
    dropping(x)
    moved = torch.get_rng_state()
    torch.set_rng_state(state)
    torch.randint(-(2**63), 2**63 - 1, ())
    assert torch.equal(torch.get_rng_state(), moved)


def test_dropout_on_ones_shows_its_mask_in_the_gradient() -> None:
    """The forward's mask is the backward's, and another call has another."""
    same = reference(nn.Sequential(nn.Identity(), nn.Dropout(0.5), nn.Identity()), "1")
    masks = []
    for _ in range(2):
        x = torch.ones(8, 8, requires_grad=True)
        y = same(x)
        y.sum().backward()
        assert torch.equal(x.grad, y)  # type: ignore[arg-type]
        masks.append(y.detach())
    assert not torch.equal(*masks)


def test_a_body_called_twice_keeps_its_own_parameters() -> None:
    """Each call has its aliases, and after it, also after an error, the parameters themselves are back."""
    same = reference(twice(nn.Linear(8, 8)), "body")
    held = dict(same.named_parameters())
    same(torch.randn(2, 6)).sum().backward()
    assert held["body.weight"].grad is not None
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        same.body(torch.randn(2, 5))
    assert all(parameter is held[name] for name, parameter in same.named_parameters())


def test_a_copy_of_it_computes_with_its_own_weights() -> None:
    """As moving averages keep one: changing the copy changes what the copy computes, and nothing else."""
    same, x = reference(model(), "body").eval(), torch.randn(4, 6)
    expected = same(x)
    other = copy.deepcopy(same)
    assert torch.equal(other(x), expected)
    with torch.no_grad():
        for parameter in other.body.parameters():
            parameter.zero_()
    assert torch.equal(other(x), other.head(torch.zeros(4, 8)))
    assert torch.equal(same(x), expected)


def test_what_cant_be_cut_has_no_reference() -> None:
    """The same errors as split's."""
    with pytest.raises(UnknownCutError, match="nearest are"):
        reference(model(), "bodi")
    with pytest.raises(CutError, match="overlap"):
        reference(model(), ["body", "body.0"])


def test_a_cut_that_calls_its_parts_in_a_loop() -> None:
    """A body in the middle of the caller's own code: its outputs may be any tree, and None among them."""
    inner = Calls(lambda m, x, k: {"out": [m.layer(x) for _ in range(k)], "none": None}, layer=nn.Linear(6, 6))
    raw = Calls(lambda m, x: sum(m.inner(x, k=2)["out"]), inner=inner)
    x = torch.randn(3, 6)
    assert torch.equal(reference(raw, "inner")(x), raw(x))
