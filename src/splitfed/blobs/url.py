"""The URL of a store, and the storage backend that it names.

A backend is imported when a URL asks for it: a local store needs no fsspec, and one in memory no
filelock. `open_blobs` has a module of its own because every backend imports `contract`.
"""

from __future__ import annotations

import os
import re
from typing import Any
from urllib.parse import unquote

from splitfed.blobs.contract import Blobs
from splitfed.errors import InputError

_PROTOCOL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)


def open_blobs(url: str | os.PathLike[str], *, fsync: bool = True, **storage_options: Any) -> Blobs:
    """Open the storage backend at `url`; nothing is created or contacted until the first use.

    Args:
        url: A path or `file:///abs/path` (percent-encoded, as `Path.as_uri` writes it) is a local
            directory, `memory://name` is shared within the process, and any other protocol is
            fsspec's.
        fsync: If False, what a local directory holds survives the death of every process, but not a
            power loss.
        storage_options: Go to fsspec's filesystem.

    Raises:
        InputError: the URL can't be one, or has options where none apply.
        StoreError: the protocol's package isn't installed.
    """
    text = os.fspath(url)
    # A `Path` is a path, whatever characters it has.
    protocol, place = _split(text) if isinstance(url, str) else ("", text)
    if protocol in ("file", "local"):
        place = _local_path(place)
        if not os.path.isabs(place):
            raise InputError(
                f"{text!r} isn't absolute: expected {protocol}:///absolute/path, or a plain path"
            )
    if not text or "\0" in place:
        raise _not_a_store(text)
    if protocol not in ("", "file", "local", "memory"):
        from splitfed.blobs.remote import RemoteBlobs

        return RemoteBlobs(text, **storage_options)
    if storage_options:
        raise InputError(
            f"storage options {sorted(storage_options)} don't apply to {text!r}: leave them out"
        )
    if protocol == "memory":
        from splitfed.blobs.memory import MemoryBlobs

        return MemoryBlobs(place.strip("/"))
    from splitfed.blobs.local import LocalBlobs

    return LocalBlobs(place, fsync=fsync)


def _split(text: str) -> tuple[str, str]:
    """Return the protocol in lower case, "" for a plain path, and what follows it."""
    if "://" not in text:
        return "", text
    if "::" in text:
        raise InputError(
            "a chained URL (with '::') caches or wraps what the store must see: "
            "expected a plain one"
        )
    match = _PROTOCOL.fullmatch(text)
    if match is None:
        raise _not_a_store(text)
    return match[1].lower(), match[2]


def _local_path(place: str) -> str:
    path = unquote(place)
    if os.name == "nt":  # file:///C:/runs
        path = re.sub(r"^/(?=[A-Za-z]:)", "", path)
    return path


def _not_a_store(text: str) -> InputError:
    return InputError(
        f"store URL {text[:80]!r} isn't one: expected a directory or a URL such as s3://bucket/run"
    )
