"""A stand-in for a module that was cut out: its class, its names, its copies, and what it refuses."""

from __future__ import annotations

import copy
import inspect
import io
from abc import ABC, ABCMeta, abstractmethod
from collections import OrderedDict
from typing import Any, ClassVar, Generic, TypeVar

import pytest
import torch
from bodies import Calls, sandwich
from torch import Tensor, nn

import splitfed
from splitfed.errors import AbsentError, CutError
from splitfed.model.cutpoint import CutPoint
from splitfed.model.standin.modules import AbsentModule

T = TypeVar("T")


class Registry(type):
    """A metaclass that enters each class in a list."""

    names: ClassVar[list[str]] = []

    def __init__(cls, name: str, bases: Any, namespace: Any) -> None:
        super().__init__(name, bases, namespace)
        Registry.names.append(name)


class Registered(nn.Linear, metaclass=Registry):
    """In the list."""


class Counted(nn.Linear):
    """Enters its subclasses in a list, which must name a number."""

    numbers: ClassVar[list[int]] = []

    def __init_subclass__(cls, number: int, **settings: Any) -> None:
        Counted.numbers.append(number)


class Abstract(nn.Linear, ABC):
    """Has a method that a subclass must have."""

    @abstractmethod
    def name(self) -> str:
        """What it is called."""


class Concrete(Abstract):
    """Has it."""

    def name(self) -> str:
        """What it is called."""
        return f"concrete {self.in_features}"


class Typed(nn.Linear, Generic[T]):
    """Generic."""


class Called(nn.Linear):
    """Does something of its own when called, which is for the server."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse."""
        raise RuntimeError("called at the client")


class Rich(nn.Module):
    """A part with attributes that a stand-in might have of its own, properties and methods."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.name, self.origin, self.points, self.part = "rich", (0, 0), 7, "body"
        self.beta = 1.0
        self._active = "a"

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.linear.weight.device

    @property
    def temperature(self) -> float:
        """By way of a setter."""
        return self.beta

    @temperature.setter
    def temperature(self, value: float) -> None:
        self.beta = 2 * value

    @property
    def norm(self) -> Tensor:
        """Needs values."""
        return self.linear.weight.norm()

    def _call(self) -> str:
        return "its own"

    def activate(self, name: str) -> None:
        """Set a private attribute, as adapters do."""
        self._active = name

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        """`(N, 8)` -> `(N, 8)`."""
        return self.linear(x) * self.beta * scale


def point_of(part: nn.Module) -> Any:
    """The cut point in place of a part."""
    return splitfed.split(sandwich(part), "body")[0].body


@pytest.mark.parametrize("make", [Registered, Concrete, Typed, Called, nn.Linear], ids=lambda cls: cls.__name__)
def test_it_is_of_the_class_of_its_part(make: Any) -> None:
    """`isinstance`, `__class__` and `==` of types; its own class is ours."""
    for module in (point_of(make(8, 8)), point_of(nn.Sequential(make(8, 8), nn.ReLU()))[0]):
        assert isinstance(module, make)
        assert isinstance(module, nn.Linear)
        assert isinstance(module, AbsentModule)
        assert module.__class__ is make
        assert type(module) is not make
        assert (type(module).__name__, type(module).__module__) == (make.__name__, make.__module__)
    plain = point_of(nn.Linear(8, 8))
    assert type(plain) == nn.Linear  # noqa: E721 -- as code that compares so
    assert type(plain) in {nn.Linear, nn.Conv2d}
    assert {nn.Linear: "linear"}[type(plain)] == "linear"
    assert type(plain) != nn.Conv2d  # noqa: E721
    assert isinstance(plain, CutPoint)


def test_no_list_of_classes_gets_it() -> None:
    """Neither a metaclass nor `__init_subclass__` is run, which might refuse or replace."""
    before = list(Registry.names), list(Counted.numbers)
    assert isinstance(point_of(Registered(8, 8)), Registered)
    assert isinstance(point_of(Counted(8, 8)), Counted)
    assert (Registry.names, Counted.numbers) == before
    assert type(type(point_of(Concrete(8, 8)))) is ABCMeta


def test_names_of_our_own_are_in_nobodys_way() -> None:
    """What the part calls so is the part's."""
    point = point_of(Rich())
    assert (point.name, point.origin, point.points, point.part) == ("rich", (0, 0), 7, "body")
    assert point._call() == "its own"
    ours = {name for name in vars(CutPoint) | vars(AbsentModule) if not hasattr(nn.Module, name)}
    assert ours == {"__deepcopy__", "__prepare_scriptable__"}


