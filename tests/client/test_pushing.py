"""push(gradient=True): the mean gradient of a half that took no step, whatever its losses were scaled by."""

from __future__ import annotations

import uuid
from typing import Any

import pytest
import torch
from harness import Wire
from torch import Tensor, nn

import splitfed
from splitfed.errors import InputError, StoreError
from splitfed.protocol.messages import GradientRecord, PushAnswer, PushRequest


class Lossy(Wire):
    """Loses the reply to a push when told to."""

    lose = False

    def push(self, request: PushRequest, /) -> PushAnswer:
        """Pass it on."""
        answer = self.send("push", request)
        if self.lose:
            self.lose = False
            raise StoreError("the reply was lost")
        return answer


class Site:
    """One client with the number 1 before the cut, and 1 behind it: with loss ½(x − y)² the gradient is 1 − y."""

    def __init__(self, loss_scale: Any = 1.0, *extra: nn.Module) -> None:
        self.store = splitfed.GradientStore(f"memory://{uuid.uuid4()}")
        body = number()
        self.wire = Lossy(splitfed.SplitServer(body, self.store, loss_fn=halved_square))
        self.half = nn.Sequential(number(), *extra, splitfed.CutPoint())
        self.client = splitfed.SplitClient(self.half, self.wire, "a", loss_scale=loss_scale)
        self.client.pull()

    def backward(self, target: float, samples: int = 1, scale: float = 1.0) -> None:
        """One backward pass of the mean loss, times `scale`."""
        x = torch.ones(samples, 1, dtype=torch.float64)
        (halved_square(self.client(x), torch.full_like(x, target)) * scale).backward()

    def pushed(self) -> list[GradientRecord]:
        """What waits in the halves' pile."""
        pile = self.store.pile("client")
        return [record for batch in self.store.waiting("client") if (record := pile.read(batch)) is not None]

    def mean(self) -> float:
        """What one commit takes for the gradient: with SGD at rate 1 the weight goes from 1 to 1 − mean."""
        splitfed.Accumulator(self.half, self.store, lambda p: torch.optim.SGD(p, lr=1.0), lineage="client").step()
        return 1 - self.store.load_weights(lineage="client")["0.weight"].item()

    def lost_push(self) -> None:
        """A push that arrives and whose reply doesn't."""
        self.wire.lose = True
        with pytest.raises(StoreError, match="reply was lost"):
            self.client.push(gradient=True)


def number() -> nn.Module:
    """The number 1."""
    made = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    nn.init.ones_(made.weight)
    return made


def halved_square(outputs: Tensor, target: Tensor) -> Tensor:
    """½ of the mean squared error."""
    return (outputs - target).pow(2).mean() / 2


def test_a_gradient_is_published_with_its_samples_and_its_base() -> None:
    """1 − (−2) = 3 over four samples, and the half is left where it was."""
    site = Site()
    site.backward(-2.0, samples=4)
    site.client.push(gradient=True)
    (record,) = site.pushed()
    assert (record.gradients["0.weight"].item(), record.num_samples, record.base_version) == (3.0, 4.0, 0)
    assert site.half[0].weight.item() == 1.0
    assert site.mean() == 3.0
    assert site.client.pull() == 1
    assert site.half[0].weight.item() == -2.0


@pytest.mark.parametrize(
    ("loss_scale", "scales"),
    [(1.0, (1.0, 1.0)), (0.5, (0.5, 0.5)), (1024.0, (1024.0, 1024.0)), (lambda: 0.5, (0.5, 0.5))],
    ids=["unscaled", "by_their_number", "grad_scaler", "function"],
)
def test_accumulated_gradients_are_their_mean_however_losses_were_scaled(loss_scale: Any, scales: Any) -> None:
    """Gradients 1 and 3 of two batches of four add up in .grad; what counts is 2, with eight samples."""
    site = Site(loss_scale)
    for target, scale in zip((0.0, -2.0), scales, strict=True):
        site.backward(target, 4, scale)
    site.client.push(gradient=True)
    assert site.pushed()[0].num_samples == 8
    assert site.mean() == 2.0


def test_losses_scaled_by_their_size_give_the_mean_over_samples() -> None:
    """Summed losses of one and three samples: gradients 1 and 9 in .grad, over Σ λ = 4 that is (1 + 3·3)/4."""
    site = Site()
    for target, samples in ((0.0, 1), (-2.0, 3)):
        with site.client.batch(loss_scale=samples):
            site.backward(target, samples, scale=samples)
    site.client.push(gradient=True)
    assert site.pushed()[0].num_samples == 4
    assert site.mean() == 2.5


