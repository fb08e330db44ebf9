"""Other libraries that run a part of a model in another process, where they are installed: a step of ResNet-18.

    hivemind     the body is an expert of a server, which recomputes each forward at the backward, and steps there
    torchslicer  the body and the head are a worker's; it keeps the graph in memory, and files nowhere

They aren't dependencies of this project, not even of its tests: `pip install hivemind` or `'torchslicer[grpc]'` makes
their rows. Ratios are to the unsplit step, which is measured in turns with hivemind's, and before and after
torchslicer's, whose training loop isn't ours to stop.
"""

from __future__ import annotations

import importlib.util
import itertools
import multiprocessing
import socket
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import splitfed
from benchmarks import rounds
from benchmarks.models import resnet18
from benchmarks.rounds import Step
from benchmarks.split_step import training

Rows = dict[str, dict[str, Any]]


def run(seconds: float) -> Rows:
    """A row for each library: its figures, or why there are none."""
    x, y = torch.randn(32, 3, 32, 32), torch.randint(0, 10, (32,))
    found: Rows = {}
    for name, (needs, measure) in PEERS.items():
        missing = [module for module in needs if importlib.util.find_spec(module) is None]
        if missing:
            found[name] = {"skipped": f"{' and '.join(missing)} isn't installed"}
            continue
        try:
            found[name] = measure(x, y, seconds)
        except Exception as error:  # noqa: BLE001 -- a peer that fails here is no failure of ours
            found[name] = {"skipped": f"{type(error).__name__}: {error}"}
    return found


def as_table(found: Rows) -> str:
    """The rows as a Markdown table."""
    lines = ["| other libraries, resnet18 | min, ms | median, ms | of unsplit |", "|---|--:|--:|--:|"]
    for name, row in found.items():
        if "skipped" in row:
            lines.append(f"| {name}: skipped, {row['skipped']} | | | |")
        else:
            lines.append(f"| {name} | {row['min']:.2f} | {row['median']:.2f} | {row['ratio']:.2f} × |")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------- hivemind


def hivemind(x: Tensor, y: Tensor, seconds: float) -> dict[str, float]:
    """A step whose body is a remote expert."""
    model = resnet18()
    half = splitfed.split(model, "2:7")[0]
    layers = list(half.children())
    bottom, head = nn.Sequential(*layers[:2]), nn.Sequential(*layers[-1:])
    with _expert() as expert:
        steps: dict[str, Step] = {
            "unsplit": training(model, model, x, y),
            "hivemind": training(nn.ModuleList([bottom, head]), lambda x: head(expert(bottom(x))), x, y),
        }
        return rounds.ratios(rounds.in_turns(steps, seconds), "unsplit")["hivemind"]


@contextmanager
def _expert() -> Iterator[Callable[[Tensor], Tensor]]:
    from hivemind import DHT
    from hivemind.moe.client.expert import create_remote_experts
    from hivemind.moe.expert_uid import ExpertInfo

    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve_expert, args=(there, torch.get_num_threads()))
    process.start()
    try:
        peer, addresses = here.recv()
        dht = DHT(initial_peers=addresses, start=True, client_mode=True)
        (expert,) = create_remote_experts([ExpertInfo("body.0", peer)], dht)
        yield expert
        dht.shutdown()
    finally:
        here.close()
        process.join(10)
        process.kill()


def _serve_expert(pipe: Any, threads: int) -> None:
    from hivemind import DHT
    from hivemind.moe import ModuleBackend, Server
    from hivemind.utils.tensor_descr import BatchTensorDescriptor

    torch.set_num_threads(threads)
    body = splitfed.split(resnet18(), "2:7")[1]
    optimizer = torch.optim.SGD(body.parameters(), lr=1e-3, momentum=0.9)
    takes = (BatchTensorDescriptor(64, 32, 32),)
    backend = ModuleBackend("body.0", body, optimizer=optimizer, args_schema=takes, max_batch_size=64)
    dht = DHT(start=True, host_maddrs=["/ip4/127.0.0.1/tcp/0"])
    server = Server(dht, {"body.0": backend}, num_connection_handlers=1)
    server.run_in_background(await_ready=True)
    pipe.send((dht.peer_id, dht.get_visible_maddrs()))
    try:
        pipe.recv()
    except EOFError:
        server.shutdown()


# ------------------------------------------------------------------------------------- torchslicer


def torchslicer(x: Tensor, y: Tensor, seconds: float) -> dict[str, float]:
    """An epoch by its own loop: the first part and the rest of the model in two workers."""
    import torchslicer as library

    unsplit_model = resnet18()
    unsplit = training(unsplit_model, unsplit_model, x, y)
    before = _seconds(unsplit, 5)
    batches = max(5, int(seconds / 3 / before))
    model = resnet18()
    layers = list(model.children())
    parts = [nn.Sequential(*layers[:2]), nn.Sequential(*layers[2:])]
    first, second, third = _ports(3)
    places = [f"127.0.0.1:{port}" for port in (first, second)]
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_work, args=(place, torch.get_num_threads()), daemon=True) for place in places]
    for worker in workers:
        worker.start()
    for place in places:
        _await_listener(place)
    times: list[float] = []

    class Loader:
        """The same batch again and again; notes when each is asked for."""

        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            for _ in range(batches):
                times.append(time.perf_counter())
                yield x, y
            times.append(time.perf_counter())

        def __len__(self) -> int:
            return batches

    config = library.RunConfig()
    config.logging.enabled = False
    config.startup.worker_init_rpc_timeout_s = 60.0
    executor = library.DistributedExecutor(
        discovery=library.StaticDiscovery(peers=places), coordinator_addr=f"127.0.0.1:{third}", run_config=config
    )
    sliced = library.slice(model, n=2, executor=executor, pack=lambda _: parts)
    optimizer = {"name": "SGD", "params": {"lr": 1e-3, "momentum": 0.9}}
    try:
        sliced.train(Loader(), optimizer, {"name": "CrossEntropyLoss", "params": {}}, epochs=1)
    finally:
        for worker in workers:
            worker.kill()
    after = _seconds(unsplit, 5)
    taken = [1e3 * (later - earlier) for earlier, later in itertools.pairwise(times[2:])]
    base = 1e3 * (before + after) / 2
    median = statistics.median(taken)
    return {"min": min(taken), "median": median, "ratio": median / base, "count": len(taken)}


def _work(place: str, threads: int) -> None:
    import torchslicer as library

    torch.set_num_threads(threads)
    library.run_worker(port=int(place.rpartition(":")[2]), coordinator_addr=None, worker_address=place, device="cpu")


def _seconds(step: Step, count: int) -> float:
    """The median seconds of a step."""
    step()
    taken = []
    for _ in range(count):
        begun = time.perf_counter()
        step()
        taken.append(time.perf_counter() - begun)
    return statistics.median(taken)


def _ports(count: int) -> list[int]:
    """Ports that are free at this moment, and so are those above them."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    found = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return found


def _await_listener(place: str) -> None:
    host, _, port = place.partition(":")
    until = time.monotonic() + 60
    while time.monotonic() < until:
        try:
            socket.create_connection((host, int(port)), 1.0).close()
            return
        except OSError:
            time.sleep(0.05)
    raise TimeoutError(f"nobody listens at {place}")


PEERS: dict[str, tuple[tuple[str, ...], Callable[[Tensor, Tensor, float], dict[str, float]]]] = {
    "hivemind": (("hivemind",), hivemind),
    "torchslicer": (("torchslicer", "grpc"), torchslicer),
}
