"""The ASGI app: a `SplitServer` under versioned paths, with an operator's pages beside it.

It runs under any ASGI server; limits on time, raw headers and connections need `serve`, since an
app can't see a request before its headers are complete. `/healthz` says that the process lives,
`/readyz` that its store answers: the first decides about a restart, the second about requests.
Listing a large store takes long, so the status has a thread of its own: a load balancer that asks
`/readyz` doesn't wait for it.

The metrics are our own few lines instead of a client library: counters, gauges and one histogram
are all there is. No id, payload or secret is in them, and labels come from fixed sets, so their
number is bounded whatever is requested. Each process counts for itself: behind `--workers` a scrape
reaches one of them, so replicas of one worker each are scraped one by one.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import threading
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, Generic, TypeVar

import torch
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from splitfed._version import __version__
from splitfed.errors import InputError, MissingError, SplitFedError
from splitfed.protocol.transport import VERBS
from splitfed.server.server import SplitServer
from splitfed.service.http.auth import Tokens
from splitfed.service.http.contract import JSON, PREFIX, document, encode_error
from splitfed.service.http.endpoints import Desk, Method, Report
from splitfed.service.http.limits import Limits
from splitfed.service.http.threads import Threads
from splitfed.store.status import read_status

T = TypeVar("T")
PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""Upper bounds of the histogram of request times."""
_CACHED_SECONDS = 1.0


def make_app(
    server: SplitServer,
    *,
    limits: Limits | None = None,
    tokens: str | os.PathLike[str] | None = None,
) -> Starlette:
    """Return the service as an ASGI app.

    Args:
        server: Serves the requests.
        limits: What it accepts; by default the defaults of `Limits`.
        tokens: The token file. Without one, everybody who can reach the app may use any client id.

    Raises:
        InputError: the token file can't be read.
    """
    limits = Limits() if limits is None else limits
    checked = None if tokens is None else Tokens(tokens)
    limits.govern(server)
    pools = _Pools(limits)
    metrics = Metrics()
    desk = Desk(server, limits, checked, pools.serving, metrics)
    routes: list[BaseRoute] = [
        Route(f"{PREFIX}/{verb}", Method(desk, verb), methods=["POST"]) for verb in VERBS
    ]
    for report in _reports(server, desk, pools, metrics):
        routes.append(Route(report.path, report, methods=["GET"]))

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        pools.close()
        server.hand_over()

    app = Starlette(
        routes=routes, lifespan=lifespan, exception_handlers={HTTPException: _unknown_route}
    )
    app.router.redirect_slashes = False
    return app


class _Pools:
    """The threads of an app: those that serve requests, and others for the operator's pages."""

    def __init__(self, limits: Limits) -> None:
        # OpenMP has a count for each thread. A thread in which it isn't set computes with as many
        # as there are cores, which is another numerics class, and slow.
        set_count = functools.partial(torch.set_num_threads, torch.get_num_threads())
        self.serving = Threads(limits.requests, "splitfed", set_count)
        self.watching = Threads(2, "splitfed-watch")
        self.listing = Threads(1, "splitfed-list")

    def close(self) -> None:
        """End the threads. What still computes has had its time, and is repeated elsewhere."""
        for threads in (self.listing, self.watching, self.serving):
            threads.close()


def _reports(server: SplitServer, desk: Desk, pools: _Pools, metrics: Metrics) -> list[Report]:
    """The pages for an operator. Only the status needs a token: it names the clients."""
    store = server.store
    versions = store.lineage(server.lineage)
    secured = desk.tokens is not None
    openapi = json.dumps(document(desk.limits, secured=secured)).encode()
    status = _Cached(lambda: json.dumps(read_status(store).to_json()).encode(), _CACHED_SECONDS)
    newest = _Cached(lambda: versions.head(), _CACHED_SECONDS)

    def read_ready() -> bytes:
        found = {
            "status": "ready",
            "version": versions.checked_head(),
            "splitfed": __version__,
        }
        return json.dumps(found).encode()

    # Anybody may ask: the store is read once a second, however many do.
    ready = _Cached(read_ready, _CACHED_SECONDS)

    def measure() -> bytes:
        requests = desk.budget.requests
        gauges: dict[str, tuple[str, float]] = {
            "requests_in_flight": ("Requests that are being received or answered.", requests),
            "bytes_in_flight": ("Bytes of their bodies.", desk.budget.num_bytes),
        }
        # A store that fails is the matter of /readyz: the other metrics are needed all the more.
        with contextlib.suppress(SplitFedError):
            about = "The newest version of the lineage that is served."
            gauges["version"] = (about, newest())
        return metrics.text(gauges, server.uses.counts())

    return [
        Report(desk, f"{PREFIX}/status", JSON, status, pools.listing, private=True),
        Report(desk, "/healthz", JSON, lambda: b'{"status": "alive"}'),
        Report(desk, "/readyz", JSON, ready, pools.watching),
        Report(desk, "/metrics", PROMETHEUS, measure, pools.watching),
        Report(desk, "/openapi.json", JSON, lambda: openapi),
    ]


