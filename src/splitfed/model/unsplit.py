"""The unsplit model to compare with: identity functions where the cut would be, and the same seeds.

Split equals reference bit for bit, always. The reference equals the raw model wherever the body draws no random
numbers, no activation fans out across the cut, and no parameter is used several times in a call of a body that is
called several
times: there, floating-point addition is grouped by the cut, and the reference is grouped the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from splitfed.errors import UnsupportedError
from splitfed.model.boundary import alias, enter, leave, uncached
from splitfed.model.copying import deep_copy
from splitfed.model.cut import find_cuts
from splitfed.model.rng import Seed, compute_lock, seeded
from splitfed.model.skeleton import unwrap
from splitfed.protocol import pytree

Call = Callable[..., Any]


def reference(model: nn.Module, at: str | Sequence[str]) -> nn.Module:
    """A copy of `model` that computes, in one piece, exactly what its two halves would.

    Args:
        model: The model; it isn't changed.
        at: Where it would be cut, as for `split`.

    Returns:
        A module with the same keys whose outputs, gradients and buffers are those of the split model.

    Raises:
        UnknownCutError: as `split`.
    """
    whole = deep_copy(unwrap(model))
    for cut in find_cuts(whole, at):
        first, *rest = (whole.get_submodule(name) for name in cut.parts)
        first.__dict__["_rest"] = rest  # no submodules of it, but copied with it
        _wrap(first, lambda part, *args, **kwargs: _across([part, *part._rest], args, kwargs))
        for part in rest:
            _wrap(part, lambda part, value: value)
    return whole


def _wrap(module: nn.Module, call: Call) -> None:
    """Change what calling this one module does: by a class of its own, so that names, hooks and type checks stay."""
    kind = type(module)
    module.__class__ = type(kind.__name__, (kind,), {"__call__": call, "_plain": kind})


def _across(parts: Sequence[nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run the parts as a server does: own copies in and out, generators seeded by the client's draw."""
    spec, tensors = pytree.flatten((args, kwargs))
    seed = Seed()
    args, kwargs = pytree.unflatten(spec, [enter(tensor) for tensor in tensors])
    devices = {t.device for t in tensors if t.device.type != "cpu"}
    with uncached(), compute_lock, seeded(seed.value, tuple(devices)) as draws, _aliased(parts):
        value = _plain(parts[0])(parts[0], *args, **kwargs)
        for part in parts[1:]:
            value = _plain(part)(part, value)
    if not draws.drew:
        seed.put_back()
    spec, tensors = pytree.flatten(value)
    return pytree.unflatten(spec, [leave(tensor) for tensor in tensors])


def _plain(part: nn.Module) -> Call:
    call: Call = part._plain.__call__  # type: ignore[operator]
    return call


@contextmanager
def _aliased(parts: Sequence[nn.Module]) -> Iterator[None]:
    """Give each parameter another name for the call, so that gradients add up within it first, as across the cut.

    Recurrent layers keep a list of their weights besides and use each once; they are left alone. So is all under
    autocast, which caches casts of leaves only: there, the cast of a weight, made anew in each call, groups them.
    """
    slots = [
        (owner._parameters, leaf, parameter)
        for part in parts
        for owner in part.modules()
        if not isinstance(owner, nn.RNNBase)
        for leaf, parameter in owner._parameters.items()
        if parameter is not None and parameter.requires_grad
    ]
    aliases: dict[int, Any] = {}
    versions = [parameter._version for _, _, parameter in slots]
    autocast = any(torch.is_autocast_enabled(parameter.device.type) for _, _, parameter in slots)
    try:
        for held, leaf, parameter in slots if torch.is_grad_enabled() and not autocast else ():
            if id(parameter) not in aliases:
                aliases[id(parameter)] = alias(parameter)
            held[leaf] = aliases[id(parameter)]
        yield
        if versions != [parameter._version for _, _, parameter in slots]:
            raise UnsupportedError(
                "the body changes its own parameters in forward: keep what it changes in buffers"
            )
    finally:
        for held, leaf, parameter in slots:
            held[leaf] = parameter
