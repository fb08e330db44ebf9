"""pull and push: FedAvg of client halves with numbers worked by hand, and everything that can go wrong with it."""

from __future__ import annotations

import math
import uuid
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import splitfed
from splitfed.errors import ArchitectureError, InputError, SupersededError
from splitfed.protocol.messages import frozen_digest
from splitfed.simulation.traffic import Meter


def half(value: float = 0.0) -> nn.Module:
    """One weight, one frozen weight and a BatchNorm before the cut."""
    made = nn.Sequential(nn.Linear(1, 1, bias=False), nn.BatchNorm1d(1), splitfed.CutPoint())
    made.register_parameter("frozen", nn.Parameter(torch.tensor(7.0), requires_grad=False))
    with torch.no_grad():
        made[0].weight.fill_(value)
    return made


class Federation:
    """A store, a server, and whoever averages the halves."""

    def __init__(self) -> None:
        self.store = splitfed.GradientStore(f"memory://{uuid.uuid4()}")
        self.body = nn.Linear(1, 1)
        self.server = splitfed.SplitServer(self.body, self.store)

    def sgd(self, params: Any) -> torch.optim.Optimizer:
        """What makes the commit FedAvg."""
        return torch.optim.SGD(params, lr=1.0)

    def client(self, name: str, value: float = 0.0) -> splitfed.SplitClient:
        """A client whose weight is `value`."""
        return splitfed.SplitClient(half(value), self.server, name)

    def average(self) -> splitfed.Commit | None:
        """One commit of the halves' lineage."""
        return splitfed.Accumulator(half(), self.store, self.sgd, lineage="client").step()

    def waiting(self) -> list[str]:
        """The pushes that wait."""
        return [str(batch) for batch in self.store.waiting("client")]


def weight(client: splitfed.SplitClient) -> float:
    """Its one weight."""
    return client.client_half[0].weight.item()


def learn(client: splitfed.SplitClient, step: float, mean: float = 0.0, updates: int = 0) -> None:
    """Move the weight by `step`, and the running mean to `mean` by so many updates."""
    with torch.no_grad():
        client.client_half[0].weight.add_(step)
        client.client_half[1].running_mean.fill_(mean)
        client.client_half[1].num_batches_tracked.add_(updates)


def test_the_first_pull_publishes_and_later_ones_copy() -> None:
    """Whoever comes first gives version 0; another's weights become the same, in place."""
    made = Federation()
    first, second = made.client("a", 3.0), made.client("b", 5.0)
    tensor = second.client_half[0].weight
    assert (first.pull(), second.pull()) == (0, 0)
    assert (first.version, second.version) == (0, 0)
    assert (weight(first), weight(second)) == (3, 3)
    assert second.client_half[0].weight is tensor
    assert made.store.latest_version("client") == 0
    assert list(made.store.load_weights(lineage="client")) == list(half().state_dict())


def test_two_clients_are_averaged_by_their_samples() -> None:
    """From 1: +3 with 10 samples and −1 with 30 give 1 + (10·3 − 30·1)/40 = 1; with 30 and 10: 1 + (90 − 10)/40 = 3."""
    made = Federation()
    a, b = made.client("a", 1.0), made.client("b")
    a.pull()
    b.pull()
    for samples, expected in (((10, 30), 1.0), ((30, 10), 3.0)):
        learn(a, 3.0)
        learn(b, -1.0)
        a.push(samples[0])
        b.push(samples[1])
        commit = made.average()
        assert commit is not None
        assert (commit.num_batches, commit.num_samples) == (2, 40)
        assert (a.pull(), b.pull()) == (commit.version, commit.version)
        assert (weight(a), weight(b)) == (expected, expected)
    assert float(a.client_half.frozen) == 7


def test_parameters_that_never_train_travel_once_at_most() -> None:
    """Not to who has them, once to who has others; a value of one's own is replaced by every pull, in place."""
    made = Federation()
    meter = Meter(made.server)
    clients = {name: splitfed.SplitClient(half(), meter, name) for name in "abc"}
    other = clients["c"].client_half.frozen
    with torch.no_grad():
        other.fill_(8.0)
    clients["a"].pull()  # publishes all of it
    moving = 4 + (4 + 4 + 4 + 4 + 8)  # the weight, and of BatchNorm: weight, bias, mean, variance, count
    assert meter.take()["a"] == (moving + 4, moving, 3)
    for expected in (moving + 4, moving):
        for name, down in (("b", moving), ("c", expected)):
            clients[name].pull()
            assert meter.take()[name] == (0, down, 1)
    assert (other is clients["c"].client_half.frozen, other.item()) == (True, 7.0)
    with torch.no_grad():
        other.fill_(9.0)
    learn(clients["c"], 2.0)
    clients["c"].push(1)
    assert meter.take()["c"].up == 4 + 4 + 4  # what trains
    made.average()
    clients["c"].pull()
    assert meter.take()["c"].down == moving
    assert (weight(clients["c"]), other.item()) == (2.0, 7.0)


