"""Invariant 6, A true mean: k small batches are the one large batch, in any order and however often they arrive."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from bodies import sandwich
from harness import Split, Wire, assert_close, assert_same
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import splitfed
from splitfed.protocol import messages, packing

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd_momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-2, momentum=0.5, centered=True),
}
SIZES = {"a": [3, 5], "b": [1], "c": [2, 7, 4]}


def model(dtype: torch.dtype = torch.float64, dropout: float = 0.0) -> nn.Module:
    """A body with three layers; dropout only where each batch keeps its own masks."""
    torch.manual_seed(0)
    noise = [nn.Dropout(dropout)] if dropout else []
    return sandwich(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), *noise, nn.Linear(8, 8))).to(dtype)


def clients(split: Split, names: str = "abc") -> dict[str, splitfed.SplitClient]:
    """A client for each name, with halves of the same weights."""
    return {n: splitfed.SplitClient(splitfed.split(model(), split.at)[0], split.wire, n) for n in names}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_small_batches_equal_the_large_batch(name: str, tmp_path: Path) -> None:
    """Six batches of unequal size by three clients commit what one batch of all their examples does, four times."""
    small, large = (Split(model(), "body", tmp_path / size, optimizer=OPTIMIZERS[name]) for size in ("small", "large"))
    many = clients(small)
    for _ in range(4):
        whole: list[tuple[Tensor, Tensor]] = []
        for client, sizes in SIZES.items():
            for size in sizes:
                x, y = torch.randn(size, 6, dtype=torch.float64), torch.randn(size, 3, dtype=torch.float64)
                mse_loss(many[client](x), y).backward()
                whole.append((x, y))
        x, y = (torch.cat(side) for side in zip(*whole, strict=True))
        mse_loss(large.client(x), y).backward()
        commits = [split.accumulator.step() for split in (small, large)]
        assert [commit and (commit.num_batches, commit.num_samples) for commit in commits] == [(6, 22), (1, 22)]
    assert_close(small.store.load_weights(), large.store.load_weights(), 1e-12)
    before, after = small.store.load_weights(0), small.store.load_weights()
    assert min(float((after[n] - before[n]).abs().max()) for n in after) > 1e-3


BATCHES = 35  # of each client: more than one group of 32


def arrive(split: Split, order: list[str], wire: Wire | None = None) -> dict[str, Tensor]:
    """Batches of three clients in this order, each always with the same data and masks; then two commits."""
    many = clients(split)
    numbers = dict.fromkeys(many, 0)
    for name in order:
        numbers[name] += 1
        torch.manual_seed(1_000 * ord(name) + numbers[name])
        size = 1 + numbers[name] % 5
        mse_loss(many[name].to(torch.float32)(torch.randn(size, 6)), torch.randn(size, 3)).backward()
        if sum(numbers.values()) == len(order) - 3:
            split.accumulator.step()
    commit = split.accumulator.step()
    assert commit is not None
    assert commit.num_batches == 3
    return split.store.load_weights()


def momentum(params: Any) -> torch.optim.Optimizer:
    """An optimizer that keeps every difference."""
    return torch.optim.SGD(params, lr=0.5, momentum=0.9)


def one_by_one() -> list[str]:
    """Batches in the clients' order, the last of each at the end."""
    return ["a"] * (BATCHES - 1) + ["b"] * (BATCHES - 1) + ["c"] * (BATCHES - 1) + ["a", "b", "c"]


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    """The weights when batches arrive client by client, each request once."""
    return arrive(Split(model(torch.float32, 0.3), "body", "memory://invariant-06", optimizer=momentum), one_by_one())


@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_arrival_changes_no_bit(seed: int, expected: dict[str, Tensor], tmp_path: Path) -> None:
    """Batches of three clients in any interleaving commit the same bits, in float32 with dropout."""
    order = one_by_one()[:-3]
    random.Random(seed).shuffle(order)
    last = ["a", "b", "c"]
    random.Random(seed).shuffle(last)
    split = Split(model(torch.float32, 0.3), "body", f"memory://{tmp_path.name}", optimizer=momentum)
    assert_same(arrive(split, order + last), expected)


class Doubled(Wire):
    """Sends every request twice; the client gets the last answer."""

    first = False

    def send(self, method: str, request: Any) -> Any:
        """Both answers say the same."""
        answers = [super(Doubled, self).send(method, request) for _ in range(2)]
        if isinstance(request, messages.BackwardRequest):
            once, again = (b"".join(packing.pack(answer)) for answer in answers)
            assert once == again
        return answers[0 if self.first else 1]


class DoubledFirst(Doubled):
    """As `Doubled`, but the client gets the first answer: the second was on its way meanwhile."""

    first = True


class Late(Wire):
    """Delivers every request again, after the one that follows it has been answered."""

    held: tuple[str, Any] | None = None

    def send(self, method: str, request: Any) -> Any:
        """What the late copy is answered reaches nobody; it may only say that it is late."""
        answer = super().send(method, request)
        late, self.held = self.held, (method, request)
        if late is not None:
            with suppress(splitfed.ProtocolError, splitfed.ExpiredError):
                super().send(*late)
        return answer


WIRES = pytest.mark.parametrize("wire", [Doubled, DoubledFirst, Late])


@WIRES
@pytest.mark.parametrize("keep_graphs", [0, 8])
def test_requests_that_arrive_twice_change_no_bit(
    wire: type[Wire], keep_graphs: int, expected: dict[str, Tensor], tmp_path: Path
) -> None:
    """Every request is delivered twice, at once or late: each batch counts once, and the bits are the same."""
    url = f"memory://{tmp_path.name}"
    split = Split(model(torch.float32, 0.3), "body", url, wire=wire, keep_graphs=keep_graphs, optimizer=momentum)
    assert_same(arrive(split, one_by_one()), expected)
    counted = [split.store.lineage().commit(version) for version in (1, 2)]
    assert [commit.num_batches for commit in counted] == [3 * (BATCHES - 1), 3]
    assert sum(commit.num_samples for commit in counted) == 3 * sum(1 + n % 5 for n in range(1, BATCHES + 1))


@WIRES
def test_losses_and_pushes_that_arrive_twice_count_once(wire: type[Wire], tmp_path: Path) -> None:
    """So it is for client.loss and client.push, the very first request of a client's process included."""
    plain = nn.Sequential(nn.Linear(6, 8), nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.3), nn.Linear(8, 3)))
    data = [(torch.randn(4, 6), torch.randn(4, 3)) for _ in range(3)]
    found = []
    for kind in (Wire, wire):
        torch.manual_seed(7)
        url = f"memory://{tmp_path.name}-{kind.__name__}"
        split = Split(plain, "1", url, wire=kind, optimizer=momentum, loss_fn=mse_loss)
        halves = splitfed.Accumulator(split.half, split.store, lambda p: torch.optim.SGD(p, lr=1.0), lineage="client")
        client = splitfed.SplitClient(split.half, split.wire, "b")
        local = momentum(client.parameters())
        for commits, (x, y) in enumerate(data, 1):
            assert client.pull() == commits - 1
            local.zero_grad()
            client.loss(x, y).backward()
            local.step()
            client.push()
            for accumulator in (split.accumulator, halves):
                commit = accumulator.step()
                assert commit is not None
                assert (commit.version, commit.num_batches, commit.num_samples) == (commits, 1, 4)
        found.append(split.store.load_weights() | split.store.load_weights(lineage="client"))
    assert_same(*found)
