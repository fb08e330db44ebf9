"""One local run of a virtual client: which requests it makes, and what it keeps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import toy
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import IterableDataset

from splitfed.accumulator.accumulator import Accumulator
from splitfed.errors import InputError, UnsupportedError
from splitfed.model.cut import split
from splitfed.server.server import SplitServer
from splitfed.simulation.client import ClientConfig, ClientState, LocalRun, Verb
from splitfed.simulation.launch import AVERAGING
from splitfed.simulation.settings import LocalTraining
from splitfed.store.store import GradientStore


class Site:
    """A server, and clients of it that are activated one by one."""

    def __init__(self, name: str, **config: Any) -> None:
        half, self.body = split(toy.model(dropout=0.5), toy.AT)
        self.store = GradientStore(f"memory://trainee-{name}")
        self.server = SplitServer(self.body, self.store)
        local = LocalTraining(batch_size=3, **{name: config.pop(name) for name in toy.LOCAL & config.keys()})
        self.config = ClientConfig(half, cross_entropy, toy.sgd, local, **config)
        self.half = Accumulator(half, self.store, AVERAGING, lineage="client", personal=self.config.personal)

    def local_run(self, state: ClientState, repetition: int = 0, examples: int = 8) -> LocalRun:
        """A client with so many examples."""
        return LocalRun(self.config, self.server, "a", toy.examples(examples), state, (1, repetition))


def test_a_local_run_pulls_trains_each_batch_and_pushes() -> None:
    """Eight examples in batches of three: three batches, twice; it stops before each request, not after it."""
    site = Site("order", local_passes=2)
    run, made = site.local_run(ClientState()), []
    assert run.num_batches == 6
    for ahead in run.requests():
        made.append(ahead)
        assert len(site.store.waiting()) == made[:-1].count(Verb.BACKWARD)
    assert made == [Verb.PULL, *[Verb.FORWARD, Verb.BACKWARD] * 6, Verb.PUSH]
    assert len(site.store.waiting("client")) == 1
    metrics = run.metrics
    assert (metrics.num_samples, metrics.batches, metrics.expired) == (16, 6, 0)
    assert metrics.row()["train_loss"] == pytest.approx(metrics.loss_sum / 16)


def test_targets_of_several_parts_count_by_example() -> None:
    """Eight examples are eight, though each target is a class and a weight; the loss is their mean all the same."""
    site, (inputs, labels) = Site("several"), toy.examples(8)
    config = replace(site.config, loss_fn=lambda outputs, targets: cross_entropy(outputs, targets[0]) * 0 + 2)
    data = [(inputs[i], (labels[i], 1.0)) for i in range(8)]
    run = LocalRun(config, site.server, "a", data, ClientState(), (1, 0))
    list(run.requests())
    assert run.metrics.row() == {"num_samples": 8, "batches": 3, "train_loss": 2.0}


def test_what_a_batch_counts_is_its_number_of_samples_whatever_its_shapes() -> None:
    """Sequences first: a batch of three is one of three, though its tensors begin with another dimension."""
    site = Site("sequences", drop_last=True)
    local = replace(site.config.local, collate_fn=sequences_first)
    config = replace(site.config, local=local, loss_fn=lambda outputs, targets: outputs.sum() * 0)
    data = [torch.ones(5, 4)] * 7
    run = LocalRun(config, site.server, "a", data, ClientState(), (1, 0))
    assert run.num_batches == 2
    list(run.requests())
    assert run.metrics.num_samples == 6
    waiting = [site.store.pile().peek(batch) for batch in site.store.waiting()]
    assert [header["num_samples"] for header in waiting if header is not None] == [3.0, 3.0]


def sequences_first(samples: list[Tensor]) -> tuple[Tensor, int]:
    """(T, N, *), and nothing to compare with."""
    return torch.stack(samples, 1), 0


def test_a_stream_that_yields_nothing_is_an_error() -> None:
    """As a generator that was used up in the pass before."""
    site = Site("nothing", local_passes=2)
    run = LocalRun(site.config, site.server, "a", Once(), ClientState(), (1, 0))
    assert run.num_batches is None
    with pytest.raises(InputError, match=r"the Once of client 'a' yielded no batch of 3 examples in a pass"):
        list(run.requests())


class Once(IterableDataset[Any]):
    """A stream that can be gone through only once."""

    def __init__(self) -> None:
        self.left = iter(list(zip(*toy.examples(4), strict=True)))

    def __iter__(self) -> Any:
        return self.left


def test_gradients_are_pushed_after_each_batch() -> None:
    """And the half is pulled before each, in a second pass too: nothing is learned locally."""
    site = Site("gradients", gradients=True, local_passes=2)
    made = list(site.local_run(ClientState()).requests())
    assert made == [Verb.PULL, Verb.FORWARD, Verb.BACKWARD, Verb.PUSH] * 6
    assert len(site.store.waiting("client")) == 6


def test_personal_parts_learn_locally_where_the_rest_is_pushed_as_gradients() -> None:
    """Only they move between a pull and the next one; without any, nothing does."""
    site = Site("personal-gradients", gradients=True, personal=("3.bias",))
    state = ClientState()
    list(site.local_run(state).requests())
    start = site.config.half.state_dict()
    assert not torch.equal(state.personal["3.bias"], start["3.bias"])
    site.half.step()
    moved = site.store.load_weights(lineage="client")
    assert not torch.equal(moved["3.weight"], start["3.weight"])


def test_a_local_run_follows_from_its_id_and_leaves_the_callers_stream() -> None:
    """The same repetition trains to the same bits whatever was drawn outside; another one shuffles otherwise."""
    ends = []
    for number, repetition in enumerate((0, 0, 1)):
        site = Site(f"repetition-{number}")
        torch.manual_seed(number)
        before = torch.get_rng_state()
        for _ in site.local_run(ClientState(), repetition).requests():
            assert torch.equal(torch.get_rng_state(), before)
            torch.rand(1)
            before = torch.get_rng_state()
        site.half.step()
        ends.append(site.store.load_weights(lineage="client")["0.weight"])
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])


def test_personal_parts_stay_from_one_run_to_the_next() -> None:
    """They aren't pushed, and the next run begins with them; with a fresh client they are the model's."""
    site = Site("personal", personal=("3.*",))
    state = ClientState()
    list(site.local_run(state).requests())
    assert sorted(state.personal) == ["3.bias", "3.weight"]
    assert not torch.equal(state.personal["3.weight"], site.config.half.state_dict()["3.weight"])
    kept = state.personal["3.weight"].clone()
    run = site.local_run(state, 1).requests()
    next(run)
    assert torch.equal(state.personal["3.weight"], kept)
    list(run)
    assert not torch.equal(state.personal["3.weight"], kept)
    site.half.step()
    assert "3.weight" not in site.store.load_weights(lineage="client")


@pytest.mark.parametrize("keeps", [True, False])
def test_an_optimizers_state_is_kept_if_asked(keeps: bool) -> None:
    """Adam counts its steps on, or begins anew; the scheduler likewise."""
    site = Site(f"keeps-{keeps}", keep_optimizers=keeps)
    decay = lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)  # noqa: E731
    site.config = replace(site.config, optimizer=toy.adam, local=replace(site.config.local, scheduler=decay))
    state = ClientState()
    for repetition in range(2):
        list(site.local_run(state, repetition).requests())
    if keeps:
        assert state.optimizer is not None
        assert {int(one["step"]) for one in state.optimizer["state"].values()} == {6}
        assert state.optimizer["param_groups"][0]["lr"] == pytest.approx(0.05 / 2**6)
    else:
        assert state.optimizer is state.scheduler is None


def test_a_batch_whose_version_has_gone_is_lost_and_counted() -> None:
    """The version of its forward left the retention window before its backward; the rest of the pass goes on."""
    site = Site("expired")
    site.server = SplitServer(site.body, site.store, keep_graphs=0, keep_models=1)
    body = Accumulator(site.body, site.store, toy.sgd, keep_versions=2, keep_bytes=0)
    run = site.local_run(ClientState())
    steps = run.requests()
    assert [next(steps) for _ in range(3)] == [Verb.PULL, Verb.FORWARD, Verb.BACKWARD]
    for number in range(3):
        list(LocalRun(site.config, site.server, f"c{number}", toy.examples(3), ClientState(), (1,)).requests())
        body.step()
    assert [ahead for ahead in steps if ahead is Verb.PUSH] == [Verb.PUSH]
    assert run.metrics.expired == 1
    assert run.metrics.batches == 2
    assert run.metrics.row()["expired"] == 1


def test_a_loss_that_isnt_a_scalar_is_refused() -> None:
    """With its shape or its type, before autograd complains."""
    site = Site("scalar")
    site.config = replace(site.config, loss_fn=lambda outputs, targets: outputs.sum().item())  # type: ignore[return-value]
    with pytest.raises(InputError, match="loss_fn returned a float: expected a scalar tensor"):
        list(site.local_run(ClientState()).requests())
    site.config = replace(site.config, loss_fn=lambda outputs, targets: outputs.sum(1))
    with pytest.raises(InputError, match=r"shape \(3,\): expected a scalar"):
        list(site.local_run(ClientState()).requests())


@pytest.mark.parametrize(
    ("name", "made"), [("optimizer", torch.optim.LBFGS), ("scheduler", torch.optim.lr_scheduler.ReduceLROnPlateau)]
)
def test_what_needs_more_than_a_step_is_refused(name: str, made: Any) -> None:
    """Before anything trains, and not by torch."""
    site = Site("closure")
    if name in toy.LOCAL:
        site.config = replace(site.config, local=replace(site.config.local, **{name: made}))
    else:
        site.config = replace(site.config, **{name: made})
    with pytest.raises(UnsupportedError, match=f"{made.__name__}.step.. needs arguments"):
        list(site.local_run(ClientState()).requests())
    assert site.store.waiting() == []
