"""Plain split learning in one trip: activations and labels there, loss and gradients back.

For models that end at their cut. The server computes the loss, so the labels leave the client; in
return a batch costs one request. The gradient counts when it is answered, at the forward:
`backward()` of the loss only passes it on.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from splitfed.client.calls import Session, dummy, refuse_second_order
from splitfed.errors import CutError, SplitFedError
from splitfed.model.arguments import check_fit
from splitfed.model.cutpoint import Called
from splitfed.model.promise import settled
from splitfed.model.rng import Seed
from splitfed.protocol import pytree
from splitfed.protocol.messages import LossAnswer, LossRequest


class LossSession(Session):
    """One `client.loss(...)` call.

    The request is made in the cut call, and sent once the half has ended with it: were it sent at
    once, the gradient of a half that computes further would be counted before anybody could see
    that it is a wrong one.
    """

    target: Any = None
    _pending: tuple[LossRequest, list[Tensor], Seed] | None = None

    def call(self, point: Called, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make the request, and answer a stand-in for the loss.

        Raises:
            CutError: the half has more than one cut call.
            ContainerError: an argument or the target can't cross.
        """
        if self._pending is not None:
            raise CutError(
                "client.loss() needs a client half that ends at its one cut, "
                "and this one calls several"
            )
        check_fit("the target", self.target, pytree.flatten(self.target)[1])
        seed = Seed()
        ahead, tensors = self.request(point, args, kwargs, seed, None)
        samples = self.num_samples
        if self.scope is not None and self.scope.weigher is not None:
            samples = self.scope.weigher.said
        said = None if self.scope is None else self.scope.count
        counted = self.counts if said is None else said
        request = LossRequest(ahead, 0, self.target, samples, counted)
        self._pending = request, tensors, seed
        self._stand_in = torch.empty(0, device="cpu")
        return self._stand_in

    def finish(self, half: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Run the half, send activations and labels, and return the loss.

        Raises:
            CutError: the half doesn't end at its one cut.
        """
        try:
            ended = self._ends_at_cut(half, args, kwargs)
        except BaseException:
            if self._pending is not None:
                self._pending[2].put_back()
            raise
        if not ended or self._pending is None:
            raise _not_at_cut()
        request, tensors, seed = self._pending
        answer = self._send(request)
        if not answer.drew:
            seed.put_back()
        self.connection.opened(answer.incarnation, answer.version)
        value = answer.loss.to(tensors[0].device) if tensors else answer.loss
        if request.forward.grad:
            value = _Loss.apply(answer, value, dummy(), *tensors)  # type: ignore[no-untyped-call]
        return value

    def _send(self, request: LossRequest) -> LossAnswer:
        """The server's answer; a batch that counts is numbered here, and given up if none comes."""
        ahead = request.forward
        counts = ahead.grad and ahead.training and request.counted
        if counts:
            self.passes.note_loss()
            self.connection.doubt(self)
        scale = None if self.scope is None else self.scope.loss_scale
        if scale is None:
            # Asked for before the request: a wrong one raises while nothing has counted yet.
            scale = self.connection.scale()
        seq = self.connection.number("batch") if counts else 0
        try:
            with self.connection.housekeeping() as notes:
                repeats = None
                if counts and ahead.version is None:
                    repeats = self.connection.ahead(seq)
                ahead = replace(ahead, housekeeping=notes, repeats=repeats)
                answer = self.connection.transport.loss(replace(request, seq=seq, forward=ahead))
        except BaseException:
            if counts:
                self.connection.abandon(seq)
            raise
        self.connection.note_repeated(ahead.repeats, answer.repeated)
        if counts:
            self.connection.answered(seq)
            self.connection.note_status(answer.status, request.num_samples, scale)
            self.connection.buffers.close(answer.version, stored=answer.status == "stored")
            watch = self.passes.watch
            watch.note_pass(scale)
            watch.note_batch(
                answer.status,
                answer.version,
                says_scale=self.connection.scale_is_said(self.scope),
            )
        return answer

    def _ends_at_cut(self, half: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        try:
            with self:
                return settled(half(*args, **kwargs)) is getattr(self, "_stand_in", None)
        except SplitFedError:
            raise
        except Exception as error:
            if self._pending is None:
                raise
            raise _not_at_cut() from error


def _not_at_cut() -> CutError:
    return CutError(
        "client.loss() needs a client half that ends at its cut, and this one computes further: "
        "call client(x)"
    )


class _Loss(torch.autograd.Function):
    """The loss forward; the gradients that came with it, times the incoming one, backward."""

    @staticmethod
    def forward(
        ctx: Any, answer: LossAnswer, value: Tensor, dummy: Tensor, *tensors: Tensor
    ) -> Tensor:
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
        return None, None, None, *(None if own is None else own * grads[0] for own in ctx.grads)
