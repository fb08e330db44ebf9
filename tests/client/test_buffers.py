"""Buffers over several client(...) calls: as a model in one piece moves them, whichever pass counts."""

from __future__ import annotations

import uuid
import warnings
from typing import Any

import pytest
import torch
from bodies import sandwich, twice
from harness import Apart, Split, assert_same, gradients, sgd
from torch import Tensor, nn
from torch.nn.functional import softplus

import splitfed


def normed(times: int = 1) -> nn.Module:
    """A body with BatchNorm, called once or twice."""
    body = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    return twice(body) if times == 2 else sandwich(body)


def split(model: nn.Module | None = None, **settings: Any) -> Any:
    """A split model in memory, and the model in one piece."""
    net = model or normed()
    made = Split(net, "body", f"memory://{uuid.uuid4()}", optimizer=sgd, **settings)
    return made, splitfed.reference(net, "body")


def x(count: int = 4, shift: float = 0.0) -> Tensor:
    """A batch `(N, 6)`."""
    return torch.randn(count, 6) + shift


def assert_buffers(made: Any, reference: nn.Module) -> None:
    """The committed buffers of the body have the reference's bits."""
    state = made.state()
    assert_same({n: state[n] for n, _ in reference.named_buffers()}, dict(reference.named_buffers()))


def siamese(net: nn.Module, given: list[Tensor]) -> Tensor:
    """A distance of two embeddings."""
    return (net(given[0]) - net(given[1])).pow(2).mean()


def triplet(net: nn.Module, given: list[Tensor]) -> Tensor:
    """Anchor, positive, negative."""
    anchor, positive, negative = (net(one) for one in given)
    return nn.functional.triplet_margin_loss(anchor, positive, negative, margin=10.0)


def stopped(net: nn.Module, given: list[Tensor]) -> Tensor:
    """SimSiam: both views, each with the other's gradient stopped."""
    first, second = net(given[0]), net(given[1])
    return (first - second.detach()).pow(2).mean() + (second - first.detach()).abs().mean()


MODES: dict[str, dict[str, Any]] = {
    "kept": {},
    "recomputed": {"keep_graphs": 0},
    "two_replicas": {"wire": Apart, "replicas": 2},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("loss", [siamese, triplet, stopped])
def test_several_calls_of_one_loss(loss: Any, times: int, mode: str) -> None:
    """Gradients and buffers of the reference, to the bit, over three steps with a commit each."""
    made, reference = split(normed(times), **MODES[mode])
    local, plain = sgd(made.client.parameters()), sgd(reference.parameters())
    for number in range(3):
        given = [x(4, shift) for shift in (0.0, 1.0, -number)]
        for net, optimizer in ((made.client, local), (reference, plain)):
            optimizer.zero_grad()
            loss(net, given).backward()
        assert_same(made.gradients(), gradients(reference))
        local.step()
        plain.step()
        made.accumulator.step()
        assert_buffers(made, reference)


def test_outputs_that_depend_on_buffers() -> None:
    """Spectral norm moves a buffer in each forward and uses it: the second call sees what the first left."""
    body = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)), nn.Tanh())
    made, reference = split(sandwich(body))
    given = [x(), x()]
    found = [siamese(net, given) for net in (made.client, reference)]
    assert torch.equal(*found)
    for loss in found:
        loss.backward()
    assert_same(made.gradients(), gradients(reference))


@pytest.mark.parametrize("loops", [1, 2])
def test_a_block_over_the_two_steps_of_a_discriminator(loops: int) -> None:
    """Passes that one batch sums continue each other, as do the passes of a generator that count nothing."""
    made, reference = split()
    local, plain = sgd(made.client.parameters()), sgd(reference.parameters())
    for _ in range(loops):
        given = [x(4, shift) for shift in (0.0, 1.0, 2.0)]
        for net, optimizer in ((made.client, local), (reference, plain)):
            with made.client.batch(count=False):
                softplus(-net(given[2].requires_grad_())).mean().backward()
            optimizer.zero_grad()
            with made.client.batch():
                softplus(-net(given[0])).mean().backward()
                softplus(net(given[1])).mean().backward()
            optimizer.step()
        assert made.accumulator.step().num_batches == 1
        assert_buffers(made, reference)
        assert int(made.state()["body.1.num_batches_tracked"]) == 3 * (1 + _)


