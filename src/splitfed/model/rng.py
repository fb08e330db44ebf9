"""Randomness across the cut: who draws the seed, and how a body runs under it.

The client draws 64 bits from torch's default CPU generator for each call and sends the first 8
bytes of their SHA-256, so that a server can't read the generator's state off them. It can still
search: that generator uses 32 bits of a seed, and whoever finds it has the client's stream, with
all noise in it. Noise for privacy is drawn from the system's randomness. The body runs
with every generator seeded by them, and the generators are put back after it. A body that drew
nothing costs the client's stream nothing, so that a seeded run goes on as the unsplit one would,
and `torch.utils.checkpoint`, which restores the generator before it recomputes, meets the same
seed.

The trap: torch's default generator belongs to the process, not to the thread. `compute_lock` keeps
two bodies from running under each other's seed. A client half that draws in another thread
meanwhile isn't covered, but in a pipeline, which takes the lock; so many training clients in one
process go one after another, and real parallelism is by processes.

A lock is given to whoever is quickest, which is a client that asks for it from many threads. So a
server asks for a turn first (`compute_turns`), and of those that wait it is the clients that take
turns, not their requests.
"""

from __future__ import annotations

import hashlib
import threading
from collections import deque
from collections.abc import Sequence

import torch

# Reentrant: what runs under it may draw a seed, as a body does that is itself split.
compute_lock = threading.RLock()


def has_compute_lock() -> bool:
    """Whether this thread has `compute_lock`."""
    found: bool = compute_lock._is_owned()  # type: ignore[attr-defined]
    return found


class Turns:
    """Turns between clients at a lock.

    A client that waits for its turn waits for at most one run of each other client, whatever they
    have queued.

    Args:
        lock: The lock; whoever has a turn takes it too. A thread that has it needs no turn.
    """

    def __init__(self, lock: threading.RLock) -> None:
        self._has_lock = lock._is_owned  # type: ignore[attr-defined]
        self._mutex = threading.Lock()
        self._waiting: dict[str, deque[threading.Lock]] = {}
        """A gate for each request that waits, by client; the clients in the order in which they
        came, or had their last turn."""
        self._is_taken = False
        self._last = ""

    def of(self, client_id: str) -> Turn:
        """A turn for a request of a client; to be used in a `with` block."""
        return Turn(self, client_id)

    def take(self, client_id: str) -> bool:
        """Wait for a turn; false if this thread has the lock already, and needs none."""
        if self._has_lock():
            return False
        with self._mutex:
            if not self._is_taken:
                self._is_taken = True
                self._last = client_id
                return True
            gate = threading.Lock()
            gate.acquire()
            self._waiting.setdefault(client_id, deque()).append(gate)
        try:
            gate.acquire()
        except BaseException:  # Ctrl-C: nobody may hand the turn to who has gone
            with self._mutex:
                queue = self._waiting.get(client_id, deque())
                is_queued = gate in queue
                if is_queued:
                    queue.remove(gate)
                    if not queue:
                        del self._waiting[client_id]
            if not is_queued:
                self.give()
            raise
        return True

    def give(self) -> None:
        """Hand the turn on: to the client that has waited longest, another than the last."""
        with self._mutex:
            if not self._waiting:
                self._is_taken = False
                return
            client_id = next((name for name in self._waiting if name != self._last), self._last)
            queue = self._waiting.pop(client_id)
            gate = queue.popleft()
            if queue:
                self._waiting[client_id] = queue  # behind all others
            self._last = client_id
        gate.release()


class Turn:
    """One turn of `Turns`."""

    __slots__ = ("_client_id", "_has", "_turns")

    def __init__(self, turns: Turns, client_id: str) -> None:
        self._turns = turns
        self._client_id = client_id

    def __enter__(self) -> None:
        self._has = self._turns.take(self._client_id)

    def __exit__(self, *exception: object) -> None:
        if self._has:
            self._turns.give()


compute_turns = Turns(compute_lock)
"""Turns at `compute_lock`."""


class Seed:
    """A seed drawn from the client's generator, and the way back to before the draw."""

    __slots__ = ("_after", "_before", "value")

    def __init__(self) -> None:
        with compute_lock:
            self._before = torch.default_generator.get_state()
            drawn = int(torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device="cpu"))
            self._after = torch.default_generator.get_state()
        digest = hashlib.sha256(drawn.to_bytes(8, "little", signed=True)).digest()
        self.value = int.from_bytes(digest[:8], "little")

    def put_back(self) -> None:
        """Leave the generator as if nothing had been drawn."""
        with compute_lock:
            # If another thread has drawn since, going back would have it draw the same again.
            if torch.equal(torch.default_generator.get_state(), self._after):
                torch.default_generator.set_state(self._before)


class seeded:  # noqa: N801 -- reads as the verb that it is: with seeded(seed) as draws
    """Run a block with the CPU's generator, and those of `devices`, seeded; then put them back.

    Args:
        seed: 0 to 2⁶⁴ − 1.
        devices: Further devices on which the body computes.
    """

    __slots__ = ("_before", "_generators", "_seed", "_started", "drew")

    def __init__(self, seed: int, devices: Sequence[torch.device] = ()) -> None:
        self.drew = False
        """After the block: whether anything was drawn in it."""
        self._seed = seed
        self._generators = [torch.default_generator]
        for device in devices:
            generator = generator_of(device)
            if generator is not None:
                self._generators.append(generator)

    def __enter__(self) -> seeded:
        self._before = [generator.get_state() for generator in self._generators]
        for generator in self._generators:
            generator.manual_seed(self._seed)
        self._started = [generator.get_state() for generator in self._generators]
        return self

    def __exit__(self, *exception: object) -> None:
        states = zip(self._generators, self._before, self._started, strict=True)
        for generator, before, started in states:
            # A draw of no numbers at all leaves the state as it was, and counts as none.
            self.drew = self.drew or not torch.equal(generator.get_state(), started)
            generator.set_state(before)


def generator_of(device: torch.device) -> torch.Generator | None:
    """The default generator of a device that isn't the CPU, if it has one."""
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        return torch.cuda.default_generators[index]
    if device.type == "mps":
        return torch.mps._get_default_mps_generator()
    return None
