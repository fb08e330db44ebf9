"""A watch over inputs that the body changed in place.

The client's copy of such an input still has the old values, so no other use of it may count.

Uses that autograd has saved are caught by torch, once the version counter moves as an in-place
operation moves it. Any other use adds a gradient of its own: then what arrives at the tensor isn't
the very gradient that the call answered.

The trap: an input may be a view, as `flatten` and slices make them. In the unsplit model its base
changes too, so it is the base that is watched; and a moved version counter makes torch put the view
on a new node, apart from the one that the call hangs on. A hook that is the first to ask for that
node crashes torch, hence the hooks first and a look after.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from splitfed.errors import InPlaceError


def guard(tensor: Tensor, index: int, own: Callable[[], Tensor | None]) -> None:
    """Raise in the backward if input `index` gets any gradient but `own()`.

    Raises:
        InPlaceError: it is one of several views of one operation, which may not be changed in
            place.
    """
    base = tensor._base
    if base is None or not base.requires_grad:
        _watch(tensor, index, own)
        torch.autograd.graph.increment_version(tensor)
        return
    passed: list[Tensor | None] = [None]

    def remember(grads: tuple[Tensor | None, ...], _: Any) -> None:
        passed[0] = grads[0]

    node, end = (torch.autograd.graph.get_gradient_edge(t).node for t in (tensor, base))
    while node.next_functions[0][0] is not end:
        above = node.next_functions[0][0]
        if above is None:
            raise _refused(index)
        node = above
    node.register_hook(remember)
    _watch(tensor, index, own)
    _watch(base, index, lambda: passed[0])
    torch.autograd.graph.increment_version(tensor)
    try:
        tensor.grad_fn  # noqa: B018 -- puts the view on its new node
    except RuntimeError as error:
        raise _refused(index) from error


def _watch(tensor: Tensor, index: int, own: Callable[[], Tensor | None]) -> None:
    def check(grad: Tensor) -> None:
        expected = own()
        if expected is None or grad.data_ptr() != expected.data_ptr():
            raise _refused(index)

    tensor.register_hook(check)


def _refused(index: int) -> InPlaceError:
    return InPlaceError(
        f"the body changes its input {index} in place, and the client uses it elsewhere too: "
        "that use would see other values than in the unsplit model. "
        "Begin the body with inplace=False, or clone() before the cut"
    )
