"""The memory of a server process: one budget in bytes, for all clients and for each.

Counted are the calls under way (inputs as they are once expanded, outputs and graph) and the graphs
that are kept for a backward. A call is refused before it is computed, and only to a client that has
another one under way: the others go on, and one call alone always runs, whatever its size. Graphs
never cause a refusal: they are dropped for a recompute (`graphs`).

The trap is a tensor that is small on the wire and large in memory. An expanded one has few bytes
and many elements, so nobody has paid for its size; it may be a few times as large as what was sent,
as a mask for a batch is, and not more.

What a call will hold is known only once it has run. It is taken to be as many times its inputs as
the largest seen so far for the same part of the body; that is measured at the first calls, then
ever more seldom, by the sizes that the graph says of its operations. The saved tensors themselves
are left alone: asking for one may run the user's code.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from splitfed.checks import at_least
from splitfed.errors import BusyError, TooLargeError
from splitfed.model.execution import Run

EXPANSION = 64
"""Inputs may be so many times as large as the bytes that were sent for them ..."""
EXPANSION_BYTES = 4 << 20
"""... and so many bytes more."""
_UNSEEN = 1.0
"""What a call of which nothing was seen yet holds, as a multiple of its inputs."""
_KINDS = 256
_FALLBACK = 8 << 30
# Operations that make another view of what is there.
_VIEWS = (
    *("View", "Reshape", "Transpose", "Permute", "TBackward", "Expand", "Select", "Slice"),
    *("Squeeze", "Alias", "AccumulateGrad", "Split", "Unbind", "Detach"),
)


class Memory:
    """How much memory a server may hold for its clients.

    Args:
        total: Bytes, for all together; a quarter of the machine's memory by default.
        client: Bytes, for each; by default `total`, and 256 MiB where a service is reached from
            other processes.

    Raises:
        InputError: one isn't at least 1.
    """

    def __init__(self, total: int | None = None, client: int | None = None) -> None:
        for name, value in (("total", total), ("client", client)):
            if value is not None:
                at_least(name, value, 1)
        self._given = (total, client)
        self.total = _quarter() if total is None else total
        """Bytes for all clients together."""
        self.client = self.total if client is None else client
        """Bytes for each client."""
        self.growth = Growth()
        """What calls hold beside their inputs."""
        self.kept = 0
        """Bytes of the graphs that are kept."""
        self._under_way: dict[str, int] = {}
        self._sum = 0
        self._lock = threading.Lock()

    def adopt(self, total: int, client: int) -> None:
        """Take limits of a service for those that weren't given."""
        self.total = total if self._given[0] is None else self._given[0]
        self.client = client if self._given[1] is None else self._given[1]

    @property
    def under_way(self) -> int:
        """Bytes of the calls under way, roughly."""
        return self._sum

    def claim(self, client_id: str, tensors: Iterable[Tensor], cut: str = "") -> Claim:
        """Reserve memory for a call, until the claim is left.

        Args:
            client_id: Whose call it is.
            tensors: Its inputs.
            cut: The part of the body that it runs.

        Raises:
            TooLargeError: its inputs are expanded beyond what was sent for them.
            BusyError: it doesn't fit beside the client's other calls.
        """
        size, sent = extent(tensors)
        if size != sent and size - sent > EXPANSION_BYTES + EXPANSION * sent:
            raise TooLargeError(
                f"the tensors take {size} bytes when they are expanded, and {sent} as they were "
                f"sent: this server takes {EXPANSION} times as many and {EXPANSION_BYTES} more; "
                "send fewer samples, or a tensor that isn't expanded: tensor.contiguous()"
            )
        # One byte more, as a client with a call without tensors has a call under way, too.
        return self._reserve(client_id, 1 + int(size * (1.0 + self.growth.of(cut))), sent)

    def _reserve(self, client_id: str, need: int, sent: int) -> Claim:
        with self._lock:
            held = self._under_way.get(client_id, 0)
            # One call alone always runs: that its client sends no second one is all one can ask.
            if held and (held + need > self.client or self._sum + need > self.total):
                raise BusyError(
                    f"client {client_id!r} has calls of {held} bytes under way, and another one of "
                    f"{need} doesn't fit beside them: this server takes {self.client} bytes of one "
                    f"client and {self.total} in all; try again once they are answered, or raise "
                    "its limits: SplitServer(..., memory=Memory(...)), --memory, --client-memory"
                )
            self._under_way[client_id] = held + need
            self._sum += need
        return Claim(self, client_id, need, sent)

    def release(self, client_id: str, need: int) -> None:
        """Give back what was reserved."""
        with self._lock:
            left = self._under_way.get(client_id, 0) - need
            if left > 0:
                self._under_way[client_id] = left
            else:
                self._under_way.pop(client_id, None)
            self._sum -= need


