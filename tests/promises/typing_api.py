"""The public API as a user writes it, for mypy --strict only: nothing here runs.

`assert_type` fails when a name loses its type; each `type: ignore` fails when a mistake isn't caught any more
(warn_unused_ignores).
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import splitfed
from splitfed import Accumulator, Commit, CutPoint, GradientStore, PerClient, SplitClient, SplitServer, Transport
from splitfed.accumulator import policies
from splitfed.client import BatchResult
from splitfed.simulation import RayEngine


def cutting(model: nn.Module, x: Tensor) -> nn.Module:
    """A model is cut by name, by slice, at several places or by hand, joined, and compared."""
    client_half, body = splitfed.split(model, "encoder.layer.1")
    splitfed.split(model, ["first", "features.3:8"])
    splitfed.split(model, 3)  # type: ignore[arg-type]
    nn.Sequential(nn.Linear(1, 1), CutPoint(), nn.Linear(1, 1))
    assert_type(client_half, nn.Module)
    assert_type(body, nn.Module)
    assert_type(splitfed.reference(model, "2:5"), nn.Module)
    print(splitfed.check(model, "2:5", x))
    return splitfed.join(client_half, body)


def serving(body: nn.Module) -> SplitServer:
    """A store is a URL, a server a body over it, and versions are weights by name."""
    store = GradientStore("runs/demo")
    GradientStore("memory://run", sync="process")
    GradientStore("runs/demo", sync=True)  # type: ignore[arg-type]
    GradientStore()  # type: ignore[call-arg]
    assert_type(store.latest_version(), int)
    assert_type(store.load_weights(3), dict[str, Tensor])
    store.load_weights("latest")  # type: ignore[arg-type]
    return SplitServer(body, store, device="cpu")


def training(client_half: nn.Module, server: Transport, batches: Iterable[tuple[Tensor, Tensor]]) -> int | None:
    """The user's own loop, with a `SplitClient` where the model was."""
    client = SplitClient(client_half, server, client_id="hospital-a", loss_scale=lambda: 2.0)
    SplitClient(client_half, server)  # type: ignore[call-arg]
    SplitClient(client_half, 8000, client_id="hospital-a")  # type: ignore[arg-type]
    module: nn.Module = client
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    client.pull()
    for x, y in batches:
        optimizer.zero_grad()
        loss: Tensor = nn.functional.cross_entropy(client(x), y)
        loss.backward()
        optimizer.step()
        with client.batch(num_samples=len(x)):
            client(x).sum().backward()
    for done in client.pipeline(batches, nn.functional.cross_entropy, optimizer, in_flight=2):
        assert_type(done, BatchResult)
        assert_type(done.loss, Tensor)
    client.pipeline(batches, nn.functional.cross_entropy, in_flight="2")  # type: ignore[arg-type]
    SplitClient(client_half, server, client_id="hospital-a", compression={"activations": "int8"})
    SplitClient(client_half, server, client_id="hospital-a", compression=8)  # type: ignore[arg-type]
    client.push(num_samples=100)
    client.push()
    client.push(gradient=True)
    with client.at(1):
        client.eval()
    assert_type(client.position(), dict[str, Any])
    SplitClient(client_half, server, client_id="hospital-a").resume(client.position())
    client.resume("hospital-a")  # type: ignore[arg-type]
    return client.version


def in_process(body: nn.Module, client_half: nn.Module) -> SplitClient:
    """A server is a transport, so it can be given to a client as it is."""
    server: Transport = serving(body)
    return SplitClient(client_half, server, client_id="hospital-a")


def modes(body: nn.Module, client_half: nn.Module, store: GradientStore) -> Commit | None:
    """A mode is a value; a body per client commits as lists and averages as one commit."""
    mode: policies.Mode = policies.mode("buffered", min_batches=20)
    mode.min_batches = 3  # type: ignore[misc]
    Accumulator(body, store, adam, **mode.settings())
    SplitClient(client_half, SplitServer(body, store, per_client=True), client_id="a", personal=("head.*",))
    bodies = PerClient(body, store, adam, **policies.mode("sflv1").settings())
    commits: list[Commit] = bodies.step(["a"])
    bodies.step(3)  # type: ignore[arg-type]
    return bodies.average() or commits[0]


def plain_split_learning(client: SplitClient, x: Tensor, y: Tensor) -> None:
    """With the loss on the server, one call gives a loss that can be sent back through the half."""
    loss = client.loss(x, y)
    assert_type(loss, Tensor)
    loss.backward()


def adam(params: Any) -> torch.optim.Optimizer:
    """An optimizer factory gets the trainable parameters."""
    return torch.optim.AdamW(params, lr=1e-3)


