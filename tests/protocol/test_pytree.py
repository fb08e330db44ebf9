"""Trees: whatever a body takes and returns comes back as it was, and nothing foreign becomes anything else."""

from __future__ import annotations

import collections
import json
import math
import sys
import types
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from splitfed.errors import ContainerError, FormatError, InputError
from splitfed.protocol import pytree
from splitfed.protocol.pytree import MAX_DEPTH, flatten, register_container, unflatten


class Pair(NamedTuple):
    """A named tuple that both sides know."""

    left: Any
    right: Any


def travel(tree: Any) -> Any:
    """What arrives: the spec goes through JSON."""
    spec, tensors = flatten(tree)
    return unflatten(json.loads(json.dumps(spec)), tensors)


def same(a: Any, b: Any) -> bool:
    """Equal in type and value all the way down; tensors by identity, NaN as itself, −0 apart from 0."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return a is b
    if isinstance(a, float):
        return repr(a) == repr(b)
    if isinstance(a, dict):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a.items(), b.items(), strict=True))
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


T = torch.arange(3.0)
plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
keys = (
    st.text(max_size=3) | st.integers() | st.booleans() | st.none() | st.floats(allow_nan=False, allow_infinity=False)
)
anything = st.recursive(
    plain | st.builds(lambda: torch.zeros(1)) | st.just(T),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(keys, inner, max_size=3)
        | st.dictionaries(keys, inner, max_size=3).map(collections.OrderedDict)
        | st.builds(Pair, inner, inner)
    ),
    max_leaves=12,
)


@given(anything)
def test_any_tree_comes_back_as_it_was(tree: Any) -> None:
    """Types, values, order of keys and the very tensors survive, through JSON."""
    assert same(travel(tree), tree)


@pytest.mark.parametrize(
    "tree",
    [
        {1: "int", "1": "str", None: "none", 1.5: "float"},
        {True: 1},
        [math.nan, math.inf, -math.inf, -0.0],
        (2**70, -1, "", "\0", "\ud800", "ä"),
        torch.Size([2, 3]),
        collections.Counter("aab"),
        {"b": 1, "a": 2},
        ((), [], {}),
    ],
    ids=["keys", "bool_key", "floats", "extremes", "size", "counter", "order", "empty"],
)
def test_plain_values_come_back_in_their_types(tree: Any) -> None:
    """An integer key stays one, NaN stays NaN, and a tuple is no list."""
    assert same(travel(tree), tree)


def test_a_tensor_that_occurs_twice_is_one() -> None:
    """By identity: attention takes another path if query and key are one object."""
    a, b = torch.ones(2), torch.ones(2)
    spec, tensors = flatten({"q": a, "k": [a, b]})
    assert list(map(id, tensors)) == [id(a), id(b)]
    found = unflatten(spec, [torch.zeros(1), torch.zeros(2)])
    assert found["q"] is found["k"][0]
    assert found["k"][1] is not found["q"]


def test_a_named_tuple_of_an_unknown_class_is_made_from_its_fields() -> None:
    """The other side may not have imported it: an equal-looking one is made, and nothing is imported."""
    spec, _ = flatten(Pair(1, 2))
    spec["n"][0] = "not.imported:Outer.Point"
    before = set(sys.modules)
    found = unflatten(spec, [])
    assert (type(found).__name__, found._fields, tuple(found)) == ("Point", ("left", "right"), (1, 2))
    assert set(sys.modules) == before


@pytest.mark.parametrize("path", ["builtins:tuple", "os:system", "collections:OrderedDict", "sys:modules"])
def test_a_named_tuple_never_names_anything_else(path: str) -> None:
    """A path to a class or function that isn't such a named tuple makes a plain one of the given fields."""
    found = unflatten({"n": [path, ["left", "right"], [1, 2]]}, [])
    assert (type(found).__bases__, tuple(found)) == ((tuple,), (1, 2))


class Box:
    """A container that must be registered."""

    def __init__(self, content: Any) -> None:
        self.content = content


class BiggerBox(Box):
    """A subclass of a registered one."""


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """`Box`, registered for one test."""
    monkeypatch.setattr(pytree, "_containers", {})
    register_container(Box, lambda box: [box.content], lambda tree: Box(*tree))


@pytest.mark.usefixtures("registered")
def test_a_registered_container_crosses() -> None:
    """With tensors and other containers in it."""
    found = travel({"box": Box(Box((T, 1)))})["box"]
    assert type(found) is Box
    assert same(found.content.content, (T, 1))


@pytest.mark.usefixtures("registered")
def test_registration_is_of_exactly_one_class() -> None:
    """A subclass may hold more, so it isn't taken for its parent."""
    with pytest.raises(ContainerError, match=r"BiggerBox.*register_container"):
        flatten(BiggerBox(1))


def test_a_container_that_this_process_doesnt_know_is_refused() -> None:
    """The other side had registered it: the message names it."""
    with pytest.raises(ContainerError, match=r"'a:B' isn't registered.*register_container"):
        unflatten({"c": ["a:B", None]}, [])


