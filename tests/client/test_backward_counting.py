"""Which passes count: those that accumulate parameter gradients, as in torch, unless something else is said."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bodies import sandwich
from harness import Split, assert_close, assert_same, gradients, sgd
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, softplus
from torch.utils.checkpoint import checkpoint

import splitfed


def split(model: nn.Module | None = None, at: str = "body", **settings: Any) -> Any:
    """A split model in memory, and the model in one piece."""
    net = model or sandwich(nn.Sequential(nn.Linear(8, 8), nn.Tanh()))
    made = Split(net, at, f"memory://{uuid.uuid4()}", optimizer=sgd, **settings)
    return made, splitfed.reference(net, at)


def x(count: int = 4) -> Tensor:
    """A batch `(N, 6)`."""
    return torch.randn(count, 6)


def fast_sign(net: nn.Module, given: Tensor, labels: Tensor) -> Tensor:
    """FGSM: one step along the sign of the input's gradient."""
    given = given.clone().requires_grad_()
    (found,) = torch.autograd.grad(cross_entropy(net(given), labels), given)
    return given.detach() + 0.1 * found.sign()


def projected(net: nn.Module, given: Tensor, labels: Tensor) -> Tensor:
    """PGD: three steps, each by backward(inputs=...)."""
    moved = given.clone()
    for _ in range(3):
        moved = moved.detach().requires_grad_()
        cross_entropy(net(moved), labels).backward(inputs=[moved])
        moved = moved + 0.05 * moved.grad.sign()  # type: ignore[union-attr]
    return moved.detach()


def virtual(net: nn.Module, given: Tensor, labels: Tensor) -> Tensor:
    """Virtual adversarial training: the direction that changes the outputs most, through a retained graph."""
    noise = (0.01 * torch.ones_like(given)).requires_grad_()
    distance = (net(given + noise) - net(given).detach()).pow(2).sum()
    torch.autograd.grad(distance, noise, retain_graph=True)
    (found,) = torch.autograd.grad(distance, noise)
    return given + 0.1 * found / found.norm()


@pytest.mark.parametrize("keep_graphs", [0, 8])
@pytest.mark.parametrize("attack", [fast_sign, projected, virtual])
def test_adversarial_training(attack: Any, keep_graphs: int) -> None:
    """The gradients of the inputs are the reference's and count nothing; the step on what came of them does."""
    made, reference = split(keep_graphs=keep_graphs)
    given, labels = x(), torch.randint(0, 3, (4,))
    local, plain = sgd(made.client.parameters()), sgd(reference.parameters())
    for _ in range(2):
        perturbed = []
        for net, optimizer in ((made.client, local), (reference, plain)):
            optimizer.zero_grad()
            perturbed.append(attack(net, given, labels))
            assert gradients(net) == {}
            cross_entropy(net(perturbed[-1]), labels).backward()
            optimizer.step()
        assert torch.equal(*perturbed)
        assert made.accumulator.step().num_batches == 1
        assert_same(made.state(), reference.state_dict())


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["saved", "reentrant"])
def test_a_checkpoint_counts_as_without_one(use_reentrant: bool) -> None:
    """Around the client: a full pass counts once; under torch.autograd.grad, which only one form has, nothing does."""
    made, _ = split()
    checkpoint(made.client, x().requires_grad_(), use_reentrant=use_reentrant).sum().backward()
    assert len(made.waiting()) == 1
    if not use_reentrant:
        given = x().requires_grad_()
        torch.autograd.grad(checkpoint(made.client, given, use_reentrant=False).sum(), given)
        assert len(made.waiting()) == 1


def test_a_retained_graph_counts_where_it_accumulates() -> None:
    """First for the input alone, then in full."""
    made, reference = split()
    given, found = x(), []
    for net in (made.client, reference):
        own = given.clone().requires_grad_()
        loss = net(own).pow(2).mean()
        found.append(torch.autograd.grad(loss, own, retain_graph=True)[0])
        loss.backward()
    assert torch.equal(*found)
    assert_same(made.gradients(), gradients(reference))


def frozen_by_client(client: Any, frozen: bool) -> None:
    """As a module's user says it."""
    client.requires_grad_(not frozen)


def frozen_by_loop(client: Any, frozen: bool) -> None:
    """As GAN code says it."""
    for parameter in client.parameters():
        parameter.requires_grad = not frozen


@pytest.mark.parametrize("first", ["discriminator", "generator"])
@pytest.mark.parametrize("freeze", [frozen_by_client, frozen_by_loop])
def test_a_frozen_discriminator(freeze: Callable[[Any, bool], None], first: str) -> None:
    """The generator's step gets its gradients through it, and the body learns from the discriminator's steps alone."""
    made, reference = split()
    torch.manual_seed(1)
    generators = [nn.Linear(2, 6) for _ in range(2)]
    generators[1].load_state_dict(generators[0].state_dict())
    real, noise, found = x(), torch.randn(4, 2), []
    for net, generator in zip((made.client, reference), generators, strict=True):
        own, other = sgd(net.parameters()), sgd(generator.parameters())

        def of_the_discriminator(net: Any = net, generator: Any = generator, own: Any = own) -> None:
            own.zero_grad()
            outputs = net(torch.cat([real, generator(noise).detach()]))
            (softplus(-outputs[:4]).mean() + softplus(outputs[4:]).mean()).backward()
            own.step()

        def of_the_generator(net: Any = net, generator: Any = generator, other: Any = other) -> None:
            freeze(net, True)
            other.zero_grad()
            softplus(-net(generator(noise))).mean().backward()
            other.step()
            freeze(net, False)

        steps = [of_the_discriminator, of_the_generator]
        for step in steps if first == "discriminator" else reversed(steps):
            step()
            if net is made.client:
                made.accumulator.step()
        found.append(dict(generator.named_parameters()))
    assert_same(*found)
    assert made.store.latest_version() == 1
    assert_same(made.state(), reference.state_dict())


