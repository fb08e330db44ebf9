"""The transport of a server that is given as an object or as a URL: one door for both.

A transport's module is loaded when its scheme is asked for. The import is by name on purpose: a
device that talks HTTP needs neither fsspec nor anything else of the server's side, and one that
gets a server object needs not even urllib3.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from typing import Any

from splitfed.checks import install
from splitfed.errors import InputError
from splitfed.protocol.transport import Transport

_EXTRAS = {"urllib3": "http", "s3fs": "s3", "gcsfs": "gcs", "adlfs": "azure"}


def open_transport(
    url: str, *, client_id: str, token: str | None = None, **options: Any
) -> Transport:
    """The transport of a URL: to a service (`http`, `https`), or to a store that workers share.

    Any other scheme is a store's.

    Nothing is sent: a URL that leads nowhere raises at the first request.

    Args:
        url: Such as `https://host:8000` or `s3://bucket/run`.
        client_id: Whose requests will go there.
        token: What the service asks for.
        options: Of the transport: for HTTP those of `splitfed.service.http.client.HttpTransport`,
            for a store those of `splitfed.service.mailbox.client`.

    Raises:
        InputError: it isn't a URL, what it needs isn't installed, or an option isn't one of the
            transport.
    """
    scheme, colon, _ = url.partition("://")
    if not colon or not scheme:
        raise InputError(
            f"server is {url!r}: expected a SplitServer, or a URL such as 'https://host:8000'"
        )
    module = "splitfed.service.mailbox.client"
    if scheme.lower() in ("http", "https"):
        module = "splitfed.service.http.client"
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        extra = _EXTRAS.get(error.name or "")
        if extra is None:
            raise
        raise InputError(f"{url} needs {error.name}: {install(extra)}") from error
    try:
        transport: Transport = found.connect(url, client_id=client_id, token=token, **options)
    except TypeError as error:
        raise InputError(f"an option of {url} isn't known: {error}") from error
    return transport


def as_transport(
    server: Any, client_id: str, token: str | None, options: Mapping[str, Any]
) -> Transport:
    """What a user gave as `server`: a transport as it is, or a URL opened.

    Raises:
        InputError: it is neither, or options came with something that isn't a URL.
    """
    if isinstance(server, str | os.PathLike):
        return open_transport(os.fspath(server), client_id=client_id, token=token, **options)
    if not all(callable(getattr(server, name, None)) for name in ("forward", "backward")):
        raise InputError(
            f"server is {server!r}: expected a SplitServer, "
            "an object with the methods of splitfed.Transport, or a URL"
        )
    given = [*options, *(["token"] if token is not None else [])]
    if given:
        raise InputError(
            f"{', '.join(given)}: only a server given as a URL takes options; remove them"
        )
    found: Transport = server
    return found
