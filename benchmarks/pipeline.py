"""What a pipeline gains where requests take time: `client.pipeline(..., in_flight=2)` against in_flight=1.

The tiny body is served over HTTP on loopback by a process of its own. A transport between adds a delay to each request,
as a network does; it sleeps, in the thread that waits. The loops are the same code with the same optimizer, and take
turns in one run, some batches each. Client and server compute on one thread each. What is compared is the wall time of
a batch: forward, loss, backward and step.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

import splitfed
from benchmarks.http_step import serve_splitfed, server
from benchmarks.models import tiny
from splitfed.protocol.transport import Middleware
from splitfed.service.http.client import HttpTransport

DELAYS = (0.0, 0.005, 0.020)
"""Seconds that are added to each request."""
IN_FLIGHT = (1, 2, 3)
PART = 12
"""Batches that a loop takes at a turn; it drains at the end of each."""


class Delay(Middleware):
    """A transport whose requests take longer."""

    def __init__(self, inner: Any, seconds: float) -> None:
        super().__init__(inner)
        self.seconds = seconds

    def send(self, verb: str, request: Any, /) -> Any:
        """The answer, and the time that a network would have taken."""
        time.sleep(self.seconds)
        return super().send(verb, request)


def run(turns: int) -> dict[str, dict[str, float]]:
    """Milliseconds a batch, minimum and median over turns, and how many times as fast as one in flight it is.

    Args:
        turns: How many each loop takes.
    """
    found = {}
    with ExitStack() as stack:
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)  # of two, one would wait for the other wherever something else runs
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        url = stack.enter_context(server(serve_splitfed, folder))
        for delay in DELAYS:
            loops = {k: _loop(url, delay, k) for k in IN_FLIGHT}
            times: dict[int, list[float]] = {k: [] for k in IN_FLIGHT}
            for turn in range(turns + 1):
                for k, loop in loops.items():
                    begun = time.perf_counter()
                    loop()
                    if turn:
                        times[k].append(1e3 * (time.perf_counter() - begun) / PART)
            for k, taken in times.items():
                found[f"{1e3 * delay:g} ms a request, in_flight={k}"] = {
                    "min": min(taken),
                    "median": statistics.median(taken),
                    "ratio": statistics.median(one / own for one, own in zip(times[1], taken, strict=True)),
                }
    return found


def as_table(found: dict[str, dict[str, float]]) -> str:
    """The figures as a Markdown table."""
    lines = ["| pipeline | min, ms a batch | median, ms a batch | throughput |", "|---|---:|---:|---:|"]
    lines += [f"| {name} | {t['min']:.2f} | {t['median']:.2f} | {t['ratio']:.2f} × |" for name, t in found.items()]
    return "\n".join(lines)


def _loop(url: str, delay: float, in_flight: int) -> Any:
    half = splitfed.split(tiny(), "2")[0]
    client = splitfed.SplitClient(half, Delay(HttpTransport(url), delay), f"d{1e3 * delay:g}-k{in_flight}")
    optimizer = torch.optim.SGD(client.parameters(), lr=0.01, momentum=0.9)
    items = [(torch.randn(64, 784), torch.randint(0, 10, (64,))) for _ in range(PART)]

    def loop() -> None:
        done = list(client.pipeline(items, nn.functional.cross_entropy, optimizer, in_flight))
        if len(done) != PART:
            raise RuntimeError("a batch is missing")

    return loop
