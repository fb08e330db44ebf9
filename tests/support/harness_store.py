"""What tests of the store share: small bodies, batches made by hand, and storage that fails at a chosen operation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from splitfed.accumulator.accumulator import Accumulator
from splitfed.errors import StoreError
from splitfed.protocol.ids import BatchId
from splitfed.protocol.messages import GradientRecord
from splitfed.protocol.packing import pack
from splitfed.store.commit import Commit
from splitfed.store.store import GradientStore

Perform = Callable[[], Any]
Hook = Callable[[str, str, Perform], Any]
"""Called with the name of an operation, its key, and a function that performs it; returns the answer."""


class Point(nn.Module):
    """One parameter `w`, at the origin: weights are then sums of steps that can be worked out by hand."""

    def __init__(self, size: int = 2, **others: Tensor) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(size))
        for name, value in others.items():
            self.register_parameter(name, nn.Parameter(value, requires_grad=not name.startswith("frozen")))

    def forward(self, x: Tensor) -> Tensor:
        """The sum of both, as in any other body."""
        return x + self.w


def net(seed: int = 0) -> nn.Module:
    """A body with parameters and running statistics, the same for the same seed."""
    before = torch.get_rng_state()
    torch.manual_seed(seed)
    made = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    torch.set_rng_state(before)
    return made


def sgd(lr: float = 1.0) -> Callable[[Any], torch.optim.Optimizer]:
    """A factory of plain SGD: with rate 1 the weights are minus the sum of the mean gradients."""
    return lambda params: torch.optim.SGD(params, lr=lr)


def adam(params: Any) -> torch.optim.Optimizer:
    """An optimizer whose every step depends on all steps before."""
    return torch.optim.Adam(params, lr=0.1)


def halving(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    """A schedule whose state matters at every second commit."""
    return torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)


def batch(seq: int, client: str = "a", incarnation: int = 1) -> BatchId:
    """The id of a batch."""
    return BatchId(client, incarnation, seq)


def record(w: Iterable[float] = (1.0, 1.0), **fields: Any) -> GradientRecord:
    """A gradient file of `Point`, one sample at version 0 unless said otherwise."""
    made: dict[str, Any] = {
        "kind": "gradient",
        "base_version": 0,
        "num_samples": 1.0,
        "loss_scale": 1.0,
        "digest": "by hand",
        "numerics": "by hand",
        "gradients": {"w": torch.tensor(list(w))},
        "buffers": [],
    }
    return GradientRecord(**{**made, **fields})


def noisy(body: nn.Module, id_: BatchId, base_version: int) -> GradientRecord:
    """A batch of any body: gradients, and running statistics that moved, as a function of the id alone."""
    generator = torch.Generator().manual_seed(hash((sum(id_.client_id.encode()), *id_[1:])) % 2**31)
    gradients = {n: torch.randn(p.shape, generator=generator) for n, p in body.named_parameters()}
    bases = {n: b.clone() for n, b in body.named_buffers()}
    values = {
        n: b + (1 if b.dtype == torch.int64 else torch.rand(b.shape, generator=generator)) for n, b in bases.items()
    }
    update = {"values": values, "bases": bases, "num_samples": 1.0 + id_.seq}
    return record(
        gradients=gradients, base_version=base_version, num_samples=1.0 + id_.seq, buffers=[update] if bases else []
    )


def plant(store: GradientStore, id_: BatchId, content: GradientRecord | bytes) -> str:
    """Put anything where a batch would lie, as nobody's server would; return its key."""
    key = store.lineage().keys.gradient(id_)
    assert store.blobs.create(key, [content] if isinstance(content, bytes) else pack(content))
    return key


def drain(accumulator: Accumulator) -> list[Commit]:
    """Commit until nothing waits."""
    return list(iter(accumulator.step, None))


def commits(store: GradientStore, lineage: str = "body") -> list[Commit]:
    """Every record of a lineage, version 0 first, read by a store that holds nothing yet."""
    versions = again(store).lineage(lineage)
    return [versions.commit(version) for version in range(versions.head() + 1)]


def again(store: GradientStore) -> GradientStore:
    """The same store as another process sees it: opened anew, nothing cached."""
    return GradientStore(store.url, sync=store.sync)


def bits(weights: dict[str, Tensor]) -> dict[str, bytes]:
    """Weights as bytes, so that `==` compares every bit."""
    return {
        name: tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for name, tensor in weights.items()
    }


def spoil(store: GradientStore, key: str) -> None:
    """Flip the last bit of a stored object, as failing hardware would."""
    blobs = store.blobs.raw
    data = bytearray(blobs.get(key) or b"")
    data[-1] ^= 1
    blobs.delete(key)
    blobs.create(key, [data])


