"""client.batch(): several passes as one batch, whose gradient is their sum, sealed when the block ends."""

from __future__ import annotations

import sys
import types
import uuid
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bodies import sandwich
from harness import Split, assert_close, assert_same, gradients, sgd
from torch import Tensor, nn
from torch.nn.functional import mse_loss, softplus

import splitfed
from splitfed.errors import InputError
from splitfed.protocol.ids import BatchId

Losses = Callable[[nn.Module], list[Tensor]]


def split(model: nn.Module | None = None, **settings: Any) -> Any:
    """A split model in memory, and the model in one piece."""
    net = model or sandwich(nn.Sequential(nn.Linear(8, 8), nn.Tanh())).double()
    made = Split(net, "body", f"memory://{uuid.uuid4()}", optimizer=sgd, **settings)
    return made, splitfed.reference(net, "body")


def x(count: int = 4) -> Tensor:
    """A batch `(N, 6)`."""
    return torch.randn(count, 6, dtype=torch.float64)


REAL, FAKE = torch.ones(4, 6, dtype=torch.float64), torch.zeros(4, 6, dtype=torch.float64)


def discriminator(net: nn.Module) -> None:
    """DCGAN: the loss of the real examples, then that of the others."""
    softplus(-net(REAL)).mean().backward()
    softplus(net(FAKE)).mean().backward()


def two_tasks(net: nn.Module) -> None:
    """One forward, two losses with a backward each, through a retained graph."""
    out = net(REAL)
    out[:, 0].pow(2).mean().backward(retain_graph=True)
    out[:, 1:].sin().mean().backward()


def accumulated(net: nn.Module) -> None:
    """Four micro-batches, each with a quarter of its loss."""
    for part in (REAL + 0.1 * torch.arange(4)[:, None]).split(1):
        (net(part).pow(2).mean() / 4).backward()


def critic(net: nn.Module) -> None:
    """A Wasserstein critic: signed sums."""
    one = torch.ones((), dtype=torch.float64)
    net(REAL).mean().backward(-one)
    net(FAKE).mean().backward(one)


LOOPS = {"discriminator": (discriminator, 8), "two_tasks": (two_tasks, 4), "accumulated": (accumulated, 4)}
LOOPS["critic"] = (critic, 8)


@pytest.mark.parametrize(("loop", "samples"), LOOPS.values(), ids=LOOPS)
@pytest.mark.parametrize("keep_graphs", [0, 8])
def test_the_passes_of_a_block_are_one_batch(loop: Callable[[nn.Module], None], samples: int, keep_graphs: int) -> None:
    """Its gradient is what torch accumulates, to the bit; it counts the examples of each call once; no warning."""
    made, reference = split(keep_graphs=keep_graphs)
    local, plain = sgd(made.client.parameters()), sgd(reference.parameters())
    with made.client.batch():
        loop(made.client)
        assert made.waiting() == []
    loop(reference)
    (record,) = made.waiting()
    assert (record.kind, record.num_samples, record.loss_scale) == ("gradient", samples, 1.0)
    assert_same(made.gradients(), gradients(reference))
    local.step()
    plain.step()
    assert made.accumulator.step().num_batches == 1
    assert_same(made.state(), reference.state_dict())
    assert made.stored("part") == []


@pytest.mark.parametrize("size", [1, 3])
def test_accumulation_over_k_batches_is_the_large_batch(size: int) -> None:
    """With losses of 1 / k in a block per step, five steps end where the unsplit loop ends, to rounding."""
    made, reference = split()
    local, plain = sgd(made.client.parameters()), sgd(reference.parameters())
    for _ in range(5):
        whole, target = x(4 * size), torch.randn(4 * size, 3, dtype=torch.float64)
        with made.client.batch():
            for given, wanted in zip(whole.split(size), target.split(size), strict=True):
                (mse_loss(made.client(given), wanted) / 4).backward()
        mse_loss(reference(whole), target).backward()
        for optimizer in (local, plain):
            optimizer.step()
            optimizer.zero_grad()
        assert made.accumulator.step().num_samples == 4 * size
    assert_close(made.state(), reference.state_dict(), 1e-12)


