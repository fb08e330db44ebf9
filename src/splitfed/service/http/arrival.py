"""A request's body as it arrives: its place in the budget, and the memory that its tensors will be views of.

Where the length is declared, the memory is taken once and filled; without one the parts are gathered first. Either way
a body over the limit ends the reading there, and what was reserved is given back whatever happens.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any

from splitfed.errors import BusyError, FormatError, SplitFedError
from splitfed.protocol.safetensors import aligned
from splitfed.service.http.limits import Budget, Limits, check_body

Receive = Callable[[], Awaitable[Any]]


class GoneError(Exception):
    """The client has left before its body had arrived."""


class RefusedError(Exception):
    """An error whose status isn't its class's own."""

    def __init__(self, error: SplitFedError, status: int) -> None:
        super().__init__(str(error))
        self.error = error
        self.status = status


class Received:
    """A request's place in the budget, and its body."""

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._entered = False
        self._reserved = 0
        self.num_bytes = 0

    def close(self) -> None:
        """Give back what was taken."""
        if self._entered:
            self._budget.leave(self._reserved)
            self._entered = False

    async def body(self, headers: Mapping[bytes, bytes], receive: Receive, limits: Limits) -> memoryview:
        """The body, in memory of its own that is aligned as tensors need it.

        Raises:
            TooLargeError: it is over the limit.
            BusyError: too much is under way.
        """
        try:
            self._budget.enter()
        except BusyError as error:
            raise RefusedError(error, 503) from None
        self._entered = True
        text = headers.get(b"content-length")
        if text is None:
            return await self._gathered(receive, limits)
        if not text.isdigit():
            raise FormatError(f"the content length is {text[:40]!r}: expected a number of bytes")
        declared = int(text)
        check_body(declared, limits)
        self._reserved += self._budget.reserve(declared)
        return await self._into(aligned(declared), receive, limits)

    async def _into(self, memory: memoryview, receive: Receive, limits: Limits) -> memoryview:
        more = True
        while more:
            part, more = await self._part(receive, limits)
            if self.num_bytes > len(memory):
                break
            memory[self.num_bytes - len(part) : self.num_bytes] = part
        if self.num_bytes != len(memory):
            raise FormatError(f"the body has another length: expected {len(memory)} bytes, got {self.num_bytes}")
        return memory

    async def _gathered(self, receive: Receive, limits: Limits) -> memoryview:
        parts: list[bytes] = []
        more = True
        while more:
            part, more = await self._part(receive, limits)
            self._reserved += self._budget.reserve(len(part))
            parts.append(part)
        return _joined(parts, self.num_bytes)

    async def _part(self, receive: Receive, limits: Limits) -> tuple[bytes, bool]:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise GoneError
        part: bytes = message.get("body", b"")
        self.num_bytes += len(part)
        check_body(self.num_bytes, limits)
        return part, message.get("more_body", False)


def _joined(parts: Iterable[bytes], num_bytes: int) -> memoryview:
    memory, end = aligned(num_bytes), 0
    for part in parts:
        memory[end : end + len(part)] = part
        end += len(part)
    return memory
