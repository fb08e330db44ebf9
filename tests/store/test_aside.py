"""A run that is begun anew leaves the old one whole under another name, and a run that goes on says so."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import pytest
import torch
from harness_store import Point, batch, plant, record

from splitfed import Accumulator, BusyError, GradientStore, InputError


def accumulator(store: GradientStore) -> Accumulator:
    """One at rate 1, on a store that it begins if need be."""
    return Accumulator(Point(), store, lambda params: torch.optim.SGD(params, lr=1.0))


def trained(url: str | Path) -> GradientStore:
    """A store at version 1, of one gradient of (1, 1)."""
    store = GradientStore(url, sync="process")
    made = accumulator(store)
    plant(store, batch(0), record())
    assert made.step() is not None
    return store


def test_a_fresh_run_sets_the_old_one_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The old folder is whole under a name with the time of its newest version; the new run is at version 0."""
    old = trained(tmp_path / "run")
    made = time.strftime("%Y%m%d-%H%M%S", time.localtime(old.lineage().commit(1).time))
    new = GradientStore(tmp_path / "run", sync="process", fresh=True)
    moved = tmp_path / f"run-until-{made}"
    assert caplog.messages == [f"a run at {old.shown} was set aside: it is at {moved} now"]
    accumulator(new)
    assert (new.latest_version(), GradientStore(moved).latest_version()) == (0, 1)
    assert GradientStore(moved).load_weights()["w"].tolist() == [-1.0, -1.0]
    # The next one of the same second gets a name of its own.
    plant(new, batch(0), record())
    assert accumulator(new).step() is not None
    (tmp_path / f"run-until-{time.strftime('%Y%m%d-%H%M%S', time.localtime(new.lineage().commit(1).time))}").mkdir(
        exist_ok=True
    )
    again = new.begin_anew()
    assert again is not None
    assert again.endswith("-2")


def test_a_run_in_which_nothing_was_trained_stays(tmp_path: Path) -> None:
    """Of two processes that both say fresh=True the second doesn't undo what the first has begun."""
    assert GradientStore(tmp_path / "new", fresh=True).begin_anew() is None
    first = GradientStore(tmp_path / "run", sync="process", fresh=True)
    accumulator(first)
    second = GradientStore(tmp_path / "run", sync="process", fresh=True)
    assert second.latest_version() == 0
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_what_isnt_a_folder_or_is_at_work_is_refused(tmp_path: Path) -> None:
    """A bucket can't be renamed in one step; under an accumulator nothing is moved."""
    trained("memory://aside")
    with pytest.raises(InputError, match="aside holds a run: only a folder of this machine can be set aside"):
        GradientStore("memory://aside", fresh=True)
    store = trained(tmp_path / "run")
    with (
        store.blobs.lock(store.lineage().keys.lock, 1.0),
        pytest.raises(BusyError, match="an accumulator is at work on lineage 'body'"),
    ):
        GradientStore(tmp_path / "run", fresh=True)
    assert GradientStore(tmp_path / "run").latest_version() == 1


def test_going_on_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """By who comes to versions that it hasn't made, with the way to a new run; not by who has begun the run."""
    store = trained(tmp_path / "run")
    accumulator(store)
    assert caplog.messages == []
    later = GradientStore(tmp_path / "run", sync="process")
    accumulator(later)
    accumulator(later)
    (said,) = caplog.records
    assert (said.name, said.levelno) == ("splitfed", logging.WARNING)
    assert said.getMessage() == f"continuing {store.shown} at version 1 (to begin a new run, give fresh=True)"