def test_a_loss_in_one_trip_counts_too() -> None:
    """client.loss(x, y) scaled by the user: 3 over eight samples."""
    site = Site(4.0)
    x = torch.ones(8, 1, dtype=torch.float64)
    (site.client.loss(x, torch.full_like(x, -2.0)) * 4).backward()
    site.client.push(gradient=True)
    assert site.pushed()[0].num_samples == 8
    assert site.mean() == 3.0


def test_a_scale_counts_once() -> None:
    """After a push the sum of scales begins anew, as the samples do."""
    site = Site(2.0)
    for target in (0.0, -2.0):
        site.client.zero_grad()
        site.backward(target, scale=2.0)
        site.client.push(gradient=True)
    assert [record.loss_scale for record in site.pushed()] == [2.0, 2.0]
    assert site.mean() == 2.0


def test_a_parameter_without_a_gradient_is_left_out() -> None:
    """It keeps its weight and its optimizer state; buffers go along."""
    site = Site(1.0, nn.BatchNorm1d(1, dtype=torch.float64))
    site.half[1].bias.requires_grad_(True)
    site.backward(0.0, 2)
    site.half[0].weight.grad = None
    site.client.push(gradient=True)
    (record,) = site.pushed()
    assert list(record.gradients) == ["1.weight", "1.bias"]
    assert set(record.buffers[0].values) == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}


def test_a_push_without_batches_needs_a_weight_and_takes_the_clients_scale() -> None:
    """The gradient may come from the half alone: 6 with loss scale 2 is 3."""
    site = Site(2.0)
    site.half[0].weight.grad = torch.full((1, 1), 6.0, dtype=torch.float64)
    with pytest.raises(InputError, match=r"would count 0\.0 samples"):
        site.client.push(gradient=True)
    site.client.push(7, gradient=True)
    assert site.mean() == 3.0


def test_a_push_without_a_gradient_is_refused() -> None:
    """Nothing was learned."""
    site = Site()
    with pytest.raises(InputError, match=r"no shared parameter has a gradient: call loss.backward\(\) before"):
        site.client.push(1, gradient=True)
    assert site.pushed() == []


def test_a_half_that_has_moved_publishes_no_gradient() -> None:
    """It is the gradient of a place where nobody else is; the change can be published."""
    site = Site()
    site.backward(0.0)
    torch.optim.SGD(site.client.parameters(), lr=0.5).step()
    with pytest.raises(InputError, match=r"the half has moved since it was pulled.*take no local step"):
        site.client.push(gradient=True)
    site.client.push()
    assert site.mean() == 0.5


def test_a_gradient_that_isnt_finite_is_rejected() -> None:
    """Warned of, and closed as rejected with the next commit."""
    site = Site()
    site.half[0].weight.grad = torch.full((1, 1), torch.inf, dtype=torch.float64)
    with pytest.warns(UserWarning, match="'a' isn't finite"):
        site.client.push(1, gradient=True)
    assert [record.kind for record in site.pushed()] == ["rejected"]


def test_a_gradient_whose_reply_was_lost_counts_once() -> None:
    """The user pushes again: one batch."""
    site = Site()
    site.backward(-2.0)
    site.lost_push()
    site.client.push(gradient=True)
    assert len(site.pushed()) == 1
    assert site.mean() == 3.0


@pytest.mark.parametrize("target", [-2.0, 0.0], ids=["the_same", "another"])
def test_the_batch_after_a_lost_push_counts_too(target: float) -> None:
    """The loop goes on with the next batch, though its gradient may be the very same: two batches."""
    site = Site()
    site.backward(-2.0)
    site.lost_push()
    site.client.zero_grad()
    site.backward(target)
    site.client.push(gradient=True)
    assert len(site.pushed()) == 2
    assert site.mean() == (3 + 1 - target) / 2


def test_another_gradient_without_batches_after_a_lost_push_counts_too() -> None:
    """Told apart by its content when no batch tells."""
    site = Site()
    site.half[0].weight.grad = torch.ones(1, 1, dtype=torch.float64)
    site.wire.lose = True
    with pytest.raises(StoreError):
        site.client.push(1, gradient=True)
    site.half[0].weight.grad = torch.full((1, 1), 5.0, dtype=torch.float64)
    site.client.push(1, gradient=True)
    assert site.mean() == 3.0
