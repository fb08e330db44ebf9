"""Worker processes: the same bits where the schedule is fixed, and loud when one fails."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import IterableDataset

from splitfed.accumulator import policies
from splitfed.errors import InputError, WorkerError
from splitfed.simulation.engines import processes
from splitfed.store.store import GradientStore


def ones_fail(how: str, outputs: Tensor, targets: Tensor) -> Tensor:
    """A loss that fails in a worker, by an error or by its death."""
    if how == "dies":
        os._exit(3)
    if how == "raises":
        raise KeyError("no such loss")
    return cross_entropy(outputs, targets)


def test_two_workers_end_in_the_bits_of_one_process(tmp_path: Path) -> None:
    """Synchronous mode, which goes through workers step by step; with dropout, personal parts and kept optimizers."""
    settings: dict[str, Any] = {
        "model": toy.model(dropout=0.5),
        "mode": "synchronous",
        "clients": toy.clients(3, each=9),
        "rounds": 1,
        "personal": ("3.bias",),
        "evaluate": toy.examples(20),
    }
    alone = toy.run(**settings)
    crew = toy.run(**settings, workers=2, store=GradientStore(tmp_path / "store", sync="process"))
    (one,), (other,) = list(alone), list(crew)
    assert toy.same(alone.whole(), crew.whole())
    for name in ("loss", "accuracy", "train_loss", "bytes_up", "bytes_down", "commits", "participants"):
        assert one[name] == other[name], name
    assert [entry["num_samples"] for entry in other["clients"].values()] == [9, 9, 9]
    assert all(commit["delay"] > 0 for commit in crew.history.commits())


@pytest.mark.usefixtures("forked_workers")
def test_groups_are_committed_by_workers(tmp_path: Path) -> None:
    """By whichever has pushed last: each batch counts once, in the same version of body and halves."""
    mode = policies.mode("grouped", group=2)
    crew = toy.run(mode=mode, workers=2, rounds=1, store=GradientStore(tmp_path / "store", sync="process"))
    (row,) = crew
    assert (row["status"], row["batches"], row["version"]) == ("complete", 6, row["client_version"])
    closed = [
        [list(crew.store.lineage(name).commit(version).folded) for version in range(1, row["version"] + 1)]
        for name in ("body", "client")
    ]
    assert [len(group) for group in closed[0]] == [len(group) for group in closed[1]]
    assert crew.store.pair().body == crew.store.latest_version("client")


@pytest.mark.usefixtures("forked_workers")
def test_a_round_is_the_same_in_workers_and_its_store_goes_with_it() -> None:
    """Client states travel between workers; a temporary folder holds the store as long as the run is held."""
    settings: dict[str, Any] = {"model": toy.model(0.5), "rounds": 2, "personal": ("3.*",), "keep_optimizers": True}
    alone, crew = toy.run(**settings, optimizer=toy.adam), toy.run(**settings, optimizer=toy.adam, workers=1)
    losses = [[row["train_loss"] for row in simulation] for simulation in (alone, crew)]
    assert losses[0] == losses[1]
    assert toy.same(alone.whole(), crew.whole())
    folder = Path(crew.store.url)
    assert folder.is_dir()
    del crew
    assert not folder.exists()


class Drawn(IterableDataset[tuple[Tensor, int]]):
    """A stream of eight examples, in an order that torch's own generator draws anew each time."""

    def __iter__(self) -> Iterator[Any]:
        examples = list(zip(*toy.examples(8), strict=True))
        return (examples[i] for i in torch.randperm(8).tolist())