def test_an_adversarial_pass_moves_statistics_too() -> None:
    """FGSM in train mode: two forwards move them, the second pass alone counts."""
    made, reference = split()
    given = x()
    for net in (made.client, reference):
        own = given.clone().requires_grad_()
        (found,) = torch.autograd.grad(net(own).pow(2).mean(), own)
        net.zero_grad()
        net(given + found.sign()).pow(2).mean().backward()
    made.accumulator.step()
    assert_buffers(made, reference)


@pytest.mark.parametrize("keep_graphs", [0, 8])
@pytest.mark.parametrize("order", ["012", "021", "102", "120", "201", "210", "12", "2", "02", "20"])
def test_calls_that_end_in_different_batches(order: str, keep_graphs: int) -> None:
    """Three forwards, then passes in any order, some never: no update is lost before the last pass, and none twice."""
    made, reference = split(keep_graphs=keep_graphs)
    given = [x(64, shift) for shift in (0.0, 1.0, 2.0)]
    losses = [made.client(one).pow(2).mean() for one in given]
    for number in order:
        losses[int(number)].backward()
    commit = made.accumulator.step()
    assert commit.num_batches == len(order)
    for one in given:
        reference(one)
    state = made.state()
    # A call whose pass never came has moved them if a later one's batch says so, and no batch was stored before.
    counted = {"02": 2, "20": 3}.get(order, 3)
    assert int(state["body.1.num_batches_tracked"]) == counted
    if counted == 3:
        expected = reference.body[1].running_mean
        assert torch.allclose(state["body.1.running_mean"], expected, rtol=0, atol=0.05)


def test_commits_between_two_passes() -> None:
    """A batch of the first call, a commit, then one of the second: which ends at the reference's bits."""
    made, reference = split()
    given = [x(), x()]
    losses = [made.client(one).pow(2).mean() for one in given]
    losses[0].backward()
    made.accumulator.step()
    losses[1].backward()
    made.accumulator.step()
    for one in given:
        reference(one)
    assert_buffers(made, reference)


def test_calls_of_two_versions_dont_continue_each_other() -> None:
    """A commit lies between: the later call begins with its version's buffers."""
    made, _ = split()
    waiting = made.client(x())
    other = splitfed.SplitClient(made.half, made.wire, "b")
    other(x(4, 3.0)).sum().backward()
    made.accumulator.step()
    after = made.store.load_weights()
    made.client(x(4, 5.0)).sum().backward()
    (record,) = made.waiting()
    assert record.base_version == 1
    assert torch.equal(record.buffers[0].bases["1.running_mean"], after["1.running_mean"])
    assert waiting.requires_grad


def test_records_stay_as_long_as_a_call_may_continue_them() -> None:
    """The last one that no batch has; all are gone once a batch is stored."""
    made, _ = split()
    for _ in range(2):
        made.client(x())
    assert len(made.stored("forward")) == 2
    made.client(x()).sum().backward()
    assert len(made.stored("forward")) <= 2
    with torch.no_grad():
        made.client.eval()(x())
    made.client.train()(x()).sum().backward()
    assert len(made.stored("forward")) == 1


def test_a_rejected_batch_leaves_no_trace() -> None:
    """The next call begins with the version's buffers."""
    made, _ = split()
    with pytest.warns(UserWarning, match="isn't finite"):
        (made.client(x()).sum() * float("nan")).backward()
    made.client(x()).sum().backward()
    made.accumulator.step()
    assert int(made.state()["body.1.num_batches_tracked"]) == 1