class Claim:
    """Memory that is reserved within a block.

    The block gets the number of bytes that its tensors were sent as.
    """

    __slots__ = ("_client_id", "_memory", "_need", "_sent")

    def __init__(self, memory: Memory, client_id: str, need: int, sent: int) -> None:
        self._memory = memory
        self._client_id = client_id
        self._need = need
        self._sent = sent

    def __enter__(self) -> int:
        return self._sent

    def __exit__(self, *exception: object) -> None:
        self._memory.release(self._client_id, self._need)


class Growth:
    """What calls hold beside their inputs, as a multiple of these, by part of the body."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[int, int, float]] = {}
        """By cut: the number of calls, the size of the largest that was measured, the multiple."""

    def of(self, cut: str) -> float:
        """The largest multiple that was seen."""
        found = self._seen.get(cut)
        return _UNSEEN if found is None else found[2]

    def see(self, cut: str, size: int, done: Run) -> None:
        """Take note of a call that has run.

        Args:
            cut: The part of the body that it ran.
            size: Bytes of its inputs.
            done: Its run.
        """
        count, largest, multiple = self._seen.get(cut, (0, 0, 0.0))
        count += 1
        if not count & (count - 1) or size > 2 * largest:  # 1, 2, 4, 8 and so on
            multiple = max(multiple, held_by(done.tensors) / max(size, 1))
            largest = max(largest, size)
        if cut in self._seen or len(self._seen) < _KINDS:
            self._seen[cut] = (count, largest, multiple)


def extent(tensors: Iterable[Tensor]) -> tuple[int, int]:
    """Bytes of tensors once they are expanded, and as they are stored."""
    size = sent = 0
    for tensor in tensors:
        if tensor.is_nested or tensor.layout is not torch.strided:
            continue  # they are refused elsewhere, by name
        num_bytes = tensor.nbytes
        size += num_bytes
        if not tensor.is_contiguous():
            for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
                if stride == 0:
                    num_bytes //= length
        sent += num_bytes
    return size, sent


def held_by(outputs: Sequence[Tensor]) -> int:
    """Bytes of outputs and of what the operations of their graph have made, roughly."""
    total = 0
    seen: set[Any] = set()
    waiting: list[Any] = []
    for tensor in outputs:
        if tensor.grad_fn is None:
            total += tensor.nbytes
        else:
            waiting.append(tensor.grad_fn)
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        waiting.extend(following for following, _ in node.next_functions)
        if any(view in node.name() for view in _VIEWS):
            continue
        for metadata in getattr(node, "_input_metadata", ()):
            total += _bytes_of(metadata)
    return total


def _bytes_of(metadata: Any) -> int:
    """The size of a tensor by what a node of the graph says of it."""
    try:
        num_bytes: int = metadata.dtype.itemsize
        for length in metadata.shape:
            num_bytes *= int(length)
    except (AttributeError, TypeError, RuntimeError):  # a nested tensor has no such shape
        return 0
    return num_bytes


def _quarter() -> int:
    """A quarter of the machine's memory, in bytes."""
    try:
        return max(1 << 30, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4)
    except (AttributeError, ValueError, OSError):  # not everywhere is there such a question
        return _FALLBACK
