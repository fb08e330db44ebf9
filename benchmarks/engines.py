"""`python -m benchmarks.engines`: the engines of a simulation, killed at random moments, timed, and with much data.

    python -m benchmarks.engines --part kills --engine ray --runs 7    SIGKILLs of workers, three a run
    python -m benchmarks.engines --part speed                          seconds of a round, Ray against processes
    python -m benchmarks.engines --part memory                         1,000 clients of 10 MB each, by loaders

Of Ray there are two raylets on this machine, of one CPU each (`pip install 'splitfed[ray]'`). A run that was killed has
to end in the bits of one in this process, with each example counted once; the script stops where it doesn't.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import random
import resource
import signal
import statistics
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import splitfed
from splitfed.simulation import LocalTraining, Processes, RayEngine

ENGINES: dict[str, Any] = {"processes": Processes(2), "ray": RayEngine(workers=2)}
BATCH = 8


def examples(clients: int, each: int) -> dict[str, tuple[Tensor, Tensor]]:
    """So many clients with so many examples of 64 numbers each."""
    generator = torch.Generator().manual_seed(0)
    data = {}
    for number in range(clients):
        inputs = torch.randn(each, 64, generator=generator)
        data[f"client-{number:04d}"] = (inputs, inputs[:, :10].argmax(1))
    return data


def model(width: int) -> nn.Module:
    """A perceptron with dropout in the body, the same each time."""
    torch.manual_seed(0)
    body = [nn.Linear(width, width), nn.ReLU(), nn.Dropout(0.1)]
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), *body, nn.Linear(width, 10))


def run(engine: Any, clients: Any, rounds: int, width: int = 64, **settings: Any) -> splitfed.simulation.Simulation:
    """A simulation of these."""
    return splitfed.simulate(
        model(width),
        "2:5",
        clients,
        loss_fn=cross_entropy,
        optimizer=functools.partial(torch.optim.SGD, lr=0.1),
        server_optimizer=functools.partial(torch.optim.Adam, lr=0.003),
        rounds=rounds,
        local=LocalTraining(batch_size=BATCH),
        engine=engine,
        **settings,
    )


@contextlib.contextmanager
def cluster(engine: str) -> Iterator[None]:
    """Two raylets, if they are wanted."""
    if engine != "ray":
        yield
        return
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray
    from ray.cluster_utils import Cluster

    memory = 200 * 2**20
    head = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": memory}
    made = Cluster(initialize_head=True, head_node_args=head)
    made.add_node(num_cpus=1, object_store_memory=memory)
    ray.init(address=made.address, log_to_driver=False)
    try:
        yield
    finally:
        ray.shutdown()
        made.shutdown()


def workers() -> list[int]:
    """The workers that are alive, by what their processes call themselves."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            command = path.read_bytes()
            is_child = f"PPid:\t{os.getpid()}\n" in (path.parent / "status").read_text()
            if command.startswith(b"ray::Actor") or (is_child and b"multiprocessing.spawn" in command):
                found.append(int(path.parent.name))
    return found


class Killer(threading.Thread):
    """Kills a worker after each of so many batches: those of rounds that are over, and those that wait in the store.

    A moment is a place in the work and not in time: a worker takes seconds to start, in which there is nothing to lose.
    """

    def __init__(self, store: splitfed.GradientStore, moments: list[int], of_a_round: int) -> None:
        super().__init__(daemon=True)
        self.moments = sorted(moments)
        self.killed = 0
        self.ended = threading.Event()
        self._of_a_round = of_a_round
        self._store = store

    def run(self) -> None:
        """Watch and kill."""
        while self.moments and not self.ended.wait(0.003):
            done = self._store.latest_version() * self._of_a_round + len(self._store.waiting())
            alive = workers() if done >= self.moments[0] else []
            if alive:
                self.moments.pop(0)
                os.kill(random.choice(alive), signal.SIGKILL)
                self.killed += 1


def kills(engine: str, runs: int, rounds: int, deaths: int) -> dict[str, Any]:
    """Runs that are killed end in the bits of one in this process, and count each example once."""
    clients = examples(6, 80)  # 10 batches each
    calm = run(None, clients, rounds)
    list(calm)
    expected = calm.whole().state_dict()
    found = []
    for number in range(runs):
        random.seed(number)
        crew = run(ENGINES[engine], clients, rounds)
        killer = Killer(crew.store, random.sample(range(60 * rounds), deaths), 60)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            killer.start()
            rows = list(crew)
            killer.ended.set()
        killer.join()
        folded = [crew.store.lineage("body").commit(version) for version in range(1, rounds + 1)]
        samples = sum(commit.num_samples for commit in folded)
        assert samples == 6 * 80 * rounds, f"run {number}: {samples} samples for {6 * 80 * rounds}"
        assert killer.killed == deaths, f"run {number}: only {killer.killed} kills"
        assert [row["status"] for row in rows] == ["complete"] * rounds
        state = crew.whole().state_dict()
        assert all(torch.equal(state[name], expected[name]) for name in expected), f"run {number}: other bits"
        moments = [str(one.message).split(":")[0] for one in told if "takes its place" in str(one.message)]
        found.append({"killed": killer.killed, "samples": samples, "deaths": moments})
        print(number, found[-1], flush=True)
    return {"engine": engine, "runs": found}


def speed(engine: str, rounds: int) -> dict[str, Any]:
    """The seconds of each round after the first, in which workers start."""
    crew, times = run(ENGINES[engine], examples(8, 160), rounds + 1, width=512), []
    next(crew)
    for _ in range(rounds):
        began = time.monotonic()
        next(crew)
        times.append(time.monotonic() - began)
    crew.close()
    return {"engine": engine, "seconds": times, "median": statistics.median(times)}


class Loader:
    """Makes 10 MB of examples where they are needed, 40,960 of 64 numbers: a stream that ends after a batch."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __call__(self) -> Any:
        """The examples."""
        return Stream(torch.randn(40_960, 64, generator=torch.Generator().manual_seed(self.seed)))


class Stream(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
    """The first examples of all."""

    def __init__(self, inputs: Tensor) -> None:
        self.inputs = inputs

    def __iter__(self) -> Iterator[Any]:
        rows = self.inputs[:BATCH]
        return zip(rows, rows[:, :10].argmax(1), strict=True)


def memory(engine: str, clients: int) -> dict[str, Any]:
    """The most memory that this process ever had, with so many clients of 10 MB by loaders."""
    began = time.monotonic()
    crew = run(ENGINES[engine], {f"client-{number:04d}": Loader(number) for number in range(clients)}, 1)
    (row,) = crew
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        "engine": engine,
        "clients": clients,
        "participants": len(row["participants"]),
        "driver, MiB": round(most),
        "seconds": time.monotonic() - began,
    }


def main() -> None:
    """Run one part, and print what came of it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("kills", "speed", "memory"), required=True)
    parser.add_argument("--engine", choices=sorted(ENGINES), default="ray")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--deaths", type=int, default=3)
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--output", type=Path, help="write the figures here too")
    given = parser.parse_args()
    torch.set_num_threads(1)
    began = time.monotonic()
    with cluster(given.engine):
        if given.part == "kills":
            found = kills(given.engine, given.runs, given.rounds, given.deaths)
        elif given.part == "speed":
            found = speed(given.engine, given.rounds)
        else:
            found = memory(given.engine, given.clients)
    found["minutes"] = (time.monotonic() - began) / 60
    print(json.dumps(found, indent=1))
    if given.output is not None:
        given.output.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
