"""Callbacks hear of every row, and are closed however the run ends."""

from __future__ import annotations

import csv
import math
import sys
from pathlib import Path
from typing import Any

import pytest

from splitfed.errors import InputError
from splitfed.tracking.callbacks import CSV, Callbacks, Log, MLflow, TensorBoard, scalars, several
from splitfed.tracking.history import History

ROUND = {
    "kind": "round",
    "round": 1,
    "status": "complete",
    "loss": 0.5,
    "accuracy": None,
    "sampled": ["a", "b"],
    "dropped": {"b": "not finite"},
    "clients": {"a": {"loss": 0.25, "status": "complete"}, "b": {"status": "dropped"}},
}
COMMIT = {"kind": "commit", "lineage": "client", "version": 4, "num_batches": 2, "staleness": {"0": 2}}


def test_functions_and_objects_are_told_in_turn() -> None:
    """A history, a function and an object hear of the same rows in order."""
    heard: list[Any] = []

    class Own:
        def on_row(self, row: dict[str, Any]) -> None:
            heard.append(("own", row["kind"]))

    history = History()
    with Callbacks([history, lambda row: heard.append(("function", row["kind"])), Own()]) as watchers:
        watchers.on_row(ROUND)
        watchers.on_row(COMMIT)
    assert heard == [("function", "round"), ("own", "round"), ("function", "commit"), ("own", "commit")]
    assert [row["kind"] for row in history.rows] == ["round", "commit"]


def test_all_are_closed_even_if_one_fails() -> None:
    """An error in a row or in closing leaves the block, and nobody stays open."""
    closed = []

    class Own:
        def __init__(self, name: str) -> None:
            self.name = name

        def on_row(self, row: dict[str, Any]) -> None:
            raise OSError("disk full")

        def close(self) -> None:
            closed.append(self.name)
            if self.name == "b":
                raise OSError("still full")

    with pytest.raises(OSError, match="still full"), Callbacks([Own("a"), Own("b"), Own("c")]) as watchers:
        watchers.on_row(ROUND)
    assert closed == ["c", "b", "a"]


def test_what_cant_be_called_is_refused() -> None:
    """A path in place of a CSV is noticed before the run."""
    with pytest.raises(InputError, match=r"callback 'out\.csv' can't be called: expected a function of a row"):
        Callbacks(["out.csv"])  # type: ignore[list-item]


def test_one_callback_is_as_good_as_a_list_of_one() -> None:
    """A function, an object with `on_row`, or several; what is neither is refused."""
    history = History()
    assert several(print) == [print]
    assert several(history) == [history]
    assert several(callback for callback in (print, history)) == [print, history]
    for wrong in (7, "print", None):
        with pytest.raises(InputError, match=f"callbacks is {wrong!r}: expected a function of a row, one with on_row"):
            several(wrong)  # type: ignore[arg-type]


def test_csv_has_a_line_per_round(tmp_path: Path) -> None:
    """Scalars as they are, lists and drops as counts; commits and clients are left out, an older file is replaced."""
    path = tmp_path / "new" / "rounds.csv"
    path.parent.mkdir()
    path.write_text("old")
    with Callbacks([CSV(path)]) as watchers:
        for row in (COMMIT, ROUND, ROUND | {"round": 2, "late": ["c"]}):
            watchers.on_row(row)
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    expected = {"round": "1", "status": "complete", "loss": "0.5", "accuracy": "", "sampled": "2", "dropped": "1"}
    assert lines == [expected, expected | {"round": "2"}]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # within TensorBoard
