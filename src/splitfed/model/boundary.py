"""What happens to a tensor at the cut, the same on a server, in a replay and in the reference.

A tensor enters as a copy of its own: 64-byte aligned, because an odd address changes the bits of a small Linear;
with the client's strides; and not a leaf, so that a body may begin with an in-place layer. The autograd functions
here are identities. They group gradients as the cut does: what the body adds up over several uses of an activation
leaves it as one sum.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from splitfed.protocol import safetensors

_top_hooks = getattr(
    torch._C._autograd, "_top_saved_tensors_default_hooks", None
)  # torch 2.4 can't tell


class uncached:  # noqa: N801 -- reads as the adjective that it is
    """Keep autocast's cache of cast weights from crossing the cut: what is cached on one side belongs to one graph."""

    __slots__ = ()

    def __enter__(self) -> None:
        torch.clear_autocast_cache()

    def __exit__(self, *exception: object) -> None:
        torch.clear_autocast_cache()


def unhooked() -> AbstractContextManager[Any]:
    """Keep saved-tensor hooks (torch.utils.checkpoint sets them around the client's code) out of the body's graph."""
    if _top_hooks is not None and _top_hooks(True) is None:
        return nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: tensor.detach(), lambda tensor: tensor
    )


def enter(tensor: Tensor) -> Tensor:
    """`tensor` as a body gets it: not a leaf, in memory of its own."""
    if not tensor.requires_grad:
        return fresh(tensor)
    if type(tensor) is Tensor and safetensors.is_plain(tensor):
        return tensor.clone()  # the same in one operation of torch's
    entered: Tensor = _Enter.apply(tensor)  # type: ignore[no-untyped-call]
    return entered


def leave(tensor: Tensor) -> Tensor:
    """`tensor` as a client gets it."""
    if not tensor.requires_grad:
        return fresh(tensor)
    left: Tensor = _Leave.apply(tensor)  # type: ignore[no-untyped-call]
    return left


def alias(parameter: Tensor) -> Tensor:
    """`parameter` for one call: its gradients add up within the call first."""
    named: Tensor = _Alias.apply(parameter)  # type: ignore[no-untyped-call]
    return named


def fresh(tensor: Tensor, device: torch.device | None = None) -> Tensor:
    """A detached copy in memory of its own, with the strides that survive the codec."""
    tensor = tensor.detach()
    moved = tensor if device is None or tensor.device == device else tensor.to(device)
    kept = safetensors.canonical(moved)
    if kept is not tensor and kept.data_ptr() != tensor.data_ptr():
        return kept
    if kept.is_contiguous():
        return kept.clone()
    strided = [
        i
        for i, (n, s) in enumerate(zip(kept.shape, kept.stride(), strict=True))
        if s == 0 and n > 1
    ]
    base = kept
    for dim in strided:
        base = base.narrow(dim, 0, 1)
    copy = torch.empty_strided(
        base.shape, base.stride(), dtype=base.dtype, device=base.device
    ).copy_(base)
    return copy.expand(kept.shape) if strided else copy


class _Enter(torch.autograd.Function):
    """Identity into the body: a fresh copy forward, the gradient as it is backward."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        """A fresh copy of `tensor` (any shape)."""
        ctx.set_materialize_grads(False)  # none stays none, as it does through a clone
        return fresh(tensor)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """The gradient itself."""
        return grads[0]


class _Leave(torch.autograd.Function):
    """Identity out of the body: a fresh copy forward, the gradient in the codec's layout backward."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        """A fresh copy of `tensor` (any shape)."""
        return fresh(tensor)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """The gradient as a server would get it."""
        return safetensors.canonical(grads[0].detach())


class _Alias(torch.autograd.Function):
    """Identity of a parameter for one call: its gradients are added up within the call first."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor) -> Tensor:
        """The same memory under another name, and no view of it: who writes to it in place isn't told about views."""
        return parameter.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """The gradient itself."""
        return grads[0]
