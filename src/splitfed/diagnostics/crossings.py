"""What crosses each cut: one training step on an example, with a hand on the wire.

The step goes through a `SplitServer` over a store in memory, as any other, so what is counted is what is sent: tensors,
and the requests and answers around them. The trap is to take a model's own shapes for those at the cut: a body may be
called several times, with other tensors than its first argument, and hand some of them back unchanged.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from splitfed.client.client import SplitClient
from splitfed.protocol import pytree
from splitfed.protocol.packing import pack
from splitfed.protocol.transport import Middleware
from splitfed.server.server import SplitServer
from splitfed.store.store import GradientStore


@dataclass(frozen=True, slots=True)
class Crossing:
    """One tensor that crosses a cut."""

    cut: str
    """Which; '' for a body with one cut."""
    call: int
    """Number of the call of a cut point, from 0."""
    what: str
    """'activations', 'outputs', 'grad_outputs' or 'grad_activations'."""
    shape: tuple[int, ...]
    """(N, *C)"""
    dtype: str
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Inspection:
    """What one training step sends, and what lies on which side."""

    crossings: tuple[Crossing, ...]
    """In the order in which they cross."""
    messages: Mapping[str, int]
    """Bytes of all requests and answers by kind, headers included."""
    client_parameters: int
    """Elements of the parameters in the client half."""
    body_parameters: int
    body_bytes: int
    """Bytes of the body's parameters and buffers: about one version in the store, without optimizer state."""


def inspect(client_half: nn.Module, body: nn.Module, *example: Any) -> Inspection:
    """Run one training step on `example` and tell what crossed.

    Args:
        client_half: As `split` returns it; a lone `CutPoint` for a body by itself.
        body: The server's part.
        example: The arguments of the model, of which tensors with floating values get gradients.

    Raises:
        BodyError: the body doesn't run on that.
    """
    store = GradientStore(f"memory://splitfed-inspect-{uuid.uuid4().hex}", sync="process")
    tap = _Tap(SplitServer(body, store))
    spec, tensors = pytree.flatten(example)
    leaves = [t.detach().requires_grad_(t.is_floating_point() or t.is_complex()) for t in tensors]
    try:
        outputs = SplitClient(client_half, tap, "inspect")(*pytree.unflatten(spec, leaves))
        scored = [output for output in pytree.flatten(outputs)[1] if output.requires_grad]
        if scored:
            torch.stack([output.abs().double().mean() for output in scored]).sum().backward()
    finally:
        for folder in ("body", "clients"):
            store.blobs.delete_tree(folder)
        store.blobs.delete("format.json")
    return Inspection(
        tuple(tap.crossings),
        tap.messages,
        sum(parameter.numel() for parameter in client_half.parameters()),
        sum(parameter.numel() for parameter in body.parameters()),
        sum(tensor.nbytes for tensor in body.state_dict().values()),
    )


class _Tap(Middleware):
    """Notes the tensors and the bytes of each forward and backward that passes."""

    def __init__(self, server: SplitServer) -> None:
        super().__init__(server)
        self.crossings: list[Crossing] = []
        self.messages: dict[str, int] = {}
        self._cuts: dict[int | None, str] = {}

    def send(self, verb: str, request: Any, /) -> Any:
        """Pass a request on; note what it and its answer hold."""
        answer = super().send(verb, request)
        if verb == "forward":
            self._cuts[request.call] = request.cut
            self._note(request.call, "activations", request.tensors())
            self._note(request.call, "outputs", pytree.flatten(answer.outputs)[1])
        elif verb == "backward":
            self._note(request.call, "grad_outputs", request.grad_outputs)
            self._note(request.call, "grad_activations", answer.grad_inputs)
        self._count(f"{verb} request", request)
        self._count(f"{verb} answer", answer)
        return answer

    def _note(self, call: int | None, what: str, tensors: Iterable[Tensor | None]) -> None:
        for tensor in tensors:
            if tensor is not None and call is not None:
                dtype = str(tensor.dtype).removeprefix("torch.")
                shape = tuple(tensor.shape)
                self.crossings.append(Crossing(self._cuts[call], call, what, shape, dtype, tensor.nbytes))

    def _count(self, kind: str, message: Any) -> None:
        self.messages[kind] = self.messages.get(kind, 0) + sum(map(len, pack(message)))