def sliced(samples: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """A batch of the samples but for the first."""
    inputs, labels = zip(*samples[1:], strict=True)
    return torch.stack(inputs), torch.stack(labels)


@pytest.mark.usefixtures("forked_workers")
def test_streams_are_the_same_in_workers() -> None:
    """With a collate function and without the last batch; what they draw is the client's own."""
    settings: dict[str, Any] = {
        "clients": {"a": Drawn(), "b": Drawn()},
        "collate_fn": sliced,
        "batch_size": 3,
        "drop_last": True,
        "rounds": 1,
    }
    alone, crew = toy.run(**settings), toy.run(**settings, workers=1)
    (one,), (other,) = list(alone), list(crew)
    assert one["train_loss"] == other["train_loss"]
    assert [entry["num_samples"] for entry in other["clients"].values()] == [6, 6]
    assert toy.same(alone.whole(), crew.whole())


@pytest.mark.usefixtures("forked_workers")
def test_an_error_of_a_client_is_an_error_of_the_run() -> None:
    """The error itself, with the worker's traceback behind it; nobody is started anew for it."""
    simulation = toy.run(loss_fn=functools.partial(ones_fail, "raises"), rounds=1, workers=1)
    with pytest.raises(KeyError, match="no such loss") as caught:
        next(simulation)
    assert "ones_fail" in str(caught.value.__cause__)


@pytest.mark.usefixtures("forked_workers")
def test_a_client_that_kills_every_worker_ends_the_run() -> None:
    """Each of two is replaced three times at most; then what is known of the last death is said."""
    simulation = toy.run(loss_fn=functools.partial(ones_fail, "dies"), rounds=1, workers=2)
    last = r"died with client 'client-\d' \(exit code 3\), 4 times in this run"
    with pytest.warns(UserWarning, match="another one") as told, pytest.raises(WorkerError, match=last):
        next(simulation)
    assert 3 <= len(told) <= 6


def killing(marker: Path, parent: int, outputs: Tensor, targets: Tensor) -> Tensor:
    """A loss that kills its worker once, as whoever makes the marker first; never the test's own process."""
    if os.getpid() != parent:
        with contextlib.suppress(FileExistsError):
            marker.touch(exist_ok=False)
            os.kill(os.getpid(), signal.SIGKILL)
    return cross_entropy(outputs, targets)


@pytest.mark.usefixtures("forked_workers")
@pytest.mark.parametrize("mode", ["round", "synchronous"])
def test_a_killed_worker_is_replaced_and_nothing_counts_twice(tmp_path: Path, mode: str) -> None:
    """A real SIGKILL, and the bits of a run without it."""
    loss = functools.partial(killing, tmp_path / "killed", os.getpid())
    calm = toy.run(mode=mode, loss_fn=loss)
    list(calm)
    crew = toy.run(mode=mode, loss_fn=loss, workers=2)
    with pytest.warns(UserWarning, match=r"died with client 'client-\d' \(exit code -9\)"):
        assert [row["batches"] for row in crew] == [6, 6]
    assert (tmp_path / "killed").exists()
    assert toy.same(calm.whole(), crew.whole())


def test_what_workers_cant_be_told_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock can't be pickled; without cloudpickle neither can a lambda, and the error names it."""
    with pytest.raises(InputError, match=r"functools\.partial"):
        toy.run(optimizer=functools.partial(locked, threading.Lock()), workers=1)
    monkeypatch.setitem(sys.modules, "cloudpickle", None)
    with pytest.raises(InputError, match="or install cloudpickle, with which lambdas"):
        toy.run(optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1), workers=1)


def locked(lock: Any, parameters: Any) -> torch.optim.Optimizer:
    """An optimizer whose factory holds a lock."""
    with lock:
        return toy.sgd(parameters)


@pytest.mark.usefixtures("forked_workers")
def test_lambdas_and_loaders_go_to_workers() -> None:
    """The loader is called where the client trains, and never here; the bits are those of the data itself."""
    pytest.importorskip("cloudpickle")
    parent, clients = os.getpid(), toy.clients()

    def loader(client_id: str) -> Any:
        assert os.getpid() != parent
        return clients[client_id]

    rate = 0.5
    crew = toy.run(
        clients={client_id: functools.partial(loader, client_id) for client_id in clients},
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=rate),
        rounds=1,
        workers=1,
    )
    alone = toy.run(rounds=1)
    assert [row["train_loss"] for row in crew] == [row["train_loss"] for row in alone]
    assert toy.same(alone.whole(), crew.whole())


def ends_at_once(pipe: object) -> None:
    """What becomes of a worker of a script whose work doesn't stand below its guard."""
    os._exit(1)


@pytest.mark.usefixtures("forked_workers")
def test_a_worker_that_cant_even_begin_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever took its place would end the same way: none is started."""
    monkeypatch.setattr(processes, "worker_main", ends_at_once)
    run = toy.run(workers=1)
    with pytest.raises(WorkerError, match=r"died at its start \(exit code 1: .* must stand below `if __name__"):
        next(run)


@pytest.mark.usefixtures("forked_workers")
def test_workers_go_on_with_a_killed_round(tmp_path: Path) -> None:
    """One client's update is in: it isn't trained again, and the round ends in the bits of one go."""
    alone, store = toy.run(rounds=1), GradientStore(tmp_path / "store", sync="process")
    list(alone)
    with pytest.raises(toy.Killed):
        next(toy.run(rounds=1, store=store, loss_fn=toy.dying(2)))
    crew = toy.run(rounds=1, store=store, workers=1)
    (row,) = crew
    assert (row["batches"], row["dropped"]) == (6, {})
    assert toy.same(alone.whole(), crew.whole())
