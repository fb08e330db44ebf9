"""Warnings at an optimizer's step: passes that mean another step of the body than of the half, and newcomer's traps."""

from __future__ import annotations

import copy
import gc
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from bodies import sandwich
from harness import Split, sgd
from torch import Tensor, nn

import splitfed
from splitfed.client import watch


def split(model: nn.Module | None = None, **settings: Any) -> Split:
    """A split model in memory."""
    net = model or sandwich(nn.Linear(8, 8))
    return Split(net, "body", f"memory://{uuid.uuid4()}", optimizer=sgd, **settings)


def x(count: int = 4) -> Tensor:
    """A batch `(N, 6)`."""
    return torch.randn(count, 6)


def loss(net: nn.Module) -> Tensor:
    """Of one batch."""
    return net(x()).pow(2).mean()


@contextmanager
def told() -> Iterator[list[str]]:
    """What is warned of within."""
    found: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield found
    assert all(one.category is UserWarning for one in caught)
    found += [str(one.message) for one in caught]


def two_passes(client: Any, step: Callable[[], Any]) -> None:
    """Two losses with a backward each."""
    loss(client).backward()
    loss(client).backward()
    step()


def dropped(client: Any, step: Callable[[], Any]) -> None:
    """A GAN whose generator's loss reaches the discriminator, which drops that gradient."""
    loss(client).backward()
    client.zero_grad()
    with client.batch():
        loss(client).backward()
        loss(client).backward()
    step()


def sharpness(client: Any, step: Callable[[], Any]) -> None:
    """SAM: up the gradient, and the step with that of there."""
    loss(client).backward()
    with torch.no_grad():
        for parameter in client.parameters():
            parameter.add_(0.01 * parameter.grad)
    client.zero_grad()
    loss(client).backward()
    step()


LOOPS = {"two_passes": (two_passes, r"2 batches were stored since the last step.*with client\.batch\(\)")}
LOOPS["dropped"] = (dropped, "2 batches were stored.*zero_grad")
LOOPS["sharpness"] = (sharpness, r"moved between two passes.*client\.batch\(count=False\)")


@pytest.mark.parametrize(("loop", "said"), LOOPS.values(), ids=LOOPS)
def test_a_step_of_several_batches_is_told_of_once(loop: Any, said: str) -> None:
    """At the step, and not at a pass; once for each client."""
    made = split()
    optimizer = sgd(made.client.parameters())
    with pytest.warns(UserWarning, match=f"client 'a': .*{said}"):
        loop(made.client, optimizer.step)
    with told() as found:
        loop(made.client, optimizer.step)
    assert found == []


@pytest.mark.parametrize("form", ["pull", "GradScaler"])
def test_where_two_batches_of_a_step_are_told_of_later(form: str) -> None:
    """A scaler's scale says nothing of passes; in rounds a step may have a left-over pass, but not twice."""
    made = split(loss_scale=torch.amp.GradScaler("cpu").get_scale if form == "GradScaler" else 1.0)
    optimizer = sgd(made.client.parameters())
    if form == "pull":
        made.client.pull()
        two_passes(made.client, optimizer.step)
    with pytest.warns(UserWarning, match="2 batches were stored"):
        two_passes(made.client, optimizer.step)


def accumulated(client: Any, optimizer: Any) -> None:
    """Two micro-batches with half of their loss, and a client that knows of it."""
    client = splitfed.SplitClient(client.client_half, client._connection.transport, "b", loss_scale=0.5)
    two_passes(client, optimizer.step)


def summed(client: Any, optimizer: Any) -> None:
    """Both in one block."""
    with client.batch():
        two_passes(client, lambda: None)
    optimizer.step()


def scaled_in_blocks(client: Any, optimizer: Any) -> None:
    """Each in a block with its scale."""
    for _ in range(2):
        with client.batch(loss_scale=0.5):
            (loss(client) / 2).backward()
    optimizer.step()