@pytest.fixture
def transformers(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A module that looks like transformers', with a ModelOutput and a Cache."""
    module = types.ModuleType("transformers.made_up")
    output = type("ModelOutput", (collections.OrderedDict,), {"__module__": module.__name__})
    cache = type("Cache", (), {"__module__": module.__name__})
    module.__dict__.update(
        Output=type("Output", (output,), {"__module__": module.__name__}),
        DynamicCache=type("DynamicCache", (cache,), {"__module__": module.__name__}),
    )
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def test_a_model_output_crosses_as_its_class(transformers: types.ModuleType) -> None:
    """Its class is used if this process has imported it; otherwise the message says to."""
    tree = transformers.Output(last_hidden_state=T, hidden_states=(T, None))
    assert same(travel(tree), tree)
    spec, tensors = flatten(tree)
    del sys.modules[transformers.__name__]
    with pytest.raises(ContainerError, match=r"Output.*import its module"):
        unflatten(spec, tensors)


def test_a_model_output_is_the_only_class_that_a_spec_may_call() -> None:
    """Any other class by that way is refused, imported or not."""
    with pytest.raises(ContainerError, match="isn't an imported transformers ModelOutput"):
        unflatten({"h": ["subprocess:Popen", [["args", "true"]]]}, [])


def test_a_cache_is_refused_with_the_way_out(transformers: types.ModuleType) -> None:
    """It holds state that no file could follow."""
    with pytest.raises(ContainerError, match=r"\['past'\].*DynamicCache.*use_cache=False"):
        flatten({"past": transformers.DynamicCache()})


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ([1, {"x": object()}], r"\[1\]\['x'\] is builtins.object"),
        (Pair(1, 1j), r"\['right'\] is builtins.complex"),
        ({"x": {(1, 2): 3}}, r"a key of the dict at \['x'\] is tuple"),
        ({math.nan: 1}, "a key of the dict at the top is float"),
        ([b"bytes"], r"\[0\] is builtins.bytes"),
    ],
    ids=["object", "complex", "tuple_key", "nan_key", "bytes"],
)
def test_what_cant_cross_is_refused_by_its_place(tree: Any, said: str) -> None:
    """The message says where the value is and what it is."""
    with pytest.raises(ContainerError, match=said) as caught:
        flatten(tree)
    assert isinstance(caught.value, TypeError)


def nested(depth: int, inner: Any, wrap: Any) -> Any:
    """`inner`, wrapped so many times."""
    for _ in range(depth):
        inner = wrap(inner)
    return inner


def test_depth_has_a_limit_on_both_sides() -> None:
    """What may leave arrives, one more is refused, and a bomb of any depth is a FormatError."""
    deepest = nested(MAX_DEPTH, T, lambda inner: [inner])
    assert same(travel(deepest), deepest)
    with pytest.raises(ContainerError, match="more than 64 deep"):
        flatten([deepest])


@pytest.mark.parametrize("depth", [MAX_DEPTH + 2, 300, 600, 5000])
def test_a_depth_bomb_is_refused(depth: int) -> None:
    """Without running out of stack, not even for the message."""
    with pytest.raises(FormatError):
        unflatten(nested(depth, None, lambda inner: {"l": [inner]}), [])


MALFORMED = """
[1] ; {} ; {"l": [], "u": []} ; {"x": 1} ; {"t": 1} ; {"t": -1} ; {"t": "0"} ; {"f": "one"} ; {"f": null} ; {"l": null}
{"d": [[1]]} ; {"d": [[{"l": []}, 1]]} ; {"z": ["a"]} ; {"c": []} ; {"c": [[], 1]} ; {"n": ["a:B", ["x"]]}
{"n": ["a:B", ["x", "y"], [1]]} ; {"n": ["a:B", ["x=print(1)"], [1]]} ; {"n": ["a:B", ["class"], [1]]}
{"n": ["a:B(1)", ["x"], [1]]} ; {"n": [5, ["x"], [1]]} ; {"h": [5, []]}
"""
SPECS = [*map(json.loads, MALFORMED.strip().replace("\n", " ; ").split(" ; ")), {"f": 10**400}]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: str(spec)[:20])
def test_a_malformed_spec_is_refused(spec: Any) -> None:
    """Never with an error of Python's own, and never as something else."""
    with pytest.raises((FormatError, ContainerError)):
        unflatten(spec, [T])


def test_a_foreign_named_tuple_is_made_once() -> None:
    """Its class has the names and the fields that the spec gives, and costs once however often it occurs."""
    spec = {"l": [{"n": ["elsewhere:Point", ["x", "y"], [1, 2]]}, {"n": ["elsewhere:Point", ["x", "y"], [3, 4]]}]}
    first, second = unflatten(spec, [])
    assert (first.x, second.y) == (1, 4)
    assert type(first) is type(second)
    assert type(first).__name__ == "Point"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((5, list, list), r"takes a class and two functions.*got \(5"),
        ((Exception, None, Exception), "two functions"),
        ((dict, list, dict), "dict can't be registered: it crosses the cut as it is"),
        ((torch.nn.Parameter, list, list), "Parameter can't be registered"),
    ],
)
def test_what_cannot_be_registered_is_told(given: Any, message: str) -> None:
    """A registration that would fail later, or change nothing, is refused at once."""
    with pytest.raises(InputError, match=message):
        register_container(*given)


def test_caches_of_transformers_cannot_be_registered() -> None:
    """The body would write to its own, and the half's next token would be another one."""
    cache_utils = pytest.importorskip("transformers.cache_utils")

    class Own(cache_utils.DynamicCache):  # type: ignore[misc,name-defined]
        """A user's."""

    names = ("Cache", "DynamicCache", "StaticCache", "EncoderDecoderCache", "DynamicLayer")
    for cls in (Own, *(getattr(cache_utils, name) for name in names if hasattr(cache_utils, name))):
        with pytest.raises(ContainerError, match=r"transformers cache.*Pass use_cache=False"):
            register_container(cls, list, cls)
