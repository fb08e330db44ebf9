"""The benchmarks: each variant is a step that trains, and a ratio is of the steps of one round."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from benchmarks import compression, limits, peers, rounds, split_step
from benchmarks.models import lora, tiny
from torch import nn

from splitfed.cli.demo import data


@pytest.mark.parametrize("name", split_step.ALL)
def test_each_variant_takes_its_steps(name: str, tmp_path: Path) -> None:
    """Of the small model; all but the forward leave other parameters behind, and a commit folds what they sent."""
    model, x, y = tiny(), torch.randn(8, 784), torch.randint(0, 10, (8,))
    steps = split_step.variants(model, "2", x, y, tmp_path, (name,))
    for _ in range(2):
        steps[name]()
    if len(steps) > 1:
        commit = steps[f"commit after {name}"]()
        assert (commit.version, commit.num_batches) == (1, 2)
        steps[name]()


def test_lora_trains_what_is_not_frozen() -> None:
    """The body's layers; 15.8 million parameters of the benchmark's are frozen."""
    body = nn.Sequential(*list(lora(16, 2).children())[1:-2])
    body(torch.randn(2, 3, 16)).sum().backward()
    trained = {name.rpartition(".")[2] for name, p in body.named_parameters() if p.grad is not None}
    assert trained == {"up", "down"}
    frozen = [p.numel() for p in list(lora(512, 5).children())[1].parameters() if not p.requires_grad]
    assert 5 * sum(frozen) == pytest.approx(15.8e6, rel=0.01)


def test_steps_are_taken_in_turns() -> None:
    """As many rounds as must be, in changing order; rare ones in one round of four, at its end, and noted at once."""
    order: list[str] = []
    steps = {name: lambda name=name: order.append(name) for name in ("a", "b", "rare c")}
    times = rounds.in_turns(steps, 0.0, warm=3, every=4, rare="rare")
    assert [sorted(order[start : start + 2]) for start in (0, 3, 5, 7, 9)] == [["a", "b"]] * 5
    assert [place for place, name in enumerate(order) if name == "rare c"] == [2, 11]
    assert {("a", "b"), ("b", "a")} == {tuple(order[start : start + 2]) for start in (0, 3, 5, 7, 9)}
    assert {name: len(taken) for name, taken in times.items()} == {"a": 5, "b": 5, "rare c": 2}


def test_a_ratio_is_the_median_of_those_of_each_round() -> None:
    """Of a rare step, that of the medians."""
    found = rounds.ratios({"a": [1.0, 2.0, 4.0], "b": [2.0, 2.0, 12.0], "c": [3.0]}, "a")
    assert [found[name]["ratio"] for name in "abc"] == [1.0, 2.0, 1.5]
    assert found["b"] | {"ratio": 0} == {"min": 2.0, "median": 2.0, "ratio": 0, "count": 3}
    table = rounds.as_table({"case": found}, "a").splitlines()
    assert table[3] == "| case | b | 2.00 | 2.00 | 2.00 × |"


def test_owners_that_stay_send_changes() -> None:
    """A federation of two: the first pass is whole, the second a change; all flows but the activations are exact."""
    x, y = torch.rand(256, 1, 28, 28), torch.randint(0, 10, (256,))
    digits = data.Digits(x, y, x[:10], y[:10])
    found = compression.measure("delta+topk:0.1", digits, owners=2, rounds=2, seed=0, frozen=False)
    assert 0.1 < found["last"] < 0.25 < found["ratio"] < 0.7
    assert 1 <= found["kept"] <= 2.1  # with the headers of files
    assert compression.measure("exact", digits, owners=2, rounds=1, seed=0, frozen=True)["ratio"] == 1.0


def test_a_file_is_written_whole_and_a_new_one_removed(tmp_path: Path) -> None:
    """The raw write that others are compared with."""
    data = memoryview(bytes(range(256)) * 1000)
    limits._write(tmp_path / "new", data, limits.os.O_CREAT | limits.os.O_EXCL)
    limits._write(tmp_path / "old", data, limits.os.O_CREAT)
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert (tmp_path / "old").read_bytes() == data


def test_a_peer_that_is_not_here_is_skipped_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """None of them is a dependency; one that fails says why."""

    def fails(x: torch.Tensor, y: torch.Tensor, seconds: float) -> dict[str, float]:
        raise OSError("no daemon")

    monkeypatch.setattr(peers, "PEERS", {"one": (("no_such_module",), fails), "other": ((), fails)})
    found = peers.run(0.0)
    assert found == {"one": {"skipped": "no_such_module isn't installed"}, "other": {"skipped": "OSError: no daemon"}}
    assert "| one: skipped, no_such_module isn't installed | | | |" in peers.as_table(found)
