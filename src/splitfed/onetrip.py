"""Plain split learning in one trip: activations and labels there, loss and gradients back.

For models that end at their cut. The server computes the loss, so the labels leave the client; in return a batch
costs one request. The gradient counts when it is answered, at the forward: `backward()` of the loss only passes it on.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from splitfed.calls import Session, refuse_second_order
from splitfed.cutpoint import CutPoint
from splitfed.errors import CutError
from splitfed.messages import LossAnswer, LossRequest
from splitfed.seeding import Seed


class LossSession(Session):
    """One `client.loss(...)` call."""

    target: Any = None
    value: Tensor | None = None

    def call(self, point: CutPoint, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Send activations and labels; answer the loss in place of the outputs.

        Raises:
            CutError: the half has more than one cut call.
        """
        if self.value is not None:
            raise CutError("client.loss() needs a client half that ends at its one cut, and this one calls several")
        seed = Seed()
        ahead, tensors = self.request(point, args, kwargs, seed, None)
        counts = ahead.grad and ahead.training
        seq = self.connection.number("batch") if counts else 0
        samples = self.num_samples if self.scope is None or self.scope.num_samples is None else self.scope.num_samples
        try:
            with self.connection.housekeeping() as notes:
                answer = self.connection.transport.loss(
                    LossRequest(replace(ahead, housekeeping=notes), seq, self.target, samples)
                )
        except BaseException:
            if counts:
                self.connection.abandon(seq)
            raise
        if counts:
            self.connection.answered(seq)
            self.connection.note_status(answer.status, samples)
        if not answer.drew:
            seed.put_back()
        self.connection.opened(answer.incarnation, answer.version)
        value = answer.loss.to(tensors[0].device) if tensors else answer.loss
        if ahead.grad:
            value = _Loss.apply(answer, value, *tensors)  # type: ignore[no-untyped-call]
        self.value = value
        return value


class _Loss(torch.autograd.Function):
    """The loss forward; the gradients that came with it, times the incoming one, backward."""

    @staticmethod
    def forward(ctx: Any, answer: LossAnswer, value: Tensor, *tensors: Tensor) -> Tensor:
        """The loss, as it came."""
        ctx.grads = [
            None if grad is None else grad.to(tensor.device)
            for grad, tensor in zip(answer.grad_inputs, tensors, strict=True)
        ]
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """The gradients of the inputs."""
        refuse_second_order()
        return None, None, *(None if own is None else own * grads[0] for own in ctx.grads)