def halving(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    """A scheduler factory gets the optimizer."""
    return torch.optim.lr_scheduler.StepLR(optimizer, step_size=10, gamma=0.5)


def accumulating(body: nn.Module, store: GradientStore) -> tuple[int, ...]:
    """A step gives a commit or `None`, and mypy insists that one asks which."""
    accumulator = Accumulator(body, store, optimizer=adam, lr_scheduler=halving)
    Accumulator(body, store, optimizer=lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9))
    Accumulator(body, store, optimizer=0.1)  # type: ignore[arg-type]
    commit = accumulator.step()
    commit.version  # type: ignore[union-attr]  # noqa: B018
    if commit is None:
        return ()
    commit.version = 2  # type: ignore[misc]
    return commit.version, commit.num_batches, commit.num_stale, commit.num_rejected


def samples(commit: splitfed.Commit) -> float:
    """The weight of a commit, in examples."""
    return commit.num_samples


class Window:
    """A container of the user's own."""

    def __init__(self, frames: Sequence[Tensor]) -> None:
        self.frames = list(frames)


def registering() -> None:
    """A container is registered with both directions, of matching types."""
    splitfed.register_container(Window, lambda window: window.frames, lambda frames: Window(frames))
    splitfed.register_container(Window, lambda window: window.frams, Window)  # type: ignore[attr-defined]


def catching(error: splitfed.SplitFedError) -> int:
    """Each error is also the builtin that a caller would catch."""
    lookup: type[LookupError] = splitfed.ExpiredError
    value: type[ValueError] = splitfed.UnknownCutError
    system: type[OSError] = splitfed.StoreCapabilityError
    timeout: type[TimeoutError] = splitfed.BusyError
    print(lookup, value, system, timeout)
    return error.status


def coordinating(body: nn.Module, half: nn.Module, client: SplitClient, store: GradientStore) -> list[int]:
    """A federation's rounds are plain dicts; what a client sees of one is typed."""
    sgd = torch.optim.SGD
    bodies = Accumulator(body, store, lambda params: sgd(params, lr=1.0))
    halves = Accumulator(half, store, lambda params: sgd(params, lr=1.0), lineage="client")
    federation = splitfed.Federation(bodies, halves, clients_per_round=0.1, deadline=60, late="refuse")
    splitfed.Federation(bodies, halves, late="perhaps")  # type: ignore[arg-type]
    for report in federation.run(3):
        assert_type(report, dict[str, Any])
    return [info.number for info in client.rounds(poll=0.5) if info.sampled]


def recording(store: GradientStore) -> list[dict[str, Any]]:
    """A history lies in a store, a file or memory, and gives plain rows."""
    with splitfed.History(store) as history:
        history.append({"kind": "round", "round": 1})
    splitfed.History("runs/history.jsonl").append(3)  # type: ignore[arg-type]
    assert_type(splitfed.History.load("runs/demo"), splitfed.History)
    return history.rounds()


def sorting(ids: list[splitfed.BatchId]) -> str:
    """Batch ids sort, and print as client, incarnation and number."""
    assert_type(ids[0].seq, int)
    return str(sorted(ids)[0])


def versions() -> str:
    """The version is a string, and a name that isn't there is an error."""
    splitfed.Splitclient  # type: ignore[attr-defined]  # noqa: B018
    return splitfed.__version__


def simulating(model: nn.Module, x: Tensor, y: Tensor) -> None:
    """A run is an iterator of rows; virtual time takes numbers, mappings and functions of an id, and nothing else."""
    virtual = splitfed.VirtualTime(compute=2, latency={"a": 0.1}, dropout=lambda client_id: 0.5)
    splitfed.VirtualTime(compute="fast")  # type: ignore[arg-type]
    run = splitfed.simulate(
        model,
        ["0", "2"],
        {"a": (x, y)},
        loss_fn=nn.functional.cross_entropy,
        optimizer=lambda params: torch.optim.SGD(params, lr=0.1),
        server_optimizer=adam,
        rounds=3,
        engine=virtual,
        evaluate=lambda whole: {"accuracy": 1.0},
    )
    for row in run:
        assert_type(row, dict[str, Any])
    assert_type(run.whole(), nn.Module)
    splitfed.simulate(
        model,
        "0",
        {"a": {"inputs": x, "labels": y}},
        loss_fn=nn.functional.cross_entropy,
        optimizer=torch.optim.SGD,
        server_optimizer=adam,
        rounds=1,
        callbacks=print,
    )
    splitfed.simulate(
        model,
        "0",
        {"a": lambda: (x, y)},
        loss_fn=nn.functional.cross_entropy,
        optimizer=torch.optim.SGD,
        server_optimizer=adam,
        rounds=1,
        engine="ray",
        device="cuda",
    )
    RayEngine(gpus=1)  # type: ignore[call-arg]
    assert_type(run.store, GradientStore)
