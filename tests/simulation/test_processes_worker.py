"""The inside of a worker process, run in this one."""

from __future__ import annotations

import pickle
from dataclasses import replace
from multiprocessing import Pipe
from threading import Thread
from typing import Any

import pytest
import torch
import toy

from splitfed.errors import InputError, WorkerError
from splitfed.simulation.client import Belongings
from splitfed.simulation.engines import processes as worker
from splitfed.simulation.engines.processes import Answer, Job, Order, WorkerPool, receive, send, work
from splitfed.store.store import GradientStore


class StubbornError(Exception):
    """Can be pickled, but not put together again."""

    def __init__(self, one: int, other: int) -> None:
        super().__init__(f"{one} and {other}")


def told(tmp_path: Any, **settings: Any) -> Job:
    """What the worker of such a run would be told."""
    simulation = toy.run(workers=1, store=GradientStore(tmp_path / "store", sync="process"), **settings)
    simulation._assembly.federation.open()
    crew = simulation._driver
    assert isinstance(crew, WorkerPool)
    job: Job = pickle.loads(crew._job)
    return job


def answers(job: Job, orders: list[Order]) -> list[Answer]:
    """What a worker answers, one order after another, until its pipe is closed."""
    ours, theirs = Pipe()
    thread = Thread(target=work, args=(theirs,))
    thread.start()
    found = []
    try:
        send(ours, job)
        for order in orders:
            send(ours, order)
            found.append(receive(ours))
    finally:
        ours.close()
        thread.join(60)
    assert not thread.is_alive()
    return found


def test_a_worker_trains_who_it_is_given(tmp_path: Any) -> None:
    """Its answer says what came of it and what crossed; the update is in the store."""
    (answer,) = answers(told(tmp_path, personal=("3.*",)), [Order("client-1", (1, 0), Belongings())])
    assert answer.error is None
    assert answer.outcome is not None
    assert (answer.outcome.num_samples, answer.outcome.batches) == (8, 2)
    assert sorted(answer.belongings.personal) == ["3.bias", "3.weight"]
    assert list(answer.traffic) == ["client-1"]
    assert sorted(lineage for lineage, _ in answer.arrivals) == ["body", "body", "client"]
    store = GradientStore(tmp_path / "store", sync="process")
    assert len(store.waiting()) == 2
    assert len(store.waiting("client")) == 1


def test_a_worker_commits_where_the_mode_doesnt_wait(tmp_path: Any) -> None:
    """K = 1: each batch is a version when the answer comes."""
    answers(told(tmp_path, mode="sflv2"), [Order("client-0", (1, 0), Belongings())])
    assert GradientStore(tmp_path / "store", sync="process").latest_version() == 2


def test_a_worker_holds_its_client_until_the_next_global_step(tmp_path: Any) -> None:
    """Synchronous mode: two batches are two orders, and only the second answer has an outcome."""
    job = told(tmp_path, mode="synchronous")
    first, second = answers(job, [Order("client-0", (1, 0), Belongings()), Order("client-0", (1, 0))])
    assert first.outcome is None
    assert second.outcome is not None
    assert second.outcome.batches == 2


def test_errors_come_back_with_their_traceback(tmp_path: Any) -> None:
    """One that can't be put together again comes as a WorkerError, and the worker goes on."""
    job = told(tmp_path)
    bad = replace(job, recipe=replace(job.recipe, loss_fn=Unloadable()))
    found = answers(bad, [Order("client-0", (1, 0), Belongings()), Order("nobody", (1, 0), Belongings())])
    assert isinstance(found[0].error, WorkerError)
    assert "StubbornError: 1 and 2" in str(found[0].error)
    assert "__call__" in found[0].trace
    assert isinstance(found[1].error, KeyError)


class Unloadable:
    """A loss whose error can't be brought over."""

    def __call__(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Never returns."""
        raise StubbornError(1, 2)


def test_a_worker_whose_pipe_is_closed_at_once_just_ends() -> None:
    """Nobody is there to be told anything."""
    ours, theirs = Pipe()
    ours.close()
    work(theirs)
    with pytest.raises((EOFError, OSError)):
        receive(theirs)


def test_a_worker_opens_the_store_with_its_options(tmp_path: Any) -> None:
    """What the filesystem is told is told the worker too; a folder has no options, and says so there."""
    first = told(tmp_path)
    store = GradientStore("ftp://elsewhere/run", port=2121)
    job: Job = pickle.loads(worker.job(store, first.plans, first.recipe, first.clients))
    assert job.storage_options == store.storage_options == {"port": 2121}
    (answer,) = answers(replace(first, storage_options=job.storage_options), [Order("client-0", (1, 0), Belongings())])
    with pytest.raises(InputError, match=r"storage options \['port'\] don't apply"):
        raise answer.error or AssertionError(answer)
