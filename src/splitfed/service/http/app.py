"""The ASGI app: a `SplitServer` under versioned paths, with what an operator looks at beside it.

It runs under any ASGI server; limits on time, raw headers and connections need `serving`, since an app can't see a
request before its headers are complete. `/healthz` says that the process lives, `/readyz` that its store answers: the
first is for restarting it, the second for sending it requests. Listing a large store takes long, so the status has a
thread of its own: a load balancer that asks `/readyz` doesn't wait for it.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

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
from splitfed.service.http import metrics
from splitfed.service.http.auth import Tokens
from splitfed.service.http.contract import PREFIX, encode_error
from splitfed.service.http.endpoints import Desk, Method, Report
from splitfed.service.http.limits import Limits
from splitfed.service.http.openapi import document
from splitfed.service.http.threads import Threads
from splitfed.store.status import read_status

_JSON = b"application/json"
_STATUS_SECONDS = 1.0


def make_app(
    server: SplitServer, *, limits: Limits | None = None, tokens: str | os.PathLike[str] | None = None
) -> Starlette:
    """The service as an ASGI app.

    Args:
        server: What it serves.
        limits: How much it takes; the defaults of `Limits` if not given.
        tokens: The token file; without one everybody who can reach the app may use any client id.

    Raises:
        InputError: the token file can't be read.
    """
    limits = Limits() if limits is None else limits
    # OpenMP counts for each thread by itself: one that wasn't told would compute with as many as there are cores, which
    # is another numerics class, and slow.
    count = torch.get_num_threads()
    threads = Threads(limits.requests, "splitfed", functools.partial(torch.set_num_threads, count))
    watchers, lister = Threads(2, "splitfed-watch"), Threads(1, "splitfed-list")
    desk = Desk(server, limits, None if tokens is None else Tokens(tokens), threads)
    store, versions = server.store, server.store.lineage(server.lineage)

    def ready() -> tuple[int, bytes]:
        found = {"status": "ready", "version": versions.checked_head(), "splitfed": __version__}
        return 200, json.dumps(found).encode()

    def measure() -> tuple[int, bytes]:
        gauges = {
            "requests_in_flight": ("Requests that are being received or answered.", desk.budget.requests),
            "bytes_in_flight": ("Bytes of their bodies.", desk.budget.num_bytes),
        }
        with contextlib.suppress(SplitFedError):  # a store that fails is what /readyz is for
            gauges["version"] = ("The newest version of the lineage that is served.", versions.head())
        return 200, desk.metrics.text(gauges)

    spec = json.dumps(document(limits, secured=tokens is not None)).encode()
    status = _Cached(lambda: json.dumps(read_status(store).to_json()).encode(), _STATUS_SECONDS)
    methods = {f"{PREFIX}/{name}": Method(desk, name) for name in VERBS}
    routes: list[BaseRoute] = [Route(path, method, methods=["POST"]) for path, method in methods.items()]
    reports = [
        Report(desk, f"{PREFIX}/status", _JSON, lambda: (200, status()), lister, private=True),
        Report(desk, "/healthz", _JSON, lambda: (200, b'{"status": "alive"}')),
        Report(desk, "/readyz", _JSON, ready, watchers),
        Report(desk, "/metrics", metrics.CONTENT_TYPE, measure, watchers),
        Report(desk, "/openapi.json", _JSON, lambda: (200, spec)),
    ]
    routes += [Route(report.path, report, methods=["GET"]) for report in reports]

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        for pool in (lister, watchers, threads):  # what still computes was given its time, and is repeated elsewhere
            pool.close()

    app = _Service(routes=routes, lifespan=lifespan, exception_handlers={HTTPException: _no_route})
    app.methods = methods
    app.router.redirect_slashes = False
    return app


class _Service(Starlette):
    """Starlette, asked only for what isn't a request of the protocol: its layers take as long as the rest of the app.

    Whoever puts a middleware or a path in front has it in front of everything.
    """

    methods: Mapping[str, Method] = {}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        method = self.methods.get(scope.get("path", ""))
        if method is None or scope.get("method") != "POST" or scope.get("root_path") or self.user_middleware:
            await super().__call__(scope, receive, send)
        else:
            await method(scope, receive, send)


class _Cached:
    """What a function returned last, for some seconds: asking for the status often doesn't list the store often.

    It is called in one thread, so it needs no lock; those who ask meanwhile wait for that thread.
    """

    def __init__(self, read: Callable[[], bytes], seconds: float) -> None:
        self._read = read
        self._seconds = seconds
        self._found: tuple[float, bytes] | None = None

    def __call__(self) -> bytes:
        if self._found is None or time.monotonic() - self._found[0] > self._seconds:
            data = self._read()
            self._found = time.monotonic(), data  # not before: a listing may take longer than what it says is kept
        return self._found[1]


async def _no_route(request: Request, error: Exception) -> Response:
    """A path or method that isn't served, as an error of ours."""
    status = getattr(error, "status_code", 404)
    said: SplitFedError
    if status == 405:
        said = InputError(f"{request.method} isn't allowed here: see /openapi.json")
    else:
        said = MissingError(f"nothing is served at this path: expected one of {PREFIX}/..., see /openapi.json")
    headers: Any = getattr(error, "headers", None)
    return Response(encode_error(said), status, headers, media_type="application/json")
