"""client.loss(x, y): one request carries activations and labels there, and gradients and loss back."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from bodies import Calls, twice
from harness import Wire, assert_same, gradients, replay_rng
from harness_requests import ONES, Site, X, ahead, body
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import splitfed
from splitfed.errors import BodyError, CutError, DigestError, InputError
from splitfed.protocol.messages import LossAnswer, LossRequest
from splitfed.server.server import SplitServer


def memory() -> str:
    """The URL of an empty store in memory."""
    return f"memory://{uuid.uuid4()}"


def model() -> nn.Module:
    """A model that ends at its cut, with dropout in the body."""
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.Dropout(0.3), nn.Linear(8, 3))


class Losing(Wire):
    """Loses an answer now and then, and asks again with the same request, as a network client would."""

    lose = 0

    def loss(self, request: LossRequest, /) -> LossAnswer:
        """Ask so many times more than needed."""
        for _ in range(self.lose):
            self.send("loss", request)
        return self.send("loss", request)


class Trip:
    """A client whose server computes the loss."""

    def __init__(self, net: nn.Module, at: str, loss_fn: Any = cross_entropy, **settings: Any) -> None:
        self.half, self.body = splitfed.split(net, at)
        self.store = splitfed.GradientStore(memory())
        self.server = SplitServer(self.body, self.store, loss_fn=loss_fn, **settings)
        self.wire = Losing(self.server)
        self.client = splitfed.SplitClient(self.half, self.wire, "a")
        self.accumulator = splitfed.Accumulator(self.body, self.store, lambda p: torch.optim.Adam(p, lr=0.01))


def data(count: int = 3) -> list[tuple[Tensor, Tensor]]:
    """Batches and their labels."""
    return [(torch.randn(8, 6), torch.randint(0, 3, (8,))) for _ in range(count)]


@pytest.mark.parametrize("lose", [0, 1], ids=["", "lost_reply"])
@pytest.mark.parametrize("factor", [1.0, 0.25], ids=["", "scaled"])
def test_it_equals_the_plain_loop(factor: float, lose: int) -> None:
    """Loss, the client's gradients and committed weights have the reference loop's bits, also when asked twice."""
    trip, reference = Trip(model(), "2:"), splitfed.reference(model(), "2:")
    reference.load_state_dict(splitfed.join(trip.client, trip.body.state_dict()).state_dict())
    trip.wire.lose = lose
    own = torch.optim.Adam(trip.client.parameters(), lr=0.01)
    plain = torch.optim.Adam(reference.parameters(), lr=0.01)
    for x, y in data():
        rewind = replay_rng()
        loss = trip.client.loss(x, y)
        own.zero_grad()
        (loss * factor).backward()
        rewind()
        expected = cross_entropy(reference(x), y)
        plain.zero_grad()
        (expected * factor).backward()
        assert torch.equal(loss, expected)
        assert_same(
            gradients(trip.client),
            {n: g for n, g in gradients(reference).items() if n in "0.weight 0.bias 1.weight 1.bias"},
        )
        for name, parameter in reference.named_parameters():  # the server knows nothing of the factor
            if name not in dict(trip.client.named_parameters()) and parameter.grad is not None:
                parameter.grad /= factor
        own.step()
        plain.step()
        commit = trip.accumulator.step()
        assert commit is not None
        assert (commit.num_batches, commit.num_samples) == (1, 8)
        assert_same(splitfed.join(trip.client, trip.store.load_weights()).state_dict(), reference.state_dict())


@pytest.mark.parametrize("how", ["no_grad", "eval"])
def test_evaluation_counts_nothing(how: str) -> None:
    """Under no_grad nothing is stored; in eval mode gradients reach the client and no batch waits."""
    net = model().eval()
    trip = Trip(net, "2:")
    ((x, y),) = data(1)
    before = trip.store.blobs.list("")
    if how == "no_grad":
        with torch.no_grad():
            loss = trip.client.loss(x, y)
        assert not loss.requires_grad
        assert trip.store.blobs.list("") == before
    else:
        loss = trip.client.loss(x, y)
        loss.backward()
        assert all(parameter.grad is not None for parameter in trip.client.parameters())
    assert torch.equal(loss, cross_entropy(net(x), y))
    assert trip.store.waiting() == []


@pytest.mark.parametrize("bottom", ["frozen", "empty"])
def test_a_bottom_without_parameters_to_train(bottom: str) -> None:
    """`backward()` does what it would locally: nothing at the client, and the body's gradient counts."""
    trip = Trip(model(), "2:" if bottom == "frozen" else "")
    trip.half.requires_grad_(False)
    ((x, y),) = data(1)
    trip.client.loss(x, y).backward()
    assert [(c.num_batches, c.num_samples) for c in [trip.accumulator.step()] if c] == [(1, 8)]


CONTINUING: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "scaled": (lambda: Calls(lambda m, x: m.b(m.a(x)) * 2, a=nn.Linear(6, 6), b=nn.Linear(6, 3)), "b"),
    "layer": (
        lambda: Calls(
            lambda m, x: m.c(m.b(m.a(x)).unsqueeze(-1)), a=nn.Linear(6, 6), b=nn.Linear(6, 3), c=nn.Linear(1, 1)
        ),
        "b",
    ),
    "raises": (lambda: nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)), "1"),
    "twice": (lambda: twice(nn.Linear(8, 8)), "body"),
    "never": (lambda: Calls(lambda m, x: m.a(x), a=nn.Linear(6, 6), b=nn.Linear(6, 3)), "b"),
}


