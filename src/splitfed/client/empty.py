"""A call across the cut with no examples in it, answered on this side.

Poisson sampling, as Opacus uses it, draws such batches: the model runs on zero rows, and the
optimizer takes a step of noise alone. Nothing of it can count on the server, so nothing is sent.
What the half must know is the shapes of the outputs, which the part that was cut out shows when it
runs on the meta device, where tensors have no values. A part that can't run there (its path depends
on values, or it was placed by hand) is asked for them by a request that the server doesn't record.

The trap: an empty input doesn't make an empty output. A loss or a state that the body returns from
no rows has values, and gradients of its own: such a call goes the ordinary way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from splitfed.model.copying import deep_copy
from splitfed.model.cutpoint import Called, hole_of
from splitfed.model.promise import settled
from splitfed.model.slices import run_parts
from splitfed.protocol import pytree


def answer_empty(
    point: Called,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    ask: Callable[[], Any],
) -> Any:
    """The outputs of a call without examples; `NotImplemented` if they aren't all empty.

    Args:
        point: Whose call it is.
        args: What it was called with.
        kwargs: By keyword.
        ask: Gets the outputs from the server, where they can't be told here.
    """
    spec, given = pytree.flatten(settled((args, kwargs)))
    shapes = _on_meta(point, spec, given)
    if shapes is None:
        with torch.no_grad():
            shapes = pytree.flatten(ask())
    spec, outputs = shapes
    if any(output.numel() for output in outputs):
        return NotImplemented
    device = given[0].device if given else torch.device("cpu")
    made = [torch.empty_like(output, device=device).detach() for output in outputs]
    return pytree.unflatten(spec, list(_Nothing.apply(made, _dummy(), *given)))  # type: ignore[no-untyped-call]


def _on_meta(point: Called, spec: pytree.Spec, given: list[Tensor]) -> Any:
    """Outputs of the part on the meta device, flat; `None` if it can't run there."""
    # Autocast knows no meta device, so the dtypes would be others.
    origins = [hole_of(each).origin for each in point.points]
    if given and torch.is_autocast_enabled(given[0].device.type):
        return None
    parts = [origin.part for origin in origins if origin is not None]
    if len(parts) != len(origins):
        return None
    with torch.no_grad(), torch.random.fork_rng(devices=()):
        try:
            args, kwargs = pytree.unflatten(spec, [tensor.to("meta") for tensor in given])
            return pytree.flatten(run_parts(list(map(deep_copy, parts)), args, kwargs))
        except Exception:  # noqa: BLE001 -- whatever the user's code makes of tensors without values
            return None


def _dummy() -> Tensor:
    return torch.empty(0, requires_grad=True, device="cpu")


class _Nothing(torch.autograd.Function):
    """Empty outputs forward; zeros backward, as of a sum over no examples."""

    @staticmethod
    def forward(ctx: Any, outputs: list[Tensor], dummy: Tensor, *given: Tensor) -> Any:
        """The outputs, as they were made."""
        ctx.given = [(tensor.shape, tensor.dtype, tensor.device) for tensor in given]
        plain = [t for t in outputs if not (t.is_floating_point() or t.is_complex())]
        ctx.mark_non_differentiable(*plain)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        """Zeros of the inputs' shapes."""
        needed = ctx.needs_input_grad[2:]
        zeros = [
            torch.zeros(shape, dtype=dtype, device=device) if wanted else None
            for wanted, (shape, dtype, device) in zip(needed, ctx.given, strict=True)
        ]
        return None, None, *zeros
