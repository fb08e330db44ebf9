"""The engine of Ray: a cluster of two raylets, which share nothing with this process but a bucket."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import threading
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from servers import Place
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # nothing is told to anybody; read when a raylet starts

import ray
from ray.cluster_utils import Cluster

from splitfed.errors import InputError, WorkerError
from splitfed.simulation import RayEngine, Simulation, simulate

# Ray's own: sockets and logs of a raylet that is being stopped.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning:ray", "ignore::DeprecationWarning:ray"),
]
SETTINGS: dict[str, Any] = {"model": toy.model(0.5), "clients": toy.clients(4), "rounds": 2}


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[Cluster]:
    """Two nodes of one CPU each, where the tests can be imported; this process is on the first."""
    support = Path(toy.__file__).parent
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, (support.parents[1], support))))
        yield from _cluster()


def _cluster() -> Iterator[Cluster]:
    memory = {"object_store_memory": 100 * 2**20, "include_dashboard": False}
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, **memory})
    made.add_node(num_cpus=1, object_store_memory=memory["object_store_memory"])
    ray.init(address=made.address, log_to_driver=False)
    try:
        yield made
    finally:
        ray.shutdown()
        made.shutdown()


def run(engine: Any, **settings: Any) -> Simulation:
    """The usual simulation of the tests, by this engine."""
    usual = {"at": toy.AT, "loss_fn": cross_entropy, "optimizer": toy.sgd, "server_optimizer": toy.adam}
    return simulate(**{**toy.grouped({**usual, "batch_size": 4, **SETTINGS, **settings}), "engine": engine})


@pytest.mark.parametrize("mode", ["round", "sflv1", "synchronous"])
def test_two_raylets_and_a_bucket_end_in_the_bits_of_one_process(seaweed: Place, mode: str) -> None:
    """Clients are loaders, the half's class and the optimizer's lambda this test's own."""
    clients, rate = SETTINGS["clients"], 0.5

    class Scaled(nn.Linear):
        def forward(self, inputs: Tensor) -> Tensor:
            return 2 * super().forward(inputs)

    model = nn.Sequential(Scaled(4, 6), *[toy.model(0.5)[place] for place in (1, 2, 3)])
    model[0].load_state_dict(toy.model()[0].state_dict())
    settings = {
        "mode": mode,
        "model": model,
        "clients": {name: functools.partial(clients.get, name) for name in clients},
        "optimizer": lambda parameters: torch.optim.SGD(parameters, lr=rate),
    }
    alone, crew = run(None, **settings), run("ray", **settings, store=seaweed.store())
    losses = [row["train_loss"] for row in alone]
    assert [row["train_loss"] for row in crew] == losses
    assert toy.same(alone.whole(), crew.whole())


def killing(folder: Path, parent: int, deaths: int, outputs: Tensor, targets: Tensor) -> Tensor:
    """A loss that kills the worker that computes it, so often in all; never the test's own process."""
    if os.getpid() != parent:
        for number in range(deaths):
            with contextlib.suppress(FileExistsError):
                (folder / str(number)).touch(exist_ok=False)
                os.kill(os.getpid(), signal.SIGKILL)
                threading.Event().wait()  # the signal is on its way
    return cross_entropy(outputs, targets)


def test_a_killed_actor_is_replaced_and_nothing_counts_twice(tmp_path: Path) -> None:
    """Two real SIGKILLs in the middle of local runs, and the bits of a run without them."""
    loss = functools.partial(killing, tmp_path, os.getpid(), 2)
    alone, crew = run(None), run(RayEngine(workers=2), loss_fn=loss)
    with pytest.warns(UserWarning, match=r"worker \d died with client 'client-\d' \(.*Died.*another one takes its"):
        assert [row["batches"] for row in crew] == [8, 8]
    list(alone)
    assert toy.same(alone.whole(), crew.whole())
    assert len(list(tmp_path.iterdir())) == 2


def test_the_fourth_death_of_an_actor_ends_the_run(tmp_path: Path) -> None:
    """With its reason; three were replaced."""
    crew = run(RayEngine(workers=1), loss_fn=functools.partial(killing, tmp_path, os.getpid(), 4))
    reason = r"worker 0 died with client 'client-0' \(.*, 4 times in this run"
    with pytest.warns(UserWarning, match="another one") as told, pytest.raises(WorkerError, match=reason):
        next(crew)
    assert len(told) == 3


def test_an_error_of_a_client_is_an_error_of_the_run() -> None:
    """The error itself, with the worker's traceback behind it."""
    crew = run("ray", clients={"a": functools.partial(int, "no data")})
    with pytest.raises(ValueError, match="invalid literal") as caught:
        next(crew)
    assert "in worker 0" in str(caught.value.__cause__)


def test_what_no_node_has_is_said_at_once() -> None:
    """With what there is; nobody waits for a node that never comes."""
    began = time.monotonic()
    with pytest.raises(InputError, match=r"no node .* num_gpus=1: of its 2 nodes the largest have 1 CPUs and 0 GPUs"):
        next(run(RayEngine(num_gpus=1)))
    with pytest.raises(InputError, match="room for a worker of num_cpus=2"):
        next(run(RayEngine(num_cpus=2)))
    assert time.monotonic() - began < 5


def test_a_missing_or_old_ray_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the extra that brings it."""

    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    began = time.monotonic()
    old = "needs Ray 2.50 or newer, and 2.49.2 is"
    for found, said in ((missing, "isn't installed: pip install"), (lambda name: "2.49.2", old)):
        monkeypatch.setattr("splitfed.simulation.engines.actors.version", found)
        with pytest.raises(InputError, match=said):
            run("ray")
    assert time.monotonic() - began < 5
