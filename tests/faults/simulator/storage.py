"""The storage that a simulated process sees: the real one in memory, behind everything that can go wrong on the way."""

from __future__ import annotations

import builtins
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from random import Random
from typing import TYPE_CHECKING, Any

from tests.faults.simulator.process import Fault, Process
from tests.faults.simulator.scheduler import Killed

from splitfed.blobs.contract import Buffer
from splitfed.blobs.memory import MemoryBlobs
from splitfed.errors import StoreError

if TYPE_CHECKING:
    from tests.faults.simulator.world import World

_NEVER = 0.15
"""Of late writes, so many never land."""
_LATEST = 500
_OLDEST = 250


class Storage:
    """What is really stored, and when it came and went; the ledger is told of each change.

    Args:
        world: The run.
    """

    def __init__(self, world: World) -> None:
        self.blobs = MemoryBlobs("fault-simulator")
        self.clear()
        self._world = world
        self._born: dict[str, int] = {}
        self._gone: dict[str, tuple[int, int]] = {}

    def clear(self) -> None:
        """Forget everything: the objects of one name outlive a run."""
        for key in self.blobs.list(""):
            self.blobs.delete(key)

    def get(self, key: str) -> memoryview | None:
        """The object now."""
        return self.blobs.get(key)

    def create(self, key: str, parts: Sequence[Buffer]) -> bool:
        """Create it now."""
        if not self.blobs.create(key, parts):
            return False
        self._born.setdefault(key, self._world.scheduler.steps)
        self._world.ledger.created(key)
        return True

    def put(self, key: str, parts: Sequence[Buffer]) -> None:
        """Create or replace it now."""
        self._world.ledger.replaced(key, existed=self.blobs.get(key) is not None)
        self.blobs.put(key, parts)
        self._born.setdefault(key, self._world.scheduler.steps)
        self._world.ledger.written(key)

    def rot(self, key: str, where: float) -> None:
        """Change a bit of it for good."""
        self._world.ledger.damaged.add(key)
        self.blobs.put(key, [flipped(self.blobs.get(key) or b"", where)])

    def delete(self, key: str) -> None:
        """Delete it now."""
        if self.blobs.get(key) is None:
            return
        self._world.ledger.deleted(key)
        self.blobs.delete(key)
        self._gone[key] = (self._born.pop(key, 0), self._world.scheduler.steps)

    def list(self, prefix: str) -> builtins.list[str]:
        """The keys now."""
        return self.blobs.list(prefix)

    def listed(self, prefix: str, age: float, patchy: bool) -> builtins.list[str]:
        """The keys as a listing has them that isn't up to date: of a moment ago, or each of another moment."""
        then = self._world.scheduler.steps - 1 - int(age * _OLDEST)
        draw = Random(age)
        found = set(self.blobs.list(prefix))
        start = f"{prefix}/" if prefix else ""
        for key in sorted(found):
            if self._born.get(key, 0) > then and not (patchy and draw.random() < 0.5):
                found.discard(key)
        for key, (born, died) in self._gone.items():
            if key.startswith(start) and born <= then < died and not (patchy and draw.random() < 0.5):
                found.add(key)
        return sorted(found)


class ProcessBlobs:
    """The storage as one process has it; a `Blobs`."""

    def __init__(self, process: Process, storage: Storage) -> None:
        self._process = process
        self._storage = storage
        self._garbled = ""

    def get(self, key: str) -> memoryview | None:
        """As the contract has it."""
        fault = self._process.step("get", key)
        _refuse(fault, "get", key)
        data = self._storage.get(key)
        again, self._garbled = self._garbled, ""
        if not data or fault not in ("garbled", "rotten"):
            return data
        assert fault is not None
        if fault == "rotten" and _may_rot(key):
            self._storage.rot(key, fault.size)
            return self._storage.get(key)
        if again == key:  # two in a row of one file can't be told from a file that is damaged for good
            return data
        self._garbled = key
        return memoryview(flipped(data, fault.size))

    def create(self, key: str, parts: Sequence[Buffer], *, durable: bool = True) -> bool:
        """As the contract has it."""
        body = b"".join(bytes(part) for part in parts)
        fault = self._process.step("create", key)
        won: bool = self._write(fault, "create", key, lambda: self._storage.create(key, [body]))
        return won and fault != "exists"

    def put(self, key: str, parts: Sequence[Buffer], *, durable: bool = False) -> None:
        """As the contract has it."""
        body = b"".join(bytes(part) for part in parts)
        fault = self._process.step("put", key)
        self._write(fault, "put", key, lambda: self._storage.put(key, [body]))

    def delete(self, key: str) -> None:
        """As the contract has it."""
        fault = self._process.step("delete", key)
        self._write(fault, "delete", key, lambda: self._storage.delete(key))

    def delete_tree(self, prefix: str) -> int:
        """As the contract has it: one key after the other, as every backend does."""
        keys = self.list(prefix)
        for key in keys:
            self.delete(key)
        return len(keys)

    def list(self, prefix: str) -> builtins.list[str]:
        """As the contract has it."""
        fault = self._process.step("list", prefix)
        _refuse(fault, "list", prefix)
        prefix = prefix.removesuffix("/")
        if fault in ("stale", "patchy"):
            assert fault is not None
            return self._storage.listed(prefix, fault.size, fault == "patchy")
        return self._storage.list(prefix)

    def sizes(self, prefix: str) -> dict[str, int]:
        """As the contract has it."""
        found = {key: self._storage.get(key) for key in self.list(prefix)}
        return {key: len(data) for key, data in found.items() if data is not None}

    def probe(self) -> None:
        """It is known what this storage can do."""

    @contextmanager
    def lock(self, key: str, timeout: float) -> Iterator[bool]:
        """Everybody gets it: it may save work, and nothing may rest on it."""
        yield True

    def _write(self, fault: Fault | None, operation: str, key: str, write: Callable[[], Any]) -> Any:
        _refuse(fault, operation, key)
        if fault in ("late", "kill late"):
            assert fault is not None
            if fault.size > _NEVER:
                world = self._process.world
                world.scheduler.after(1 + int(fault.size * _LATEST), lambda: world.land(operation, key, write))
            if fault == "kill late":
                self._process.kill()
                raise Killed
            raise StoreError(f"timeout of {operation} {key}")
        answer = write()
        if fault == "kill after":
            self._process.kill()
            raise Killed
        if fault == "lost":
            raise StoreError(f"the reply to {operation} {key} was lost")
        return answer


def flipped(data: Buffer, where: float) -> bytes:
    """The bytes with one bit changed."""
    changed = bytearray(data)
    place = int(where * 8 * len(changed))
    changed[place // 8] ^= 1 << place % 8
    return bytes(changed)


def _may_rot(key: str) -> bool:
    """Whether the run goes on, and is right, when this file is damaged: those of batches, and the hint."""
    parts = key.split("/")
    return parts[0] == "body" and parts[1] in ("grad", "part", "forward", "pin", "sum", "head")


def _refuse(fault: Fault | None, operation: str, key: str) -> None:
    if fault == "fail":
        raise StoreError(f"refused to {operation} {key}")