def test_a_block_in_which_no_pass_ends_is_no_batch() -> None:
    """Its forwards make batches where their passes end."""
    made, _ = split()
    with made.client.batch():
        first, second = made.client(x(2)).sum(), made.client(x(3)).sum()
    first.backward()
    second.backward()
    assert [record.num_samples for record in made.waiting()] == [2, 3]
    with made.client.batch():
        pass
    assert len(made.waiting()) == 2


def test_a_block_with_a_weight_or_a_scale_sums_nothing() -> None:
    """It says something of the calls within, and each pass is a batch."""
    made, _ = split()
    with made.client.batch(num_samples=10):
        made.client(x()).sum().backward()
        assert len(made.waiting()) == 1
        made.client(x()).sum().backward()
    assert [record.num_samples for record in made.waiting()] == [10, 10]


def test_blocks_nest() -> None:
    """An inner block without settings joins the outer one's sum; one with settings says them of its calls."""
    made, reference = split(loss_scale=2.0)
    given = [x(2), x(3)]
    with made.client.batch():
        with made.client.batch():
            made.client(given[0]).sum().backward()
        assert made.waiting() == []
        with made.client.batch(num_samples=30):
            out = made.client(given[1])
        out.sum().backward()
    (record,) = made.waiting()
    assert (record.num_samples, record.loss_scale) == (32, 2.0)
    for one in given:
        reference(one).sum().backward()
    assert_same(made.gradients(), gradients(reference))


def test_settings_hold_in_blocks_within() -> None:
    """What an inner block doesn't say is as the outer one has it."""
    made, _ = split()
    with made.client.batch(loss_scale=4.0), made.client.batch(num_samples=7):
        made.client(x()).sum().backward()
    (record,) = made.waiting()
    assert (record.num_samples, record.loss_scale) == (7, 4.0)


def test_passes_of_two_scales_cant_be_summed() -> None:
    """What the sum would be divided by isn't one number: refused, and nothing of the block counts."""
    made, _ = split()

    def loop() -> None:
        with made.client.batch():
            for scale in (1.0, 8.0):
                with made.client.batch(loss_scale=scale):
                    made.client(x()).sum().backward()

    with pytest.raises(InputError, match=r"sums passes of one loss scale: expected 1\.0 as in the first, got 8\.0"):
        loop()
    made.client(x()).sum().backward()
    assert [record.kind for record in made.waiting()] == ["skip", "gradient"]


@pytest.mark.parametrize("kind", [ZeroDivisionError, KeyboardInterrupt])
def test_an_exception_drops_the_sum_and_says_so(kind: type[BaseException]) -> None:
    """Its number is given up with the next request; the exception tells how many passes are gone."""
    made, _ = split()

    def loop() -> None:
        with made.client.batch():
            made.client(x()).sum().backward()
            made.client(x()).sum().backward()
            raise kind

    if sys.version_info >= (3, 11):
        with pytest.raises(kind) as caught:
            loop()
        assert "2 backward passes that client.batch() had summed were dropped" in caught.value.__notes__[0]
    else:
        with pytest.raises(kind), pytest.warns(UserWarning, match="2 backward passes"):
            loop()
    made.client(x(7)).sum().backward()
    assert [(record.kind, record.num_samples) for record in made.waiting()] == [("skip", 0), ("gradient", 7)]


def exploding(tensor: Tensor) -> Tensor:
    """The tensor, with a gradient that raises."""

    def explode(grad: Tensor) -> None:
        raise ZeroDivisionError

    tensor.register_hook(explode)
    return tensor


@pytest.mark.parametrize("passes_before", [0, 1])
def test_a_pass_that_fails_within(passes_before: int) -> None:
    """Caught within the block: what was summed before it counts no more, and a warning says so; else others count."""
    made, _ = split(sandwich(nn.Linear(8, 8)))
    inner = made.half.body
    made.half.run = lambda m, given: inner(exploding(inner(m.bottom(given)))).sum()

    def loop() -> None:
        with made.client.batch():
            for _ in range(passes_before):
                made.half.run, failing = (lambda m, given: inner(m.bottom(given)).sum()), made.half.run
                made.client(x().float()).backward()
                made.half.run = failing
            with pytest.raises(ZeroDivisionError):
                made.client(x().float()).backward()
            made.half.run = lambda m, given: inner(m.bottom(given)).sum()
            made.client(x(3).float()).backward()

    if passes_before:
        with pytest.warns(UserWarning, match="has failed, so nothing that the block has summed counts"):
            loop()
        made.client(x().float()).backward()
        assert [record.num_samples for record in made.waiting() if record.kind == "gradient"] == [4]
    else:
        loop()
        assert [record.num_samples for record in made.waiting() if record.kind == "gradient"] == [3]


