"""The study runs as its page says, on a few digits, and its figures are what they claim to be."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import programs
import pytest
import torch
from torch import Tensor

STUDY = Path(__file__).parents[2] / "examples" / "study.py"
MODES = ("round", "buffered", "sflv2", "sflv1", "synchronous")
TRAINING, OWNERS = 640, 3
HALF = 4 * (784 * 64 + 64 + 64 * 10 + 10)  # bytes of bottom and head in float32
ACROSS = 4 * 4 * 64  # bytes of an example: 64 floats each of activations, outputs, and the gradients of both
PICTURES = ("curves.png", "rule.png", "classes.png")


def write_idx(path: Path, values: Tensor) -> None:
    """Write uint8 values as MNIST's files are."""
    sizes = struct.pack(f">{values.dim()}i", *values.shape)
    path.write_bytes(struct.pack(">i", 0x800 + values.dim()) + sizes + values.numpy().tobytes())


def digits(count: int) -> tuple[Tensor, Tensor]:
    """Bright squares in a place of their own for each class, and noise: as many of each class as of any other."""
    labels = torch.arange(count) % 10
    images = torch.randint(0, 80, (count, 28, 28), generator=torch.Generator().manual_seed(count))
    for image, label in zip(images, labels.tolist(), strict=True):
        top, left = 2 + 12 * (label % 2), 5 * (label // 2)
        image[top : top + 8, left : left + 5] = 250
    return images.to(torch.uint8), labels.to(torch.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of everything over two rounds; its output is in `out`."""
    where = tmp_path_factory.mktemp("study")
    for name, count in (("train", TRAINING), ("t10k", 200)):
        images, labels = digits(count)
        write_idx(where / f"{name}-images-idx3-ubyte", images)
        write_idx(where / f"{name}-labels-idx1-ubyte", labels)
    run("--data", where, "--output", where / "out", "--modes", *MODES, "--buffer", 4, "--rule", 2)
    return where


@pytest.fixture(scope="module")
def summary(folder: Path) -> dict[str, Any]:
    """What that run has written."""
    found: dict[str, Any] = json.loads((folder / "out" / "summary.json").read_text())
    return found


def run(*arguments: object) -> str:
    """Run the script for three owners and two rounds; warnings are errors."""
    settings = ("--clients", OWNERS, "--alpha", 5.0, "--rounds", 2, *arguments)
    done = programs.run(programs.script, STUDY, *settings, strict=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def batches(summary: dict[str, Any]) -> list[int]:
    """How many batches each owner has, by what the round mode's history says of it."""
    history = Path(summary["settings"]["output"]) / "round.jsonl"
    head = json.loads(history.read_text().splitlines()[0])
    return [-(-client["num_samples"] // 64) for client in head["clients"].values()]


def test_every_curve_has_a_point_per_round(summary: dict[str, Any]) -> None:
    """Accuracy, loss, seconds, bytes, commits and passes, for each mode, after each of two rounds."""
    assert tuple(summary["curves"]) == MODES
    for curve in summary["curves"].values():
        assert set(curve) == {"accuracy", "loss", "seconds", "bytes", "commits", "passes"}
        assert all(len(points) == 2 for points in curve.values())
        assert curve["passes"] == [1.0, 2.0]
        assert 0 < curve["seconds"][0] < curve["seconds"][1]
    assert tuple(summary["baselines"]) == ("centralised", "fedavg", "local")


def test_commits_are_those_of_the_mode(summary: dict[str, Any]) -> None:
    """One a round; one per four batches and one for the rest; one per batch; one per step of the busiest owner."""
    counts = batches(summary)
    each = {
        "round": 1,
        "sflv1": 1,
        "sflv2": sum(counts),
        "buffered": -(-sum(counts) // 4),
        "synchronous": max(counts),
    }
    found = {name: curve["commits"] for name, curve in summary["curves"].items()}
    assert found == {name: [count, 2 * count] for name, count in each.items()}


def test_bytes_are_those_that_cross(summary: dict[str, Any]) -> None:
    """Four tensors of 64 floats per example; and the half, there and back, once a round or at every step."""
    counts = batches(summary)
    averaged = TRAINING * ACROSS + 2 * OWNERS * HALF
    stepped = TRAINING * ACROSS + 2 * sum(counts) * HALF
    for name, curve in summary["curves"].items():
        each = stepped if name == "synchronous" else averaged
        assert curve["bytes"] == [each, 2 * each], name
    whole = HALF + 4 * (64 * 64 + 64)
    sent = {name: curve["bytes"] for name, curve in summary["baselines"].items()}
    assert sent == {"centralised": [TRAINING * 785] * 2, "fedavg": [6 * whole, 12 * whole], "local": [0, 0]}


def test_all_but_the_studys_rule_learn(summary: dict[str, Any]) -> None:
    """Ten bright squares are soon told apart, by everyone but a frozen bottom with a step a round."""
    learned = {**summary["curves"], **summary["baselines"]}
    last = {name: curve["accuracy"][-1] for name, curve in learned.items()}
    assert min(last.values()) > 0.5, last
    assert set(summary["rule"]) == {"sum", "mean"}


def test_swings_and_drops_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """From round 50 on: 0.8 to 0.5 and back to 0.75; in the table, no drop counts before the fifth round."""
    monkeypatch.syspath_prepend(STUDY.parent)
    from mnist_study.summary import swings, table

    found = swings({"accuracy": [0.1] * 49 + [0.8, 0.5, 0.75]})
    assert found == {"lowest": 0.5, "highest": 0.8, "spread": pytest.approx(0.3), "largest_drop": pytest.approx(0.3)}
    rows = {"accuracy": [0.5, 0.1, 0.6, 0.9, 0.88, 0.91], "bytes": [1e6] * 6, "seconds": [2.0] * 6, "commits": [6] * 6}
    assert table({"round": rows}).splitlines()[-1] == "| round | 0.9100 | 0.0200 | 6 | 1 | 2 |"


def test_pictures_and_histories(folder: Path) -> None:
    """Three pictures, and the rows of each mode."""
    out = folder / "out"
    assert all((out / name).read_bytes().startswith(b"\x89PNG") for name in PICTURES)
    for name in MODES:
        kinds = [json.loads(line)["kind"] for line in (out / f"{name}.jsonl").read_text().splitlines()]
        assert kinds[0] == "run"
        assert kinds.count("round") == 2


def test_validation_leaves_the_test_set_alone(folder: Path) -> None:
    """With --validate the figures are of training digits, with rates from the command line."""
    output = folder / "validated"
    run(
        *("--data", folder, "--output", output, "--modes", "round", "--baselines", "--validate"),
        *("--server-rate", "sgd:0.1"),
    )
    summary = json.loads((output / "summary.json").read_text())
    assert summary["rates"]["round"]["server"] == "sgd:0.1"
    right = summary["curves"]["round"]["accuracy"][-1] * 106  # 640 // 6 are held out; the test set has 200
    assert right == pytest.approx(round(right))