@pytest.mark.parametrize("calls", [1, 2])
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["saved", "reentrant"])
def test_checkpoints_over_several_calls(use_reentrant: bool, calls: int) -> None:
    """Recomputed after another call's graph has gone: a recompute begins as its call began; nothing is warned of."""
    net = normed()
    made, reference = split(net)
    for module in (made.half, reference):
        inner = module.body
        module.run = lambda m, one, inner=inner: m.head(
            torch.utils.checkpoint.checkpoint(inner, m.bottom(one), use_reentrant=use_reentrant)
        )
    reference.run = lambda m, one: m.head(m.body(m.bottom(one)))
    given = [x(), x()]
    local = sgd(made.client.parameters())
    with made.client.batch():
        losses = [made.client(one).pow(2).mean() for one in given[:calls]]
        for loss in losses:
            loss.backward()
    local.step()
    for one in given[:calls]:
        reference(one).pow(2).mean().backward()
    made.accumulator.step()
    if calls == 1 or not use_reentrant:
        state = made.state()
        buffers = dict(reference.named_buffers())
        assert_same({n: state[n] for n in buffers}, buffers)


def second_view(client: nn.Module, given: Tensor) -> None:
    """BYOL: one view under no_grad, the other one trains."""
    with torch.no_grad():
        target = client(given + 1)
    (client(given) - target).pow(2).mean().backward()


@pytest.mark.parametrize("norm", [True, False])
def test_forwards_under_no_grad_in_train_mode_are_told_of_once(norm: bool) -> None:
    """At the second one, or at the half's next step; none if the body has no statistics, and none in eval mode."""
    made, _ = split(None if norm else sandwich(nn.Linear(8, 8)))
    local = sgd(made.client.parameters())
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with torch.no_grad():
            made.client.eval()(x())
            made.client(x())
        made.client.train()
        second_view(made.client, x())
        assert told == []
        for _ in range(2):
            local.step()
            second_view(made.client, x())
    assert [str(one.message)[:35] for one in told] == ["client 'a': forwards in train mode "] * norm
    assert all(issubclass(one.category, UserWarning) for one in told)


def test_statistics_gathered_by_forwards_alone_are_told_of() -> None:
    """Without and with grad: an error if warnings are errors."""

    def gather(grad: bool) -> None:
        made, _ = split()
        with torch.set_grad_enabled(grad):
            for _ in range(25):
                made.client(x())

    for grad in (False, True):
        with pytest.warns(UserWarning, match="move the statistics of the unsplit model"):
            gather(grad)


def test_statistics_that_count_in_no_batch_are_told_of_at_a_step() -> None:
    """A frozen pass after this version's batch was stored: nothing continues it."""
    made, _ = split()
    local = sgd(made.client.parameters())
    with made.client.batch(count=False):
        made.client(x()).sum().backward()
    made.client(x()).sum().backward()
    local.step()
    with made.client.batch(count=False):
        made.client(x()).sum().backward()
    made.client(x()).sum().backward()
    with pytest.warns(UserWarning, match="move the statistics"):
        local.step()
    assert int(made.accumulator.step().num_batches) == 2


@pytest.mark.parametrize("how", ["damaged", "gone"])
def test_a_call_that_cant_be_continued_stops_no_other(how: str) -> None:
    """Its record is damaged or gone, which its own backward says: the next call begins anew."""
    made, _ = split(keep_graphs=0)
    waiting = made.client(x())
    (key,) = made.stored("forward")
    if how == "gone":
        made.store.blobs.delete(key)
    else:
        made.store.blobs.put(key, [b"{}"])
    made.client(x()).sum().backward()
    (record,) = made.waiting()
    assert int(record.buffers[0].values["1.num_batches_tracked"]) == 1
    with pytest.raises(splitfed.SplitFedError):
        waiting.sum().backward()


def test_a_pass_that_fails_is_continued_by_nobody() -> None:
    """As a rejected batch: the statistics of its forward count nowhere."""
    made, _ = split(keep_graphs=0)
    loss = made.client(x()).sum()
    (key,) = made.stored("forward")
    made.store.blobs.put(key, [b"{}"])
    with pytest.raises(splitfed.SplitFedError):
        loss.backward()
    made.client(x()).sum().backward()
    assert [record.kind for record in made.waiting()] == ["skip", "gradient"]
    made.accumulator.step()
    assert int(made.state()["body.1.num_batches_tracked"]) == 1
