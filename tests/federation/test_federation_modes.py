"""Each mode of split federated learning against its definition, on numbers worked by hand.

The model is two numbers: a at the client, b in the body, output a·b·x. With x = 1, loss ½(ab − y)² and a = b = 1 the
gradients of both are 1 − y. Everything is float64, and rates are powers of two, so most results are exact.
"""

from __future__ import annotations

import contextlib
import copy
import math
import uuid
from typing import Any

import pytest
import torch
from coalition import Coalition
from harness_store import Crash, Nth, crash, hooked
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import splitfed
from splitfed.accumulator import policies
from splitfed.accumulator.policies import Mode
from splitfed.errors import InputError
from splitfed.store.together import Pair

ONE = torch.ones(1, dtype=torch.float64)


def sgd(params: Any) -> torch.optim.Optimizer:
    """Rate one half."""
    return torch.optim.SGD(params, lr=0.5)


def fedavg(params: Any) -> torch.optim.Optimizer:
    """Applies the mean of start − end."""
    return torch.optim.SGD(params, lr=1.0)


def number() -> nn.Linear:
    """The number 1 as a layer."""
    made = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    nn.init.ones_(made.weight)
    return made


class Run:
    """Two clients, a server, and whoever commits in a mode."""

    def __init__(self, mode: Mode, half_optimizer: Any = fedavg) -> None:
        self.store = splitfed.GradientStore(f"memory://{uuid.uuid4()}")
        self.server = splitfed.SplitServer(number(), self.store, per_client=mode.per_client)
        self.clients = {
            name: splitfed.SplitClient(nn.Sequential(number(), splitfed.CutPoint()), self.server, name)
            for name in ("a", "b")
        }
        commits = splitfed.PerClient if mode.per_client else splitfed.Accumulator
        self.body: Any = commits(number(), self.store, sgd, **mode.settings())
        half = nn.Sequential(number(), splitfed.CutPoint())
        self.half = splitfed.Accumulator(half, self.store, half_optimizer, lineage="client")
        for client in self.clients.values():
            client.pull()

    def forward(self, name: str, target: float, samples: int) -> Tensor:
        """The mean loss of `samples` equal examples."""
        outputs = self.clients[name](ONE.expand(samples, 1))
        return (outputs - target).pow(2).mean() / 2

    def batch(self, name: str, target: float, samples: int = 1) -> None:
        """One backward pass; the client takes no step."""
        self.clients[name].zero_grad()
        self.forward(name, target, samples).backward()

    def weight(self, lineage: str = "body") -> float:
        """The one number of a lineage."""
        (value,) = self.store.load_weights(lineage=lineage).values()
        return value.item()


def test_round_mode_is_one_step_on_the_mean_of_all_batches() -> None:
    """Gradients 1 (1 sample), 2 (3 samples) and −2 (4 samples): (1 + 6 − 8)/8 = −1/8, and 1 + ½·⅛ = 1.0625."""
    run = Run(policies.mode("round"))
    run.batch("a", 0.0)
    run.batch("a", -1.0, 3)
    run.batch("b", 3.0, 4)
    commit = run.body.step(min_batches=1)
    assert (commit.version, commit.num_batches, commit.num_samples) == (1, 3, 8)
    assert run.weight() == 1.0625


def test_buffered_mode_damps_what_is_stale() -> None:
    """K = 2: (1 − 2)/2 makes 1.25; a stale 1 (1 sample) and a fresh 1 (3 samples): (1/√2 + 3)/4 more."""
    run = Run(policies.mode("buffered", min_batches=2, max_staleness=4))
    late = run.forward("a", 0.0, 1)
    run.batch("a", 0.0)
    assert run.body.step() is None
    run.batch("b", 3.0)
    assert run.body.step().num_batches == 2
    assert run.weight() == 1.25
    late.backward()
    run.batch("b", 0.25, 3)
    commit = run.body.step()
    assert commit.staleness == {0: 1, 1: 1}
    assert run.weight() == pytest.approx(1.25 - 0.5 * (1 / math.sqrt(2) + 3) / 4, abs=1e-15)


