"""Training loops as people write them, around a SplitClient: what they commit is what the plain loop computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bodies import Calls, sandwich
from harness import adam, assert_close, assert_same, assert_step, gradients, pair, replay_rng, sgd
from torch import Tensor, nn
from torch.nn.functional import mse_loss


def model(dtype: torch.dtype = torch.float32) -> nn.Module:
    """A bottom, a body with dropout, and a head; `(N, 6)` -> `(N, 3)`."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        body = [nn.Linear(8, 8), nn.Dropout(0.3), nn.ReLU(inplace=True), nn.Linear(8, 8)]
        return sandwich(nn.Sequential(*body)).to(dtype)


def data(count: int, size: int = 8, dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, Tensor]]:
    """Batches of inputs and targets."""
    return [(torch.randn(size, 6, dtype=dtype), torch.randn(size, 3, dtype=dtype)) for _ in range(count)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_grad_scaler_under_autocast(dtype: torch.dtype, tmp_path: Path) -> None:
    """GradScaler with autocast: the plain loop's bits (scales are powers of two); steps that overflow don't count."""
    size = 2.0**127 if dtype == torch.float16 else 2.0**16

    def train(net: nn.Module, optimizer: Any, scaler: Any, committed: Callable[[], Any]) -> None:
        for x, y in batches:
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=dtype):
                loss = mse_loss(net(x).float(), y)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            committed()

    batches = data(6)
    scalers = [
        torch.amp.GradScaler("cpu", init_scale=size, backoff_factor=2.0**-60, growth_interval=2) for _ in range(2)
    ]
    split, reference = pair(model(), tmp_path, optimizer=sgd, loss_scale=scalers[0].get_scale)
    rewind = replay_rng()
    commits: list[Any] = []
    scales: list[float] = []
    local = sgd(split.client.parameters())
    if dtype == torch.float16:
        with pytest.warns(UserWarning, match="isn't finite"):
            train(split.client, local, scalers[0], lambda: commits.append(split.accumulator.step()))
    else:
        train(split.client, local, scalers[0], lambda: commits.append(split.accumulator.step()))
    rewind()
    train(reference, sgd(reference.parameters()), scalers[1], lambda: scales.append(scalers[1].get_scale()))
    assert scalers[0].get_scale() == scales[-1] != size
    assert_same(split.state(), reference.state_dict())
    overflows = 2 if dtype == torch.float16 else 0
    assert [commit is None for commit in commits] == [n < overflows for n in range(6)]
    assert commits[overflows].num_rejected == overflows


@pytest.fixture
def accelerator() -> Iterator[Any]:
    """An Accelerator that accumulates over four batches."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    yield Accelerator(cpu=True, gradient_accumulation_steps=4)
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-6), (torch.float64, 1e-12)], ids=["float32", "float64"])
def test_accelerate_with_accumulation(accelerator: Any, dtype: torch.dtype, atol: float, tmp_path: Path) -> None:
    """Accelerate, 4 batches a step, up to rounding: the plain loop adds in their dtype, the commit in float64."""
    split, reference = pair(model(dtype), tmp_path, loss_scale=1 / 4, min_batches=4)
    client, local = accelerator.prepare(split.client, adam(split.client.parameters()))
    plain = adam(reference.parameters())
    batches = data(8, dtype=dtype)
    rewind = replay_rng()
    commits = []
    for x, y in batches:
        with accelerator.accumulate(client):
            accelerator.backward(mse_loss(client(x), y))
            local.step()
            local.zero_grad()
        commits.append(split.accumulator.step())
    rewind()
    for number, (x, y) in enumerate(batches, 1):
        (mse_loss(reference(x), y) / 4).backward()
        if number % 4 == 0:
            plain.step()
            plain.zero_grad()
    assert [commit and commit.num_batches for commit in commits] == [None, None, None, 4] * 2
    assert_close(split.state(), reference.state_dict(), atol)


@pytest.mark.parametrize("scaled", [True, False], ids=["loss_scale", "as_it_is"])
def test_summed_loss(scaled: bool, tmp_path: Path) -> None:
    """A summed loss commits its gradient, or the mean's with loss_scale=len(batch): equal bits, 8 is a power of two."""
    rate = 2.0**-6
    body = (lambda p: torch.optim.SGD(p, lr=8 * rate)) if scaled else (lambda p: torch.optim.SGD(p, lr=rate))
    split, reference = pair(model(), tmp_path, optimizer=body, loss_scale=(lambda: 8) if scaled else 1.0)
    plain = torch.optim.SGD(reference.parameters(), lr=rate)
    local = torch.optim.SGD(split.client.parameters(), lr=rate)
    for x, y in data(4):
        rewind = replay_rng()
        for net, optimizer in ((split.client, local), (reference, plain)):
            optimizer.zero_grad()
            mse_loss(net(x), y, reduction="sum").backward()
            optimizer.step()
            if net is split.client:
                rewind()
        split.accumulator.step()
        assert_same(split.state(), reference.state_dict())


