"""Storage whose n-th system call fails, and a small training schedule that goes on over such faults.

The calls are those of the blob layer: `os` as the modules of local files see it, the filesystem of fsspec under the
remote backend, or the operations of the backend in memory. A fault is an error before anything is done, the same after
it is done, the answer that a repeated call would get, or an answer that is cut short.
"""

from __future__ import annotations

import errno
import os
import random
import re
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import get_ident
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from backends import Objects
from harness_requests import SEAL, X, ahead, back
from harness_store import Hooked, bits, check_counted_once
from torch import nn

from splitfed.accumulator.accumulator import Accumulator
from splitfed.blobs import files, local
from splitfed.errors import SplitFedError, StoreError
from splitfed.protocol.ids import BatchId
from splitfed.server.server import SplitServer
from splitfed.store import clients
from splitfed.store.store import GradientStore

BEFORE = ("EIO", "ENOSPC", "EINTR", "ESTALE", "ENOENT")
"""The call does nothing, and says so by one of these."""
AFTER = ("done", "repeated")
"""The call does it. Then an I/O error, as a lost reply; or what a client says that asks once more on a lost reply."""
ON_OPEN_FILES = ("read", "writev", "fsync", "close")
AGAIN = {"link": "EEXIST", "mkdir": "EEXIST", "create": "EEXIST", "unlink": "ENOENT", "rmdir": "ENOENT"}
"""What a repeated call is answered whose first try was done."""
NAMES = (*ON_OPEN_FILES, "open", "link", "replace", "unlink", "mkdir", "rmdir", "scandir", "listdir", "stat", "chmod")
"""The system calls that are numbered."""
TRIES = 60
_NONCE = re.compile(r"-[0-9a-f]{16}\.")


def kinds(name: str) -> tuple[str, ...]:
    """The faults of a call."""
    if name in ON_OPEN_FILES:
        short = ("short",) if name in ("read", "writev") else ()
        return (*BEFORE[:4], "done", *short)
    return (*BEFORE, *AFTER)


class Faults:
    """Numbers the calls of one thread, and lets some of them fail.

    Args:
        chance: Chooses the kinds of the faults.
        pairs: The numbers of the calls that fail, two and two.
    """

    def __init__(self, chance: random.Random, pairs: Sequence[tuple[int, int]] = ()) -> None:
        self._chance = chance
        self._names = random.Random(chance.random())
        self._pairs = pairs
        self._at = {number for pair in pairs for number in pair}
        self._thread = get_ident()
        self.count = 0
        self.armed = True
        self.seen: list[tuple[str, str, str]] = []
        """Name, argument and kind of those that failed."""
        self.trace: list[tuple[str, str]] = []
        """Name and file of each call."""

    @property
    def num_pairs(self) -> int:
        """The number of pairs both of which came about."""
        return sum(max(pair) < self.count for pair in self._pairs)

    def names(self, size: int, real: Callable[[int], bytes] = os.urandom) -> bytes:
        """What the system would draw, of which the names of files are made; the probe's threads get its own."""
        return self._names.randbytes(size) if get_ident() == self._thread else real(size)

    def __call__(self, name: str, what: Any, perform: Callable[[], Any], cut: Callable[[], Any] | None = None) -> Any:
        """One call."""
        if not self.armed or get_ident() != self._thread:
            return perform()
        number, self.count = self.count, self.count + 1
        paths = [path for path in (what if isinstance(what, tuple) else (what,)) if isinstance(path, str)]
        self.trace.append((name, os.path.basename(paths[-1]) if paths else ""))
        if number not in self._at:
            return perform()
        kind = self._chance.choice(kinds(name))
        self.seen.append((name, str(what), kind))
        if kind == "short" and cut is not None:
            return cut()
        found = perform() if kind in AFTER or name == "close" else None
        if name == "open" and kind in AFTER:
            os.close(found)
        code = AGAIN.get(name, "EIO") if kind == "repeated" else "EIO" if kind in AFTER else kind
        raise OSError(getattr(errno, code, errno.EIO), f"injected {code} ({kind})")