def test_several_clients_have_blocks_of_their_own() -> None:
    """Passes of another client within are its own batches."""
    made, _ = split()
    other = splitfed.SplitClient(made.half, made.wire, "b")
    with made.client.batch():
        made.client(x()).sum().backward()
        other(x()).sum().backward()
        made.client(x()).sum().backward()
    assert made.store.waiting() == [BatchId("a", 1, 0), BatchId("b", 1, 0)]


def test_one_trip_losses_cant_be_summed() -> None:
    """One counts by itself; a second one, or a pass beside it, is refused before it counts."""
    net = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3)).double()
    made = Split(net, "1:", f"memory://{uuid.uuid4()}", loss_fn=lambda out, target: out.sum(), optimizer=sgd)

    def loop(extra: Callable[[], Any]) -> None:
        with made.client.batch():
            made.client.loss(x(), None)
            extra()

    for extra in (lambda: made.client.loss(x(), None), lambda: made.client(x()).sum().backward()):
        with pytest.raises(InputError, match=r"client\.loss\(\) counts by itself"):
            loop(extra)
    assert [record.kind for record in made.waiting()] == ["gradient"] * 2


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """The one state of Accelerate; sets whether the next backward is a step's last."""
    state: dict[str, Any] = {"sync_gradients": True}
    module: Any = types.ModuleType("accelerate.state")
    module.GradientState = type("GradientState", (), {"_shared_state": state})
    monkeypatch.setitem(sys.modules, "accelerate.state", module)
    return lambda last: state.update(sync_gradients=last)


def test_what_a_trainer_accumulates_is_one_batch(trainer: Callable[[bool], None]) -> None:
    """Without settings: the sum, sealed by the last pass."""
    made, reference = split()
    made.client._is_accelerate_prepared = True
    local, plain = sgd(made.client.parameters()), sgd(reference.parameters())
    for _ in range(2):
        parts = [x(2) for _ in range(3)]
        for number, part in enumerate(parts):
            trainer(number == 2)
            (made.client(part).pow(2).mean() / 3).backward()
            (reference(part).pow(2).mean() / 3).backward()
            assert len(made.waiting()) == (number == 2)
        for optimizer in (local, plain):
            optimizer.step()
            optimizer.zero_grad()
        assert made.accumulator.step().num_samples == 6
        assert_same(made.state(), reference.state_dict())


def test_a_step_ends_what_a_trainer_accumulates(trainer: Callable[[bool], None]) -> None:
    """Where no last pass is announced; a loss scale that is said means batches of their own, as ever."""
    made, _ = split()
    made.client._is_accelerate_prepared = True
    local = sgd(made.client.parameters())
    trainer(False)
    for _ in range(2):
        made.client(x()).sum().backward()
    assert made.waiting() == []
    local.step()
    assert [record.num_samples for record in made.waiting()] == [8]
    scaled = splitfed.SplitClient(made.half, made.wire, "b", loss_scale=0.5)
    scaled._is_accelerate_prepared = True
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            scaled(x()).sum().backward()
        local.step()
    assert len(made.waiting()) == 3


def test_accelerate_accumulates_without_settings() -> None:
    """Four batches a step in Accelerate's own loop, and a loop beside it that it knows nothing of."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    try:
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
        made, reference = split()
        client, local = accelerator.prepare(made.client, sgd(made.client.parameters()))
        plain = sgd(reference.parameters())
        for number in range(1, 9):
            given = x()
            with accelerator.accumulate(client):
                accelerator.backward(client(given).pow(2).mean())
                local.step()
                local.zero_grad()
            (reference(given).pow(2).mean() / 4).backward()
            commit = made.accumulator.step()
            assert (commit is not None) == (number % 4 == 0)
            if commit is not None:
                plain.step()
                plain.zero_grad()
                assert (commit.num_batches, commit.num_samples) == (1, 16)
                assert_close(made.state(), reference.state_dict(), 1e-12)
        other = splitfed.SplitClient(made.half, made.wire, "b")
        with accelerator.accumulate(client):
            other(x()).sum().backward()
        assert len(made.waiting()) == 1
    finally:
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