def test_accumulation_over_batches_of_unequal_size(tmp_path: Path) -> None:
    """Micro-batches weighted nᵢ/N within client.batch(loss_scale=nᵢ/N) commit the plain loop's weights, to 1e-12."""
    split, reference = pair(model(torch.float64), tmp_path)
    parts = [data(1, size, torch.float64)[0] for size in (5, 2, 9)]
    rewind = replay_rng()
    for x, y in parts:
        share = len(x) / 16
        with split.client.batch(loss_scale=share):
            (mse_loss(split.client(x), y) * share).backward()
    rewind()
    for x, y in parts:
        (mse_loss(reference(x), y) * len(x) / 16).backward()
    adam(reference.parameters()).step()
    adam(split.client.parameters()).step()
    commit = split.accumulator.step()
    assert commit is not None
    assert (commit.num_batches, commit.num_samples) == (3, 16)
    assert_close(split.state(), reference.state_dict(), 1e-12)


@pytest.mark.parametrize("keep_graphs", [0, 8])
def test_a_second_pass_through_a_retained_graph_is_a_second_batch(keep_graphs: int, tmp_path: Path) -> None:
    """backward(retain_graph=True), then backward(): twice the gradient at the client, and two equal batches wait."""
    split, reference = pair(model(), tmp_path, keep_graphs=keep_graphs)
    ((x, y),) = data(1)
    rewind = replay_rng()
    loss = mse_loss(split.client(x), y)
    loss.backward(retain_graph=True)
    loss.backward()
    rewind()
    mse_loss(reference(x), y).backward()
    plain = gradients(reference)
    assert_same(gradients(split.client), {n: 2 * g for n, g in plain.items() if not n.startswith("body")})
    first, second = split.waiting()
    assert_same(first.gradients, second.gradients)
    assert_same(first.gradients, {n.removeprefix("body."): g for n, g in plain.items() if n.startswith("body")})
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
    assert len(split.waiting()) == 2


def uses(kind: str) -> nn.Module:
    """A model whose body has two outputs, which the client uses in some unusual way."""

    def forward(m: Any, x: Tensor) -> Tensor:
        left, right = m.body(m.bottom(x))
        if kind == "double":
            return m.head(left + left * right) + m.head(left)
        if kind == "unused":
            return m.head(left)
        return m.head(left) + m.head(right.detach())

    parts = {"left": nn.Linear(8, 8), "right": nn.Linear(8, 8), "noise": nn.Dropout()}
    net = sandwich(Calls(lambda m, x: (m.left(x), m.noise(m.right(x))), **parts))
    net.run = forward
    return net


@pytest.mark.parametrize("kind", ["double", "unused", "detached"])
def test_unusual_uses_of_outputs(kind: str, tmp_path: Path) -> None:
    """An output used twice, not at all, or detached: the reference's gradients, none where the reference has none."""
    split, reference = pair(uses(kind), tmp_path)
    got = assert_step(split, reference, ((torch.randn(8, 6),), {}))
    assert ("body.right.weight" in got.parameters) is (kind == "double")


def test_a_step_whose_backward_never_comes(tmp_path: Path) -> None:
    """A forward without a backward counts nowhere, holds up nothing, and its record goes with the next request."""
    split, reference = pair(model(), tmp_path)
    local, plain = adam(split.client.parameters()), adam(reference.parameters())
    for number, (x, y) in enumerate(data(5)):
        rewind = replay_rng()
        for net, optimizer in ((split.client, local), (reference, plain)):
            loss = mse_loss(net(x), y)
            if number % 2:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            if net is split.client:
                rewind()
        assert len(split.stored("forward")) == 1
        del loss
        commit = split.accumulator.step()
        assert (commit is not None) is bool(number % 2)
    assert split.store.latest_version() == 2
    assert_same(split.state(), reference.state_dict())
