"""What a side of a cut reaches: closures, methods, hooks, objects and globals, refused where they lead across."""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import splitfed
from splitfed.errors import CutError, SharedParameterError, UnsupportedError
from splitfed.model.reach import reached

X = torch.ones(3, 4)


class Model(nn.Module):
    """A bottom, a layer to be cut, a head, and a parameter beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.bottom, self.head = nn.Linear(4, 4), nn.Linear(4, 4)
        self.layer = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        self.scale = nn.Parameter(torch.full((4,), 2.0))

    def forward(self, x: Tensor) -> Tensor:
        """All in a row."""
        return self.head(self.layer(self.bottom(x)))

    def scaled(self, module: Any, given: Any, output: Tensor) -> Tensor:
        """A method to be used as a hook."""
        return output * self.scale


class Helper:
    """A plain object that has a model, and can be called as a hook."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, module: Any, given: Any, output: Tensor) -> Tensor:
        """Scales."""
        return output * self.model.scale


class Slotted:
    """Another that keeps its attributes elsewhere."""

    __slots__ = ("held",)

    def __init__(self, held: Any) -> None:
        self.held = held


def scaled_by(model: Any, module: Any, given: Any, output: Tensor) -> Tensor:
    """A function that is given the model."""
    return output * model.scale


def patched(model: Model, by: Callable[[Tensor], Tensor]) -> None:
    """Give the layer another forward."""
    before = model.layer.forward
    model.layer.forward = lambda x: by(before(x))


def wrapped(model: Model) -> Any:
    """A hook that says it is another function."""
    return functools.wraps(scaled_by)(lambda module, given, output: output * model.scale)


ACROSS: dict[str, Callable[[Model], Any]] = {
    "closure": lambda m: m.layer.register_forward_hook(lambda _, given, out: out * m.scale),
    "closure_over_a_tensor": lambda m: m.layer.register_forward_hook((lambda s: lambda _, i, out: out * s)(m.scale)),
    "method": lambda m: m.layer.register_forward_hook(m.scaled),
    "partial": lambda m: m.layer.register_forward_hook(functools.partial(scaled_by, m)),
    "object": lambda m: m.layer.register_forward_hook(Helper(m)),
    "default": lambda m: m.layer.register_forward_pre_hook(lambda _, given, s=m.scale: (given[0] * s,)),
    "keyword_default": lambda m: m.layer.register_forward_pre_hook(lambda _, given, *, s=m.scale: (given[0] * s,)),
    "wraps": lambda m: m.layer.register_forward_hook(wrapped(m)),
    "backward_hook": lambda m: m.layer.register_full_backward_hook(lambda _, grads, outs: (grads[0] * m.scale,)),
    "state_dict_hook": lambda m: m.layer.register_state_dict_post_hook(lambda module, *_: m.scale),
    "inner_layer": lambda m: m.layer[0].register_forward_hook(lambda _, given, out: out * m.scale),
    "patched_forward": lambda m: patched(m, lambda out: out * m.scale),
    "weak_reference": lambda m: vars(m.layer).update(parent=weakref.ref(m)),
    "function_in_a_list": lambda m: setattr(m, "functions", [lambda x: m.layer(x)]),
    "method_of_the_layer": lambda m: setattr(m, "encode", m.layer.forward),
    "object_in_a_dict": lambda m: setattr(m, "helpers", {"a": [Helper(m.layer)]}),
    "slot": lambda m: setattr(m, "helper", Slotted(m.layer[0].weight)),
    "key_of_a_dict": lambda m: setattr(m, "rates", {m.layer[0].weight: 0.1}),
    "hook_of_the_half": lambda m: m.head.register_forward_hook(lambda _, given, out: out + m.layer[0].bias.sum()),
}


@pytest.mark.parametrize("way", ACROSS)
def test_what_leads_across_the_cut_is_refused(way: str) -> None:
    """By the name of the place, whichever side it is on; the model itself isn't changed."""
    model = Model()
    ACROSS[way](model)
    before = model(X)
    with pytest.raises(SharedParameterError, match=r"(client half|body).*(move the cut|in the forward)"):
        splitfed.split(model, "layer")
    with pytest.raises(CutError):
        splitfed.check(model, "layer", X)
    assert torch.equal(model(X), before)


