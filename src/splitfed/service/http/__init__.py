"""The service over HTTP: a `SplitServer` behind Starlette and uvicorn, and the transport to it.

Nothing here changes what is computed. The body of a request is the packed message itself, and so is
that of its answer: what crosses the wire is what is on disk. Each replica is as stateless as the
server in it, so any load balancer may send any request to any replica, and every request may be
sent again.

    limits.py      what is under way, of all clients and of each
    contract.py    paths, content types, statuses, errors as JSON; the OpenAPI document
    connection.py  one request and its answer on a connection; which failures are transient
    client.py      the transport: connections, retries
    auth.py        tokens, hashed at rest
    threads.py     threads that compute while the event loop goes on
    endpoints.py   one request: admit, receive, serve, answer
    app.py         the ASGI app, the operator's pages
    guard.py       limits that uvicorn lacks: on time, headers and connections
    serve.py       running it: sockets, workers, drain

The client's end is the first four, which import nothing of the rest.
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