class System:
    """`os` as a module sees it, whose calls are numbered; fsync is, too, and does nothing."""

    def __init__(self, faults: Faults) -> None:
        self._faults = faults

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in NAMES:
            return real

        def call(*arguments: Any, **named: Any) -> Any:
            def perform() -> Any:
                return None if name == "fsync" else real(*arguments, **named)

            def cut() -> Any:
                if name == "read":
                    return os.read(arguments[0], min(100, arguments[1]))
                return os.writev(arguments[0], [arguments[1][0][:3]])

            return self._faults(name, arguments[:2], perform, cut)

        return call


class Remote(Objects):
    """The objects of an object store, each request of which is numbered."""

    protocol = "faulty"
    faults: Faults

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        """Store bytes."""
        name = "create" if mode == "create" else "put"
        store = super().pipe_file
        self.faults(name, path, lambda: store(path, value, mode, **kwargs))

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        """Return bytes."""
        read = super().cat_file
        found: bytes = self.faults("get", path, lambda: read(path))
        return found

    def rm_file(self, path: str) -> None:
        """Delete an object."""
        remove = super().rm_file
        self.faults("unlink", path, lambda: remove(path))

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> list[Any]:
        """List one level."""
        listed = super().ls
        found: list[Any] = self.faults("list", path, lambda: listed(path, detail))
        return found


@contextmanager
def opened(backend: str, folder: Path, faults: Faults) -> Iterator[Callable[[], GradientStore]]:
    """What opens a store of a backend, as a new process would, whose calls are numbered.

    A run is a function of its faults: random names come of their generator, and no clock has clients looked up again.

    Args:
        backend: A way of publishing files, "found" for the experiment, "memory" or "remote".
        folder: Where files go, a new folder.
        faults: Which calls fail.
    """
    name = uuid.uuid4().hex

    def make() -> GradientStore:
        if backend == "memory":
            store = GradientStore(f"memory://{name}")
            store.blobs = Hooked(store.blobs, _operation(faults))
            return store
        if backend == "remote":
            return GradientStore(f"faulty://bucket/{name}")
        store = GradientStore(folder)
        if backend != "found":
            store.blobs.raw._publisher._way = backend
        return store

    system = System(faults)
    Remote.faults = faults
    with (
        mock.patch("os.urandom", faults.names),
        mock.patch.object(clients, "time", SimpleNamespace(monotonic=lambda: 0.0)),
        mock.patch.object(files, "os", system),
        mock.patch.object(local, "os", system),
        mock.patch.object(files, "LEAST_SPARES", 0),
    ):
        yield make


def _operation(faults: Faults) -> Callable[[str, str, Callable[[], Any]], Any]:
    def call(operation: str, key: str, perform: Callable[[], Any]) -> Any:
        try:
            return faults(operation, key, perform)
        except OSError as error:
            # As the backends translate them.
            if operation == "create" and error.errno == errno.EEXIST:
                return False
            if operation == "get" and error.errno == errno.ENOENT:
                return None
            raise StoreError(f"can't {operation} {key!r}: {error}") from error

    return call


class Net(nn.Module):
    """Parameters, running statistics and a random mask, on two features."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.norm = nn.BatchNorm1d(2)
        self.drop = nn.Dropout(0.5)
        with torch.no_grad():
            self.linear.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, -1.0]]))
            self.linear.bias.copy_(torch.tensor([0.5, -0.5]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Linear, dropout, normalisation."""
        found: torch.Tensor = self.norm(self.drop(self.linear(x)))
        return found


@dataclass
class Outcome:
    """What a schedule has left in its store."""

    bits: list[dict[str, bytes]]
    """The weights of each version."""
    optimizers: list[str]
    """The state of the optimizer at each."""
    keys: list[str]
    """All keys, without their nonces and the number of the client's process."""
    foreign: list[str] = field(default_factory=list)
    """Files that aren't keys, besides lock files."""


