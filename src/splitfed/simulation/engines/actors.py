"""The crew of actors of a Ray cluster: workers on any machine of it.

Nothing of Ray's is relied upon but that it starts actors and tells which have died: Ray neither
restarts an actor nor repeats a task, since the pool does both. Bytes go through Ray; everything
else goes through the store, which all machines must reach.

An actor that waits for its resources holds nobody up: it gets no task before it has said that it is
there, and the others go on.
"""

from __future__ import annotations

import os
import re
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from splitfed.checks import install
from splitfed.errors import InputError
from splitfed.simulation.engines.host import Host
from splitfed.simulation.engines.pool import Death
from splitfed.simulation.settings import RayEngine

_LEAST = (2, 50)


class RayCrew:
    """Actors of a Ray cluster, as a `Crew`.

    Args:
        engine: What they get.

    Raises:
        InputError: Ray isn't installed, or is too old.
    """

    def __init__(self, engine: RayEngine) -> None:
        _check_installed()
        self._engine = engine
        self._actors: dict[int, Any] = {}
        self._owed: dict[Any, int] = {}
        """Who owes what answer."""
        self._setup: Any = None
        self._is_ours = False
        """Whether Ray was started, or joined, for this run."""

    def open(self, setup: bytes) -> int:
        """Join the cluster; returns how many actors it has room for, or as many as were asked for.

        Raises:
            InputError: no machine of the cluster can ever run one.
        """
        import ray

        if not ray.is_initialized():
            # Whoever wants to send Ray's makers its statistics says so in the environment.
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            ray.init(address=self._engine.address, include_dashboard=False)
            self._is_ours = True
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        room = sum(self._room(resources) for resources in nodes)
        if not room:
            wanted = f"num_cpus={self._engine.num_cpus:g}, num_gpus={self._engine.num_gpus:g}"
            largest = [max((node.get(kind, 0) for node in nodes), default=0) for kind in _KINDS]
            raise InputError(
                f"no node of the Ray cluster has room for a worker of {wanted}: of its "
                f"{len(nodes)} nodes the largest have {largest[0]:g} CPUs and {largest[1]:g} GPUs. "
                "Give RayEngine(...) less, or start such a node first"
            )
        self._setup = ray.put(setup)
        return self._engine.workers or room

    def start(self, number: int) -> None:
        """Start an actor; it may wait for its resources."""
        import ray

        options = {"num_cpus": self._engine.num_cpus, "num_gpus": self._engine.num_gpus}
        actor = ray.remote(Actor).options(**options, max_restarts=0).remote()
        self._actors[number] = actor
        self._owed[actor.begin.remote(self._setup)] = number

    def give(self, number: int, task: bytes) -> None:
        """Give an actor a task."""
        self._owed[self._actors[number].execute.remote(task)] = number

    def take(self) -> list[tuple[int, bytes | Death]]:
        """Wait for answers and deaths."""
        import ray

        found: list[tuple[int, bytes | Death]] = []
        for answer in ray.wait([*self._owed], num_returns=1)[0]:
            number = self._owed.pop(answer)
            try:
                found.append((number, ray.get(answer)))
            except ray.exceptions.RayError as error:
                found.append((number, Death(_in_one_line(error))))
        return found

    def stop(self) -> None:
        """End the actors, and Ray if it was started for this run."""
        if self._setup is None and not self._is_ours:
            return  # never opened, or stopped before
        import ray

        for actor in self._actors.values():
            ray.kill(actor)
        self._actors.clear()
        self._owed.clear()
        self._setup = None
        if self._is_ours:
            ray.shutdown()
            self._is_ours = False

    def _room(self, resources: dict[str, float]) -> int:
        """How many actors a node has room for, if nothing else runs there."""
        wanted = dict(zip(_KINDS, (self._engine.num_cpus, self._engine.num_gpus), strict=True))
        return min(int(resources.get(kind, 0) / least) for kind, least in wanted.items() if least)


_KINDS = ("CPU", "GPU")


class Actor:
    """A worker, as Ray calls it."""

    def begin(self, setup: bytes) -> bytes:
        """Read the setup."""
        self._host = Host(setup)
        return self._host.begin()

    def execute(self, task: bytes) -> bytes:
        """Execute a task."""
        return self._host.execute(task)


def _check_installed() -> None:
    least = ".".join(map(str, _LEAST))
    try:
        found = version("ray")
    except PackageNotFoundError as error:
        raise InputError(
            f"engine='ray' needs Ray, which isn't installed: {install('ray')}"
        ) from error
    numbers = tuple(map(int, re.findall(r"\d+", found)[:2]))
    if numbers < _LEAST:
        raise InputError(
            f"engine='ray' needs Ray {least} or newer, and {found} is installed: "
            f"{install('ray')}, with --upgrade"
        )


def _in_one_line(error: Exception) -> str:
    """The first line of an error of Ray's that says something; they are long."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:3])[:300]}"