def test_the_digest_of_frozen_parameters_is_the_one_on_record() -> None:
    """The hash of the file that holds them, which each commit names; no hash without one that is frozen and here."""
    made = Federation()
    made.client("a").pull()
    record = made.store.lineage("client").commit(0)
    assert frozen_digest({"frozen": torch.tensor(7.0)}) == record.frozen
    assert frozen_digest({"frozen": torch.tensor(8.0)}) != record.frozen
    assert frozen_digest({}) == frozen_digest({"frozen": torch.empty((), device="meta")}) == ""


def test_batchnorm_statistics_are_averaged_too() -> None:
    """Steps of momentum 0.1 to 0.1 and 0.3 saw 1 and 3; by samples 1:3 that is 2.5; two steps: 0.19·2.5 = 0.475."""
    made = Federation()
    a, b = made.client("a"), made.client("b")
    a.pull()
    b.pull()
    learn(a, 0.0, mean=0.1, updates=1)
    learn(b, 0.0, mean=0.3, updates=1)
    a.push(1)
    b.push(3)
    made.average()
    a.pull()
    assert a.client_half[1].running_mean.item() == pytest.approx(0.475, abs=1e-7)
    assert int(a.client_half[1].num_batches_tracked) == 2


def test_what_is_pushed_is_the_change_since_the_last_push_or_pull() -> None:
    """Two pushes of one pull count each change once: 1 + (2 + 4)/2 = 4."""
    made = Federation()
    client = made.client("a", 1.0)
    client.pull()
    for step in (2.0, 4.0):
        learn(client, step)
        client.push(1)
    assert made.waiting() == ["a/1/0", "a/1/1"]
    made.average()
    client.pull()
    assert weight(client) == 4


def train(client: splitfed.SplitClient, x: Tensor) -> None:
    """One backward pass."""
    client(x).sum().backward()


def test_a_push_counts_the_samples_since_the_last_one() -> None:
    """Of the batches that were stored; the user's optimizer keeps its state and its parameters."""
    made = Federation()
    client = made.client("a", 1.0)
    optimizer = torch.optim.Adam(client.parameters(), lr=0.1)
    client.pull()
    train(client, torch.randn(5, 1))
    train(client, torch.randn(3, 1))
    optimizer.step()
    moment = optimizer.state[client.client_half[0].weight]["exp_avg"].clone()
    client.push()
    commit = made.average()
    assert commit is not None
    assert commit.num_samples == 8
    client.pull()
    assert torch.equal(optimizer.state[client.client_half[0].weight]["exp_avg"], moment)
    with pytest.raises(InputError, match=r"would count 0.0 samples: train before push\(\), or give push\(num_samples"):
        client.push()


@pytest.mark.parametrize(("step", "counts"), [(math.nan, None), (2.0, 5.0)])
def test_a_client_whose_batches_were_all_rejected_is_heard_from(step: float, counts: float | None) -> None:
    """Its update is judged: not finite, it is rejected too; finite, it counts what the batches would have."""
    made = Federation()
    client = made.client("a", 1.0)
    client.pull()
    with pytest.warns(UserWarning, match="isn't finite"):
        train(client, torch.full((5, 1), math.nan))
    learn(client, step)
    client.push()
    assert made.waiting() == ["a/1/0"]
    commit = made.average()
    assert (commit.num_samples if commit else None) == counts
    with pytest.raises(InputError, match="train before push"):
        client.push()


@pytest.mark.parametrize("samples", [0, -2, math.nan, math.inf], ids=str)
def test_a_push_weighs_something_and_comes_after_a_pull(samples: float) -> None:
    """A finite number above 0; and without a pull there is nothing to tell the change from."""
    made = Federation()
    client = made.client("a")
    with pytest.raises(InputError, match=r"no version yet: call client.pull\(\) before training"):
        client.push(1)
    client.pull()
    with pytest.raises(InputError, match="samples"):
        client.push(samples)
    assert made.waiting() == []


def test_a_half_of_another_architecture_is_refused() -> None:
    """Its tensors are named, and nothing is copied."""
    made = Federation()
    made.client("a").pull()
    other = splitfed.SplitClient(nn.Sequential(nn.Linear(1, 2), splitfed.CutPoint()), made.server, "b")
    before = other.client_half[0].weight.clone()
    with pytest.raises(ArchitectureError, match=r"the client half isn't the one.*0.weight: the store has .*\(1, 1\)"):
        other.pull()
    assert torch.equal(other.client_half[0].weight, before)


def test_an_update_that_isnt_finite_is_rejected() -> None:
    """Warned of, closed as rejected, and the average goes on without it."""
    made = Federation()
    a, b = made.client("a", 1.0), made.client("b")
    a.pull()
    b.pull()
    learn(a, math.nan)
    with pytest.warns(UserWarning, match="'a' isn't finite"):
        a.push(1)
    learn(b, 1.0)
    b.push(1)
    commit = made.average()
    assert commit is not None
    assert (commit.num_batches, commit.num_rejected) == (1, 1)
    a.pull()
    assert weight(a) == 2


def test_a_newer_process_supersedes() -> None:
    """Two clients of one id: the older can't push any more."""
    made = Federation()
    old = made.client("a")
    old.pull()
    old.push(1)
    new = made.client("a")
    new.pull()
    new.push(1)
    with pytest.raises(SupersededError, match="newer process than its number 1"):
        old.push(1)