def test_properties_and_methods_run_on_it() -> None:
    """What they set is set here, what needs values raises under the tensor's name."""
    point = point_of(Rich())
    assert point.device == torch.device("cpu")
    point.temperature = 3.0
    assert (point.beta, point.temperature) == (6.0, 6.0)
    point.activate("b")
    assert point._active == "b"
    assert point.norm.shape == ()
    with pytest.raises(AbsentError, match=r"'norm.__float__'"):
        float(point.norm)
    assert point_of(Concrete(8, 8)).name() == "concrete 8"


def test_a_property_that_computes_a_tensor_has_its_shape() -> None:
    """As a parametrized weight; its values are absent like all."""
    point = point_of(nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)))
    assert (point.weight.shape, point.weight.dtype) == ((8, 8), torch.float32)
    with pytest.raises(AbsentError, match=r"'weight.sum'"):
        point.weight.sum()


def test_its_forward_has_the_parts_signature() -> None:
    """Containers look there for what they may pass."""
    assert list(inspect.signature(point_of(Rich()).forward).parameters) == ["x", "scale"]


def test_containers_are_walked_through() -> None:
    """Length, iteration, indices and slices; what comes out of a slice is absent, too."""
    parts = [nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)]
    table = nn.ModuleDict({"a": nn.Linear(2, 2)})
    half: Any = splitfed.split(sandwich(Calls(lambda m, x: x, seq=nn.Sequential(*parts), table=table)), "body")[0]
    seq = half.body.seq
    assert (len(seq), seq[-1].out_features, [type(module).__name__ for module in seq]) == (
        3,
        8,
        ["Linear", "ReLU", "Linear"],
    )
    assert isinstance(seq[:2], nn.Sequential)
    assert [name for name, _ in seq[1:].named_parameters()] == ["2.weight", "2.bias"]
    assert list(half.body.table) == ["a"]
    assert "a" in half.body.table
    assert [name for name, _ in half.body.named_children()] == ["seq", "table"]
    for call in (lambda: seq[0](torch.ones(1, 8)), lambda: seq[:2](torch.ones(1, 8)), lambda: seq[0].forward(1)):
        with pytest.raises(AbsentError, match="of the part that was cut out"):
            call()


def test_all_modules_have_their_names_and_the_halfs_tensors_stay_its_own() -> None:
    """A loop over the half sees what the unsplit model has; by parameters it sees its own."""
    net = sandwich(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)))
    half, body = splitfed.split(net, "body")
    assert [name for name, _ in half.named_modules()] == [name for name, _ in net.named_modules()]
    own = [name for name, _ in net.named_parameters() if not name.startswith("body")]
    assert [name for name, _ in half.named_parameters()] == list(half.state_dict()) == own
    assert half.state_dict()._metadata.keys() == {"", "bottom", "body", "head"}
    part: Any = half.body
    assert [name for name, _ in part.named_parameters()] == [name for name, _ in body.named_parameters()]
    assert [name for name, _ in part.named_buffers("b")] == [f"b.{name}" for name, _ in body.named_buffers()]
    assert sum(p.numel() for p in part.parameters()) == sum(p.numel() for p in body.parameters())
    assert part.get_parameter("0.weight") is part[0].weight
    assert part.get_buffer("1.running_mean") is part[1].running_mean
    with pytest.raises(AttributeError, match="has no attribute"):
        part.get_parameter("0.nothing")


def test_loops_of_tools_over_all_modules_find_the_halfs_parameters() -> None:
    """Groups of weight decay, and what DDP and Opacus collect, are those of `half.parameters()`."""
    half: Any = splitfed.split(sandwich(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))), "body")[0]
    own = dict(half.named_parameters())
    direct = {
        f"{m}.{p}": value for m, module in half.named_modules() for p, value in module.named_parameters(recurse=False)
    }
    assert direct == own
    recursive = {f"{m}.{p}".lstrip(".") for m, module in half.named_modules() for p, _ in module.named_parameters()}
    assert recursive == own.keys()
    assert [buffer for module in half.modules() for buffer in module.buffers()] == []
    modules = [module for module in half.modules() if isinstance(module, AbsentModule)]
    assert len([p for module in modules for p in module.parameters(recurse=False)]) == 4