def test_buffered_mode_reports_what_is_too_stale() -> None:
    """With max_staleness 0 a batch from before the last commit is closed as stale, and the fresh one counts alone."""
    run = Run(policies.mode("buffered", min_batches=1, max_staleness=0))
    late = run.forward("a", 0.0, 1)
    run.batch("b", 0.0)
    run.body.step()
    late.backward()
    run.batch("b", 0.0)
    commit = run.body.step()
    assert (commit.num_batches, commit.num_stale) == (1, 1)
    assert run.weight() == 0.25


def test_synchronous_mode_steps_both_halves_on_the_mean_gradient() -> None:
    """Gradients 1 (1 sample) and 2 (3 samples) of both halves: 7/4, and 1 − ½·7/4 = 0.125 on either side."""
    mode = policies.mode("synchronous")
    run = Run(mode, half_optimizer=sgd)
    for name, target, samples in (("a", 0.0, 1), ("b", -1.0, 3)):
        run.batch(name, target, samples)
        run.clients[name].push(gradient=mode.gradients)
    for accumulator in (run.body, run.half):
        commit = accumulator.step(min_batches=1)
        assert (commit.num_batches, commit.num_samples) == (2, 4)
    assert (run.weight(), run.weight("client")) == (0.125, 0.125)
    assert [client.pull() for client in run.clients.values()] == [1, 1]
    assert [client.client_half[0].weight.item() for client in run.clients.values()] == [0.125, 0.125]


def test_sflv2_commits_each_batch_on_one_body() -> None:
    """1 − ½·1 = ½ by the first client; the second trains from there: ½ − ½·½ = ¼."""
    run = Run(policies.mode("sflv2"))
    for name, expected in (("a", 0.5), ("b", 0.25)):
        run.batch(name, 0.0)
        assert run.body.step().num_batches == 1
        assert run.weight() == expected


def test_sflv1_averages_bodies_that_trained_apart() -> None:
    """a: 1, ½, ¼ over two samples; b: 1, 2 over two; the mean change (¾ − 1)/2 makes 1.125, where both go on."""
    run = Run(policies.mode("sflv1"))
    for name, target, samples in (("a", 0.0, 1), ("b", 3.0, 2), ("a", 0.0, 1)):
        run.batch(name, target, samples)
        assert len(run.body.step([name])) == 1
    assert [run.weight(f"body@{name}") for name in run.clients] == [0.25, 2.0]
    assert run.weight() == 1.0
    commit = run.body.average()
    assert (commit.version, commit.num_batches, commit.num_samples) == (1, 2, 4)
    assert [run.weight(lineage) for lineage in ("body", "body@a", "body@b")] == [1.125] * 3
    run.batch("b", 0.125)
    run.body.step()
    assert [run.weight(lineage) for lineage in ("body", "body@a", "body@b")] == [1.125, 1.125, 0.625]


def test_sflv1_with_one_client_is_ordinary_training() -> None:
    """One body, averaged with nobody: what SFLV2 computes."""
    runs = [Run(policies.mode(name)) for name in ("sflv1", "sflv2")]
    for run in runs:
        for target in (0.0, 2.0, -1.0):
            run.batch("a", target)
            run.body.step()
    runs[0].body.average()
    assert runs[0].weight() == runs[1].weight() != 1.0


@pytest.mark.parametrize("name", ["round", "buffered", "sflv1", "sflv2"])
def test_client_halves_are_averaged_by_samples_in_every_other_mode(name: str) -> None:
    """From 1: −½ with one sample and −1 with three: 1 − (½ + 3)/4 = 0.125."""
    run = Run(policies.mode(name))
    for client, target, samples in (("a", 0.0, 1), ("b", -1.0, 3)):
        run.batch(client, target, samples)
        sgd(run.clients[client].parameters()).step()
        run.clients[client].push()
    commit = run.half.step(min_batches=1)
    assert commit is not None
    assert (commit.num_batches, commit.num_samples) == (2, 4)
    assert run.weight("client") == 0.125


def test_another_optimizer_of_the_halves_is_fedopt() -> None:
    """FedAdam: pseudo-gradients −2 and then −1 with rate 0.1, the moments written out."""
    run = Run(policies.mode("round"), lambda params: torch.optim.Adam(params, lr=0.1, betas=(0.5, 0.75), eps=0.0))
    expected, first, second = 1.0, 0.0, 0.0
    for step, change in ((1, 2.0), (2, 1.0)):
        with torch.no_grad():
            run.clients["a"].client_half[0].weight.add_(change)
        run.clients["a"].push(1)
        run.half.step()
        run.clients["a"].pull()
        first, second = 0.5 * first - 0.5 * change, 0.75 * second + 0.25 * change**2
        expected -= 0.1 * first / (1 - 0.5**step) / math.sqrt(second / (1 - 0.75**step))
        assert run.weight("client") == pytest.approx(expected, abs=1e-14)
    assert expected == pytest.approx(1 + 0.1 + 0.1 * (4 / 3) / math.sqrt(16 / 7), abs=1e-14)


