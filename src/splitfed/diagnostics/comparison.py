"""Comparison of a user's own model with its split: one step as it is, as reference, and split.

The split step goes the whole way: two servers that share only a store, no graph kept, so that the
backward is a recompute by a replica that never saw the forward.

The trap: each of the three steps must begin from the same bits. So each has the generator's state
of the first, copies of the arguments, which a model may change in place, and a copy of the model.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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
    """(what, reference against raw, split against reference).

    'equal', or the largest difference and where it is.
    """

    @property
    def ok(self) -> bool:
        """Whether the split model equals the reference in every bit: what is promised."""
        return all(against_reference == "equal" for _, _, against_reference in self.rows)

    def __str__(self) -> str:
        table = [("", "reference = raw model", "split = reference"), *self.rows]
        widths = [max(len(cell) for cell in column) for column in zip(*table, strict=True)]
        lines = []
        for row in table:
            cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
            lines.append("  ".join(cells).rstrip())
        return "\n".join(lines)


def check(model: nn.Module, at: str | Sequence[str], *example: Any, **kwargs: Any) -> Check:
    """Run one training step on `example` unsplit, as reference and split, and compare.

    Args:
        model: The model; it isn't changed.
        at: Where to cut it, as for `split`.
        example: The model's arguments, as in `model(*example, **kwargs)`.
        kwargs: Its keyword arguments.

    Returns:
        A table: `print(splitfed.check(...))`. Split equals reference always; reference equals the
        raw model wherever the body draws no random numbers and no activation fans out across the
        cut.

    Raises:
        UnknownCutError: as `split`.
        InputError: the model returns nothing that a gradient could come from.
    """
    whole = deep_copy(unwrap(model))
    state = torch.get_rng_state()
    try:
        raw = _step(whole, whole, example, kwargs)
        torch.set_rng_state(state)
        unsplit = reference(model, at)
        expected = _step(unsplit, unsplit, example, kwargs)
        torch.set_rng_state(state)
        got = _split_step(model, at, example, kwargs)
    finally:
        torch.set_rng_state(state)
    if not whole.training:
        # In eval mode a server stores no gradient, as promised, so there is none to compare.
        stored = got["parameter gradients"].keys()
        for found in (raw, expected):
            gradients = found["parameter gradients"]
            found["parameter gradients"] = {
                name: gradients[name] for name in gradients if name in stored
            }
    return Check(
        tuple(
            (row, _compare(raw[row], expected[row]), _compare(expected[row], got[row]))
            for row in ROWS
        )
    )


@contextmanager
def memory_store(purpose: str) -> Iterator[GradientStore]:
    """A store in memory for one step, which leaves nothing behind.

    Stores in memory are kept by name for as long as the process lives, so its objects are deleted.
    """
    store = GradientStore(f"memory://splitfed-{purpose}-{uuid.uuid4().hex}", sync="process")
    try:
        yield store
    finally:
        for folder in ("body", "clients"):
            store.blobs.delete_tree(folder)
        store.blobs.delete("format.json")


def leaves_like(tree: Any) -> Any:
    """Arguments with the same values, as leaves from which gradients can be read."""
    spec, tensors = pytree.flatten(tree)
    leaves = []
    for tensor in tensors:
        floating = tensor.is_floating_point() or tensor.is_complex()
        leaves.append(tensor.detach().clone().requires_grad_(floating))
    return pytree.unflatten(spec, leaves)


def _step(
    module: nn.Module, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Tensors]:
    """One forward and backward; everything that it gives, by row and name."""
    given = leaves_like((args, kwargs))
    args, kwargs = given
    outputs = pytree.flatten(call(*args, **kwargs))[1]
    _loss(outputs).backward()
    leaves = pytree.flatten(given)[1]
    buffers = [(n, t) for n, t in named_state(module) if not isinstance(t, nn.Parameter)]
    return {
        "outputs": {str(i): out.detach() for i, out in enumerate(outputs)},
        "input gradients": {str(i): leaf.grad for i, leaf in enumerate(leaves)},
        "parameter gradients": {name: p.grad for name, p in module.named_parameters()},
        "buffers": {name: buffer.detach().clone() for name, buffer in buffers},
    }


def _loss(outputs: Sequence[Tensor]) -> Tensor:
    """The mean squares of all outputs that have a gradient, summed: the outputs may be complex."""
    scored = [out for out in outputs if out.requires_grad]
    if not scored:
        raise InputError(
            "the model's outputs need no gradient, so there is no step to check: "
            "is all of it frozen?"
        )
    return torch.stack([out.abs().pow(2).mean().to(torch.float64) for out in scored]).sum()


def _split_step(
    model: nn.Module, at: str | Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Tensors]:
    """The same, of the half and, under the model's names, of the body."""
    half, body = split(model, at)
    prefix = _body_prefix(model, at)
    with memory_store("check") as store:
        first = SplitServer(body, store, keep_graphs=0)
        second = SplitServer(body, store, keep_graphs=0)
        client = SplitClient(half, _BackwardElsewhere(first, second), "check")
        _run_other_client(half, second, args, kwargs)
        found = _step(half, client, args, kwargs)
        gradients, buffers = _stored_step(store, body)
    found["parameter gradients"] |= {prefix + name: g for name, g in gradients.items()}
    found["buffers"] |= {prefix + name: buffer for name, buffer in buffers.items()}
    return found


def _stored_step(store: GradientStore, body: nn.Module) -> tuple[Tensors, Tensors]:
    """The gradients that a step has stored, and the buffers that it would leave."""
    weights = store.load_weights(0)
    gradients: Tensors = {}
    buffers: Tensors = {name: weights[name] for name, _ in body.named_buffers() if name in weights}
    for batch in store.waiting():
        record = store.pile().read(batch)
        if record is not None:
            gradients |= record.gradients
            for update in record.buffers:
                buffers |= update.values
    return gradients, buffers


def _run_other_client(
    half: nn.Module, server: SplitServer, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Let a server run something before, so that a body that keeps state in Python is found out."""
    state = torch.get_rng_state()
    with torch.no_grad():
        args, kwargs = leaves_like((args, kwargs))
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


def _body_prefix(model: nn.Module, at: str | Sequence[str]) -> str:
    """What to put before a body's names to have the model's; a list of cuts has those already."""
    owner = find_cuts(unwrap(model), at)[0].owner if isinstance(at, str) else ""
    return f"{owner}." if owner else ""


def _compare(expected: Tensors, got: Tensors) -> str:
    """A cell of the table: 'equal', or the largest difference and where it is."""
    worst = 0.0
    where = ""
    for name in {**expected, **got}:
        a = expected.get(name)
        b = got.get(name)
        if a is None or b is None:
            if a is not b:
                return f"differ in kind at {name}"
            continue
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"differ in kind at {name}"
        difference = _largest_difference(a, b)
        # Not `>`, with which a difference of NaN would be none.
        if difference and not difference <= worst:
            worst = difference
            where = name
    return f"up to {worst:.1e} at {where}" if where else "equal"


def _largest_difference(a: Tensor, b: Tensor) -> float:
    """The largest absolute difference of two tensors of one kind; NaN equals NaN."""
    # A client's own embedding may have sparse gradients.
    a = a.to_dense()
    b = b.to_dense()
    inexact = a.is_floating_point() or a.is_complex()
    if torch.equal(a, b) or (inexact and torch.allclose(a, b, 0, 0, equal_nan=True)):
        return 0.0
    wide = torch.complex128 if a.is_complex() else torch.float64
    return float((a.to(wide) - b.to(wide)).abs().max())