OUTSIDE: dict[str, Callable[[Model], Any]] = {
    "patched_forward": lambda m: patched(m, lambda out: out * 2),
    "hook": lambda m: m.layer.register_forward_hook((lambda own: lambda _, i, out: out + own.bias)(m.layer[0])),
    "hook_of_the_half": lambda m: m.head.register_forward_hook((lambda own: lambda _, i, out: own(out))(m.bottom)),
}


@pytest.mark.parametrize("way", OUTSIDE)
def test_a_function_that_holds_the_original_is_refused(way: str) -> None:
    """On its own side, too: a copy keeps the function, which goes on with the model that was given."""
    model = Model()
    OUTSIDE[way](model)
    with pytest.raises(UnsupportedError, match=r"of the model given to split\(\).*Use the module that a hook is given"):
        splitfed.split(model, "layer")


named: Any = None


def uses_a_name(module: Any, given: Any, output: Tensor) -> Tensor:
    """As a hook in a script or notebook does."""
    return output * named.scale


def calls_one_that_does(module: Any, given: Any, output: Tensor) -> Tensor:
    """Once removed, and within a function of its own."""
    return next(uses_a_name(module, given, out) for out in (output,))


class UsesAName(nn.Linear):
    """A layer of a script."""

    def forward(self, x: Tensor) -> Tensor:
        """Scales by a parameter of the model that is there by that name."""
        return super().forward(x) * named.scale


@pytest.mark.parametrize("way", ["hook", "hook_once_removed", "class"])
def test_global_names_are_looked_up(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that a function finds by a name of its file is as good as in its closure."""
    model = Model()
    if way == "class":
        model.layer.append(UsesAName(4, 4))
    else:
        model.layer.register_forward_hook(uses_a_name if way == "hook" else calls_one_that_does)
    splitfed.split(model, "layer")  # the name stands for something else
    monkeypatch.setitem(globals(), "named", model)
    with pytest.raises(SharedParameterError, match="by its 'named'"):
        splitfed.split(model, "layer")


HARMLESS: dict[str, Callable[[Model], Any]] = {
    "closure_over_a_list": lambda m: m.layer.register_forward_hook((lambda k: lambda *_: None if k else 1)([2])),
    "method_of_its_own": lambda m: vars(m.layer).update(
        forward=types.MethodType(lambda own, x: own[1](own[0](x)) * 2, m.layer)
    ),
    "own_modules_in_a_list": lambda m: setattr(m, "ends", [m.bottom, m.head, Helper(m.bottom)]),
    "optimizer": lambda m: setattr(m, "optimizer", torch.optim.SGD(m.parameters(), lr=0.1)),
    "spectral_norm": lambda m: nn.utils.spectral_norm(m.layer[0]),
    "parametrization": lambda m: nn.utils.parametrizations.weight_norm(m.layer[0]),
    "weak_reference_to_its_own": lambda m: vars(m.layer).update(first=weakref.ref(Model())),
    "function_of_the_module_that_it_is_given": lambda m: m.layer.register_forward_hook(
        lambda own, i, o: o + own[0].bias
    ),
}


@pytest.mark.parametrize("way", HARMLESS)
def test_what_stays_on_its_side_is_fine(way: str) -> None:
    """It was exact and is."""
    model = Model()
    HARMLESS[way](model)
    assert splitfed.check(model, "layer", X).ok


def test_a_walk_ends_and_names_the_first_place() -> None:
    """Containers may contain themselves, and one value may be reached by many ways."""
    model = Model()
    loop: list[Any] = [model.scale]
    loop.append(loop)
    model.loop, model.again = loop, {"a": loop, "b": model}
    model.data = [float(i) for i in range(1000)]
    found = {id(value): place for place, value in reached(model)}
    assert found[id(model.scale)] == "scale"
    assert found[id(model.layer[0].weight)] == "layer.0.weight"
    assert len(found) == len(list(model.parameters())) + len(list(model.modules()))
