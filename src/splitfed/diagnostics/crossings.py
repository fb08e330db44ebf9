"""Crossings: the tensors that cross each cut in one training step, and their bytes.

The step goes through a `SplitServer` over a store in memory, as any other, so what is counted is
what is sent: tensors, and the requests and answers around them. The trap is to take a model's own
shapes for those at the cut: a body may be called several times, with other tensors than its first
argument, and return some of them unchanged.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from splitfed.client.client import SplitClient
from splitfed.diagnostics.comparison import leaves_like, memory_store
from splitfed.protocol import pytree
from splitfed.protocol.packing import pack
from splitfed.protocol.transport import Middleware
from splitfed.server.server import SplitServer


@dataclass(frozen=True, slots=True)
class Crossing:
    """One tensor that crosses a cut."""

    cut: str
    """Its name; '' for a body with one cut."""
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
    """Of parameters and buffers: about one version in the store, without its optimizer state."""


def inspect(client_half: nn.Module, body: nn.Module, *example: Any) -> Inspection:
    """Run one training step on `example` and list what crossed.

    Args:
        client_half: As `split` returns it; a lone `CutPoint` for a body by itself.
        body: The server's part.
        example: The arguments of the model, of which tensors with floating values get gradients.

    Raises:
        BodyError: the body doesn't run on that.
    """
    with memory_store("inspect") as store:
        tap = _Tap(SplitServer(body, store))
        outputs = SplitClient(client_half, tap, "inspect")(*leaves_like(example))
        scored = [output for output in pytree.flatten(outputs)[1] if output.requires_grad]
        if scored:
            torch.stack([output.abs().double().mean() for output in scored]).sum().backward()
    return Inspection(
        crossings=tuple(tap.crossings),
        messages=tap.messages,
        client_parameters=sum(parameter.numel() for parameter in client_half.parameters()),
        body_parameters=sum(parameter.numel() for parameter in body.parameters()),
        body_bytes=sum(tensor.nbytes for tensor in body.state_dict().values()),
    )


class _Tap(Middleware):
    """Notes the tensors and the bytes of each request and answer that passes."""

    def __init__(self, server: SplitServer) -> None:
        super().__init__(server)
        self.crossings: list[Crossing] = []
        self.messages: dict[str, int] = {}
        self._cuts: dict[int | None, str] = {}

    def send(self, verb: str, request: Any, /) -> Any:
        """Pass a request on; note what it and its answer hold."""
        answer = super().send(verb, request)
        if verb == "forward":
            # A backward names its call only; the forward of that call said at which cut.
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
            if tensor is None or call is None:
                continue
            dtype = str(tensor.dtype).removeprefix("torch.")
            shape = tuple(tensor.shape)
            cut = self._cuts[call]
            self.crossings.append(Crossing(cut, call, what, shape, dtype, tensor.nbytes))

    def _count(self, kind: str, message: Any) -> None:
        num_bytes = sum(map(len, pack(message)))
        self.messages[kind] = self.messages.get(kind, 0) + num_bytes
