"""A few atomic operations on bytes under keys: what the store is built on, for any place that can hold a file.

Leaf first: `contract` (the `Blobs` protocol, the shape of a key, the race that tests a backend), `memory`; `files`
(single files: read, write, make durable), `publishing` (how a written file gets its name, atomically), `local`;
`redaction`, `remote` (any other filesystem of fsspec, imported when a URL asks for it).
"""

from __future__ import annotations

import os
import re
from typing import Any
from urllib.parse import unquote

from splitfed.blobs.contract import Blobs, Buffer, check_key
from splitfed.errors import InputError

__all__ = ["Blobs", "Buffer", "check_key", "open_blobs"]

_PROTOCOL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)


def open_blobs(url: str | os.PathLike[str], *, fsync: bool = True, **storage_options: Any) -> Blobs:
    """Open the blobs at `url`; nothing is created or contacted until the first use.

    A path or `file:///abs/path` (percent-encoded, as `Path.as_uri` writes it) is a local directory, `memory://name` is
    shared within the process, and any other protocol is fsspec's, which gets the `storage_options`. With `fsync=False`
    what a local directory holds survives the death of every process, but not a power loss.

    Raises:
        InputError: the URL can't be one, or has options where none apply.
        StoreError: the protocol's package isn't installed.
    """
    text = os.fspath(url)
    match = _PROTOCOL.fullmatch(text) if isinstance(url, str) else None
    protocol, rest = (match[1].lower(), match[2]) if match else ("", text)
    odd = isinstance(url, str) and "://" in text and match is None
    if "::" in text and (match or odd):
        raise InputError("a chained URL (with '::') caches or wraps what the store must see: expected a plain one")
    if protocol in ("file", "local"):
        rest = unquote(rest) if os.name != "nt" else re.sub(r"^/(?=[A-Za-z]:)", "", unquote(rest))
        if not os.path.isabs(rest):
            raise InputError(f"{text!r} isn't absolute: expected {protocol}:///absolute/path, or a plain path")
    if odd or not text or "\0" in rest:
        raise InputError(f"store URL {text[:80]!r} isn't one: expected a directory or a URL such as s3://bucket/run")
    if protocol not in ("", "file", "local", "memory"):
        from splitfed.blobs.remote import RemoteBlobs

        return RemoteBlobs(text, **storage_options)
    if storage_options:
        raise InputError(f"storage options {sorted(storage_options)} don't apply to {text!r}: leave them out")
    if protocol == "memory":
        from splitfed.blobs.memory import MemoryBlobs

        return MemoryBlobs(rest.strip("/"))
    from splitfed.blobs.local import LocalBlobs

    return LocalBlobs(rest, fsync=fsync)
