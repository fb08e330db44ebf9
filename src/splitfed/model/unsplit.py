"""The unsplit model to compare with: identity functions where the cut would be, and the same seeds.

Split equals reference bit for bit, always. The reference equals the raw model wherever the body
draws no random numbers, no activation fans out across the cut, and no parameter is used several
times in a call of a body that is called several times: there, the cut decides the floating-point
order in which gradients are added up, and the reference adds them in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from splitfed.errors import UnsupportedError
from splitfed.model.boundary import alias, enter, leave, uncached
from splitfed.model.copying import deep_copy
from splitfed.model.cut import find_cuts
from splitfed.model.layers import Layer, Structures
from splitfed.model.rng import Seed, compute_lock, seeded
from splitfed.model.runs import call_layer
from splitfed.model.skeleton import unwrap
from splitfed.model.slices import Slice, run_as_one, run_parts
from splitfed.model.standin.modules import Likeness
from splitfed.model.trial import skeleton_of
from splitfed.protocol import pytree

Call = Callable[..., Any]


def reference(model: nn.Module, at: str | Sequence[str]) -> nn.Module:
    """A copy of `model` that computes, in one piece, exactly what its two halves would.

    Args:
        model: The model; it isn't changed.
        at: Where it would be cut, as for `split`.

    Returns:
        A module with the same keys whose outputs, gradients and buffers are those of the split
        model.

    Raises:
        UnknownCutError: as `split`.
    """
    whole = deep_copy(unwrap(model))
    for cut in find_cuts(whole, at):
        if cut.is_run:
            for layer in cut.layers:
                _replace_call(whole.get_submodule(layer.name), _call_of(layer))
            continue
        parts = [whole.get_submodule(name) for name in cut.parts]
        for part in parts:
            # One that stands in several positions, such as an activation, has been here before.
            if not hasattr(part, "_plain"):
                _replace_call(part, lambda part, *args, **kw: _run_parts([part], args, kw))
        if cut.positions:
            piece = Slice(cut.positions, tuple(parts), "")
            run_as_one(whole.get_submodule(cut.owner), piece, _run_slice)
    return whole


def _call_of(layer: Layer) -> Call:
    """What calling a layer of a run does."""

    def call(part: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return call_layer(_Member(layer, part), args, kwargs)

    return call


@dataclass(frozen=True, slots=True, eq=False)
class _Member:
    """A layer of a run, by itself."""

    layer: Layer
    module: nn.Module
    is_compiled: bool = False

    @property
    def structures(self) -> Structures:
        """What it is known to return."""
        # Past __setattr__, which may be the user's own.
        found: Structures = vars(self.module).setdefault("_structures", Structures())
        return found

    def settings(self) -> None:
        """Nothing travels, so nothing is told."""

    def trial(self) -> tuple[nn.Module, Call]:
        """A copy of its skeleton, and what calls that."""
        return skeleton_of(self.module), _original_call(self.module)

    def caller(self) -> None:
        """Nobody has to be asked."""

    def send(self, members: Sequence[_Member], args: Any, kwargs: Any, caller: Any) -> Any:
        """The answer to the calls of some layers."""
        return _run_parts([member.module for member in members], args, kwargs)


def _run_slice(piece: Slice, value: Any, training: bool) -> Any:
    return _run_parts(piece.members, (value,), {})


def _replace_call(module: nn.Module, call: Call) -> None:
    """Change what calling this one module does.

    By a class of its own, so that names, hooks and type checks stay.
    """
    kind = type(module)
    meta: Any = Likeness if type(kind) is type else type(kind)
    own = {"__call__": call, "_plain": kind, "_absent_class": kind}
    module.__class__ = meta(kind.__name__, (kind,), own)


def _original_call(part: nn.Module) -> Call:
    call: Call = part._plain.__call__  # type: ignore[operator]
    return call


def _run_parts(parts: Sequence[nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run the parts as a server does: copies in and out, generators seeded by the client's draw."""
    spec, tensors = pytree.flatten((args, kwargs))
    seed = Seed()
    args, kwargs = pytree.unflatten(spec, [enter(tensor) for tensor in tensors])
    devices = {t.device for t in tensors if t.device.type != "cpu"}
    # A call inside of a backward pass is a checkpoint's recompute: it never counts again.
    buffers = _buffers_of(parts) if torch._C._current_graph_task_id() != -1 else []
    with uncached(), compute_lock, seeded(seed.value, tuple(devices)) as draws, _aliased(parts):
        value = run_parts([partial(_original_call(part), part) for part in parts], args, kwargs)
    for owner, leaf, buffer in buffers:
        owner._buffers[leaf] = buffer
    if not draws.drew:
        seed.put_back()
    spec, tensors = pytree.flatten(value)
    return pytree.unflatten(spec, [leave(tensor) for tensor in tensors])


def _buffers_of(parts: Sequence[nn.Module]) -> list[tuple[nn.Module, str, Tensor]]:
    """Copies of the parts' buffers, and where they belong."""
    return [
        (owner, leaf, buffer.clone())
        for part in parts
        for owner in part.modules()
        for leaf, buffer in owner._buffers.items()
        if buffer is not None
    ]


@contextmanager
def _aliased(parts: Sequence[nn.Module]) -> Iterator[None]:
    """Give each parameter another name for the call, so that its gradients add up within it first.

    As across the cut. All under autocast is left alone, which caches casts of leaves only: there,
    the cast of a weight, made again in each call, groups them.
    """
    slots = _parameter_slots(parts)
    parameters = [slot[leaf] for slot, leaf in slots]
    versions = [parameter._version for parameter in parameters]
    autocast = any(torch.is_autocast_enabled(parameter.device.type) for parameter in parameters)
    try:
        if torch.is_grad_enabled() and not autocast:
            aliases = _aliases(parameters)
            for (slot, leaf), parameter in zip(slots, parameters, strict=True):
                slot[leaf] = aliases[id(parameter)]
        yield
        # An alias shares its parameter's memory and version counter.
        if versions != [parameter._version for parameter in parameters]:
            raise UnsupportedError(
                "the body changes its own parameters in forward: keep what it changes in buffers"
            )
    finally:
        for (slot, leaf), parameter in zip(slots, parameters, strict=True):
            slot[leaf] = parameter


def _aliases(parameters: Sequence[nn.Parameter]) -> dict[int, Tensor]:
    """By the id of each parameter, one alias: tied parameters stay tied."""
    found: dict[int, Tensor] = {}
    for parameter in parameters:
        if id(parameter) not in found:
            found[id(parameter)] = alias(parameter)
    return found


def _parameter_slots(parts: Sequence[nn.Module]) -> list[tuple[Any, Any]]:
    """Where the trainable parameters of the parts are, as (registry or list, name or place)."""
    slots: list[tuple[Any, Any]] = []
    for owner in (module for part in parts for module in part.modules()):
        # A recurrent layer computes with a list of its weights that it keeps besides.
        if isinstance(owner, nn.RNNBase):
            weights: Any = owner._flat_weights
            slots += [(weights, i) for i, weight in enumerate(weights) if weight.requires_grad]
            continue
        for leaf, parameter in owner._parameters.items():
            if parameter is not None and parameter.requires_grad:
                slots.append((owner._parameters, leaf))
    return slots
