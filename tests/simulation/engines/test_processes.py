"""Worker processes: the same bits where the schedule is fixed, and loud when one fails."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import IterableDataset

from splitfed.errors import InputError, WorkerError
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
@pytest.mark.parametrize(
    ("how", "error", "said"), [("raises", KeyError, "no such loss"), ("dies", WorkerError, "code 3")]
)
def test_a_worker_that_fails_is_an_error_of_the_run(how: str, error: type[Exception], said: str) -> None:
    """The error itself, with the worker's traceback behind it; or what is known of a death."""
    simulation = toy.run(loss_fn=functools.partial(ones_fail, how), rounds=1, workers=1)
    with pytest.raises(error, match=said) as caught:
        next(simulation)
    if how == "raises":
        assert "ones_fail" in str(caught.value.__cause__)


def test_what_workers_cant_be_told_is_refused() -> None:
    """A lambda can't be pickled, and memory can't be shared."""
    with pytest.raises(InputError, match=r"functools\.partial"):
        toy.run(optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1), workers=1)
    with pytest.raises(InputError, match="memory://mine is in this process's memory"):
        toy.run(store=GradientStore("memory://mine"), workers=1)


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