@pytest.mark.parametrize(("net", "at"), CONTINUING.values(), ids=CONTINUING)
def test_a_half_that_doesnt_end_at_its_cut_is_refused(net: Callable[[], nn.Module], at: str) -> None:
    """Before anything counts: a gradient of half of the model would be a wrong one."""
    trip = Trip(net(), at, loss_fn=lambda out, target: out.sum())
    with pytest.raises(
        (CutError, RuntimeError), match=r"client\.loss\(\) needs a client half that ends at|at least 1D"
    ):
        trip.client.loss(torch.randn(2, 6), None)
    assert trip.store.waiting() == []


def test_it_takes_a_target() -> None:
    """The last positional argument, of any kind; without one there is no loss."""
    trip = Trip(model(), "2:", loss_fn=lambda out, target: out.pow(2).mean() * target["weight"])
    with pytest.raises(InputError, match="inputs and then the target: expected at least 2 arguments, got 1"):
        trip.client.loss(torch.randn(2, 6))
    assert trip.client.loss(torch.randn(2, 6), {"weight": 0}).tolist() == 0


@pytest.mark.parametrize(("scope", "samples"), [(None, 8), (32, 32)])
def test_what_it_counts(scope: float | None, samples: float) -> None:
    """The leading dimension of the first input, or what client.batch() says."""
    trip = Trip(model(), "2:")
    ((x, y),) = data(1)
    with trip.client.batch(scope):
        trip.client.loss(x, y)
    commit = trip.accumulator.step()
    assert commit is not None
    assert commit.num_samples == samples


def test_a_loss_that_isnt_finite_is_rejected() -> None:
    """As autograd would answer it, and closed as rejected; warned of once."""
    trip = Trip(model(), "2:", loss_fn=lambda out, target: out.sum() * float("nan"))
    with pytest.warns(UserWarning, match="isn't finite"):
        loss = trip.client.loss(torch.randn(2, 6), None)
    loss.backward()
    assert bool(trip.half[0].weight.grad.isnan().all())
    trip.client.loss(torch.randn(2, 6), None)
    assert [record["kind"] for record in map(trip.store.pile().peek, trip.store.waiting()) if record] == [
        "rejected"
    ] * 2


def test_second_derivatives_cant_cross() -> None:
    """The same error as for any other call."""
    trip = Trip(model(), "2:")
    ((x, y),) = data(1)
    with pytest.raises(splitfed.UnsupportedError, match="create_graph=True can't cross the cut"):
        torch.autograd.grad(trip.client.loss(x, y), list(trip.client.parameters()), create_graph=True)


@pytest.mark.parametrize(
    ("loss_fn", "error", "said"),
    [
        (None, InputError, r"computes no loss: give it one, SplitServer\(body, store, loss_fn=...\)"),
        (lambda out, target: out, InputError, "loss_fn returned Tensor: expected a tensor with one element"),
        (lambda out, target: (out.sum(),), InputError, "loss_fn returned tuple"),
        (lambda out, target: 3.0, InputError, "loss_fn returned float"),
        (lambda out, target: out.sum() / {}[target], BodyError, "the body raised KeyError: 5"),
    ],
    ids=["none", "vector", "tuple", "float", "raises"],
)
def test_a_loss_that_cant_be_is_refused(loss_fn: Any, error: type[Exception], said: str) -> None:
    """A server without one, one that isn't a scalar, and one that raises; nothing is stored."""
    site = Site(memory())
    server = SplitServer(body(), site.store, loss_fn=loss_fn)
    with pytest.raises(error, match=said):
        server.loss(LossRequest(ahead(), 0, 5, 2.0))
    assert site.store.waiting() == []


def total(out: Tensor, target: Any) -> Tensor:
    """Σ out · target."""
    return (out * target).sum()


CHANGED = {
    "target": {"target": 4.0},
    "target_tensor": {"target": ONES},
    "samples": {"num_samples": 3.0},
    "inputs": {"forward": ahead(incarnation=1, inputs=((X + 1,), {}))},
    "seed": {"forward": ahead(incarnation=1, seed=8)},
}


@pytest.mark.parametrize("changes", CHANGED.values(), ids=CHANGED)
def test_a_loss_is_counted_once_and_only_as_it_was(changes: dict[str, Any]) -> None:
    """A retry gets the same bits, also after a commit; another content under its number is refused."""
    site = Site(memory(), loss_fn=total)
    first = site.server.loss(LossRequest(ahead(), 0, 3.0, 2.0))
    request = LossRequest(ahead(incarnation=1), 0, 3.0, 2.0)
    with pytest.raises(DigestError, match="batch a/1/0"):
        site.other.loss(replace(request, **changes))
    site.commit()
    again = site.other.loss(request)
    assert (first.status, again.status, again.version) == ("stored", "stored", 0)
    assert torch.equal(again.loss, first.loss)
    assert torch.equal(again.grad_inputs[0], first.grad_inputs[0])  # type: ignore[arg-type]
    assert site.store.waiting() == []
