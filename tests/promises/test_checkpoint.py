"""torch.utils.checkpoint in the client half: the cut is called again inside of a backward, and nothing changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bodies import sandwich
from harness import Split, assert_same, gradients, pair, replay_rng, step
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import splitfed


def model(where: str, use_reentrant: bool, calls: int = 1) -> nn.Module:
    """A model that recomputes a part of its client half, with the cut inside or beside of it."""

    def forward(m: Any, x: Tensor) -> Tensor:
        def bottom(x: Tensor) -> Tensor:
            return m.noise(m.bottom(x))

        def body(x: Tensor) -> Tensor:
            for _ in range(calls):
                x = m.body(x).tanh()
            return x

        def across(x: Tensor) -> Tensor:
            return m.head(body(bottom(x)))

        if where == "around_the_cut":
            return checkpoint(across, x, use_reentrant=use_reentrant)
        if where == "before_the_cut":
            return m.head(body(checkpoint(bottom, x, use_reentrant=use_reentrant)))
        if where == "after_the_cut":
            return checkpoint(m.head, body(bottom(x)), use_reentrant=use_reentrant)
        return across(x)

    with torch.random.fork_rng():
        torch.manual_seed(1)
        net = sandwich(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.3), nn.ReLU(inplace=True), nn.Linear(8, 8)))
    net.noise = nn.Dropout(0.2)
    net.run = forward
    return net


@pytest.mark.parametrize("commit_between", [False, True], ids=["", "commit_between"])
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["saved", "reentrant"])
@pytest.mark.parametrize("where", ["around_the_cut", "before_the_cut", "after_the_cut"])
@pytest.mark.parametrize("calls", [1, 2])
@pytest.mark.parametrize("keep_graphs", [0, 8])
def test_a_recompute_meets_the_same_masks_and_version(
    where: str, use_reentrant: bool, commit_between: bool, calls: int, keep_graphs: int, tmp_path: Path
) -> None:
    """Outputs, gradients and generator are those of the reference without checkpoint, also if a commit came between."""
    split = Split(model(where, use_reentrant, calls), "body", tmp_path, keep_graphs=keep_graphs)
    reference = splitfed.reference(model("", False, calls), "body")
    given = torch.randn(8, 6)
    if commit_between:
        step(splitfed.SplitClient(split.half, split.wire, "b"), ((given,), {}))
        split.client.zero_grad()
    found = []
    rewind = replay_rng()
    for net in (split.client, reference):
        rewind()
        x = given.clone().requires_grad_()
        outputs = net(x)
        if net is split.client and commit_between:
            assert split.accumulator.step() is not None
        outputs.pow(2).mean().backward()
        found.append({"outputs": outputs.detach(), "input": x.grad, "generator": torch.get_rng_state()})
    assert_same(*found)
    assert_same(split.gradients(), gradients(reference))


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["saved", "reentrant"])
@pytest.mark.parametrize("calls", [1, 2])
def test_a_recompute_counts_no_buffers(use_reentrant: bool, calls: int, tmp_path: Path) -> None:
    """BatchNorm in the body sees each call once, although the cut is called twice for it; the calls hand buffers on."""

    def around(m: Any, x: Tensor) -> Tensor:
        for _ in range(calls):
            x = m.body(x)
        return m.head(x)

    split, reference = pair(sandwich(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))), tmp_path)
    split.half.run = lambda m, x: checkpoint(lambda x: around(m, x), m.bottom(x), use_reentrant=use_reentrant)
    reference.run = lambda m, x: around(m, m.bottom(x))
    inputs = ((torch.randn(8, 6),), {})
    step(split.client, inputs)
    step(reference, inputs)
    split.accumulator.step()
    buffers = [name for name, _ in reference.named_buffers()]
    assert_same(*({name: state[name] for name in buffers} for state in (split.state(), reference.state_dict())))


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["saved", "reentrant"])
def test_a_checkpoint_around_the_client_stays_at_its_version(use_reentrant: bool, tmp_path: Path) -> None:
    """The recompute calls client(...) anew, after a commit: the gradients are those of the first call's version."""
    split = Split(model("", False), "body", tmp_path)
    reference = splitfed.reference(model("", False), "body")
    step(splitfed.SplitClient(split.half, split.wire, "b"), ((torch.randn(8, 6),), {}))
    split.client.zero_grad()
    given, rewind, found = torch.randn(8, 6), replay_rng(), []
    for net in (split.client, reference):
        rewind()
        x = given.clone().requires_grad_()
        outputs = net(x) if net is reference else checkpoint(net, x, use_reentrant=use_reentrant)
        if net is split.client:
            assert split.accumulator.step() is not None
        outputs.pow(2).mean().backward()
        found.append({"outputs": outputs.detach(), "input": x.grad})
    assert_same(*found)
    assert_same(split.gradients(), gradients(reference))


def test_a_recompute_that_differs_is_refused(tmp_path: Path) -> None:
    """Without the generator's state a recompute can't meet the same masks: an error says so, and nothing counts."""
    split, _ = pair(sandwich(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.3))), tmp_path)
    split.half.run = lambda m, x: checkpoint(
        lambda x: m.head(m.body(x)), m.bottom(x), use_reentrant=False, preserve_rng_state=False
    )
    with pytest.raises(splitfed.ReplayError, match="preserve_rng_state=True"):
        step(split.client, ((torch.randn(8, 6),), {}))
    assert split.waiting() == []
