"""One activation of a virtual client: which requests it makes, and what it keeps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import toy
from torch.nn.functional import cross_entropy

from splitfed.accumulator.accumulator import Accumulator
from splitfed.errors import InputError, UnsupportedError
from splitfed.model.cut import split
from splitfed.server.server import SplitServer
from splitfed.simulation.client import Belongings, Next, Recipe, Trainee
from splitfed.simulation.launch import AVERAGING
from splitfed.simulation.settings import LocalTraining
from splitfed.store.store import GradientStore


class Site:
    """A server, and clients of it that are activated one by one."""

    def __init__(self, name: str, **recipe: Any) -> None:
        half, self.body = split(toy.model(dropout=0.5), toy.AT)
        self.store = GradientStore(f"memory://trainee-{name}")
        self.server = SplitServer(self.body, self.store)
        local = LocalTraining(batch_size=3, **{name: recipe.pop(name) for name in toy.LOCAL & recipe.keys()})
        self.recipe = Recipe(half, cross_entropy, toy.sgd, local, **recipe)
        self.half = Accumulator(half, self.store, AVERAGING, lineage="client", personal=self.recipe.personal)

    def trainee(self, own: Belongings, occasion: int = 0, examples: int = 8) -> Trainee:
        """A client with so many examples."""
        return Trainee(self.recipe, self.server, "a", toy.examples(examples), own, (1, occasion))


def test_an_activation_pulls_trains_each_batch_and_pushes() -> None:
    """Eight examples in batches of three: three batches, twice; it stops before each request, not after it."""
    site = Site("order", local_passes=2)
    trainee, made = site.trainee(Belongings()), []
    assert trainee.num_batches == 6
    for ahead in trainee.run():
        made.append(ahead)
        assert len(site.store.waiting()) == made[:-1].count(Next.BACKWARD)
    assert made == [Next.PULL, *[Next.FORWARD, Next.BACKWARD] * 6, Next.PUSH]
    assert len(site.store.waiting("client")) == 1
    outcome = trainee.outcome
    assert (outcome.num_samples, outcome.batches, outcome.expired) == (16, 6, 0)
    assert outcome.row()["train_loss"] == pytest.approx(outcome.loss / 16)


def test_targets_of_several_parts_count_by_example() -> None:
    """Eight examples are eight, though each target is a class and a weight; the loss is their mean all the same."""
    site, (inputs, labels) = Site("several"), toy.examples(8)
    recipe = replace(site.recipe, loss_fn=lambda outputs, targets: cross_entropy(outputs, targets[0]) * 0 + 2)
    data = [(inputs[i], (labels[i], 1.0)) for i in range(8)]
    trainee = Trainee(recipe, site.server, "a", data, Belongings(), (1, 0))
    list(trainee.run())
    assert trainee.outcome.row() == {"num_samples": 8, "batches": 3, "train_loss": 2.0}


def test_gradients_are_pushed_after_each_batch() -> None:
    """And the half is pulled before each, in a second pass too: nothing is learned locally."""
    site = Site("gradients", gradients=True, local_passes=2)
    made = list(site.trainee(Belongings()).run())
    assert made == [Next.PULL, Next.FORWARD, Next.BACKWARD, Next.PUSH] * 6
    assert len(site.store.waiting("client")) == 6


def test_personal_parts_learn_locally_where_the_rest_is_pushed_as_gradients() -> None:
    """Only they move between a pull and the next one; without any, nothing does."""
    site = Site("personal-gradients", gradients=True, personal=("3.bias",))
    own = Belongings()
    list(site.trainee(own).run())
    start = site.recipe.half.state_dict()
    assert not torch.equal(own.personal["3.bias"], start["3.bias"])
    site.half.step()
    moved = site.store.load_weights(lineage="client")
    assert not torch.equal(moved["3.weight"], start["3.weight"])


def test_an_activation_follows_from_its_occasion_and_leaves_the_callers_stream() -> None:
    """The same occasion trains to the same bits whatever was drawn outside; another one shuffles otherwise."""
    ends = []
    for number, occasion in enumerate((0, 0, 1)):
        site = Site(f"occasion-{number}")
        torch.manual_seed(number)
        before = torch.get_rng_state()
        for _ in site.trainee(Belongings(), occasion).run():
            assert torch.equal(torch.get_rng_state(), before)
            torch.rand(1)
            before = torch.get_rng_state()
        site.half.step()
        ends.append(site.store.load_weights(lineage="client")["0.weight"])
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])


def test_personal_parts_stay_from_one_activation_to_the_next() -> None:
    """They aren't pushed, and the next activation begins with them; with a fresh client they are the model's."""
    site = Site("personal", personal=("3.*",))
    own = Belongings()
    list(site.trainee(own).run())
    assert sorted(own.personal) == ["3.bias", "3.weight"]
    assert not torch.equal(own.personal["3.weight"], site.recipe.half.state_dict()["3.weight"])
    kept = own.personal["3.weight"].clone()
    run = site.trainee(own, 1).run()
    next(run)
    assert torch.equal(own.personal["3.weight"], kept)
    list(run)
    assert not torch.equal(own.personal["3.weight"], kept)
    site.half.step()
    assert "3.weight" not in site.store.load_weights(lineage="client")


@pytest.mark.parametrize("keeps", [True, False])
def test_an_optimizers_state_is_kept_if_asked(keeps: bool) -> None:
    """Adam counts its steps on, or begins anew; the scheduler likewise."""
    site = Site(f"keeps-{keeps}", keep_optimizers=keeps)
    decay = lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)  # noqa: E731
    site.recipe = replace(site.recipe, optimizer=toy.adam, local=replace(site.recipe.local, scheduler=decay))
    own = Belongings()
    for occasion in range(2):
        list(site.trainee(own, occasion).run())
    if keeps:
        assert own.optimizer is not None
        assert {int(state["step"]) for state in own.optimizer["state"].values()} == {6}
        assert own.optimizer["param_groups"][0]["lr"] == pytest.approx(0.05 / 2**6)
    else:
        assert own.optimizer is own.scheduler is None


def test_a_batch_whose_version_has_gone_is_lost_and_counted() -> None:
    """The version of its forward left the retention window before its backward; the rest of the pass goes on."""
    site = Site("expired")
    site.server = SplitServer(site.body, site.store, keep_graphs=0, keep_models=1)
    body = Accumulator(site.body, site.store, toy.sgd, keep_versions=2)
    trainee = site.trainee(Belongings())
    steps = trainee.run()
    assert [next(steps) for _ in range(3)] == [Next.PULL, Next.FORWARD, Next.BACKWARD]
    for number in range(3):
        list(Trainee(site.recipe, site.server, f"c{number}", toy.examples(3), Belongings(), (1,)).run())
        body.step()
    assert [ahead for ahead in steps if ahead is Next.PUSH] == [Next.PUSH]
    assert trainee.outcome.expired == 1
    assert trainee.outcome.batches == 2
    assert trainee.outcome.row()["expired"] == 1


def test_a_loss_that_isnt_a_scalar_is_refused() -> None:
    """With its shape or its type, before autograd complains."""
    site = Site("scalar")
    site.recipe = replace(site.recipe, loss_fn=lambda outputs, targets: outputs.sum().item())  # type: ignore[return-value]
    with pytest.raises(InputError, match="loss_fn returned a float: expected a scalar tensor"):
        list(site.trainee(Belongings()).run())
    site.recipe = replace(site.recipe, loss_fn=lambda outputs, targets: outputs.sum(1))
    with pytest.raises(InputError, match=r"shape \(3,\): expected a scalar"):
        list(site.trainee(Belongings()).run())


@pytest.mark.parametrize(
    ("name", "made"), [("optimizer", torch.optim.LBFGS), ("scheduler", torch.optim.lr_scheduler.ReduceLROnPlateau)]
)
def test_what_needs_more_than_a_step_is_refused(name: str, made: Any) -> None:
    """Before anything trains, and not by torch."""
    site = Site("closure")
    if name in toy.LOCAL:
        site.recipe = replace(site.recipe, local=replace(site.recipe.local, **{name: made}))
    else:
        site.recipe = replace(site.recipe, **{name: made})
    with pytest.raises(UnsupportedError, match=f"{made.__name__}.step.. needs arguments"):
        list(site.trainee(Belongings()).run())
    assert site.store.waiting() == []
