"""The URL of a store, and the storage backend that it names.

A backend is imported when a URL asks for it: a local store needs no fsspec, and one in memory no
filelock. `open_blobs` has a module of its own because every backend imports `contract`.

The trap is a URL that is mistyped: as a path it would be a new folder, called `s3:`, in which a run
begins and nobody finds it. So what begins like a URL is one, or is refused.
"""

from __future__ import annotations

import os
import re
from typing import Any
from urllib.parse import unquote

from splitfed.blobs.contract import Blobs
from splitfed.errors import InputError

_PROTOCOL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
_BEGINNING = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):(?!//)/*(.*)", re.DOTALL)
_NO_COLON = re.compile(r"(s3|gs|gcs|abfs|az|memory|file)(?:/)/+(.*)", re.DOTALL | re.IGNORECASE)


def open_blobs(
    url: str | os.PathLike[str],
    *,
    fsync: bool = True,
    shared: bool = False,
    **storage_options: Any,
) -> Blobs:
    """Open the storage backend at `url`; nothing is created or contacted until the first use.

    Args:
        url: A path or `file:///abs/path` (percent-encoded, as `Path.as_uri` writes it) is a local
            directory, `memory://name` is shared within the process, and any other protocol is
            fsspec's.
        fsync: If False, what a local directory holds survives the death of every process, but not a
            power loss.
        shared: Whether a local directory is for the owner's group, as far as the umask lets it.
        storage_options: Go to fsspec's filesystem.

    Raises:
        InputError: the URL can't be one, or has options where none apply.
        StoreError: the protocol's package isn't installed.
    """
    if not isinstance(url, str | os.PathLike):
        raise InputError(
            f"a store's URL is a {type(url).__name__}: expected a directory or a URL such as "
            "s3://bucket/run, as text or a Path"
        )
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
    if shared and protocol not in ("", "file", "local"):
        raise InputError(
            f"shared=True is about the modes of local files, and {text!r} has none: leave it out"
        )
    if protocol in ("http", "https"):
        raise InputError(
            f"{text!r} is a service's URL: expected a store's, such as s3://bucket/run; "
            "a service is given to a SplitClient, or to splitfed doctor --server"
        )
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

    return LocalBlobs(place, fsync=fsync, shared=shared)


def _split(text: str) -> tuple[str, str]:
    """Return the protocol in lower case, "" for a plain path, and what follows it."""
    if "://" not in text:
        _check_path(text)
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


def _check_path(text: str) -> None:
    """Refuse a path that begins like a URL.

    Raises:
        InputError: it does; a drive of Windows isn't meant, on Windows.
    """
    found = _BEGINNING.fullmatch(text) or _NO_COLON.fullmatch(text)
    if found is None or (os.name == "nt" and len(found[1]) == 1):
        return
    protocol = found[1].lower()
    root = "/" if protocol in ("file", "local") else ""
    meant = f"{protocol}://{root}{found[2][:80]}"
    if len(protocol) == 1:
        meant = "a path of this system, which has no drives"
    raise InputError(
        f"store URL {text[:80]!r} isn't one, and looks like one: expected {meant}, "
        f"or {os.path.join('.', text[:80])!r} for a folder of that name"
    )


def _local_path(place: str) -> str:
    path = unquote(place)
    if os.name == "nt":  # file:///C:/runs
        path = re.sub(r"^/(?=[A-Za-z]:)", "", path)
    return path


def _not_a_store(text: str) -> InputError:
    return InputError(
        f"store URL {text[:80]!r} isn't one: expected a directory or a URL such as s3://bucket/run"
    )
