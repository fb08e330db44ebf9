"""A SplitClient is a module like any other: copies, nesting, signatures, state, dtypes and torch.compile."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from bodies import Calls, noisy
from cases import Inputs
from harness import Split, adam, assert_equal, assert_same, assert_step, gradients, pair, replay_rng, step
from processes import CONTEXT
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import splitfed


def inputs(size: int = 8) -> Inputs:
    """One batch."""
    return (torch.randn(size, 6),), {}


def test_a_copy_for_evaluation(tmp_path: Path) -> None:
    """A deep copy of the client, as a moving average keeps one, evaluates by itself and leaves the training alone."""
    split, reference = pair(noisy(), tmp_path)
    with pytest.warns(UserWarning, match="copies the half alone"):
        averaged = AveragedModel(split.client, multi_avg_fn=get_ema_multi_avg_fn(0.5)).eval()
    local, plain = adam(split.client.parameters()), adam(reference.parameters())
    for _ in range(3):
        given = inputs()
        assert_step(split, reference, given)
        local.step()
        plain.step()
        split.accumulator.step()
        averaged.update_parameters(split.client)
        with torch.no_grad():
            found = averaged(given[0][0])
        assert_same(split.state(), reference.state_dict())
        assert split.client.training
    expected = splitfed.join(split.half, split.store.load_weights()).eval()
    own = dict(averaged.module.named_parameters())
    with torch.no_grad():
        for name, parameter in expected.named_parameters():
            if name in own:
                assert not torch.equal(own[name], parameter)
                parameter.copy_(own[name])
        assert torch.equal(found, expected(given[0][0]))
    assert not hasattr(copy.deepcopy(split.half), "client_id")


def test_forward_has_the_signature_of_the_half(tmp_path: Path) -> None:
    """inspect.signature(client.forward), by which trainers choose their columns, is the half's own."""

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(4, 4)
            self.temperature = 2.0

        def forward(self, input_ids: Tensor, mask: Tensor | None = None, *, labels: Tensor | None = None) -> Tensor:
            return self.body(input_ids) / self.temperature

    client = Split(Classifier(), "body", tmp_path).client
    signature = inspect.signature(client.forward)
    assert signature == inspect.signature(client.client_half.forward)
    assert list(signature.parameters) == ["input_ids", "mask", "labels"]
    assert inspect.signature(type(client).forward) == inspect.signature(Classifier.forward)
    assert client.temperature == 2.0
    with pytest.raises(AttributeError, match="nowhere"):
        _ = client.nowhere


def test_state_is_the_halfs(tmp_path: Path) -> None:
    """state_dict, parameters and load_state_dict are the half's, under its own names and with its own tensors."""
    split, _ = pair(noisy(), tmp_path)
    client, half = split.client, split.half
    names = ["bottom.weight", "bottom.bias", "head.weight", "head.bias"]
    assert list(client.state_dict()) == list(half.state_dict()) == names
    assert [name for name, _ in client.named_parameters()] == names
    assert all(a is b for a, b in zip(client.parameters(), half.parameters(), strict=True))
    saved = {name: torch.full_like(tensor, 3) for name, tensor in half.state_dict().items()}
    client.load_state_dict(saved)
    assert_same(half.state_dict(), saved)
    with pytest.raises(RuntimeError, match="Missing key"):
        client.load_state_dict({})
    client.eval()
    assert not any(module.training for module in half.modules())


def test_a_client_moves_to_another_dtype(tmp_path: Path) -> None:
    """client.to(float64) converts the half in place, and trains with a body of that dtype as the reference does."""
    net = noisy()
    split = Split(copy.deepcopy(net).double(), "body", tmp_path)
    reference = splitfed.reference(net, "body").double()
    client = splitfed.SplitClient(splitfed.split(net, "body")[0], split.wire, "b")
    assert client.to(torch.float64) is client
    assert {p.dtype for p in client.client_half.parameters()} == {torch.float64}
    given = ((torch.randn(8, 6, dtype=torch.float64),), {})
    rewind = replay_rng()
    got = step(client, given, lambda: gradients(client) | split.body_gradients())
    rewind()
    assert_equal(got, step(reference, given))