def test_nothing_requires_grad_in_a_frozen_half() -> None:
    """As in a frozen model: outputs for an input without grad need none; a bottom that never trained counts."""
    made, _ = split()
    made.client.requires_grad_(False)
    assert not made.client(x()).requires_grad
    assert made.client(x().requires_grad_()).requires_grad
    net = sandwich(nn.Linear(8, 8))
    net.bottom.requires_grad_(False)
    net.head.requires_grad_(False)
    made, _ = split(net)
    made.client(x()).sum().backward()
    assert len(made.waiting()) == 1
    made.client.requires_grad_(False)
    assert not made.client(x()).requires_grad
    assert len(made.waiting()) == 1


def test_what_is_frozen_is_asked_at_the_forward() -> None:
    """As torch builds its graphs: thawed before the backward, it passes on and counts nothing; and the other way."""
    made, _ = split()
    made.client.requires_grad_(False)
    loss = made.client(x().requires_grad_()).sum()
    made.client.requires_grad_(True)
    loss.backward()
    assert made.waiting() == []
    loss = made.client(x()).sum()
    made.client.requires_grad_(False)
    loss.backward()
    assert len(made.waiting()) == 1


@pytest.mark.parametrize("inside", ["both", "forward", "backward"])
@pytest.mark.parametrize("count", [True, False])
def test_a_block_says_whether_passes_count(count: bool, inside: str) -> None:
    """Over its forwards and over the passes that end within; against what autograd would say."""
    made, reference = split()
    given, found = x(), []
    for net in (made.client, reference):
        own = given.clone().requires_grad_()
        blocks = [made.client.batch(count=count) for _ in range(2)]
        if inside != "backward":
            with blocks[0]:
                loss = net(own).sum()
                if inside == "both":
                    found.append(pass_on(loss, own, count))
        else:
            loss = net(own).sum()
        if inside == "backward":
            with blocks[1]:
                found.append(pass_on(loss, own, count))
        elif inside == "forward":
            found.append(pass_on(loss, own, count))
    assert torch.equal(*found)
    assert len(made.waiting()) == count


def pass_on(loss: Tensor, given: Tensor, count: bool) -> Tensor:
    """The gradient of the input, by a pass that wouldn't count where it shall, and the other way round."""
    if count:
        return torch.autograd.grad(loss, given)[0]
    loss.backward()
    return given.grad  # type: ignore[return-value]


def test_no_block_counts_eval_mode() -> None:
    """There nothing of the body counts."""
    made, _ = split()
    made.client.eval()
    with made.client.batch(count=True):
        made.client(x()).sum().backward()
    assert made.waiting() == []


def test_calls_that_count_and_calls_that_dont_in_one_pass() -> None:
    """A triplet whose negative is frozen out: the batch has the others, and all inputs get their gradients."""
    made, _ = split(sandwich(nn.Linear(8, 8)).double())
    given = [x(2).double().requires_grad_() for _ in range(3)]
    out = [made.client(one) for one in given[:2]]
    with made.client.batch(count=False):
        out.append(made.client(given[2]))
    (out[0] * out[1] - out[0] * out[2]).sum().backward()
    (record,) = made.waiting()
    assert record.num_samples == 4
    assert all(one.grad is not None for one in given)
    alone = splitfed.join(made.client, made.body)
    alone.zero_grad()
    out = [alone(one) for one in given]
    (out[0] * out[1] - out[0] * out[2].detach()).sum().backward()
    own = {f"body.{name}": gradient for name, gradient in record.gradients.items()}
    assert_close(own, {n: g for n, g in gradients(alone).items() if n.startswith("body")}, 1e-12)


@pytest.mark.parametrize("how", ["block", "client", "loop"])
def test_a_loss_in_one_trip_counts_at_its_forward_or_not_at_all(how: str) -> None:
    """A frozen client and count=False make it pass gradients on; torch.autograd.grad comes too late to say so."""
    net = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3))
    made, _ = split(net, "1:", loss_fn=lambda out, target: out.pow(2).mean())
    given = x().requires_grad_()
    torch.autograd.grad(made.client.loss(given, None), given)
    assert len(made.waiting()) == 1
    if how == "block":
        with made.client.batch(count=False):
            made.client.loss(given, None).backward()
    else:
        {"client": frozen_by_client, "loop": frozen_by_loop}[how](made.client, True)
        made.client.loss(given, None).backward()
    assert given.grad is not None
    assert len(made.waiting()) == 1
