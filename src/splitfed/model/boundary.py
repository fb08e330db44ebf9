"""The boundary of the cut: what happens to a tensor there, in a run, a replay and the reference.

A tensor enters as a copy of its own: 64-byte aligned, because an odd address changes the bits of a
small Linear; with the client's strides; and not a leaf, so that a body may begin with an in-place
layer. The autograd functions here are identities. They group gradients as the cut does: what the
body adds up over several uses of an activation leaves it as one sum.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from splitfed.protocol import safetensors

# torch 2.4 has no way to ask for it.
_top_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)


AS_IT_IS: AbstractContextManager[Any] = nullcontext()
"""For a block around which nothing has to be changed: one object for all, entered in each call."""


class uncached:  # noqa: N801 -- reads as the adjective that it is
    """Keep autocast's cache of cast weights from crossing the cut.

    A cached cast hangs on the graph of the side that made it, and belongs to that side only.
    """

    __slots__ = ()

    def __enter__(self) -> None:
        torch.clear_autocast_cache()

    def __exit__(self, *exception: object) -> None:
        torch.clear_autocast_cache()


def unhooked() -> AbstractContextManager[Any]:
    """Keep saved-tensor hooks out of the body's graph: `torch.utils.checkpoint` sets some.

    Those are around the client's code. They would drop what the body saves, too, and run the
    client's code again to get it back.
    """
    if _top_hooks is not None and _top_hooks(True) is None:
        return AS_IT_IS
    # Only the innermost pair is called, so one that does nothing keeps the others out. Detached,
    # or a node that saves its own output would keep itself alive.
    return torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: tensor.detach(), lambda tensor: tensor
    )


def enter(tensor: Tensor) -> Tensor:
    """`tensor` as a body gets it: not a leaf, in memory of its own."""
    if not tensor.requires_grad:
        return fresh(tensor)
    # A plain tensor's clone is what `_Enter` gives, in one operation of torch's own.
    if type(tensor) is Tensor and safetensors.is_plain(tensor):
        return tensor.clone()
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
    moved = tensor
    if device is not None and tensor.device != device:
        moved = tensor.to(device)
    kept = safetensors.canonical(moved)
    # Another address: the move or the codec's layout has made the copy already. The same address
    # may come with another tensor object, which still shares the memory.
    if kept is not tensor and kept.data_ptr() != tensor.data_ptr():
        return kept
    if kept.is_contiguous():
        return kept.clone()
    return _strided_copy(kept)


def _strided_copy(tensor: Tensor) -> Tensor:
    """A copy with the same strides; `clone` would fill expanded dimensions with memory."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    expanded = [dim for dim, (size, stride) in enumerate(sizes) if stride == 0 and size > 1]
    base = tensor
    for dim in expanded:
        base = base.narrow(dim, 0, 1)
    copy = torch.empty_strided(base.shape, base.stride(), dtype=base.dtype, device=base.device)
    copy.copy_(base)
    return copy.expand(tensor.shape) if expanded else copy


class _Enter(torch.autograd.Function):
    """Identity into the body: a fresh copy forward, the gradient as it is backward."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        """A fresh copy of `tensor` (any shape)."""
        # No gradient stays none, as it does through a clone, instead of becoming zeros.
        ctx.set_materialize_grads(False)
        return fresh(tensor)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """The gradient itself."""
        return grads[0]


class _Leave(torch.autograd.Function):
    """Identity out of the body: a fresh copy forward, the codec's layout backward."""

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
        """The same memory in another tensor object.

        Not as a view: a body that writes to its parameter in place would get torch's error about
        views, and not the one that says what to do.
        """
        return parameter.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """The gradient itself."""
        return grads[0]
