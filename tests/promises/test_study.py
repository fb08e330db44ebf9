"""The study runs as its page says, on a few digits, and its figures are what they claim to be."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path
from typing import Any

import programs
import pytest
import torch
from torch import Tensor

from splitfed.errors import InputError

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
    where = tmp_path_factory.mktemp("study") / "squares"
    where.mkdir()
    for name, count in (("train", TRAINING), ("t10k", 200)):
        images, labels = digits(count)
        write_idx(where / f"{name}-images-idx3-ubyte", images)
        write_idx(where / f"{name}-labels-idx1-ubyte", labels)
    run("--data", where, "--output", where / "out", "--modes", *MODES, "--rule", 2)
    return where


@pytest.fixture(scope="module")
def curves(folder: Path) -> dict[str, Any]:
    """What that run has written: a curve for each mode and baseline."""
    return read(folder / "out", *MODES, "centralised", "fedavg", "local")


def read(output: Path, *names: str) -> dict[str, Any]:
    """The curves of the first seed, by mode or baseline."""
    found: dict[str, Any] = json.loads((output / "summary.json").read_text())["curves"]["squares"]
    everywhere = {**found.get("any", {}), **found["5"]}
    return {name: everywhere[name]["0"] for name in names}


def run(*arguments: object, returns: int = 0) -> str:
    """Run the script for three owners and two rounds; warnings are errors."""
    settings = ("--clients", OWNERS, "--alpha", 5.0, "--rounds", 2, "--seed", 0, "--buffer", 4, *arguments)
    done = programs.run(programs.script, STUDY, *settings, strict=True)
    assert done.returncode == returns, done.stderr
    return str(done.stderr if returns else done.stdout)


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a test import the parts of the study."""
    monkeypatch.syspath_prepend(STUDY.parent)