class _Cached(Generic[T]):
    """The result of a function, kept for some seconds: frequent requests read the store once.

    So is its error, if it is one of ours. One thread reads at a time; others wait for what it
    finds.
    """

    def __init__(self, read: Callable[[], T], seconds: float) -> None:
        self._read = read
        self._seconds = seconds
        self._found: tuple[float, T | SplitFedError] | None = None
        self._lock = threading.Lock()

    def __call__(self) -> T:
        with self._lock:
            if self._found is None or time.monotonic() - self._found[0] > self._seconds:
                found: T | SplitFedError
                try:
                    found = self._read()
                except SplitFedError as error:
                    found = error
                # The time after the reading, which may take longer than its result is kept.
                self._found = (time.monotonic(), found)
            result = self._found[1]
        if isinstance(result, SplitFedError):
            raise result.with_traceback(None)  # else it would grow with each that asks
        return result


async def _unknown_route(request: Request, error: Exception) -> Response:
    """Answer a path or method that isn't served with an error of ours."""
    status = getattr(error, "status_code", 404)
    refusal: SplitFedError
    if status == 405:
        refusal = InputError(f"{request.method} isn't allowed here: see /openapi.json")
    else:
        refusal = MissingError(
            f"nothing is served at this path: expected one of {PREFIX}/..., see /openapi.json"
        )
    headers: Any = getattr(error, "headers", None)
    return Response(encode_error(refusal), status, headers, media_type=JSON)


# ------------------------------------------------------------------------------------------ metrics


class Metrics:
    """Counts of what a process has served.

    The event loop alone counts, so there is no lock; `text` may run in another thread meanwhile.
    """

    def __init__(self) -> None:
        self._requests: Counter[tuple[str, int]] = Counter()
        self._errors: Counter[str] = Counter()
        self._buckets: dict[str, list[int]] = {}
        self._seconds: dict[str, float] = {}
        self._received = 0
        self._sent = 0

    def count(self, path: str, status: int, seconds: float, received: int, sent: int) -> None:
        """Count a request that was answered.

        Args:
            path: Its route, never what a client wrote.
            status: Status of the answer.
            seconds: From its headers to the last byte of the answer.
            received: Bytes of its body.
            sent: Bytes of the answer's body.
        """
        self._requests[path, status] += 1
        # The sum before the buckets: `text`, in another thread, reads the sum of each path that has
        # buckets.
        self._seconds[path] = self._seconds.get(path, 0.0) + seconds
        buckets = self._buckets.setdefault(path, [0] * (len(SECONDS) + 1))
        buckets[bisect_left(SECONDS, seconds)] += 1
        self._received += received
        self._sent += sent

    def error(self, name: str) -> None:
        """Count an error that a request was answered with, by its class."""
        self._errors[name] += 1

    def text(
        self, gauges: Mapping[str, tuple[str, float]], uses: Mapping[str, int] | None = None
    ) -> bytes:
        """Return all of it in Prometheus's text format.

        Args:
            gauges: What is measured at this moment: help and value by name.
            uses: How often the graph of a call was at hand, by `server.graphs.Uses`.
        """
        lines = _head("requests_total", "counter", "Requests answered, by route and status.")
        for (path, status), count in sorted(self._requests.items()):
            lines.append(f'splitfed_requests_total{{path="{path}",status="{status}"}} {count}')
        lines += _head("errors_total", "counter", "Requests answered with an error, by its class.")
        for name, count in sorted(self._errors.items()):
            lines.append(f'splitfed_errors_total{{error="{name}"}} {count}')
        if uses is not None:
            about = "Graphs that were kept, or computed again: recomputed for a backward, "
            about += "continued for the buffers that the next call goes on from."
            lines += _head("graphs_total", "counter", about)
            lines += [f'splitfed_graphs_total{{use="{use}"}} {n}' for use, n in uses.items()]
        lines += self._histogram()
        lines += _head("received_bytes_total", "counter", "Bytes of requests' bodies.")
        lines.append(f"splitfed_received_bytes_total {self._received}")
        lines += _head("sent_bytes_total", "counter", "Bytes of answers' bodies.")
        lines.append(f"splitfed_sent_bytes_total {self._sent}")
        for name, (help_text, value) in gauges.items():
            lines += _head(name, "gauge", help_text)
            lines.append(f"splitfed_{name} {value:g}")
        return ("\n".join(lines) + "\n").encode()

    def _histogram(self) -> list[str]:
        name = "request_seconds"
        help_text = "Time from a request's headers to the end of its answer."
        lines = _head(name, "histogram", help_text)
        for path, buckets in sorted(self._buckets.items()):
            total = 0
            for bound, count in zip([*map(str, SECONDS), "+Inf"], buckets, strict=True):
                total += count  # Prometheus's buckets are cumulative
                lines.append(f'splitfed_{name}_bucket{{path="{path}",le="{bound}"}} {total}')
            lines.append(f'splitfed_{name}_sum{{path="{path}"}} {self._seconds[path]:.6f}')
            lines.append(f'splitfed_{name}_count{{path="{path}"}} {total}')
        return lines


def _head(name: str, kind: str, help_text: str) -> list[str]:
    return [f"# HELP splitfed_{name} {help_text}", f"# TYPE splitfed_{name} {kind}"]