def sharpness_aware(client: Any, optimizer: Any) -> None:
    """SAM as the warning says it."""
    with client.batch(count=False):
        loss(client).backward()
    with torch.no_grad():
        next(iter(client.parameters())).add_(0.01)
    client.zero_grad()
    loss(client).backward()
    optimizer.step()


def in_two_optimizers(client: Any, optimizer: Any) -> None:
    """One for the bottom, one for the head."""
    optimizers = [sgd(getattr(client, name).parameters()) for name in ("bottom", "head")]
    for _ in range(2):
        loss(client).backward()
        for one in optimizers:
            one.step()


def another_ones_steps(client: Any, optimizer: Any) -> None:
    """Another module trains in between."""
    other = nn.Linear(2, 2)
    for _ in range(2):
        loss(client).backward()
        other(torch.ones(1, 2)).sum().backward()
        sgd(other.parameters()).step()
        optimizer.step()


def by_hand(client: Any, optimizer: Any) -> None:
    """No optimizer at all."""
    for _ in range(3):
        loss(client).backward()
        with torch.no_grad():
            for parameter in client.parameters():
                parameter -= 0.1 * parameter.grad
        client.zero_grad()


def closure(client: Any, optimizer: Any) -> None:
    """A closure that is evaluated once."""

    def evaluate() -> Tensor:
        optimizer.zero_grad()
        found = loss(client)
        found.backward()
        return found

    for _ in range(3):
        optimizer.step(evaluate)


def loaded(client: Any, optimizer: Any) -> None:
    """Weights are loaded between two steps, and averaged ones are looked at."""
    state = copy.deepcopy(client.state_dict())
    for _ in range(2):
        loss(client).backward()
        optimizer.step()
        client.load_state_dict(state)
        client.pull()
        with torch.no_grad():
            client.eval()(x())
        client.train()


@pytest.mark.parametrize(
    "loop",
    [
        accumulated,
        summed,
        scaled_in_blocks,
        sharpness_aware,
        in_two_optimizers,
        another_ones_steps,
        by_hand,
        closure,
        loaded,
    ],
)
def test_loops_that_are_right_are_told_nothing(loop: Any) -> None:
    """Or that mean what they say."""
    made = split()
    with told() as found:
        loop(made.client, sgd(made.client.parameters()))
    assert found == []


def test_a_scaler_that_skips_a_step_is_no_second_pass() -> None:
    """It takes another scale: what was accumulated was dropped."""
    made = split()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-100)
    client = splitfed.SplitClient(made.half, made.wire, "b", loss_scale=scaler.get_scale)
    optimizer = sgd(client.parameters())
    with told() as found:
        for factor in (1e3, 1.0, 1.0):
            optimizer.zero_grad()
            scaler.scale(loss(client) * factor).backward()
            scaler.step(optimizer)
            scaler.update()
    assert [text for text in found if "isn't finite" not in text] == []
    assert scaler.get_scale() < 2.0**127


def test_a_line_search_evaluates_several_times() -> None:
    """LBFGS: each backward would count."""
    made = split()
    optimizer = torch.optim.LBFGS(made.client.parameters(), max_iter=3)
    given = x()

    def evaluate() -> Tensor:
        optimizer.zero_grad()
        found = made.client(given).pow(2).mean()
        found.backward()
        return found

    with pytest.warns(UserWarning, match=r"evaluated \d times within one step"):
        optimizer.step(evaluate)


@pytest.mark.parametrize("how", ["grad", "inputs", "frozen"])
def test_a_step_of_the_half_alone_is_told_of(how: str) -> None:
    """Its gradients came of passes that count nothing for the body; a step that follows one that counts is silent."""
    made = split()
    parameters = list(made.client.parameters())
    optimizer = sgd(parameters)
    with told() as found:
        given = x().requires_grad_()
        torch.autograd.grad(made.client(given).sum(), given)
        loss(made.client).backward()
        optimizer.step()
    assert found == []
    if how == "grad":
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss(made.client), parameters), strict=True):
            parameter.grad = gradient
    elif how == "inputs":
        loss(made.client).backward(inputs=parameters)
    else:
        made.client.requires_grad_(False)
        made.client(x().requires_grad_()).sum().backward()
    with pytest.warns(UserWarning, match=r"no pass has counted for the body.*count=True"):
        optimizer.step()