@pytest.mark.parametrize(
    ("ask", "said"),
    [
        (lambda m: m.state_dict(), r"state_dict\(\) of the part.*load_weights"),
        (lambda m: m[0].state_dict(), r"state_dict\(\) of '0'"),
        (lambda m: m.load_state_dict({}), "before split"),
        (lambda m: m.requires_grad_(False), "requires_grad of '0.weight'"),
        (lambda m: m.add_module("x", nn.ReLU()), "sets 'x'.*a ReLU"),
        (lambda m: m.append(nn.ReLU()), "sets '2'"),
        (lambda m: m.__setitem__(0, nn.ReLU()), "sets '0'"),
        (lambda m: m.__delitem__(0), "deletes '0'"),
        (lambda m: m[0].register_parameter("x", None), "sets '0.x'"),
        (lambda m: m[0].register_buffer("x", torch.ones(1)), "sets '0.x'.*Tensor"),
        (lambda m: setattr(m[0], "weight", nn.Parameter(torch.ones(8, 8))), "sets '0.weight'.*Parameter"),
        (lambda m: setattr(m[0], "forward", lambda x: x), "sets '0.forward'.*function"),
        (lambda m: setattr(m[0], "in_features", torch.tensor(3)), "sets '0.in_features'.*Tensor"),
        (lambda m: m[0].register_forward_hook(print), "hook on '0'"),
        (lambda m: m[0].register_forward_pre_hook(print), "hook on '0'"),
        (lambda m: m[0].register_full_backward_hook(print), "hook on '0'"),
        (lambda m: m[0].register_full_backward_pre_hook(print), "hook on '0'"),
        (lambda m: m[0].register_backward_hook(print), "hook on '0'"),
    ],
)
def test_what_cant_travel_is_refused_where_it_is_asked_for(ask: Any, said: str) -> None:
    """Under its name, with what to do instead."""
    with pytest.raises(AbsentError, match=said):
        ask(point_of(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))))


def test_what_changes_nothing_is_no_error() -> None:
    """Gradients that nobody keeps, flags that are so already, a tool's marks, saving memory."""
    half, _ = splitfed.split(sandwich(nn.Sequential(nn.Linear(8, 8))), "body")
    part: Any = half.body
    part.zero_grad()
    assert part.requires_grad_() is part
    part[0].in_features = 8
    part[0].weight = part[0].weight
    part[0]._mark = print
    part[0].my_note = "a note that no code reads"
    part[0].gradient_checkpointing = True
    assert (part[0]._mark, part[0].my_note) == (print, "a note that no code reads")
    del part[0].my_note
    assert vars(part)["_absent_hole"].mirror.settings(True) == {}
    assert half.load_state_dict(half.state_dict()).missing_keys == []


def test_hooks_and_a_forward_around_the_call_of_the_part_itself() -> None:
    """The cut point is called at the client, so they work."""
    part = point_of(Rich())
    handle = part.register_forward_hook(lambda *_: None)
    handle.remove()
    before = part.forward
    part.forward = lambda *args: before(*args)
    with pytest.raises(splitfed.NotConnectedError):
        part(torch.ones(1, 8))


def test_copies_and_pickles() -> None:
    """Each has stand-ins of its own, with what was set; where it came from is shared."""
    layers = OrderedDict(drop=nn.Dropout(0.5), lin=nn.Linear(8, 8))
    half, _ = splitfed.split(sandwich(nn.Sequential(layers)), "body")
    part: Any = half.body
    part.drop.p = 0.1
    part.lin.eval()
    file = io.BytesIO()
    half.run = None
    torch.save(half, file)
    file.seek(0)
    for twin in (copy.deepcopy(half).body, torch.load(file, weights_only=False).body, copy.deepcopy(part)):
        settings = vars(twin)["_absent_hole"].mirror.settings(True)
        assert settings == {"drop.p": 0.1, "lin.training": False}
        assert isinstance(twin, nn.Sequential)
        twin.drop.p = 0.9
        assert vars(twin)["_absent_hole"].mirror.settings(True)["drop.p"] == 0.9
        assert (twin[1].weight.shape, part.drop.p, twin[0] is part[0]) == ((8, 8), 0.1, False)
    assert vars(copy.deepcopy(part))["_absent_hole"].origin is vars(part)["_absent_hole"].origin


def test_no_cut_within_what_is_cut_out() -> None:
    """There is nothing to take out; a second cut elsewhere is well."""
    half, _ = splitfed.split(sandwich(nn.Sequential(nn.Linear(8, 8))), "body")
    with pytest.raises(CutError, match=r"'body.0' is within a part that was cut out already"):
        splitfed.split(half, "body.0")
    assert isinstance(splitfed.split(half, "head")[0].head, CutPoint)


def test_the_whole_model_cut_out_leaves_a_half_without_anything() -> None:
    """The cut point is the half then: asked for what it trains, it has nothing."""
    half, _ = splitfed.split(nn.Sequential(nn.Linear(2, 2)), "")
    assert (list(half.parameters()), half.state_dict()) == ([], {})
    assert half.requires_grad_(False) is half
    assert len(list(half[0].parameters())) == 2
