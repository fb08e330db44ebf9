"""Requests that travel through a store: posted by hand, and a clock that only moves when it is waited on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from splitfed.protocol import backoff
from splitfed.protocol.packing import pack, unpack_answer
from splitfed.service.mailbox.client import StoreTransport
from splitfed.store import layout
from splitfed.store.store import GradientStore

PROCESS = "0" * 32


class Clock:
    """Seconds that pass only in `sleep`, which lets somebody else act meanwhile."""

    def __init__(self, meanwhile: Callable[[], Any] = lambda: None) -> None:
        self.now = 0.0
        self.slept: list[float] = []
        self.meanwhile = meanwhile

    def monotonic(self) -> float:
        """The time."""
        return self.now

    def sleep(self, seconds: float) -> None:
        """Let the others act, then let the time pass."""
        self.slept.append(seconds)
        self.meanwhile()
        self.now += seconds


def clocked(monkeypatch: pytest.MonkeyPatch, meanwhile: Callable[[], Any] = lambda: None) -> Clock:
    """A clock that the store transport waits by."""
    clock = Clock(meanwhile)
    monkeypatch.setattr(backoff, "time", clock)
    return clock


def post(store: GradientStore, request: Any, number: int = 0, client_id: str = "a") -> str:
    """Put a request, or any bytes, where a client would; return its place."""
    place = layout.post(client_id, PROCESS, number)
    store.blobs.put(f"{place}.request", [request] if isinstance(request, bytes) else pack(request))
    return place


def answer(store: GradientStore, place: str, method: str) -> Any:
    """What was answered there; raises the error that was."""
    data = store.blobs.get(f"{place}.answer")
    assert data is not None, f"no answer among {store.blobs.list('post')}"
    return unpack_answer(method, data)


def ends(store: GradientStore) -> list[str]:
    """What lies beneath post/, by the last part of the keys' names."""
    return [key.rpartition(".")[2] for key in store.blobs.list("post")]


def transport(url: str, **options: Any) -> StoreTransport:
    """The transport of client "a"."""
    return StoreTransport(url, client_id="a", **options)
