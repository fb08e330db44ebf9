"""Copies of modules: what `copy.deepcopy` would give, sooner."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from cases import Case, parameters
from torch import Tensor, nn
from torch.nn.utils import prune

import splitfed
from splitfed.errors import UnsupportedError
from splitfed.model.copying import deep_copy


def described(value: Any, seen: dict[int, int]) -> Any:
    """A value as plain data, with a number for each object that it holds, so that sharing shows."""
    if isinstance(value, type | str | int | float | bool | None):
        return value
    if id(value) in seen:
        return ("again", seen[id(value)])
    seen[id(value)] = len(seen)
    if isinstance(value, Tensor):
        return (type(value), value.shape, value.dtype, value.requires_grad, value.tolist())
    if isinstance(value, dict):
        return (type(value), [(key, described(held, seen)) for key, held in value.items()])
    if isinstance(value, list | tuple | set):
        return (type(value), [described(held, seen) for held in value])
    if isinstance(value, nn.Module):
        return (type(value), described(value.__dict__, seen))
    return type(value)


@pytest.mark.parametrize("case", parameters())
def test_a_copy_is_what_deepcopy_makes(case: Case) -> None:
    """Attribute by attribute, in the same order, with the same objects shared; of models of many kinds."""
    model = case.model()
    assert described(deep_copy(model), {}) == described(copy.deepcopy(model), {})


class Knotted(nn.Module):
    """Refers to its children and to itself by plain attributes, ties a weight, and shares one empty table."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = [nn.Linear(2, 2), nn.Linear(2, 2)]
        self.first, self.second = self.layers
        self.second.weight = self.first.weight
        self.table = self.same_table = {}
        self.register_module("absent", None)
        self.register_buffer("nothing", None)
        self.__dict__["itself"] = self


def test_what_is_shared_stays_shared_and_nothing_is_shared_with_the_original() -> None:
    """Lists of layers, ties and references back lead into the copy."""
    model = Knotted()
    model.register_forward_hook(lambda *_: None)
    twin: Any = deep_copy(model)
    assert twin.layers[0] is twin.first is not model.first
    assert twin.second.weight is twin.first.weight is not model.first.weight
    assert twin.table is twin.same_table is not model.table
    assert twin.itself is twin
    assert twin.absent is None
    assert twin.nothing is None
    twin.first.register_forward_hook(lambda *_: None)
    assert (len(model.first._forward_hooks), len(model._forward_hooks), len(twin._forward_hooks)) == (0, 1, 1)


def test_what_the_memo_holds_takes_the_place_of_the_original() -> None:
    """A parameter, or a whole submodule."""
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    other, relu = nn.Parameter(torch.zeros(2, 2)), nn.Tanh()
    twin: Any = deep_copy(model, {id(model[0].weight): other, id(model[1]): relu})
    assert twin[0].weight is other
    assert twin[1] is relu


def test_a_module_that_says_how_it_is_copied_is_asked() -> None:
    """As it would be by copy.deepcopy, wherever it stands."""

    class Own(nn.Module):
        def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
            return nn.Identity()

    class Stateful(nn.Module):
        def __setstate__(self, state: dict[str, Any]) -> None:
            super().__setstate__(state | {"restored": True})

    twin: Any = deep_copy(nn.Sequential(Own(), Stateful()))
    assert type(twin[0]) is nn.Identity
    assert twin[1].restored


def test_what_cant_be_copied_is_said_to_the_user() -> None:
    """With the class and the cause, and what to do."""
    model = nn.Linear(1, 1)
    model.lock = __import__("threading").Lock()
    with pytest.raises(UnsupportedError, match=r"Linear can't be copied .*lock.*keep what can't be deep-copied out"):
        deep_copy(model)


class Attention(nn.Module):
    """Keeps its last map, as many do for plots."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Weighs its input."""
        self.map = self.layer(x).softmax(1)
        self.maps = {"last": [self.map]}
        return x * self.map


def keep_output(module: Any, given: Any, output: Tensor) -> None:
    """A hook that keeps what a layer gives."""
    module.output = output


def set_output(module: Any, given: Any, output: Tensor) -> None:
    """The same by a name that is a string."""
    setattr(module, "kept" if output.dim() else "none", output)


def hooked(hook: Any) -> nn.Module:
    """A layer with it."""
    layer = nn.Linear(2, 2)
    layer.register_forward_hook(hook)
    return layer


def pruned() -> nn.Module:
    """A layer with half of its weights."""
    layer = nn.Linear(2, 2)
    prune.l1_unstructured(layer, "weight", 0.5)
    return layer


REMADE = {
    "weight_norm": lambda: nn.utils.weight_norm(nn.Linear(2, 2)),
    "spectral_norm": lambda: nn.utils.spectral_norm(nn.Linear(2, 2)),
    "pruning": pruned,
    "cached_map": Attention,
    "hook": lambda: hooked(keep_output),
    "hook_by_name": lambda: hooked(set_output),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("used", [False, True], ids=["new", "used"])
@pytest.mark.parametrize("at", ["0", "1", "2"])
@pytest.mark.parametrize("kind", REMADE)
def test_what_a_forward_makes_anew_doesnt_stand_in_the_way(kind: str, at: str, used: bool) -> None:
    """The tensor has a graph, which no copy has: the model splits on either side, and check() is ok."""
    model, x = nn.Sequential(nn.Linear(2, 2), REMADE[kind](), nn.Linear(2, 2)), torch.ones(3, 2)
    if used:
        model(x)
    assert splitfed.check(model, at, x).ok
    twin = deep_copy(model)
    assert torch.equal(twin.eval()(x), model.eval()(x))


@pytest.mark.parametrize("name", ["lock", "made_once"])
def test_the_attribute_that_cant_be_copied_is_named(name: str) -> None:
    """With its submodule, wherever it is: what nobody makes anew would be trained once and then be stale."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)))
    held: Any = model[1][0].weight * 2 if name == "made_once" else __import__("threading").Lock()
    setattr(model[1][0], name, held)
    said = rf"Sequential can't be copied for the attribute '{name}' of '1\.0' .*out of the module"
    for at in ("0", "1"):
        with pytest.raises(UnsupportedError, match=said):
            splitfed.split(model, at)


def test_a_compiled_call_isnt_shared_with_the_original() -> None:
    """`module.compile()` makes a function that runs the original: torch's own copies have none, nor have ours."""
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].compile(backend="eager")
    twin: Any = deep_copy(model)
    assert "_compiled_call_impl" not in vars(twin[0])
    assert "_compiled_call_impl" in vars(model[0])


@pytest.mark.parametrize("kind", ["register_hook", "register_post_accumulate_grad_hook"])
def test_a_parameters_own_hook_isnt_lost_without_a_word(kind: str) -> None:
    """A mask on a gradient would be gone from both halves: `split` says where to put it."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    hook = getattr(model[1].weight, kind)(lambda *_: None)
    with pytest.raises(UnsupportedError, match=r"'1.weight' has a hook of its own.*the client half"):
        splitfed.split(model, "1")
    hook.remove()
    splitfed.split(model, "1")