def test_fedopt_leaves_buffers_to_their_own_rule() -> None:
    """Under Adam the running mean is still 0.19·2.5 after two steps that saw 1 and 3: it has no gradient."""
    store = splitfed.GradientStore(f"memory://{uuid.uuid4()}")
    half = nn.Sequential(number(), nn.BatchNorm1d(1, dtype=torch.float64), splitfed.CutPoint())
    server = splitfed.SplitServer(number(), store)
    for name, mean, samples in (("a", 0.1, 1), ("b", 0.3, 3)):
        client = splitfed.SplitClient(copy.deepcopy(half), server, name)
        client.pull()
        client.client_half[1].running_mean.fill_(mean)
        client.client_half[1].num_batches_tracked.add_(1)
        client.push(samples)
    adam = splitfed.Accumulator(half, store, lambda params: torch.optim.Adam(params, lr=0.1), lineage="client")
    adam.step()
    state = store.load_weights(lineage="client")
    assert state["1.running_mean"].item() == pytest.approx(0.475, abs=1e-15)
    assert state["1.num_batches_tracked"].item() == 2
    assert state["0.weight"].item() == 1.0


def test_synchronous_mode_is_centralised_large_batch_training() -> None:
    """50 steps with Adam in float64, three clients with 5, 9 and 2 examples a step: both halves within 1e-12."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 8),
        nn.Tanh(),
        nn.Linear(8, 8),
        nn.LayerNorm(8),
        nn.GELU(),
        nn.Linear(8, 4),
        nn.Tanh(),
        nn.Linear(4, 3),
    ).double()
    half, body = splitfed.split(model, "2:6")
    store = splitfed.GradientStore(f"memory://{uuid.uuid4()}")
    server = splitfed.SplitServer(body, store)
    sizes = {"a": 5, "b": 9, "c": 2}
    clients = {name: splitfed.SplitClient(copy.deepcopy(half), server, name) for name in sizes}

    def adam(params: Any) -> torch.optim.Optimizer:
        return torch.optim.Adam(params, lr=1e-2)

    accumulators = [
        splitfed.Accumulator(body, store, adam),
        splitfed.Accumulator(half, store, adam, lineage="client"),
    ]
    central = adam(model.parameters())
    for step in range(50):
        x, y = torch.randn(16, 6, dtype=torch.float64), torch.arange(step, step + 16) % 3
        for (name, client), rows in zip(clients.items(), torch.arange(16).split(list(sizes.values())), strict=True):
            client.pull()
            client.zero_grad()
            assert len(rows) == sizes[name]
            cross_entropy(client(x[rows]), y[rows]).backward()
            client.push(gradient=True)
        for accumulator in accumulators:
            commit = accumulator.step(min_batches=3)
            assert commit is not None
            assert (commit.version, commit.num_batches) == (step + 1, 3)
        central.zero_grad()
        cross_entropy(model(x), y).backward()
        central.step()
    clients["a"].pull()
    whole = splitfed.join(clients["a"], store.load_weights()).state_dict()
    far = {name: (whole[name] - value).abs().max().item() for name, value in model.state_dict().items()}
    assert len(far) == 10
    assert max(far.values()) <= 1e-12, far


def grouped(**settings: Any) -> Coalition:
    """Three owners in groups of two."""
    mode = policies.mode("grouped", group=2)
    return Coalition.begun(
        f"memory://{uuid.uuid4()}", "a", "b", "c", mode=mode, body=mode.settings(), half=mode.settings(), **settings
    )


def publish(run: Coalition, name: str, x: float) -> None:
    """One batch of a client, and the gradient of its half; with h = b = 1 both are x."""
    run.client(name).zero_grad()
    run.batch(name, x)
    run.client(name).push(gradient=True)


def test_a_round_of_groups_commits_them_as_they_fill_and_the_rest_when_it_ends() -> None:
    """Gradients 2 and 6 make 1 − 4 = −3 on either side; the third client's 1, from the first pair, ends at −4."""
    run = grouped()
    publish(run, "a", 2.0)
    assert run.federation.poll() is None
    publish(run, "b", 6.0)
    assert run.federation.poll() is None
    assert (run.store.pair(), run.weight("body"), run.weight("client")) == (Pair(1, 1), -3.0, -3.0)
    publish(run, "c", 1.0)
    report = run.poll()
    assert (report["status"], report["participants"], report["missing"]) == ("complete", ["a", "b", "c"], [])
    assert (report["commits"], report["batches"], report["version"], report["client_version"]) == (2, 3, 2, 2)
    assert report["clients"]["c"] == {"status": "folded", "batches": 1, "staleness": 1}
    assert run.weight("body") == run.weight("client") == pytest.approx(-3.0 - 2**-0.5)