def batches(folder: Path) -> list[int]:
    """How many batches each owner has, by what the round mode's history says of it."""
    history = folder / "out" / "squares" / "5" / "round-0.jsonl"
    head = json.loads(history.read_text().splitlines()[0])
    return [-(-client["num_samples"] // 64) for client in head["clients"].values()]


def test_every_curve_has_a_point_per_round(curves: dict[str, Any]) -> None:
    """Accuracy, loss, seconds, traffic; of modes also commits, passes and staleness; after each of two rounds."""
    of_all = {"accuracy", "loss", "seconds", "bytes_up", "bytes_down", "round_trips"}
    for name, curve in curves.items():
        extra = {"commits", "passes", "dropped", "staleness", "staleness_most"} if name in MODES else set()
        assert set(curve) - {"lowest", "highest"} == of_all | extra, name
        assert all(len(points) == 2 for points in curve.values())
        assert 0 < curve["seconds"][0] < curve["seconds"][1]
        if name in MODES:
            assert curve["passes"] == [1.0, 2.0]
            assert curve["staleness_most"] == [0, 0]  # in turns, nobody comes between a forward and its backward


def test_with_slow_owners_nobody_waits_in_groups(folder: Path, tmp_path: Path) -> None:
    """Of four owners the second and the last take 10 s for 64 digits: in rounds all wait, in groups they take 6."""
    modes = ("grouped", "round")
    some = ("--clients", 4, "--slow", 10, "--target", 0.05)
    table = run("--data", folder, "--modes", *modes, "--baselines", *some, "--output", tmp_path)
    grouped, waiting = (read(tmp_path, *modes)[name] for name in modes)
    assert all(len(points) == 2 for curve in (grouped, waiting) for points in curve.values())
    head = json.loads((tmp_path / "squares" / "5" / "round-0.jsonl").read_text().splitlines()[0])
    slowest = max(-(-client["num_samples"] // 64) for client in list(head["clients"].values())[1::2])
    assert waiting["time"] == pytest.approx([10 * slowest, 20 * slowest])
    assert 2 * grouped["time"][1] < waiting["time"][0]
    assert max(grouped["staleness_most"]) <= 5
    sizes = [json.loads((tmp_path / "squares" / "5" / f"{mode}-0.json").read_text())["conditions"] for mode in modes]
    assert [one.get("slow_batch") for one in sizes] == [6, None]  # a file of other batches is another training
    assert "| squares, α = 5: `grouped` |" in table


def test_commits_are_those_of_the_mode(folder: Path, curves: dict[str, Any]) -> None:
    """One a round; one per four batches and one for the rest; one per batch; one per step of the busiest owner."""
    counts = batches(folder)
    each = {
        "round": 1,
        "sflv1": 1,
        "sflv2": sum(counts),
        "buffered": -(-sum(counts) // 4),
        "synchronous": max(counts),
    }
    found = {name: curves[name]["commits"] for name in MODES}
    assert found == {name: [count, 2 * count] for name, count in each.items()}


def test_traffic_is_what_crosses(folder: Path, curves: dict[str, Any]) -> None:
    """Four tensors of 64 floats per example, in two requests a batch; and the half, once a round or at every step."""
    counts = batches(folder)
    for name in MODES:
        exchanges = sum(counts) if name == "synchronous" else OWNERS
        one_way = TRAINING * ACROSS // 2 + exchanges * HALF
        curve = curves[name]
        assert curve["bytes_up"] == curve["bytes_down"] == [one_way] * 2, name
        assert curve["round_trips"] == [2 * (sum(counts) + exchanges)] * 2
    whole = OWNERS * (HALF + 4 * (64 * 64 + 64))
    sent = {name: curves[name]["bytes_up"] for name in ("centralised", "fedavg", "local")}
    assert sent == {"centralised": [TRAINING * 785, 0], "fedavg": [whole, whole], "local": [0, 0]}
    assert curves["fedavg"]["round_trips"] == [2 * OWNERS] * 2


def test_all_but_the_studys_rule_learn(folder: Path, curves: dict[str, Any]) -> None:
    """Ten bright squares are soon told apart, by everyone but a frozen bottom with a step a round."""
    last = {name: curve["accuracy"][-1] for name, curve in curves.items()}
    assert min(last.values()) > 0.5, last
    assert set(json.loads((folder / "out" / "squares" / "5" / "rule.json").read_text())) == {"sum", "mean"}


def test_a_study_goes_on_where_it_was(folder: Path, curves: dict[str, Any], tmp_path: Path) -> None:
    """A cell whose file is there isn't trained again; one that is lost has the same figures; the page has both."""
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- table -->\nold\n<!-- end of table -->\nafter\n")
    lost = folder / "out" / "squares" / "5" / "buffered-0.json"
    lost.unlink()
    lost.with_suffix(".1.part").write_text('{"half of')
    words = ("--data", folder, "--output", folder / "out", "--modes", "round", "buffered", "--baselines", "centralised")
    trained = [line.split()[2] for line in run(*words, "--docs", page).splitlines() if line.startswith("squares ")]
    assert trained == ["buffered", "buffered"]
    again = read(folder / "out", "round", "buffered")
    for key in ("accuracy", "loss", "bytes_up", "commits"):
        assert again["buffered"][key] == curves["buffered"][key]
    assert again["round"] == curves["round"]
    head, *_, tail = page.read_text().splitlines()
    assert (head, tail) == ("before", "after")
    assert "old" not in page.read_text()
    assert f"| `buffered` | {again['buffered']['accuracy'][-1]:.4f} (" in page.read_text()
    assert "rounds 2, and now it is 3: give another --output" in run(*words, "--rounds", 3, returns=1)


def test_a_folder_that_isnt_there_says_where_the_data_come_from(tmp_path: Path) -> None:
    """The package of Fashion-MNIST, the four names, and what goes without any."""
    told = run("--data", tmp_path / "fashion-mnist", "--output", tmp_path, returns=2)
    for word in ("isn't a folder", "dataset-fashion-mnist", "train-images-idx3-ubyte", "leave --data out"):
        assert word in told


def test_each_owner_has_one_class(study: None) -> None:
    """Twelve owners of ten classes: the first two classes have two owners each, who share evenly."""
    from mnist_study import recipe

    images, labels = digits(TRAINING)
    whole = recipe.Deal(images.flatten(1), labels.long(), [], (images, labels))
    parts = recipe.deal(whole, "one-class", 12, seed=0).parts
    assert [len(part) for part in parts] == [32, 32, *[64] * 8, 32, 32]
    assert [whole.labels[part].unique().tolist() for part in parts] == [[owner % 10] for owner in range(12)]
    assert torch.cat(parts).unique().numel() == TRAINING
    assert [len(part) for part in recipe.deal(whole, "iid", 3, seed=0).parts] == [214, 213, 213]
    with pytest.raises(InputError, match="9 owners can't have one class each of 10"):
        recipe.deal(whole, "one-class", 9, seed=0)


def test_the_first_seed_of_everything_comes_before_any_other(study: None) -> None:
    """And all digits in one place are trained once for all partitions."""
    from mnist_study import cells

    planned = cells.plan([None], ["iid", "0.1"], ["centralised", "round", "buffered"], [0, 1], ["buffered"])
    found = [(cell.seed, cell.skew, cell.method) for cell in planned]
    first = [(0, "any", "centralised"), (0, "iid", "round"), (0, "iid", "buffered")]
    assert found == [
        *first,
        (0, "0.1", "round"),
        (0, "0.1", "buffered"),
        (1, "iid", "buffered"),
        (1, "0.1", "buffered"),
    ]


def test_the_table_has_spread_and_distance(study: None) -> None:
    """0.7 and 0.8 are 0.75 ± √0.005, −20 and −10 points from 0.9; one of them drops by 0.1 after round 4."""
    from mnist_study.summary import Table

    def curve(*accuracy: float) -> dict[str, Any]:
        steps = len(accuracy)
        traffic = {"bytes_up": [1e6] * steps, "bytes_down": [5e5] * steps, "round_trips": [10] * steps}
        ages = {"staleness": [0.5] * steps, "staleness_most": [3] * steps, "commits": list(range(1, steps + 1))}
        return {"accuracy": [*accuracy], "seconds": [2.0 * n for n in range(1, steps + 1)], **traffic, **ages}

    flat = (0.5, 0.1, 0.6, 0.8)
    found = {
        ("d", "any", "centralised"): {0: curve(*flat, 0.9), 1: curve(*flat, 0.9)},
        ("d", "0.1", "round"): {0: curve(*flat, 0.7), 1: curve(*flat, 0.8)},
    }
    lines = Table(found, 5).text().splitlines()
    assert "| all digits in one place | 0.9000 ± 0.0000 |" in lines
    assert "| `round` | 0.7500 ± 0.0707 (−15.00) |" in lines
    assert lines[-1] == "| `round` | 1.5 | 10 | 0.5 | 3 | 1 | 2.0 | 0.0000 to 0.1000 |"


def test_swings_are_told(study: None) -> None:
    """From round 50 on: 0.8 to 0.5 and back to 0.75."""
    from mnist_study.summary import swings

    found = swings({"accuracy": [0.1] * 49 + [0.8, 0.5, 0.75]})
    assert found == {"lowest": 0.5, "highest": 0.8, "spread": pytest.approx(0.3), "largest_drop": pytest.approx(0.3)}


def test_pictures_and_histories(folder: Path) -> None:
    """Three pictures, and the rows of each mode."""
    out = folder / "out" / "squares" / "5"
    assert all((out / name).read_bytes().startswith(b"\x89PNG") for name in PICTURES)
    for name in MODES:
        kinds = [json.loads(line)["kind"] for line in (out / f"{name}-0.jsonl").read_text().splitlines()]
        assert kinds[0] == "run"
        assert kinds.count("round") == 2


def test_validation_leaves_the_test_set_alone(folder: Path) -> None:
    """With --validate the figures are of training digits, with rates from the command line."""
    output = folder / "validated"
    run(
        *("--data", folder, "--output", output, "--modes", "round", "--baselines", "--validate"),
        *("--server-rate", "sgd:0.1", "--schedule", "constant"),
    )
    kept = json.loads((output / "squares" / "5" / "round-0.json").read_text())
    assert kept["conditions"]["rates"]["server"] == "sgd:0.1"
    right = kept["curve"]["accuracy"][-1] * 106  # 640 // 6 are held out; the test set has 200
    assert right == pytest.approx(round(right))


def test_the_page_is_found_beside_another_package_of_that_name(
    study: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opacus brings a package `benchmarks`; and a page without a place is said before anything is trained."""
    from mnist_study import results

    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "__init__.py").touch()
    for name in [name for name in sys.modules if name.partition(".")[0] == "benchmarks"]:
        monkeypatch.delitem(sys.modules, name)
    root = str(STUDY.parents[1])
    monkeypatch.setattr(sys, "path", [str(tmp_path), *(one for one in sys.path if one not in ("", ".", root))])
    results.check_page(STUDY.parents[1] / "docs" / "study.md")
    with pytest.raises(SystemExit, match="has no place for the table"):
        results.check_page(tmp_path / "none.md")
