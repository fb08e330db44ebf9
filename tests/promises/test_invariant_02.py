"""Invariant 2, Pinned: a backward runs on the version, seed and modes of its forward, whatever has happened since."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from bodies import sandwich
from harness import Split, assert_same, gradients, pair, replay_rng, step
from torch import Tensor, nn

import splitfed

CHANGES = ["commit", "three_commits", "generator", "autocast", "no_grad", "eval_mode", "body_object", "thread"]


def model() -> nn.Module:
    """A body with BatchNorm and dropout, alone: the gradient that reaches it is what the test gives."""
    body = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.4), nn.Linear(8, 3))
    return nn.Sequential(nn.Identity(), body)


@contextmanager
def changed(split: Split, what: str) -> Iterator[None]:
    """Something that happens between a forward and its backward."""
    if what.endswith(("commit", "commits")):
        other = splitfed.SplitClient(splitfed.split(model(), "1")[0], split.wire, "other")
        for _ in range(3 if what == "three_commits" else 1):
            other(torch.randn(4, 8)).sum().backward()
            assert split.accumulator.step() is not None
    if what == "generator":
        torch.manual_seed(99)
        torch.rand(7)
    if what == "eval_mode":
        split.client.eval()
    if what == "body_object":
        with torch.no_grad():
            split.body[0].weight.fill_(7)
    with torch.set_grad_enabled(what != "no_grad"), torch.autocast("cpu", torch.bfloat16, enabled=what == "autocast"):
        yield


@pytest.mark.parametrize("what", CHANGES)
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast_forward"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("keep_graphs", [0, 8])
def test_a_backward_is_that_of_its_forward(
    what: str, autocast: bool, training: bool, keep_graphs: int, tmp_path: Path
) -> None:
    """Input gradient, parameter gradient and buffers are those of the forward, although the world has changed since."""
    split = Split(model(), "1", tmp_path, keep_graphs=keep_graphs)
    reference = splitfed.reference(model(), "1")
    reference.load_state_dict(split.state())
    x, weights = torch.randn(6, 8), torch.randn(6, 3)
    rewind = replay_rng()
    found = []
    for net in (reference.train(training), split.client.train(training)):
        rewind()
        own = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            outputs = net(own)
        if net is reference:
            outputs.backward(weights.to(outputs.dtype))
        else:
            with changed(split, what):
                backward(outputs, weights, in_thread=what == "thread")
        found.append({"outputs": outputs.detach(), "input": own.grad})
    assert_same(found[1], found[0])
    if not training:
        assert split.waiting() == []
        return
    assert_same(split.body_gradients(), gradients(reference))
    (record,) = split.waiting()
    assert record.base_version == 0
    buffers = {f"1.{name}": value for name, value in record.buffers[0].values.items()}
    assert_same(buffers, dict(reference.named_buffers()))


def backward(outputs: Tensor, weights: Tensor, *, in_thread: bool) -> None:
    """`outputs.backward(weights)`, if need be in a thread that has none of this one's modes."""
    if not in_thread:
        outputs.backward(weights.to(outputs.dtype))
        return
    thread = threading.Thread(target=lambda: outputs.backward(weights.to(outputs.dtype)))
    thread.start()
    thread.join()


def test_all_calls_of_one_client_call_run_at_one_version(tmp_path: Path) -> None:
    """A commit between two cut calls of one client(...) doesn't reach the second: they run at one version."""
    net = sandwich(nn.Linear(8, 8))
    between: list[Any] = []

    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.body(m.bottom(x))
        for action in between:
            action()
        return m.head(m.body(x))

    net.run = forward
    split, reference = pair(net, tmp_path)
    inputs = ((torch.randn(4, 6),), {})
    step(splitfed.SplitClient(split.half, split.wire, "other"), inputs)
    between.append(lambda: between.clear() or split.accumulator.step())
    got = step(split.client, inputs, split.gradients)
    assert split.store.latest_version() == 1
    expected = step(reference, inputs)
    assert_same(got.parameters, expected.parameters)
    assert torch.equal(split.client(inputs[0][0]), splitfed.join(split.half, split.store.load_weights(1))(inputs[0][0]))


def test_clients_in_threads_of_one_process_keep_their_seeds(tmp_path: Path) -> None:
    """Torch's generator is the process's, yet a client's draw never disturbs a body that runs in another thread."""
    split = Split(model(), "1", tmp_path, keep_graphs=0)
    clients = [splitfed.SplitClient(splitfed.split(model(), "1")[0], split.wire, name) for name in "abcd"]
    errors: list[Exception] = []

    def work(client: splitfed.SplitClient) -> None:  # a model that is built in a thread draws beside the lock
        try:
            for _ in range(20):
                client(torch.ones(4, 8)).sum().backward()
        except splitfed.SplitFedError as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(client,)) for client in clients]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(split.waiting()) == 80


def test_evaluation_at_a_version(tmp_path: Path) -> None:
    """client.at(version) evaluates with that version's weights, older ones too, and ends with the block."""
    split = Split(model(), "1", tmp_path)
    for _ in range(3):
        split.client(torch.randn(6, 8)).sum().backward()
        split.accumulator.step()
    x = torch.randn(6, 8)
    split.client.eval()
    expected = [splitfed.join(split.half, split.store.load_weights(version)).eval()(x) for version in range(4)]
    assert not torch.equal(expected[0], expected[3])
    with torch.no_grad():
        for version in (2, 0, 3, 1):
            with split.client.at(version):
                assert torch.equal(split.client(x), expected[version])
        assert torch.equal(split.client(x), expected[3])
        with split.client.at(4), pytest.raises(splitfed.MissingError, match="no version 4"):
            split.client(x)
