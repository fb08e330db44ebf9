"""Callbacks hear of every row, and are closed however the run ends."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import Any

import pytest

from splitfed.errors import InputError
from splitfed.tracking.callbacks import CSV, Callbacks, TensorBoard, several
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
        "client/loss/a": (1, 0.25),
        "commit/client/num_batches": (4, 2.0),
    }


def test_tensorboard_is_asked_for_by_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it the error says how to get it."""
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard.writer", None)
    with pytest.raises(InputError, match=r'pip install "\.\[tensorboard\]" in a clone'):
        TensorBoard(tmp_path).on_row(ROUND)
