"""Comparison of a user's own model with its split: one step as it is, as reference, and split.

The split step goes the whole way: two servers that share only a store, no graph kept, so that the
backward is a recompute by a replica that never saw the forward.

The trap: each of the three steps must begin from the same bits. So each has the generator's state
of the first, copies of the arguments, which a model may change in place, and a copy of the model.
"""

from __future__ import annotations

import contextlib
import uuid
import warnings
from collections.abc import Callable, Iterator, Sequence
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
    drew: bool = False
    """Whether the body drew random numbers: then its outputs are others than the raw model's."""

    @property
    def ok(self) -> bool:
        """Whether the split model is what is promised.

        It equals the reference in every bit, and unless the body drew random numbers its outputs
        are the raw model's.
        """
        as_promised = all(against_reference == "equal" for _, _, against_reference in self.rows)
        outputs = [against_raw for row, against_raw, _ in self.rows if row == "outputs"]
        return as_promised and (self.drew or all(cell == "equal" for cell in outputs))

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

    What one example can show, and what it can't:

    | what may be wrong | how it shows |
    |---|---|
    | the model can't be cut there, or copied | an error of `split` |
    | a function, hook or object that reaches over the cut | an error of `split` |
    | the model calls the positions of a slice itself | right; else 'outputs' |
    | a layer that is asked for its class, hidden states that a hook collects | 'outputs' |
    | a body that keeps state in Python, or draws past torch | `ReplayError`, or a row |
    | a value or setting that the half uses of the part cut out | `AbsentError`, or 'outputs' |
    | a buffer that a forward changes, in value or shape | 'buffers', or an error of the server |
    | an argument or output that can't cross the cut | `ContainerError` |
    | a batch whose weight isn't known | the warning that a client gives |
    | halves of another cut or width than the server's; forked processes | not: one half |
    | what counts as a batch; statistics over several calls; the optimizer's part | not: one pass |
    | train and eval mode other than the model is in | not: one mode |
    | tools around the client (trainers, averages, exporters), storage, the network | not |

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
        got, drew = _split_step(model, at, example, kwargs)
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
        ),
        drew,
    )


@contextlib.contextmanager
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
    returned = call(*args, **kwargs)
    outputs = pytree.flatten(returned)[1]
    _loss(outputs).backward()
    leaves = pytree.flatten(given)[1]
    buffers = [(n, t) for n, t in named_state(module) if not isinstance(t, nn.Parameter)]
    return {
        "outputs": _occurrences(returned),
        "input gradients": {str(i): leaf.grad for i, leaf in enumerate(leaves)},
        "parameter gradients": {name: p.grad for name, p in module.named_parameters()},
        "buffers": {name: buffer.detach().clone() for name, buffer in buffers},
    }


def _occurrences(returned: Any) -> Tensors:
    """The tensors in what a model returned, by their places, and what else is there as a key."""
    spec, tensors = pytree.flatten(returned)
    # As often as they occur: a body that returns its input makes another tensor of it.
    found: list[Tensor] = []
    plain = _without_indices(spec, tensors, found)
    outputs: Tensors = {str(place): tensor.detach() for place, tensor in enumerate(found)}
    return {**outputs, f"the values besides tensors: {plain!r:.200}": torch.empty(0)}


def _without_indices(spec: Any, tensors: Sequence[Tensor], found: list[Tensor]) -> Any:
    """A tree's spec that doesn't say which of its tensors are one; `found` gets each occurrence."""
    if isinstance(spec, dict) and "t" in spec:
        found.append(tensors[spec["t"]])
        return "t"
    if isinstance(spec, dict):
        return {kind: _without_indices(inner, tensors, found) for kind, inner in spec.items()}
    if isinstance(spec, list):
        return [_without_indices(inner, tensors, found) for inner in spec]
    return spec


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
) -> tuple[dict[str, Tensors], bool]:
    """The same, of the half and, under the model's names, of the body; and whether that drew."""
    half, body = split(model, at)
    prefix = _body_prefix(model, at)
    with memory_store("check") as store:
        first = SplitServer(body, store, keep_graphs=0)
        second = SplitServer(body, store, keep_graphs=0)
        way = _BackwardElsewhere(first, second)
        client = SplitClient(half, way, "check")
        _run_other_client(half, second, args, kwargs)
        found = _step(half, client, args, kwargs)
        gradients, buffers = _stored_step(store, body)
    found["parameter gradients"] |= {prefix + name: g for name, g in gradients.items()}
    found["buffers"] |= {prefix + name: buffer for name, buffer in buffers.items()}
    return found, way.drew


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
    spec, tensors = pytree.flatten((args, kwargs))
    # Other values first, or a body that keeps what it first saw would give the same. They may not
    # be valid ones (sorted lengths, indices). What it says of this client isn't said to the user.
    other = [tensor.detach().flip(tuple(range(tensor.dim()))) for tensor in tensors]
    client = SplitClient(deep_copy(half), server, "other")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for values in (other, tensors):
            args, kwargs = leaves_like(pytree.unflatten(spec, values))
            with contextlib.suppress(*([Exception] if values is other else [])):
                client(*args, **kwargs)
    torch.set_rng_state(state)


class _BackwardElsewhere(Middleware):
    """Sends a backward to another replica than its forward: one that hasn't seen it."""

    def __init__(self, first: SplitServer, second: SplitServer) -> None:
        super().__init__(first)
        self._second = second
        self.drew = False
        """Whether the body drew random numbers."""

    def send(self, verb: str, request: Any, /) -> Any:
        """The answer of the replica whose turn it is."""
        if verb == "backward":
            return self._second.backward(request)
        answer = super().send(verb, request)
        self.drew = self.drew or getattr(answer, "drew", False)
        return answer


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
