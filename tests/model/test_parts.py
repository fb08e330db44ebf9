"""Calls of a run, as a server finds them in a request: run in order, and refused if they don't fit."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from splitfed.errors import ContainerError, FormatError, InputError, UnsupportedError
from splitfed.model.layers import Kept, LayerCall, Output
from splitfed.model.slices import run_parts
from splitfed.protocol import pytree

X = torch.arange(3.0)
TENSOR = json.dumps({"t": 0})


def call(*args: Any, returns: str | None = TENSOR, **kwargs: Any) -> LayerCall:
    """A call with these arguments, of which an `Output` is given as it is."""
    places = [arg for arg in args if isinstance(arg, Output)]
    shells = [torch.empty(0) if isinstance(arg, Output) else arg for arg in args]
    spec, leaves = pytree.flatten((tuple(shells), kwargs))
    waiting = iter(places)
    mixed = [next(waiting) if leaf.numel() == 0 else leaf for leaf in leaves]
    return LayerCall(json.dumps(spec), mixed, returns)


def add(a: Tensor, b: Tensor | float = 1.0) -> Tensor:
    """A layer."""
    return a + b


def crossed(calls: Any, kwargs: Any) -> Any:
    """The arguments as they come out of a request."""
    spec, tensors = pytree.flatten((calls, kwargs))
    return pytree.unflatten(json.loads(json.dumps(spec)), tensors)


def test_each_layer_gets_what_the_one_before_returned() -> None:
    """In the place where its promise stood; other outputs come along if they are kept."""
    calls = (call(X), call(Output(0, 0), b=2.0), call(Output(1, 0), X, returns=None))
    args, kwargs = crossed(calls, {})
    assert torch.equal(run_parts([add, add, add], args, kwargs), X + 1 + 2 + X)
    args, kwargs = crossed(calls, {"kept": [Output(0, 0)]})
    found = run_parts([add, add, add], args, kwargs)
    assert isinstance(found, Kept)
    assert torch.equal(found.kept[0], X + 1)


def test_parts_of_a_slice_take_what_the_one_before_returned() -> None:
    """Without calls of their own."""
    assert torch.equal(run_parts([add, add], (X,), {"b": 2.0}), X + 2 + 1)


@pytest.mark.parametrize(
    ("calls", "error", "said"),
    [
        ([call(X)], InputError, "a run of 2 layers got 1 calls"),
        ([call(X), X], InputError, "a run of 2 layers got 2 calls"),
        ([call(X), call(Output(1, 0))], FormatError, "takes a tensor from"),
        ([call(X), call(Output(-1, 0))], FormatError, "takes a tensor from"),
        ([call(X), call(Output(True, 0))], FormatError, "takes a tensor from"),
        ([call(X), call(Output(0, 1))], FormatError, "layer 0 returned 1 tensors"),
        ([call(X), LayerCall("[" * 100_000, [X], None)], FormatError, "malformed"),
        ([call(X), LayerCall("{}", [X], None)], FormatError, "malformed"),
        ([call(X), LayerCall(3, [X], None)], FormatError, "malformed"),  # type: ignore[arg-type]
        ([call(X), LayerCall(call(X).spec, [], None)], FormatError, "names tensor 0 of 0"),
        ([call(X, returns=json.dumps({"u": [{"t": 0}]})), call(X)], UnsupportedError, "what it returns depends on"),
    ],
)
def test_calls_that_dont_fit_are_refused(calls: Any, error: type[Exception], said: str) -> None:
    """A request is foreign."""
    with pytest.raises(error, match=said):
        run_parts([add, add], tuple(calls), {})


def test_a_layer_that_changes_a_container_is_refused() -> None:
    """Nobody would see it, as for any part."""

    def append(values: list[Tensor]) -> Tensor:
        values.append(X)
        return X

    with pytest.raises(ContainerError, match="changes the list"):
        run_parts([append], (call([X], returns=None),), {})
