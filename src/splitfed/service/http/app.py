"""The ASGI app: a `SplitServer` under versioned paths, with an operator's pages beside it.

It runs under any ASGI server; limits on time, raw headers and connections need `serve`, since an
app can't see a request before its headers are complete. `/healthz` says that the process lives,
`/readyz` that its store answers: the first decides about a restart, the second about requests.
Listing a large store takes long, so the status has a thread of its own: a load balancer that asks
`/readyz` doesn't wait for it.

Behind `--workers` a scrape reaches one of several processes, which answers for all of them
(`service.metrics`).
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import AsyncIterator, Iterator
from typing import Any

import torch
from prometheus_client.core import Metric
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
from splitfed.service.metrics import RequestMetrics, kept, newest_version
from splitfed.store.status import read_status

PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"
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
    versions = server.store.lineage(server.lineage)
    newest = kept(lambda: versions.head(), _CACHED_SECONDS)

    def measure() -> Iterator[Metric]:
        # A store that fails is the matter of /readyz: the other metrics are needed all the more.
        with contextlib.suppress(SplitFedError):
            yield newest_version(newest())

    metrics = RequestMetrics(server.uses.counts, measure)
    desk = Desk(server, limits, checked, pools.serving, metrics)
    desk.budget.watch(metrics.under_way)
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


def _reports(
    server: SplitServer, desk: Desk, pools: _Pools, metrics: RequestMetrics
) -> list[Report]:
    """The pages for an operator. Only the status needs a token: it names the clients."""
    store = server.store
    versions = store.lineage(server.lineage)
    secured = desk.tokens is not None
    openapi = json.dumps(document(desk.limits, secured=secured)).encode()
    status = kept(lambda: json.dumps(read_status(store).to_json()).encode(), _CACHED_SECONDS)

    def read_ready() -> bytes:
        found = {
            "status": "ready",
            "version": versions.checked_head(),
            "splitfed": __version__,
        }
        return json.dumps(found).encode()

    # Anybody may ask: the store is read once a second, however many do.
    ready = kept(read_ready, _CACHED_SECONDS)

    return [
        Report(desk, f"{PREFIX}/status", JSON, status, pools.listing, private=True),
        Report(desk, "/healthz", JSON, lambda: b'{"status": "alive"}'),
        Report(desk, "/readyz", JSON, ready, pools.watching),
        Report(desk, "/metrics", PROMETHEUS, metrics.counts.text, pools.watching),
        Report(desk, "/openapi.json", JSON, lambda: openapi),
    ]


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
