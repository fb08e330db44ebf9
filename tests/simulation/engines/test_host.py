"""The inside of a worker, run in this process."""

from __future__ import annotations

from dataclasses import replace
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import pytest
import torch
import toy

from splitfed.errors import InputError, WorkerError
from splitfed.simulation.client import ClientState
from splitfed.simulation.engines.host import Host
from splitfed.simulation.engines.pool import WorkerPool
from splitfed.simulation.engines.processes import worker_main
from splitfed.simulation.engines.tasks import Setup, Task, TaskResult, dumps, loads, setup_of
from splitfed.store.store import GradientStore


class StubbornError(Exception):
    """Can be pickled, but not put together again."""

    def __init__(self, one: int, other: int) -> None:
        super().__init__(f"{one} and {other}")


def told(tmp_path: Any, **settings: Any) -> Setup:
    """What the worker of such a run would be told."""
    simulation = toy.run(workers=1, store=GradientStore(tmp_path / "store", sync="process"), **settings)
    simulation._assembly.federation.open()
    pool = simulation._driver
    assert isinstance(pool, WorkerPool)
    setup: Setup = loads(pool._setup)
    return setup


def answers(setup: Setup, tasks: list[Task]) -> list[TaskResult]:
    """What a worker answers, one task after another."""
    host = Host(dumps(setup))
    assert host.begin() == b""
    return [loads(host.execute(dumps(task))) for task in tasks]


def test_a_worker_trains_who_it_is_given(tmp_path: Any) -> None:
    """Its answer says what came of it and what crossed; the update is in the store."""
    (answer,) = answers(told(tmp_path, personal=("3.*",)), [Task("client-1", (1, 0), ClientState())])
    assert answer.error is None
    assert answer.metrics is not None
    assert (answer.metrics.num_samples, answer.metrics.batches) == (8, 2)
    assert sorted(answer.state.personal) == ["3.bias", "3.weight"]
    assert list(answer.traffic) == ["client-1"]
    assert sorted(lineage for lineage, _ in answer.arrivals) == ["body", "body", "client"]
    store = GradientStore(tmp_path / "store", sync="process")
    assert len(store.waiting()) == 2
    assert len(store.waiting("client")) == 1


def test_a_worker_commits_where_the_mode_doesnt_wait(tmp_path: Any) -> None:
    """K = 1: each batch is a version when the answer comes."""
    answers(told(tmp_path, mode="sflv2"), [Task("client-0", (1, 0), ClientState())])
    assert GradientStore(tmp_path / "store", sync="process").latest_version() == 2


def test_a_worker_holds_its_client_until_the_next_global_step(tmp_path: Any) -> None:
    """Synchronous mode: two batches are two tasks, and only the second answer has an outcome."""
    setup = told(tmp_path, mode="synchronous")
    first, second = answers(setup, [Task("client-0", (1, 0), ClientState()), Task("client-0", (1, 0))])
    assert first.metrics is None
    assert second.metrics is not None
    assert second.metrics.batches == 2


def test_errors_come_back_with_their_traceback(tmp_path: Any) -> None:
    """One that can't be put together again comes as a WorkerError, and the worker goes on."""
    setup = told(tmp_path)
    bad = replace(setup, config=replace(setup.config, loss_fn=Unloadable()))
    found = answers(bad, [Task("client-0", (1, 0), ClientState()), Task("nobody", (1, 0), ClientState())])
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
    worker_main(theirs)
    with pytest.raises((EOFError, OSError)):
        theirs.recv_bytes()


def test_a_worker_opens_the_store_with_its_options(tmp_path: Any) -> None:
    """What the filesystem is told is told the worker too; a folder has no options, and says so there."""
    first = told(tmp_path)
    store = GradientStore("ftp://elsewhere/run", port=2121)
    setup: Setup = loads(setup_of(store, first.plans, first.config, first.clients))
    assert setup.storage_options == store.storage_options == {"port": 2121}
    (answer,) = answers(
        replace(first, storage_options=setup.storage_options), [Task("client-0", (1, 0), ClientState())]
    )
    with pytest.raises(InputError, match=r"storage options \['port'\] don't apply"):
        raise answer.error or AssertionError(answer)


def test_a_worker_that_cant_load_its_setup_says_why() -> None:
    """As a class of a notebook without cloudpickle: the answer in place of the first holds the error."""
    setup = b"csplitfed.simulation\nNotebook\n."
    result: TaskResult = loads(Host(setup).begin())
    with pytest.raises(InputError, match=r"can't load its setup \(.*'Notebook'.* a notebook defines needs cloudpickle"):
        raise result.error or AssertionError(result)


def test_a_worker_that_sees_another_folder_refuses_to_begin_a_run(tmp_path: Path) -> None:
    """On a machine that doesn't share the store, all that it trains would be lost."""
    setup = replace(told(tmp_path), url=str(tmp_path / "elsewhere"))
    (answer,) = answers(setup, [Task("client-0", (1, 0), ClientState())])
    with pytest.raises(InputError, match=r"finds no run in .*elsewhere: expected a store that all machines reach"):
        raise answer.error or AssertionError(answer)


def test_a_run_that_is_begun_again_goes_on_under_its_numbers(tmp_path: Path) -> None:
    """Another worker is given the same task: two batches are pending and one update, and it counts them once."""
    setup = told(tmp_path)
    task = Task("client-0", (1, 0), ClientState())
    (first,), (second,) = answers(setup, [task]), answers(setup, [task])
    assert first.metrics == second.metrics
    store = GradientStore(tmp_path / "store", sync="process")
    assert [len(store.waiting(name)) for name in ("body", "client")] == [2, 1]
    assert [batch.incarnation for batch in store.waiting()] == [1, 1]
