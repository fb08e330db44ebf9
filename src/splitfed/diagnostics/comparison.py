"""The proof on the user's own model: one step unsplit, as reference, and split; what is equal, bit for bit.

The split step goes the whole way: two servers that share only a store, no graph kept, so that the backward is a
recompute by a replica that never saw the forward.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from splitfed.client.client import SplitClient
from splitfed.errors import InputError
from splitfed.model.copying import deep_copy
from splitfed.model.cut import find_cuts, split
from splitfed.model.skeleton import named_state, unwrap
from splitfed.model.unsplit import reference
from splitfed.protocol import pytree
from splitfed.protocol.transport import Middleware
from splitfed.server.server import SplitServer
from splitfed.store.store import GradientStore

Tensors = dict[str, Tensor | None]
ROWS = ("outputs", "input gradients", "parameter gradients", "buffers")


@dataclass(frozen=True, slots=True)
class Check:
    """What a `check` found; prints as a table."""

    rows: tuple[tuple[str, str, str], ...]
    """(what, reference against raw, split against reference): 'equal', or the largest difference and where it is."""

    @property
    def ok(self) -> bool:
        """Whether the split model equals the reference in every bit: what is promised."""
        return all(split_ == "equal" for _, _, split_ in self.rows)

    def __str__(self) -> str:
        table = [("", "reference = raw model", "split = reference"), *self.rows]
        widths = [max(len(row[i]) for row in table) for i in range(3)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table
        )


def check(model: nn.Module, at: str | Sequence[str], *example: Any, **kwargs: Any) -> Check:
    """Run one training step on `example` unsplit, as reference and split, and compare.

    Args:
        model: The model; it isn't changed.
        at: Where to cut it, as for `split`.
        example: The model's arguments, as in `model(*example, **kwargs)`.
        kwargs: Its keyword arguments.

    Returns:
        A table: `print(splitfed.check(...))`. Split equals reference always; reference equals the raw model wherever
        the body draws no random numbers and no activation fans out across the cut.

    Raises:
        UnknownCutError: as `split`.
        InputError: the model returns nothing that a gradient could come from.
    """
    whole = deep_copy(unwrap(model))
    state = torch.get_rng_state()
    try:
        raw = _step(whole, whole, example, kwargs)
        torch.set_rng_state(state)
        same = reference(model, at)
        expected = _step(same, same, example, kwargs)
        torch.set_rng_state(state)
        got = _split_step(model, at, example, kwargs)
    finally:
        torch.set_rng_state(state)
    if not whole.training:  # in eval mode a server stores no gradient, as promised
        names = got["parameter gradients"]
        for found in (raw, expected):
            found["parameter gradients"] = {n: g for n, g in found["parameter gradients"].items() if n in names}
    return Check(tuple((row, _compare(raw[row], expected[row]), _compare(expected[row], got[row])) for row in ROWS))


def _step(
    module: nn.Module, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Tensors]:
    """One forward and backward; everything that it gives, by row and name."""
    given = _own((args, kwargs))
    args, kwargs = given
    outputs = pytree.flatten(call(*args, **kwargs))[1]
    scored = [out for out in outputs if out.requires_grad]
    if not scored:
        raise InputError("the model's outputs need no gradient, so there is no step to check: is all of it frozen?")
    torch.stack([out.abs().pow(2).mean().to(torch.float64) for out in scored]).sum().backward()
    return {
        "outputs": {str(i): out.detach() for i, out in enumerate(outputs)},
        "input gradients": {str(i): tensor.grad for i, tensor in enumerate(pytree.flatten(given)[1])},
        "parameter gradients": {name: parameter.grad for name, parameter in module.named_parameters()},
        "buffers": {name: t.detach().clone() for name, t in named_state(module) if not isinstance(t, nn.Parameter)},
    }


def _split_step(
    model: nn.Module, at: str | Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Tensors]:
    half, body = split(model, at)
    store = GradientStore(f"memory://splitfed-check-{uuid.uuid4().hex}", sync="process")
    first, second = SplitServer(body, store, keep_graphs=0), SplitServer(body, store, keep_graphs=0)
    client = SplitClient(half, _BackwardElsewhere(first, second), "check")
    try:
        _disturb(half, second, args, kwargs)
        got = _step(half, client, args, kwargs)
        prefix = _prefix(model, at)
        for batch in store.waiting():
            record = store.pile().read(batch)
            if record is not None:
                got["parameter gradients"] |= {prefix + name: gradient for name, gradient in record.gradients.items()}
                values = {k: v for chain in record.buffers for k, v in chain.values.items()}
                got["buffers"] |= {prefix + name: value for name, value in values.items()}
        weights = store.load_weights(0)
        for name in [name for name, _ in body.named_buffers() if name in weights]:
            got["buffers"].setdefault(prefix + name, weights[name])
    finally:
        for folder in ("body", "clients"):
            store.blobs.delete_tree(folder)
        store.blobs.delete("format.json")
    return got


def _disturb(half: nn.Module, server: SplitServer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Let the second server run something before, so that a body that keeps state in Python is found out."""
    state = torch.get_rng_state()
    with torch.no_grad():
        args, kwargs = _own((args, kwargs))
        SplitClient(deep_copy(half), server, "other")(*args, **kwargs)
    torch.set_rng_state(state)


class _BackwardElsewhere(Middleware):
    """Sends a backward to another replica than its forward: one that hasn't seen it."""

    def __init__(self, first: SplitServer, second: SplitServer) -> None:
        super().__init__(first)
        self._second = second

    def send(self, verb: str, request: Any, /) -> Any:
        """The answer of the replica whose turn it is."""
        if verb == "backward":
            return self._second.backward(request)
        return super().send(verb, request)


def _prefix(model: nn.Module, at: str | Sequence[str]) -> str:
    """What to put before a body's names to have the model's."""
    owner = find_cuts(unwrap(model), at)[0].owner if isinstance(at, str) else ""
    return f"{owner}." if owner else ""


def _own(tree: Any) -> Any:
    """The arguments with leaves of their own, so that input gradients can be read."""
    spec, tensors = pytree.flatten(tree)
    floating = [tensor.is_floating_point() or tensor.is_complex() for tensor in tensors]
    return pytree.unflatten(
        spec, [t.detach().clone().requires_grad_(f) for t, f in zip(tensors, floating, strict=True)]
    )


def _compare(expected: Tensors, got: Tensors) -> str:
    worst, where = 0.0, ""
    for name in {**expected, **got}:
        a, b = expected.get(name), got.get(name)
        if a is None and b is None:
            continue
        if a is None or b is None or a.shape != b.shape or a.dtype != b.dtype:
            return f"differ in kind at {name}"
        a, b = a.to_dense(), b.to_dense()  # a client's own embedding may have sparse gradients
        inexact = a.is_floating_point() or a.is_complex()
        if torch.equal(a, b) or (inexact and torch.allclose(a, b, 0, 0, equal_nan=True)):
            continue
        wide = torch.complex128 if a.is_complex() else torch.float64
        largest = float((a.to(wide) - b.to(wide)).abs().max())
        if not largest <= worst:
            worst, where = largest, name
    return f"up to {worst:.1e} at {where}" if where else "equal"