def test_tensorboard_gets_the_figures(tmp_path: Path) -> None:
    """A round's figures at its number, its clients' too, a commit's at its version; what isn't known is left out."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Callbacks([TensorBoard(tmp_path)]) as watchers:
        for row in ({"kind": "run"}, ROUND, COMMIT):
            watchers.on_row(row)
    TensorBoard(tmp_path / "unused").close()
    events = EventAccumulator(str(tmp_path)).Reload()
    found = {tag: (events.Scalars(tag)[0].step, events.Scalars(tag)[0].value) for tag in events.Tags()["scalars"]}
    assert found == {
        "round/loss": (1, 0.5),
        "round/sampled": (1, 2.0),
        "round/dropped": (1, 1.0),
        "client/loss/a": (1, 0.25),
        "commit/client/num_batches": (4, 2.0),
        "commit/client/staleness": (4, 0.0),
        "commit/client/staleness_max": (4, 0.0),
    }


def test_tensorboard_is_asked_for_by_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it the error says how to get it."""
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard.writer", None)
    with pytest.raises(InputError, match=r'pip install "\.\[tensorboard\]" in a clone'):
        TensorBoard(tmp_path).on_row(ROUND)


def test_scalars_are_flat_numbers() -> None:
    """Numbers, counts of lists, mean and maximum of ages, flows of compression; no text, no flag, nothing unknown."""
    row = ROUND | {
        "version": 7,
        "gradients_folded": 3,
        "is_last": True,
        "train_loss": math.inf,
        "compression": {"gradients": {"exact_bytes": 8, "sent_bytes": 2, "codec": "int8"}},
    }
    assert scalars(row) == {
        "round/loss": 0.5,
        "round/sampled": 2,
        "round/dropped": 1,
        "round/version": 7,
        "round/gradients_folded": 3,
        "round/compression/gradients/exact_bytes": 8,
        "round/compression/gradients/sent_bytes": 2,
        "client/loss/a": 0.25,
    }
    assert "client/loss/a" not in scalars(row, clients=False)
    commit = {
        "kind": "commit",
        "version": 3,
        "num_batches": 4,
        "staleness": {"0": 3, "8": 1},
        "folded": {"a": 3, "b": 1},
    }
    assert scalars(commit) == {
        "commit/body/num_batches": 4,
        "commit/body/staleness": 2.0,
        "commit/body/staleness_max": 8,
        "commit/body/num_clients": 2,
    }
    assert scalars({"kind": "run", "seed": 3}) == scalars({"kind": "note"}) == {}


def test_log_counts_its_own_steps_and_names_the_axes() -> None:
    """A row is a step, from where a resumed run is; round and version are metrics, and the axes of their groups."""

    class Run:
        step = 5

        def __init__(self) -> None:
            self.logged: list[Any] = []
            self.axes: dict[str, Any] = {}

        def log(self, metrics: dict[str, float], step: int) -> None:
            self.logged.append((step, metrics))

        def define_metric(self, name: str, step_metric: str | None = None) -> None:
            self.axes[name] = step_metric

    run = Run()
    with Callbacks([Log(run, clients=False)]) as watchers:
        for row in ({"kind": "run"}, COMMIT, ROUND):
            watchers.on_row(row)
    assert [step for step, _ in run.logged] == [5, 6]
    assert [run.logged[0][1]["version/client"], run.logged[1][1]["round"]] == [4, 1]
    assert run.axes == {
        "version/client": None,
        "commit/client/*": "version/client",
        "round": None,
        "round/*": "round",
    }
    heard: list[Any] = []
    Log(lambda metrics, step: heard.append((metrics, step))).on_row(COMMIT)
    assert heard == [({**scalars(COMMIT), "version/client": 4}, 0)]


def test_what_cant_log_is_refused() -> None:
    """A project's name in place of a run is noticed before the run."""
    with pytest.raises(InputError, match=r"run is a str: expected a tracker's run with log\(metrics, step=\)"):
        Log("project")


def test_mlflow_is_asked_for_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it the error says how to get it; a callback that never heard of a row has nothing to close."""
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(InputError, match="pip install mlflow, or mlflow-skinny"):
        MLflow().on_row(ROUND)
    MLflow().close()