def test_two_steps_in_one_block_are_told_of() -> None:
    """The block makes one batch of them."""
    made = split()
    optimizer = sgd(made.client.parameters())

    def loop() -> None:
        with made.client.batch():
            for _ in range(2):
                loss(made.client).backward()
                optimizer.step()

    with pytest.warns(UserWarning, match="stepped twice within one `with client.batch"):
        loop()


@pytest.mark.parametrize("kind", ["model", "copy", "embedding"])
def test_an_optimizer_of_the_wrong_parameters_is_told_of(kind: str) -> None:
    """Of the whole model that was split, or of a copy of the half: it steps without a gradient."""
    net = sandwich(nn.Linear(8, 8))
    if kind == "embedding":
        net = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 4), nn.Linear(4, 2))
        net.body, net.head = net[1], net[2]
        made = Split(nn.Sequential(*net[:3]), "1", f"memory://{uuid.uuid4()}", optimizer=sgd)
    else:
        made = split(net)
    wrong = copy.deepcopy(made.half) if kind == "copy" else net
    optimizer = torch.optim.Adam(wrong.parameters())
    loss(made.client).backward()
    with pytest.warns(UserWarning, match=r"Adam has stepped without any gradient.*client.parameters\(\)"):
        optimizer.step()
    with told() as found:
        loss(made.client).backward()
        optimizer.step()
    assert found == []


def test_a_model_of_the_same_shape_may_train_beside_it() -> None:
    """It has gradients of its own."""
    made = split()
    twin = sandwich(nn.Linear(8, 8))
    own, other = sgd(made.client.parameters()), sgd(twin.parameters())
    with told() as found:
        for _ in range(2):
            loss(made.client).backward()
            loss(twin).backward()
            other.step()
            own.step()
    assert found == []


@pytest.mark.parametrize("kind", ["alone", "accumulator", "rounds", "elsewhere"])
def test_batches_that_nobody_commits_are_told_of(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """About a hundred, in the server's process, without an accumulator; not in rounds, nor by another transport."""
    monkeypatch.setattr(watch, "MANY_BATCHES", 5)
    half, body = splitfed.split(sandwich(nn.Linear(8, 8)), "body")
    store = splitfed.GradientStore(f"memory://{uuid.uuid4()}")
    server: Any = splitfed.SplitServer(body, store)
    if kind == "accumulator":
        splitfed.Accumulator(body, store, sgd, min_batches=100)
    if kind == "elsewhere":
        made = split()
        made.wire.servers = [server]
        server = made.wire
    client = splitfed.SplitClient(half, server, "a")
    if kind == "rounds":
        client.pull()
    optimizer = sgd(client.parameters())
    with told() as found:
        for _ in range(12):
            loss(client).backward()
            optimizer.step()
    assert [text[:40] for text in found] == ["client 'a': 5 batches wait at one versio"] * (kind == "alone")


def test_a_warning_may_be_an_error() -> None:
    """It leaves optimizer.step(), which has stepped."""
    made = split()
    optimizer = sgd(made.client.parameters())
    before = made.half.head.weight.detach().clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="2 batches"):
            two_passes(made.client, optimizer.step)
    assert not torch.equal(before, made.half.head.weight)


def test_a_client_is_kept_by_nobody() -> None:
    """The hooks of a process know of the clients that wait for a step, and keep none."""
    made = split()
    loss(made.client).backward()
    known = id(made.client._passes.watch)
    assert known in watch._armed
    del made
    gc.collect()
    assert known not in watch._armed
    sgd([nn.Parameter(torch.ones(1))]).step()