def folder(store: GradientStore) -> Path:
    """Where a `file://` store lies."""
    return Path(store.blobs.root)


def check_counted_once(
    store: GradientStore, issued: Iterable[BatchId], opened: Callable[[], GradientStore] | None = None
) -> None:
    """Every batch is in exactly one list of one commit, or waits; and nothing else is anywhere.

    Args:
        store: Where.
        issued: The batches.
        opened: Opens the store anew, where its URL isn't enough.
    """
    seen: list[BatchId] = [*store.waiting()]
    versions = (again(store) if opened is None else opened()).lineage()
    for commit in map(versions.commit, range(versions.head() + 1)):
        seen += [*commit.folded, *commit.stale, *commit.rejected, *commit.skipped]
    expected = sorted(issued)
    assert sorted(seen) == expected, (
        f"lost: {[str(b) for b in expected if b not in seen]}; strange: {[str(b) for b in seen if b not in expected]}; "
        f"twice: {sorted({str(b) for b in seen if seen.count(b) > 1})}"
    )


class Crash(BaseException):
    """The process dies here: nothing of ours may catch it."""


class Hooked:
    """Blobs whose every operation goes through a hook; locks don't, since nothing may rest on them."""

    def __init__(self, blobs: Any, hook: Hook) -> None:
        self._blobs = blobs
        self._hook = hook

    def __getattr__(self, name: str) -> Any:
        return getattr(self._blobs, name)

    def get(self, key: str) -> memoryview | None:
        """As the contract has it."""
        return self._hook("get", key, lambda: self._blobs.get(key))

    def peek(self, key: str) -> memoryview | None:
        """A read as any other."""
        return self._hook("get", key, lambda: self._blobs.peek(key))

    def create(self, key: str, parts: Any, *, durable: bool = True) -> bool:
        """As the contract has it."""
        return self._hook("create", key, lambda: self._blobs.create(key, parts, durable=durable))

    def put(self, key: str, parts: Any, *, durable: bool = False) -> None:
        """As the contract has it."""
        return self._hook("put", key, lambda: self._blobs.put(key, parts, durable=durable))

    def delete(self, key: str) -> None:
        """As the contract has it."""
        return self._hook("delete", key, lambda: self._blobs.delete(key))

    def delete_tree(self, prefix: str) -> int:
        """As the contract has it."""
        return self._hook("delete_tree", prefix, lambda: self._blobs.delete_tree(prefix))

    def list(self, prefix: str) -> Any:
        """As the contract has it."""
        return self._hook("list", prefix, lambda: self._blobs.list(prefix))


def hooked(url: str, hook: Hook, **options: Any) -> GradientStore:
    """A store whose storage asks `hook` at every operation."""
    store = GradientStore(url, sync="process", **options)
    store.blobs = Hooked(store.blobs, hook)
    return store


class Nth:
    """A hook that does `act(operation, key, perform)` at the n-th operation while `armed`, and counts them.

    With `at`, such as "create body/commit", only operations on keys that begin so are counted.
    """

    def __init__(self, n: int = -1, act: Hook = lambda operation, key, perform: perform(), at: str = "") -> None:
        self.n = n
        self.act = act
        self.at = at
        self.count = 0
        self.log: list[tuple[str, str]] = []
        self._armed = False

    def arm(self) -> None:
        """Count operations from now on."""
        self._armed = True

    @contextmanager
    def armed(self) -> Iterator[Nth]:
        """Count operations within; those outside go through."""
        self.arm()
        try:
            yield self
        finally:
            self._armed = False

    def __call__(self, operation: str, key: str, perform: Perform) -> Any:
        """One operation."""
        if not self._armed or not f"{operation} {key}".startswith(self.at):
            return perform()
        here, self.count = self.count, self.count + 1
        self.log.append((operation, key))
        return self.act(operation, key, perform) if here == self.n else perform()


def crash(operation: str, key: str, perform: Perform) -> Any:
    """Die before the operation."""
    raise Crash(f"before {operation} {key}")


def refuse(operation: str, key: str, perform: Perform) -> Any:
    """Fail without doing anything."""
    raise StoreError(f"refused to {operation} {key}")


def lose_reply(operation: str, key: str, perform: Perform) -> Any:
    """Do it, and fail to say so."""
    perform()
    raise StoreError(f"the reply to {operation} {key} was lost")


def deny(operation: str, key: str, perform: Perform) -> Any:
    """Create, and say that it existed: a retry inside the client library met its own object."""
    answer = perform()
    return False if operation == "create" else answer


def meanwhile(action: Callable[[], Any]) -> Hook:
    """Let somebody else act just before the operation."""

    def act(operation: str, key: str, perform: Perform) -> Any:
        action()
        return perform()

    return act
