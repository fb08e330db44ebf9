"""Bodies that set attributes: who only writes is served, who goes on from them refused, and nobody gets another's."""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable
from typing import Any

import pytest
import stateful
import torch
from bodies import sandwich
from torch import Tensor, nn

import splitfed
from splitfed.errors import ReplayError, UnsupportedError
from splitfed.model import execution
from splitfed.model.rng import has_compute_lock, seeded
from splitfed.server import probe


class Clients:
    """Some clients of one server of a model whose body is given."""

    def __init__(self, body: nn.Module, **settings: Any) -> None:
        torch.manual_seed(0)
        self.model = sandwich(body)
        self.half, self.body = splitfed.split(self.model, "body")
        self.store = splitfed.GradientStore(f"memory://{uuid.uuid4()}", sync="process")
        self.server = splitfed.SplitServer(self.body, self.store, **settings)

    def client(self, name: str = "a") -> splitfed.SplitClient:
        """One of them."""
        return splitfed.SplitClient(self.half, self.server, client_id=name)


def trained(client: splitfed.SplitClient, times: int = 3) -> None:
    """Some steps on batches of different sizes."""
    for number in range(times):
        client(torch.randn(4 + number, 6)).pow(2).sum().backward()


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", stateful.dependent())
def test_a_body_that_goes_on_from_what_a_call_left_is_refused(name: str, train: bool) -> None:
    """At its first call, by attribute and class, with the way out; nothing waits, and it stays refused."""
    made = Clients(stateful.dependent()[name])
    client = made.client().train(train)
    for _ in range(3):
        with pytest.raises(UnsupportedError, match=rf"earlier call left in '{name}' \(Calls\).*register_buffer"):
            client(torch.randn(4, 6))
    assert made.store.waiting() == []


@pytest.mark.parametrize("forward", [stateful.in_the_gradient, stateful.of_a_backward, stateful.of_the_first_batch])
def test_state_that_shows_later_is_refused_then(forward: Callable[..., Tensor]) -> None:
    """In the gradients alone; only after a backward; only with another batch of the same client."""
    start = None if forward is stateful.of_the_first_batch else 1.0
    client = Clients(stateful.body(forward, scale=start)).client()
    with pytest.raises(UnsupportedError, match="what an earlier call left in 'scale'"):
        trained(client)


@pytest.mark.parametrize("name", stateful.independent())
def test_a_body_that_only_writes_is_served(name: str) -> None:
    """As `reference` computes it, without a warning; the answers say which attribute it sets."""
    made = Clients(stateful.independent()[name])
    client, plain = made.client(), splitfed.reference(made.model, "body")
    for number in range(5):
        x = torch.randn(4 + number, 6)
        state = torch.get_rng_state()
        got = client(x)
        got.sum().backward()
        torch.set_rng_state(state)
        assert torch.equal(got, plain(x))
    assert made.server._lines.of("a").runner.written() == (name,)
    assert len(made.store.waiting()) == 5


@pytest.mark.parametrize("name", stateful.counting())
def test_a_body_that_counts_on_unseen_is_warned_of_once(name: str) -> None:
    """No answer shows it, so it is served; but each call starts with the first value."""
    made = Clients(stateful.counting()[name])
    with pytest.warns(UserWarning, match=f"counts on from call to call in '{name}'") as told:
        trained(made.client(), 4)
    assert len(told) == 1
    assert len(made.store.waiting()) == 4


def test_each_owner_gets_what_its_own_model_would_answer() -> None:
    """A layer that keeps its first graph: the second owner's outputs are of its own."""

    class Cached(nn.Linear):
        kept: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            if self.kept is None:
                self.kept = x.detach().T @ x.detach()
            return super().forward(x) @ self.kept

    made = Clients(Cached(8, 8))
    for name in ("a", "b", "c"):
        x = torch.randn(4, 6)
        client = made.client(name)
        for _ in range(2):
            assert torch.equal(client(x), splitfed.reference(made.model, "body")(x))


class _OfTheClass(nn.Linear):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        type(self).calls += 1
        return super().forward(x) * type(self).calls


class _OfTheProcess(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + random.random()


class _InItsBackward(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        y.register_hook(lambda grad: grad * random.random())
        return y


@pytest.mark.parametrize(
    ("kind", "said"),
    [(_OfTheClass, "gave other outputs"), (_OfTheProcess, "gave other outputs"), (_InItsBackward, "other gradients")],
)
def test_state_elsewhere_is_found_at_the_first_backward(kind: type[nn.Linear], said: str) -> None:
    """Though the graph is kept, the first backwards are recomputed: of a class, of Python's own generator."""
    made = Clients(kind(8, 8))
    client = made.client()
    with pytest.raises(ReplayError, match=said):
        client(torch.randn(4, 6)).sum().backward()
    assert made.store.waiting() == []


def test_a_hook_that_draws_with_torch_in_the_backward_is_served() -> None:
    """No seed is on record for a backward, so its draws aren't compared; and the generator is left as it was."""

    class Noisy(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            y.register_hook(lambda grad: grad + torch.randn_like(grad))
            return y

    trained(Clients(Noisy(8, 8)).client())


def test_only_some_backwards_are_recomputed() -> None:
    """Numbers 1, 2 and 8, ever more seldom: a forward runs once for each call, and once more for those."""
    runs: list[int] = []
    made = Clients(stateful.body(lambda m, y: runs.append(1) or y))
    client = made.client()
    for number in range(1, 21):
        client(torch.randn(4, 6)).sum().backward()
        assert len(runs) == number + sum(number >= checked for checked in (1, 2, 8))


def test_a_loss_on_the_server_is_recomputed_too() -> None:
    """Its forward is on no record, but a retry must give the same."""
    torch.manual_seed(0)
    half, body = splitfed.split(nn.Sequential(nn.Linear(6, 8), _OfTheProcess(8, 8)), "1")
    store = splitfed.GradientStore(f"memory://{uuid.uuid4()}", sync="process")
    server = splitfed.SplitServer(body, store, loss_fn=nn.functional.mse_loss)
    client = splitfed.SplitClient(half, server, client_id="a")
    with pytest.raises(ReplayError, match="gave other outputs"):
        client.loss(torch.randn(4, 6), torch.randn(4, 8))
    assert store.waiting() == []


def test_generators_are_seeded_under_the_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for the first backwards of kept graphs, which run again: another thread draws from the same generator."""
    held: list[bool] = []

    class Watched(seeded):
        def __enter__(self) -> seeded:
            held.append(has_compute_lock())
            return super().__enter__()

    for module in (execution, probe):
        monkeypatch.setattr(module, "seeded", Watched)
    trained(Clients(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5))).client(), 1)
    assert len(held) >= 3  # the forward, and its replay with a backward
    assert all(held)
