"""The contract of the HTTP service beyond the messages: paths, content types, statuses, errors.

The body of an answer is the packed message; the body of an error is JSON, which any client or proxy
log can show. A body that is neither comes from something else: a proxy, a login page, a wrong port.

`document` writes the contract down as OpenAPI, for gateways, generated clients and fuzzers. To it
the bodies of messages are bytes: a schema of each names its fields, and `docs/wire.md` says how
they are packed.

Client and server import this module, so it imports nothing that only one of them has.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from splitfed import errors
from splitfed._version import __version__
from splitfed.errors import SplitFedError
from splitfed.protocol import packing
from splitfed.protocol.fields import added_fields
from splitfed.protocol.transport import VERBS
from splitfed.service.http.limits import Limits

PREFIX = "/v1"
"""A verb of `Transport` is served at `/v1/` and its name."""
BINARY = "application/octet-stream"
JSON = "application/json"
AFFINITY = "splitfed-affinity"
"""The header with the key of `affinity`, in requests and in answers of balancers."""
WIRE = "docs/wire.md"
"""The page on the bytes of messages."""
RETRIED = frozenset({429, 502, 503, 504})
"""Statuses after which the same request may succeed: the server is busy, a replica is gone, the
store failed."""


def encode_error(error: BaseException) -> bytes:
    """Return the JSON body of an error."""
    return json.dumps(packing.error_fields(error)).encode()


def decode_error(data: bytes) -> SplitFedError | None:
    """Return the error in a body of `encode_error`, or `None` if the body is no such one."""
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError):
        return None
    if not (isinstance(fields, dict) and {"error", "message"} <= set(fields)):
        return None
    return packing.error_from(fields)


# ------------------------------------------------------------------------------------------ OpenAPI


_SUMMARIES = {
    "forward": "Run one call of the body; with the client's grad mode on, record it. "
    "With it off: evaluation.",
    "backward": "Answer the gradients of a recorded call's inputs, "
    "and store its parameter gradient.",
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
_AFFINITY_PARAMETER = {
    "name": AFFINITY,
    "in": "header",
    "required": False,
    "description": "For a load balancer: requests with one key are best served by one replica. "
    "A replica doesn't read it.",
    "schema": {"type": "string"},
}
_ERROR_SCHEMA = {
    "type": "object",
    "required": ["error", "message", "status"],
    "properties": {
        "error": {"type": "string", "description": "A class of splitfed.errors."},
        "message": {"type": "string"},
        "status": {"type": "integer"},
    },
}


def document(limits: Limits, *, secured: bool) -> dict[str, Any]:
    """Return the OpenAPI document of a service.

    Args:
        limits: Limits of the server; the document states them.
        secured: Whether requests need a token.
    """
    paths: dict[str, Any] = {}
    for verb in VERBS:
        paths[f"{PREFIX}/{verb}"] = {"post": _operation(verb, limits)}
    paths[f"{PREFIX}/status"] = {
        "get": _report("The run, as `splitfed status --json` shows it.", private=True)
    }
    paths["/healthz"] = {"get": _report("Whether the process lives.")}
    paths["/readyz"] = {"get": _report("Whether its store answers.")}
    paths["/metrics"] = {"get": _report("Counts, for Prometheus.", "text/plain")}
    paths["/openapi.json"] = {"get": _report("This document.")}
    found: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {
            "title": "splitfed",
            "version": __version__,
            "description": "A stateless split server. "
            "Every request may be sent again: it is answered as the first.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": paths,
        "components": {"schemas": {"Error": _ERROR_SCHEMA, **_message_schemas()}},
    }
    if secured:
        found["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        for path, operations in paths.items():
            if path.startswith(PREFIX):
                for operation in operations.values():
                    operation["security"] = [{"token": []}]
    return found


def _operation(verb: str, limits: Limits) -> dict[str, Any]:
    request, answer = VERBS[verb]
    return {
        "operationId": verb,
        "summary": _SUMMARIES[verb],
        "parameters": [_AFFINITY_PARAMETER] if verb in ("forward", "backward", "loss") else [],
        "requestBody": {
            "required": True,
            "description": f"A packed {request.__name__}, of at most {limits.body} bytes.",
            "content": {BINARY: {"schema": _reference(request)}},
        },
        "responses": {
            "200": {
                "description": f"A packed {answer.__name__}.",
                "content": {BINARY: {"schema": _reference(answer)}},
            },
            **_error_responses(_status_meanings()),
        },
    }


def _reference(message: type) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{message.__name__}"}


def _message_schemas() -> dict[str, Any]:
    """A schema for each message: bytes, with the names of the fields that are packed in them."""
    found: dict[str, Any] = {}
    for message in (cls for pair in VERBS.values() for cls in pair):
        optional = added_fields(message)
        found[message.__name__] = {
            "type": "string",
            "format": "binary",
            "description": f"A packed {message.__name__}: safetensors bytes. How they are made, "
            f"and what each field means, is said by {WIRE} of splitfed's documentation, "
            f"under {message.__name__}.",
            "x-splitfed-fields": {
                field.name: "optional" if field.name in optional else "required"
                for field in dataclasses.fields(message)
            },
        }
    return found


def _report(summary: str, kind: str = JSON, *, private: bool = False) -> dict[str, Any]:
    possible = {"500", "503"}
    if private:
        possible |= {"401", "404", "431"}
    meanings = {status: text for status, text in _status_meanings().items() if status in possible}
    schema = {"type": "string" if kind == "text/plain" else "object"}
    return {
        "summary": summary,
        "responses": {
            "200": {"description": summary, "content": {kind: {"schema": schema}}},
            **_error_responses(meanings),
        },
    }


def _status_meanings() -> dict[str, str]:
    """What each status means: the errors that have it, or what the service itself refuses."""
    meanings: dict[str, str] = {}
    classes = [found for found in vars(errors).values() if isinstance(found, type)]
    for kind in classes:
        if issubclass(kind, SplitFedError):
            text = meanings.get(str(kind.status))
            name = kind.__name__
            meanings[str(kind.status)] = name if text is None else f"{text}, {name}"
    meanings |= {str(status): text for status, text in _REFUSALS.items()}
    return dict(sorted(meanings.items()))


def _error_responses(meanings: dict[str, str]) -> dict[str, Any]:
    content = {JSON: {"schema": {"$ref": "#/components/schemas/Error"}}}
    responses: dict[str, Any] = {
        status: {"description": text, "content": content} for status, text in meanings.items()
    }
    for status in ("429", "503"):
        if status in responses:
            responses[status]["headers"] = {
                "Retry-After": {"schema": {"type": "integer"}, "description": "Seconds."}
            }
    return responses
