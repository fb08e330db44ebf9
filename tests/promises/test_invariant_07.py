"""Invariant 7, Buffers too: statistics advance as the unsplit model's do, and a recompute never counts again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bodies import sandwich, twice
from harness import Apart, Split, assert_same, pair, replay_rng, sgd, step
from torch import Tensor, nn

import splitfed

BATCHES = 94


def statistics() -> nn.Module:
    """A body that is a BatchNorm over what the client sends as it is."""
    return nn.Sequential(nn.Identity(), nn.BatchNorm1d(3), nn.Identity())


def body_buffers(split: Split) -> dict[str, Tensor]:
    """The committed buffers of the body, by their names in it."""
    weights = split.store.load_weights()
    return {name: weights[name] for name, _ in split.body.named_buffers()}


@pytest.mark.parametrize("num_clients", [1, 4])
def test_94_batches_of_mean_5_in_one_commit(num_clients: int, tmp_path: Path) -> None:
    """The running mean ends within 0.05 of the sequential one, where a plain mean of the ends would leave 0.5."""
    split = Split(statistics(), "1", tmp_path)
    sequential = nn.BatchNorm1d(3)
    clients = [splitfed.SplitClient(split.half, split.wire, f"c{number}") for number in range(num_clients)]
    for number in range(BATCHES):
        x = 5 + torch.randn(64, 3) / 2
        clients[number % num_clients](x).sum().backward()
        sequential(x)
    commit = split.accumulator.step()
    assert commit is not None
    assert commit.num_batches == BATCHES
    found = body_buffers(split)
    assert int(found["num_batches_tracked"]) == BATCHES
    assert torch.allclose(found["running_mean"], sequential.running_mean, rtol=0, atol=0.05)
    assert torch.allclose(found["running_var"], sequential.running_var, rtol=0, atol=0.05)
    assert float(found["running_mean"].min()) > 4.9


@pytest.mark.parametrize("momentum", [0.1, None])
def test_one_batch_in_a_commit_counts_bit_for_bit(momentum: float | None, tmp_path: Path) -> None:
    """With a commit for each batch, every buffer has the bits of the sequential ones after every batch."""
    model = statistics()
    model[1].momentum = momentum
    split, sequential = Split(model, "1", tmp_path), nn.BatchNorm1d(3, momentum=momentum)
    for _ in range(5):
        x = 5 + torch.randn(8, 3)
        split.client(x).sum().backward()
        sequential(x)
        split.accumulator.step()
        assert_same(body_buffers(split), dict(sequential.named_buffers()))


def normed(*, calls: int = 1, dropout: float = 0.3) -> nn.Module:
    """A model whose body has BatchNorm and dropout and is called once or twice."""
    body = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(dropout))
    return twice(body) if calls == 2 else sandwich(body)


def counted(model: nn.Module) -> dict[str, Tensor]:
    """Its buffers, under the body's own names."""
    return {name.removeprefix("body."): buffer for name, buffer in model.named_buffers()}


MODES: dict[str, dict[str, Any]] = {
    "kept": {"keep_graphs": 8},
    "recomputed": {"keep_graphs": 0},
    "one_kept": {"keep_graphs": 1},
    "two_replicas": {"wire": Apart, "replicas": 2},
}


@pytest.mark.parametrize("calls", [1, 2])
@pytest.mark.parametrize("mode", MODES)
def test_a_recompute_never_counts_again(calls: int, mode: str, tmp_path: Path) -> None:
    """Kept, recomputed or on another replica: buffers advance by the client's calls, handed on from one to the next."""
    split, reference = pair(normed(calls=calls), tmp_path, optimizer=sgd, **MODES[mode])
    inputs = ((torch.randn(8, 6),), {})
    rewind = replay_rng()
    step(split.client, inputs)
    rewind()
    step(reference, inputs)
    split.accumulator.step()
    found = body_buffers(split)
    assert int(found["1.num_batches_tracked"]) == calls
    assert_same(found, counted(reference))


def test_a_second_pass_through_a_retained_graph_counts_no_buffers(tmp_path: Path) -> None:
    """Two batches of one forward: the statistics saw its data once, as in the unsplit model."""
    split, reference = pair(normed(), tmp_path)
    x = torch.randn(8, 6)
    rewind = replay_rng()
    loss = split.client(x).pow(2).mean()
    loss.backward(retain_graph=True)
    loss.backward()
    rewind()
    reference(x)
    commit = split.accumulator.step()
    assert commit is not None
    assert commit.num_batches == 2
    found, expected = body_buffers(split), counted(reference)
    assert int(found["1.num_batches_tracked"]) == 1
    assert torch.allclose(found["1.running_mean"], expected["1.running_mean"], atol=1e-6)


def test_calls_of_several_client_calls_count_each_once(tmp_path: Path) -> None:
    """Three client(...) calls in one backward advance the statistics by three steps, near to those made in a row."""
    split, sequential = pair(normed(dropout=0.1), tmp_path)
    parts = [2 + torch.randn(64, 6) for _ in range(3)]
    sum(split.client(x).sum() for x in parts).backward()
    for x in parts:
        sequential(x)
    split.accumulator.step()
    found, expected = body_buffers(split), counted(sequential)
    assert int(found["1.num_batches_tracked"]) == 3
    assert torch.allclose(found["1.running_mean"], expected["1.running_mean"], atol=0.02)


def test_neither_eval_mode_nor_a_rejected_batch_touches_buffers(tmp_path: Path) -> None:
    """Calls in eval mode, under no_grad, and batches with NaN leave every buffer of the body as it was."""
    split = Split(normed(), "body", tmp_path)
    before = body_buffers(split)
    with torch.no_grad():
        split.client(torch.randn(8, 6))
    split.client.eval()(torch.randn(8, 6)).sum().backward()
    split.client.train()
    with pytest.warns(UserWarning, match="isn't finite"):
        (split.client(torch.randn(8, 6)).sum() * float("nan")).backward()
    assert split.accumulator.step() is None
    assert_same(body_buffers(split), before)
