"""What the two sides of the HTTP service agree on, beyond the messages: paths, types, statuses, and errors as JSON.

An answer's body is bytes of ours, an error's is JSON that any client or proxy log can show. What has neither form comes
from something else: a proxy, a login page, the wrong port.
"""

from __future__ import annotations

import json

from splitfed.errors import SplitFedError
from splitfed.protocol import packing

PREFIX = "/v1"
"""A method of `Transport` is served at `/v1/` and its name."""
BINARY = "application/octet-stream"
RETRIED = frozenset({429, 502, 503, 504})
"""Statuses after which the same request may succeed: too much under way, a replica gone, a store that failed."""


def encode_error(error: BaseException) -> bytes:
    """The JSON body that says which error it is."""
    return json.dumps(packing.error_fields(error)).encode()


def decode_error(data: bytes) -> SplitFedError | None:
    """The error in a body of `encode_error`, or `None` if it is no such body."""
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError):
        return None
    if not (isinstance(fields, dict) and {"error", "message"} <= set(fields)):
        return None
    return packing.error_from(fields)
