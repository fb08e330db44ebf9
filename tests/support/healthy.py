"""Healthy stores of many kinds: random runs of clients, commits, rollbacks, rounds, killed processes, open calls."""

from __future__ import annotations

import random
import shutil
import uuid
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import toy
from harness_requests import ahead, back
from harness_store import Crash, Nth, again, crash, hooked, lose_reply
from torch import nn

from splitfed.accumulator import policies
from splitfed.accumulator.accumulator import Accumulator
from splitfed.errors import SplitFedError
from splitfed.model.skeleton import Template
from splitfed.protocol.ids import BatchId
from splitfed.protocol.messages import Chain, Housekeeping, LossRequest, PullRequest, PushRequest, Seal
from splitfed.protocol.packing import pack
from splitfed.server.server import SplitServer
from splitfed.store import layout
from splitfed.store.store import GradientStore
from splitfed.tracking.history import History

FORMATS = Path(__file__).resolve().parents[1] / "promises/formats"
CLIENTS = ("a", "b", "c")
MODES = ("round", "buffered", "synchronous", policies.mode("grouped", group=2), "sflv1", "sflv2")
Look = Callable[[GradientStore], None]
"""Called now and then with the store as a new process sees it."""


class Body(nn.Module):
    """Weights, running statistics, a mask at random; with a parameter that never trains, if wanted."""

    def __init__(self, *, frozen: bool, beside: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.norm = nn.BatchNorm1d(2)
        self.drop = nn.Dropout(0.25)
        with torch.no_grad():
            self.linear.weight.copy_(torch.eye(2))
            self.linear.bias.zero_()
        if frozen:
            self.fixed = nn.Parameter(torch.ones(2), requires_grad=False)
        if beside:
            self.register_buffer("table", torch.arange(2.0), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """All of them in a row."""
        return self.norm(self.drop(self.linear(x))) + getattr(self, "fixed", 0) + getattr(self, "table", 0)


class Run:
    """A random run of requests made by hand, commits and accidents.

    Args:
        chance: Chooses what happens.
        url: The store.
        look: Called in the middle of commits.
    """

    def __init__(self, chance: random.Random, url: str, look: Look | None = None) -> None:
        self.chance = chance
        self.url = url
        self._look = look
        self._frozen, self._beside = chance.random() < 0.4, chance.random() < 0.3
        self._optimizer = chance.choice((self._sgd, self._adam))
        self._window = chance.choice((2, 3, 6))
        self._scheduled = chance.random() < 0.3
        self.store = GradientStore(url, sync="process")
        self._server = self._serving()
        self._accumulator = self._committing(self.store)
        self._incarnations: dict[str, int] = {}
        self._calls: dict[str, list[tuple[int, int]]] = {client: [] for client in CLIENTS}
        self._numbers = dict.fromkeys(CLIENTS, 0)
        self._call = 0

    def _body(self) -> Body:
        return Body(frozen=self._frozen, beside=self._beside)

    @staticmethod
    def _sgd(params: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=0.1, momentum=0.5)

    @staticmethod
    def _adam(params: Any) -> torch.optim.Optimizer:
        return torch.optim.Adam(params, lr=0.1)

    def _serving(self) -> SplitServer:
        return SplitServer(self._body(), self.store, loss_fn=lambda outputs, target: (outputs - target).pow(2).sum())

    def _committing(self, store: GradientStore, lineage: str = "body") -> Accumulator:
        scheduler = (lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 2)) if self._scheduled else None
        module = self._body() if lineage == "body" else nn.Linear(2, 2)
        return Accumulator(
            module,
            store,
            self._optimizer,
            lr_scheduler=scheduler,
            lineage=lineage,
            keep_versions=self._window,
            lock_seconds=0,
        )

    def steps(self, count: int) -> None:
        """So many things happen."""
        acts: list[tuple[int, Callable[[], Any]]] = [
            (6, self._forward),
            (8, self._batch),
            (6, self._commit),
            (2, self._loss),
            (2, self._part),
            (1, self._process),
            (1, self._rollback),
            (2, self._push),
            (1, self._killed),
            (1, self._watched),
            (1, self._give_up),
            (1, self._mail),
            (1, self._history),
            (1, self._hint_behind),
        ]
        for _ in range(count):
            act = self.chance.choices([act for _, act in acts], [weight for weight, _ in acts])[0]
            try:
                act()
            except SplitFedError:
                continue  # as when a version has expired: the user's loop goes on

    def go_on(self, store: GradientStore) -> None:
        """Another process of the same model: a batch of a new client, and the commit that folds it."""
        self.store = store
        self._server = self._serving()
        self._accumulator = self._committing(store)
        client = f"new-{self.chance.getrandbits(32):x}"
        answer = self._server.forward(ahead(client_id=client, process=client, call=1))
        request = back(client_id=client, incarnation=answer.incarnation, version=answer.version, call=1)
        assert self._server.backward(request).status == "stored"
        while self._accumulator.step() is not None:
            pass
        newest = store.lineage().commit(store.latest_version())
        assert BatchId(client, answer.incarnation or 0, 0) in newest.folded

    def _who(self) -> str:
        return self.chance.choice(CLIENTS)

    def _notes(self, client: str) -> Housekeeping:
        calls = self._calls[client]
        released = tuple(calls.pop(0) for _ in range(self.chance.randrange(3)) if len(calls) > 2)
        return Housekeeping(released=released)

    def _forward(self) -> tuple[str, int, int]:
        client = self._who()
        self._call += 1
        x = torch.randn(self.chance.choice((2, 3)), 2)
        request = ahead(
            client_id=client,
            incarnation=self._incarnations.get(client),
            process=f"{client}-{self.chance.random()}",
            call=self._call,
            seed=self.chance.randrange(2**32),
            inputs=((x,), {}),
            housekeeping=self._notes(client),
        )
        answer = self._server.forward(request)
        self._incarnations[client] = answer.incarnation or 0
        self._calls[client].append((answer.version, self._call))
        return client, answer.version, self._call

    def _seq(self, client: str) -> int:
        self._numbers[client] += 1
        return self._numbers[client] - 1

    def _batch(self) -> None:
        client, version, call = self._forward()
        rows = torch.randn(2, 2) if self.chance.random() < 0.95 else torch.full((2, 2), float("nan"))
        record = self.store.pile().forward(version, client, self._incarnations[client], call)
        assert record is not None
        rows = rows[:1].expand(record.outputs[0][0]).contiguous()
        request = back(
            client_id=client,
            incarnation=self._incarnations[client],
            seq=self._seq(client),
            version=version,
            call=call,
            grad_outputs=(rows,),
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._server.backward(request)

    def _part(self) -> None:
        """One call's share of a batch, which may never be sealed."""
        client, version, call = self._forward()
        record = self.store.pile().forward(version, client, self._incarnations[client], call)
        assert record is not None
        seq = self._seq(client)
        request = back(
            client_id=client,
            incarnation=self._incarnations[client],
            seq=seq,
            version=version,
            call=call,
            grad_outputs=(torch.ones(record.outputs[0][0]),),
            seal=None,
        )
        self._server.backward(request)
        if self.chance.random() < 0.5:
            seal = Seal(((version, 0),), 2.0, 1.0, (Chain(2.0, 0),))
            self._server.backward(replace(request, call=None, part=1, grad_outputs=(), seal=seal))

    def _loss(self) -> None:
        client = self._who()
        self._call += 1
        x = torch.randn(2, 2)
        request = ahead(
            client_id=client,
            incarnation=self._incarnations.get(client),
            process=f"{client}-{self.chance.random()}",
            call=self._call,
            inputs=((x,), {}),
        )
        answer = self._server.loss(LossRequest(request, self._seq(client), torch.ones(2, 2), 2.0))
        self._incarnations[client] = answer.incarnation or 0

    def _give_up(self) -> None:
        client, _, _ = self._forward()
        self._call += 1
        notes = Housekeeping(abandoned=(self._seq(client),))
        self._server.forward(
            ahead(
                client_id=client,
                incarnation=self._incarnations[client],
                call=self._call,
                grad=False,
                housekeeping=notes,
            )
        )

    def _process(self) -> None:
        """A client begins again: its calls and numbers are new."""
        client = self._who()
        self._incarnations.pop(client, None)
        self._calls[client].clear()
        self._numbers[client] = 0
        if self.chance.random() < 0.3:
            self._server = self._serving()

    def _commit(self) -> None:
        self._accumulator.step()

    def _rollback(self) -> None:
        head = self.store.latest_version()
        self.store.rollback(max(0, head - self.chance.randrange(1, 4)))

    def _push(self) -> None:
        client = self._who()
        half = nn.Linear(2, 2)
        fingerprint = Template(half).fingerprint()
        weights = {name: tensor.detach() for name, tensor in half.named_parameters()}
        if self._server.pull(PullRequest(client)).version < 0:
            self._server.push(PushRequest(client, None, "p", 0, -1, fingerprint, weights, {}, {}, 1.0, 1.0))
        head = self.store.latest_version("client")
        incarnation = self._incarnations.get(client)
        process = f"{client}-{self.chance.random()}"
        request = PushRequest(
            client, incarnation, process, self._seq(client), head, fingerprint, weights, {}, {}, 1.0, 1.0
        )
        self._incarnations[client] = self._server.push(request).incarnation or 0
        if self.chance.random() < 0.5:
            self._committing(self.store, "client").step()

    def _hint_behind(self) -> None:
        """An accumulator is killed after its commit, before the hint moves."""
        hook = Nth(0, crash, at="put body/head")
        accumulator = self._committing(hooked(self.store.url, hook))
        hook.arm()
        with suppress(Crash):
            accumulator.step()

    def _killed(self) -> None:
        """An accumulator is killed somewhere in a commit, or hears nothing of one operation."""
        hook = Nth(self.chance.randrange(40), self.chance.choice((crash, crash, lose_reply)))
        store = hooked(self.store.url, hook)
        accumulator = self._committing(store)
        hook.arm()
        with suppress(Crash):
            accumulator.step()

    def _watched(self) -> None:
        """Somebody looks while a commit is under way."""
        if self._look is None:
            return
        look = self._look
        chosen = {self.chance.randrange(40) for _ in range(3)}
        count = 0

        def hook(operation: str, key: str, perform: Callable[[], Any]) -> Any:
            nonlocal count
            count += 1
            if count in chosen:
                look(again(self.store))
            return perform()

        self._committing(hooked(self.store.url, hook)).step()

    def _mail(self) -> None:
        """A request of a client without a server, in the mailbox."""
        key = layout.post(self._who(), f"{self.chance.getrandbits(128):032x}", 0)
        for end in self.chance.choice((("request",), ("request", "answer"))):
            self.store.blobs.create(f"{key}.{end}", pack(PullRequest("a")))

    def _history(self) -> None:
        History(self.store).append({"kind": "run", "mode": "round"})


@dataclass(frozen=True)
class Healthy:
    """A store."""

    kind: str
    store: GradientStore
    """As a new process sees it."""
    go_on: Callable[[GradientStore], None]
    """Makes the next version or round of a copy of it, and fails if that doesn't come about."""


def make(chance: random.Random, folder: Path, look: Look | None = None, kind: str = "") -> Healthy:
    """A healthy store.

    Args:
        chance: Chooses it.
        folder: Where a store of files goes.
        look: Called with the store while commits are under way.
        kind: Of which kind, if not of a random one.
    """
    kind = kind or chance.choices(("memory", "file", "format 1", "rounds"), (80, 10, 6, 4))[0]
    url = folder.as_uri() if kind == "file" else f"memory://{uuid.uuid4()}"
    torch.manual_seed(chance.randrange(2**32))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        if kind == "rounds":
            return _rounds(chance, url)
        if kind == "format 1":
            return Healthy(kind, _old(chance, url), lambda store: None)
        run = Run(chance, url, look)
        run.steps(chance.randrange(chance.choice((2, 15, 40, 120))))
    if kind == "file":
        (folder / ".tmp").mkdir(exist_ok=True)
        (folder / ".tmp" / "left").write_bytes(b"of a killed writer")
    return Healthy(kind, again(run.store), run.go_on)


def _rounds(chance: random.Random, url: str) -> Healthy:
    """Rounds of a federation, left somewhere."""
    mode = chance.choice(MODES)
    rows = iter(toy.run(mode=mode, rounds=3, store=GradientStore(url), history=History(GradientStore(url))))
    for _ in range(chance.randrange(1, 30)):
        if next(rows, None) is None:
            break

    def go_on(store: GradientStore) -> None:
        found = list(toy.run(mode=mode, rounds=5, store=store, history=History(store)))
        assert found, "no further round"
        assert store.rounds().current() is not None

    return Healthy(f"rounds, {policies.mode(mode).name}", again(GradientStore(url)), go_on)


def _old(chance: random.Random, url: str) -> GradientStore:
    """A store of format 1, maybe with new versions."""
    store = GradientStore(url)
    source = FORMATS / "format-1" / chance.choice(("store", "lines"))
    for path in source.rglob("*"):
        if path.is_file():
            store.blobs.raw.put(path.relative_to(source).as_posix(), [path.read_bytes()])
    store = again(store)
    names = ("body", "client") if source.name == "store" else ("body@a",)
    for name in names:
        for _ in range(chance.randrange(3)):
            head = store.latest_version(name)
            if head:
                try:
                    store.rollback(chance.randrange(head), name)
                except SplitFedError:
                    continue
    return again(store)


def remove(folder: Path) -> None:
    """Delete a store of files."""
    shutil.rmtree(folder, ignore_errors=True)