@pytest.mark.parametrize("mode", ["synchronous", "grouped"])
def test_a_client_that_dies_before_its_push_is_missing_at_the_deadline(mode: str) -> None:
    """Its batch counts in neither half of the model, and the others' count in both."""
    run = grouped() if mode == "grouped" else Coalition.begun(f"memory://{uuid.uuid4()}", "a", "b", "c", mode=mode)
    publish(run, "a", 2.0)
    run.batch("c", 100.0)
    publish(run, "b", 6.0)
    assert run.federation.poll() is None
    run.clock.now += 60
    report = run.poll()
    assert (report["status"], report["missing"], report["batches"]) == ("deadline", ["c"], 2)
    assert (run.weight("body"), run.weight("client")) == (-3.0, -3.0)
    assert [batch.client_id for batch in run.store.waiting()] == ["c"]
    run.federation.open()
    run.client("c").push(gradient=True)
    for name in "ab":
        run.pull(name)
        publish(run, name, 0.0)
    run.clock.now += 60
    assert run.poll()["late"] == ["c"], "its push came late, and brings its batch along"
    assert run.store.waiting() == run.store.waiting("client") == []


def test_groups_without_a_barrier_go_on_and_on() -> None:
    """A round is a stretch of as many pushes as there are clients; one that lives fills groups alone."""
    run = grouped(barrier=False)
    reports = []
    for _ in range(6):
        publish(run, "a", 0.0)
        report = run.federation.poll()
        run.pull("a")
        if report is not None:
            reports.append((report["participants"], report["batches"], report["version"]))
            run.federation.open()
    assert reports == [(["a"], 4, 2)]
    assert run.store.pair() == Pair(3, 3)


def test_a_synchronous_round_that_a_coordinator_leaves_anywhere_ends_once() -> None:
    """At each record: readers have a pair, and the next one ends in the same bits."""

    def ready() -> Coalition:
        run = Coalition.begun(f"memory://{uuid.uuid4()}", "a", "b", mode="synchronous")
        publish(run, "a", 2.0)
        publish(run, "b", 6.0)
        return run

    run, log = ready(), Nth(at="create")
    with log.armed():
        run.another(hooked(run.url, log)).poll()
    assert log.count > 5
    for n in range(log.count):
        run, hook = ready(), Nth(n, crash, at="create")
        with hook.armed(), contextlib.suppress(Crash):
            run.another(hooked(run.url, hook)).poll()
        assert run.store.pair() in (Pair(0, 0), Pair(1, 1))
        report = run.another().poll()
        assert report is not None
        assert (report["status"], report["batches"], report["version"]) == ("complete", 2, 1)
        assert (run.weight("body"), run.weight("client"), run.store.pair()) == (-3.0, -3.0, Pair(1, 1))


def test_what_a_federation_of_groups_cant_keep_is_refused() -> None:
    """Groups above the number of sampled clients, another number at the accumulators, and steps nobody waits for."""
    run = grouped()
    body, half = run.federation.body, run.federation.half
    mode = policies.mode("grouped", group=2)
    with pytest.raises(InputError, match="groups of 2 batches, and 1 clients train"):
        splitfed.Federation(body, half, mode=mode, clients_per_round=1)
    with pytest.raises(InputError, match="min_batches is 2, but mode 'grouped' says 3"):
        splitfed.Federation(body, half, mode=policies.mode(mode, group=3))
    with pytest.raises(InputError, match="with barrier=False nobody waits"):
        splitfed.Federation(body, half, mode="synchronous", barrier=False)
