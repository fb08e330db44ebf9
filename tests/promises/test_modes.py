"""Grad mode, eval mode, autocast and autograd.grad: each does across the cut what it does in an unsplit model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from bodies import noisy, sandwich
from cases import Inputs
from harness import assert_same, assert_step, gradients, pair, replay_rng, scalar, step
from torch import nn

import splitfed


class Held(nn.Module):
    """A backbone that stays in eval mode, as detectors keep theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(6, 4), nn.Linear(4, 2)
        self.body = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The head's outputs."""
        return self.head(self.body(self.stem(x)))

    def train(self, mode: bool = True) -> Held:
        """All but the backbone."""
        super().train(mode)
        self.body.eval()
        return self


def inputs(size: int = 8) -> Inputs:
    """One batch."""
    return (torch.randn(size, 6),), {}


@pytest.mark.parametrize("wanted", ["all", "bottom", "head", "input"])
def test_autograd_grad(wanted: str, tmp_path: Path) -> None:
    """torch.autograd.grad gives the reference's gradients, and makes no batch: it accumulates none."""
    split, reference = pair(noisy(), tmp_path)
    found = []
    given = torch.randn(8, 6)
    rewind = replay_rng()
    for net in (split.client, reference):
        rewind()
        x = given.clone().requires_grad_()
        parameters = {n: p for n, p in net.named_parameters() if not n.startswith("body")}
        chosen = {n: p for n, p in parameters.items() if wanted in ("all", n.split(".")[0])}
        if wanted == "input":
            chosen = {"x": x}
        loss = net(x).pow(2).mean()
        found.append(dict(zip(chosen, torch.autograd.grad(loss, list(chosen.values())), strict=True)))
    assert found[0]
    assert_same(*found)
    assert split.waiting() == []
    assert gradients(split.client) == {}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("keep_graphs", [0, 8])
def test_autocast(dtype: torch.dtype, keep_graphs: int, tmp_path: Path) -> None:
    """Under autocast the body computes in that dtype too: the reference's bits, also when a replica recomputes."""
    split, reference = pair(noisy(), tmp_path, keep_graphs=keep_graphs)
    found = []
    given = torch.randn(8, 6)
    rewind = replay_rng()
    for net in (split.client, reference):
        rewind()
        x = given.clone().requires_grad_()
        with torch.autocast("cpu", dtype=dtype):
            outputs = net(x)
        assert outputs.dtype == dtype
        outputs.float().pow(2).mean().backward()
        found.append({"outputs": outputs.detach(), "input": x.grad})
    assert_same(*found)
    assert_same(split.gradients(), gradients(reference))


def test_eval_mode_with_gradients(tmp_path: Path) -> None:
    """In eval mode a backward answers the reference's gradients, and the body's own and its buffers don't count."""
    split, reference = pair(noisy(), tmp_path)
    given, before = inputs(), split.state()
    got, expected = step(split.client.eval(), given), step(reference.eval(), given)
    assert_same(dict(enumerate(got.outputs + got.inputs)), dict(enumerate(expected.outputs + expected.inputs)))
    assert_same(got.parameters, {n: g for n, g in expected.parameters.items() if not n.startswith("body")})
    assert split.waiting() == []
    assert split.accumulator.step() is None
    assert_same(split.state(), before)
    split.client.train()
    assert_step(split, reference.train(), given)


def test_the_body_runs_in_the_mode_of_its_cut_point(tmp_path: Path) -> None:
    """A part in eval mode within a client that trains: the reference's bits, the body's gradient among them."""
    split, reference = pair(noisy(), tmp_path)
    for net in (split.half, reference):
        net.body.eval()
    given = inputs()
    rewind = replay_rng()
    got = step(split.client, given)
    rewind()
    expected = step(reference, given)
    assert_same(dict(enumerate(got.outputs + got.inputs)), dict(enumerate(expected.outputs + expected.inputs)))
    assert_same(split.gradients(), gradients(reference))
    assert split.client.training


@pytest.mark.parametrize("at", ["body", "body.1", "body.0:2"])
def test_a_part_that_its_model_keeps_in_eval_mode_trains(at: str, tmp_path: Path) -> None:
    """A backbone whose model never lets it into train mode steps as in the unsplit model; its statistics stay."""
    model = Held()
    half, body = splitfed.split(model, at)
    store = splitfed.GradientStore(tmp_path, sync="process")
    client = splitfed.SplitClient(half, splitfed.SplitServer(body, store), "a")
    given = torch.randn(8, 6)
    for net in (client, model):
        net.train()
        net(given).pow(2).mean().backward()
        torch.optim.SGD(net.parameters(), lr=0.1).step()
    splitfed.Accumulator(body, store, lambda parameters: torch.optim.SGD(parameters, lr=0.1)).step()
    assert_same(splitfed.join(client, store.load_weights()).state_dict(), model.state_dict())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_nothing_is_stored_without_grad(mode: type, training: bool, tmp_path: Path) -> None:
    """Under no_grad and inference_mode outputs are the reference's, and the store gets no file at all."""
    split, reference = pair(noisy(), tmp_path)
    before = split.store.blobs.list("")
    given = torch.randn(8, 6)
    rewind = replay_rng()
    found = []
    for net in (split.client.train(training), reference.train(training)):
        rewind()
        with mode():
            found.append(net(given))
    assert torch.equal(*found)
    assert not found[0].requires_grad
    assert split.store.blobs.list("") == before
    assert split.stored("forward") == []


def test_several_calls_in_one_backward_are_one_batch(tmp_path: Path) -> None:
    """The loss of three client(...) calls makes one batch: the sum of their samples, the reference's gradients."""
    split, reference = pair(noisy(), tmp_path)
    parts = [torch.randn(size, 6) for size in (3, 8, 5)]
    rewind = replay_rng()
    for net in (split.client, reference):
        rewind()
        sum(scalar(net(x)) for x in parts).backward()
    assert_same(split.gradients(), gradients(reference))
    (record,) = split.waiting()
    assert record.num_samples == 16
    commit = split.accumulator.step()
    assert commit is not None
    assert (commit.num_batches, commit.num_samples) == (1, 16)


def test_separate_backwards_of_several_calls_are_separate_batches(tmp_path: Path) -> None:
    """Forwards that overlap and backwards in another order: each batch has its own call's gradient."""
    split, reference = pair(sandwich(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.3))), tmp_path)
    parts = [inputs(size) for size in (3, 8, 5)]
    rewind = replay_rng()
    outputs = [split.client(*args) for args, _ in parts]
    for number in (1, 2, 0):
        scalar(outputs[number]).backward()
    records = split.waiting()
    assert [record.num_samples for record in records] == [8, 5, 3]
    rewind()
    expected = [step(reference, given).parameters for given in parts]
    for record, number in zip(records, (1, 2, 0), strict=True):
        own = {f"body.{name}": gradient for name, gradient in record.gradients.items()}
        assert_same(own, {n: g for n, g in expected[number].items() if n.startswith("body")})


def test_num_samples_can_be_said(tmp_path: Path) -> None:
    """client.batch(num_samples=...) counts tokens in place of the leading dimension, over all calls of the block."""
    split, _ = pair(noisy(), tmp_path)
    with split.client.batch(num_samples=100):
        (split.client(torch.randn(3, 6)).sum() + split.client(torch.randn(5, 6)).sum()).backward()
    split.client(torch.randn(3, 6)).sum().backward()
    assert [record.num_samples for record in split.waiting()] == [100, 3]