def test_a_client_within_a_larger_module(tmp_path: Path) -> None:
    """As a submodule a client computes, saves, loads and changes mode with its parent."""
    split, reference = pair(noisy(), tmp_path)
    last = nn.Linear(3, 2)
    parents = [
        Calls(lambda m, x: m.last(m.inner(x)), inner=net, last=copy.deepcopy(last)) for net in (split.client, reference)
    ]
    given = inputs()
    rewind = replay_rng()
    got = step(parents[0], given)
    rewind()
    expected = step(parents[1], given)
    assert torch.equal(got.outputs[0], expected.outputs[0])
    assert_same(got.parameters, {n: g for n, g in expected.parameters.items() if ".body." not in n})
    saved = {name: tensor.clone() for name, tensor in parents[0].state_dict().items()}
    assert list(saved) == [*(f"inner.{name}" for name in split.half.state_dict()), "last.weight", "last.bias"]
    parents[0].load_state_dict({name: tensor + 1 for name, tensor in saved.items()})
    assert_same(split.half.state_dict(), {n[6:]: t + 1 for n, t in saved.items() if n.startswith("inner")})
    parents[0].eval()
    assert not split.half.training
    parents[0].to(torch.float64)
    assert split.half.head.weight.dtype == torch.float64


# The warning comes from torch's own tracing.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_torch_compile(tmp_path: Path) -> None:
    """A compiled client is two graphs, before and after the cut, with the same bits; nothing of ours is compiled."""
    split, reference = pair(noisy(), tmp_path)
    graphs: list[list[str]] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append([node.target.__name__ for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward

    compiled = torch.compile(split.client, backend=backend)
    plain = adam([p for n, p in reference.named_parameters() if n.startswith("body")])
    for _ in range(2):
        given = inputs()
        rewind = replay_rng()
        got = step(compiled, given, lambda: gradients(split.client) | split.body_gradients())
        rewind()
        assert_equal(got, step(reference, given))
        split.accumulator.step()
        plain.step()
    assert graphs == [["linear"], ["dropout", "linear"]]


@pytest.mark.parametrize("how", ["forward", "loss"])
def test_a_default_device_of_the_users_own(how: str, tmp_path: Path) -> None:
    """Under torch.set_default_device what is ours stays on the CPU, the client's draws too ("meta" has no data)."""
    net = nn.Sequential(nn.Linear(6, 3), nn.Linear(3, 3), nn.Dropout(0.5))
    split = Split(net, "1:3", tmp_path, loss_fn=nn.functional.mse_loss)
    given, target = torch.randn(8, 6), torch.randn(8, 3)
    torch.set_default_device("meta")
    try:
        for _ in range(2):
            (split.client.loss(given, target) if how == "loss" else split.client(given).sum()).backward()
            commit = split.accumulator.step()
        assert commit is not None
        assert commit.version == 2
    finally:
        torch.set_default_device(None)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed")
def test_a_client_of_each_rank_under_distributed_data_parallel(tmp_path: Path) -> None:
    """Ranks average the half's gradients, each counts its own batch, and both end as one model with all examples."""
    processes = [CONTEXT.Process(target=ranks.rank, args=(number, tmp_path)) for number in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    one, other = (torch.load(tmp_path / f"{number}.pt") for number in range(2))
    assert one["counted"] == [(2, 8.0)] * ranks.STEPS
    unsplit = ranks.model()
    optimizer = torch.optim.SGD(unsplit.parameters(), lr=0.1)
    inputs, targets = ranks.examples()
    for _ in range(ranks.STEPS):
        optimizer.zero_grad()
        nn.functional.mse_loss(unsplit(inputs.flatten(0, 1)), targets.flatten(0, 1)).backward()
        optimizer.step()
    for name, expected in unsplit.state_dict().items():
        assert torch.equal(one["weights"][name], other["weights"][name])
        assert torch.allclose(one["weights"][name], expected, atol=1e-6)
