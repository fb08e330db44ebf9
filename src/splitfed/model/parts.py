"""A run of layers, run: by a server, by the reference, and by an owner that has no examples."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from splitfed.errors import FormatError, InputError, UnsupportedError
from splitfed.model.arguments import check_unchanged, may_change
from splitfed.model.layers import Kept, LayerCall, Output
from splitfed.protocol import pytree


def run_layers(
    parts: Sequence[Callable[..., Any]], calls: Sequence[Any], kept: Sequence[Any]
) -> Any:
    """Run layers one after another, each on its own arguments.

    Args:
        parts: The layers.
        calls: A `LayerCall` for each.
        kept: Which outputs are wanted besides the last layer's.

    Raises:
        InputError: the calls of the run don't fit its parts.
        FormatError: their specs are malformed.
        UnsupportedError: a layer returned something else than the client had taken for granted.
        ContainerError: a layer changed a container among its arguments.
    """
    if len(calls) != len(parts) or not all(isinstance(call, LayerCall) for call in calls):
        raise InputError(f"a run of {len(parts)} layers got {len(calls)} calls: expected one each")
    returned: list[list[Tensor]] = []
    outputs: Any = None
    for number, (part, call) in enumerate(zip(parts, calls, strict=True)):
        leaves = [_found(leaf, returned) for leaf in call.leaves]
        spec = _parsed(call.spec)
        args, kwargs = pytree.unflatten(spec, leaves)
        outputs = part(*args, **kwargs)
        if may_change(args, kwargs):
            check_unchanged(spec, leaves, (args, kwargs), outputs)
        kind, tensors = pytree.flatten(outputs)
        if call.returns is not None and _parsed(call.returns) != json.loads(json.dumps(kind)):
            raise UnsupportedError(
                f"layer {number} of the run returned {json.dumps(kind):.200}, and run without "
                f"values it had returned {call.returns:.200}: what it returns depends on values. "
                "Cut such layers one by one, by a list of cuts"
            )
        returned.append(tensors)
    if kept:
        return Kept(outputs, [_found(place, returned) for place in kept])
    return outputs


def _found(leaf: Any, returned: Sequence[Sequence[Tensor]]) -> Tensor:
    """A leaf of a call's arguments: itself, or the output that it stands for."""
    if isinstance(leaf, Tensor):
        return leaf
    call, index = leaf if isinstance(leaf, Output) else (None, None)
    if type(call) is not int or type(index) is not int or not 0 <= call < len(returned):
        raise FormatError(f"a run of layers takes a tensor from {leaf!r:.80}, which isn't one")
    if not 0 <= index < len(returned[call]):
        raise FormatError(f"layer {call} returned {len(returned[call])} tensors, got {index}")
    return returned[call][index]


def _parsed(text: Any) -> Any:
    """A spec out of JSON, which is foreign."""
    try:
        return json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise FormatError(f"the spec of a layer's arguments is malformed: {error}") from error
