"""The OpenAPI document of the service, for gateways, generated clients and fuzzers.

Bodies are safetensors bytes, which OpenAPI can only call binary: what is in them is `messages`. What the document can
say, and says whole, is which paths, methods, headers and statuses there are.
"""

from __future__ import annotations

from typing import Any

from splitfed import errors
from splitfed._version import __version__
from splitfed.errors import SplitFedError
from splitfed.protocol.transport import VERBS
from splitfed.service.http.contract import BINARY, PREFIX
from splitfed.service.http.limits import Limits

_SAID = {
    "forward": "Run one call of the body; with the client's grad mode on, record it. With it off: evaluation.",
    "backward": "Answer the gradients of a recorded call's inputs, and store its parameter gradient.",
    "loss": "Forward, loss and backward in one trip.",
    "push": "Publish a client half's update.",
    "pull": "Fetch a client half.",
}
_REFUSALS = {
    408: "The request didn't arrive in time.",
    413: "A body, tensor or batch over the limit.",
    415: "Another content type or encoding.",
    429: "Too many bytes under way: try again after Retry-After seconds.",
    431: "Headers over the limit.",
    500: "The server failed.",
    503: "Too many requests under way, or the store failed: try again after Retry-After seconds.",
}


def document(limits: Limits, *, secured: bool) -> dict[str, Any]:
    """The document.

    Args:
        limits: What the server takes; told to whoever reads it.
        secured: Whether requests need a token.
    """
    paths: dict[str, Any] = {f"{PREFIX}/{name}": {"post": _method(name, limits)} for name in VERBS}
    paths[f"{PREFIX}/status"] = {"get": _report("The run, as `splitfed status --json` shows it.", private=True)}
    paths["/healthz"] = {"get": _report("Whether the process lives.")}
    paths["/readyz"] = {"get": _report("Whether its store answers.")}
    paths["/metrics"] = {"get": _report("Counts, for Prometheus.", "text/plain")}
    paths["/openapi.json"] = {"get": _report("This document.")}
    found: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {
            "title": "splitfed",
            "version": __version__,
            "description": "A stateless split server. Every request may be sent again: it is answered as the first.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": paths,
        "components": {"schemas": {"Error": _ERROR}},
    }
    if secured:
        found["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        for path, operations in paths.items():
            if path.startswith(PREFIX):
                for operation in operations.values():
                    operation["security"] = [{"token": []}]
    return found


_ERROR = {
    "type": "object",
    "required": ["error", "message", "status"],
    "properties": {
        "error": {"type": "string", "description": "A class of splitfed.errors."},
        "message": {"type": "string"},
        "status": {"type": "integer"},
    },
}


def _method(name: str, limits: Limits) -> dict[str, Any]:
    request, answer = VERBS[name]
    return {
        "operationId": name,
        "summary": _SAID[name],
        "requestBody": {
            "required": True,
            "description": f"A packed {request.__name__}, of at most {limits.body} bytes.",
            "content": {BINARY: {"schema": {"type": "string", "format": "binary"}}},
        },
        "responses": {
            "200": {
                "description": f"A packed {answer.__name__}.",
                "content": {BINARY: {"schema": {"type": "string", "format": "binary"}}},
            },
            **_errors(_statuses()),
        },
    }


def _report(said: str, kind: str = "application/json", *, private: bool = False) -> dict[str, Any]:
    schema = {"type": "string"} if kind == "text/plain" else {"type": "object"}
    told = {"401", "431", "404"} if private else set()
    statuses = {status: text for status, text in _statuses().items() if status in told | {"500", "503"}}
    return {
        "summary": said,
        "responses": {"200": {"description": said, "content": {kind: {"schema": schema}}}, **_errors(statuses)},
    }


def _statuses() -> dict[str, str]:
    """What each status means: the errors that have it, or what the service itself refuses."""
    found: dict[str, str] = {}
    tree = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, SplitFedError)]
    for kind in tree:
        text = found.get(str(kind.status), "")
        found[str(kind.status)] = f"{text}, {kind.__name__}" if text else kind.__name__
    found |= {str(status): said for status, said in _REFUSALS.items()}
    return dict(sorted(found.items()))


def _errors(statuses: dict[str, str]) -> dict[str, Any]:
    schema = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    found: dict[str, Any] = {status: {"description": said, "content": schema} for status, said in statuses.items()}
    for status in ("429", "503"):
        if status in found:
            found[status]["headers"] = {"Retry-After": {"schema": {"type": "integer"}, "description": "Seconds."}}
    return found