class Training:
    """Five batches of one client, four commits and a rollback; whatever fails is tried again.

    Args:
        make: Opens the store.
        anew: Whether a new process tries again, with nothing in memory.
    """

    def __init__(self, make: Callable[[], GradientStore], *, anew: bool) -> None:
        self._make = make
        self._anew = anew
        self._server: SplitServer | None = None
        self._accumulator: Accumulator | None = None
        self._store: GradientStore | None = None
        self._incarnation: int | None = None
        self.acknowledged: list[BatchId] = []
        self.num_errors = 0

    def run(self, faults: Faults) -> Outcome:
        """The schedule; the last batch and commit are of new processes, without faults.

        New ones, because an accumulator looks for what is left of probes until it finds none, and a listing that says
        "nothing there" in error is believed.
        """
        self._batch(0, 0)
        self._commit(1)
        self._batch(1, 1)
        self._batch(2, 1)
        self._commit(2)
        self._rollback(3, to=1)
        self._batch(3, 3)
        self._commit(4)
        faults.armed = False
        self._store = self._server = self._accumulator = None
        self._batch(4, 4)
        self._commit(5)
        return self._outcome()

    def _try(self, act: Callable[[], Any]) -> Any:
        for _ in range(TRIES):
            try:
                return act()
            except SplitFedError as error:
                self.num_errors += 1
                last = error
                if self._anew:
                    self._store = self._server = self._accumulator = None
        raise AssertionError(f"a dead end: {last!r}") from last

    def _opened(self) -> GradientStore:
        if self._store is None:
            self._store = self._make()
        return self._store

    def _serving(self) -> SplitServer:
        if self._server is None:
            self._server = SplitServer(Net(), self._opened(), keep_graphs=1)
        return self._server

    def _committing(self) -> Accumulator:
        if self._accumulator is None:
            settings = {"lr": 0.1, "momentum": 0.9}
            self._accumulator = Accumulator(
                Net(), self._opened(), lambda params: torch.optim.SGD(params, **settings), keep_versions=16
            )
        return self._accumulator

    def _batch(self, seq: int, version: int) -> None:
        def forward() -> Any:
            call = ahead(call=seq, seed=seq, incarnation=self._incarnation, seen=version, inputs=((X + seq,), {}))
            return self._serving().forward(call)

        answer = self._try(forward)
        assert answer.version == version, f"batch {seq} ran at version {answer.version}, not {version}"
        self._incarnation = answer.incarnation
        request = back(seq=seq, call=seq, version=version, incarnation=answer.incarnation, seal=SEAL)
        said = self._try(lambda: self._serving().backward(request))
        assert said.status == "stored", said.status
        self.acknowledged.append(BatchId("a", request.incarnation, seq))

    def _commit(self, version: int) -> None:
        def step() -> None:
            while self._committing().step() is not None:
                pass
            found = self._opened().latest_version()
            if found < version:
                raise StoreError(f"version {found} is the newest yet")
            assert found == version, f"{found} versions, not {version}"

        self._try(step)

    def _rollback(self, version: int, to: int) -> None:
        def back_to() -> None:
            if self._opened().latest_version() < version:
                self._opened().rollback(to)

        self._try(back_to)

    def _named(self, keys: list[str]) -> Iterator[str]:
        """Keys with `own` for the number of the client's process.

        It isn't always 1: where a read says that the file isn't there which this very process has just created, another
        number is opened, and the file of the first stays as that of any process.
        """
        own = f"{self._incarnation:08d}"
        for key in keys:
            if key.startswith("clients/a/") and key != f"clients/a/{own}":
                continue
            yield re.sub(rf"(?<=[-/]){own}(?=-|$)", "own", key)

    def _outcome(self) -> Outcome:
        store = self._make()
        check_counted_once(store, self.acknowledged, self._make)
        lineage = store.lineage()
        versions = range(lineage.head() + 1)
        found = Outcome(
            [bits(store.load_weights(version)) for version in versions],
            [repr(lineage.optimizer(version)) for version in versions],
            sorted(_NONCE.sub(".", key) for key in self._named(store.blobs.list(""))),
        )
        root = getattr(store.blobs, "root", None)
        if root is not None:
            keys = {f"{root}/{key}" for key in store.blobs.list("")}
            others = {str(path) for path in Path(root).rglob("*") if path.is_file()} - keys
            found.foreign = sorted(path for path in others if "/.locks/" not in path)
        return found
