"""The service over HTTP: a `SplitServer` behind Starlette and uvicorn, and the transport that asks it.

Nothing here changes what is computed. A request's body is the packed message itself, the answer's likewise, so what
crosses the wire is what lies on disk. Each replica is as stateless as the server it wraps: any load balancer may send
any request to any replica, and every request may be sent again.

    contract.py   what both sides agree on: paths, content type, errors as JSON
    exchange.py   one request and its answer on a connection
    client.py     the transport: connections, retries
    limits.py     how much a request may be, and how much may be under way
    auth.py       tokens, hashed at rest
    metrics.py    Prometheus text
    openapi.py    the OpenAPI document
    threads.py    where requests are worked on
    arrival.py    a body as it arrives
    endpoints.py  one request: admit, receive, serve, answer
    app.py        the ASGI app
    protocol.py   what uvicorn lacks: limits on time, headers and connections
    serving.py    running it: sockets, workers, drain

The client's side is `contract.py`, `exchange.py`, `patience.py` and `client.py`, which import nothing of the rest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

__all__ = ["make_app"]

if TYPE_CHECKING:
    from splitfed.service.http.app import make_app
else:
    from splitfed._lazy import lazily

    __getattr__, __dir__ = lazily(
        __name__,
        {
            "make_app": "service.http.app",
        },
    )
