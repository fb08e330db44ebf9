"""The storage backend of fsspec's filesystems: S3, GCS, Azure and others with conditional writes.

The race is left to the storage: `pipe_file(mode="create")` becomes a conditional request there.
What fsspec adds to it isn't uniform, and each difference is a way to lose or double a gradient:

- Some filesystems ignore the mode, and fsspec's own default asks first and then writes: `probe`
  refuses them.
- "It exists" is a FileExistsError here and an OSError over HTTP status 412 there. 409 means
  "exists" on Azure and "two of you at once, try again" on S3: so then we look, and try again if
  nothing is there.
- "It exists" can mean "I won": when the reply is lost, the retry inside the client library meets
  its own object. Only the caller can tell, by a nonce in the object that it reads back.
- S3 truncates instead of refusing when an empty body meets an existing key: empty objects are
  refused beforehand.
- `find` and `walk` of fsspec's default swallow errors, and half a listing looks like a whole one:
  we walk ourselves.
- s3fs reads in concurrent ranges after a HEAD, torn when the object is replaced meanwhile, and asks
  several times for what is absent; held to one range it is one GET.
- Listings and instances are cached by default, and instances break in a forked child: no caches,
  and one instance per process (per thread, where it is synchronous, as fsspec itself has it).

`durable` has no meaning here: a reply is given once the object is durable.

No message holds a credential. A store's URL and its options may hold passwords and tokens, and
client libraries like to quote both in their errors, which end up in logs, tickets and, from a
server, in a client's hands. So whatever is shown passes through `Redactor` first.
"""

from __future__ import annotations

import builtins
import contextlib
import os
import re
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import fsspec
from fsspec.asyn import AsyncFileSystem
from fsspec.registry import known_implementations

from splitfed.blobs.contract import (
    Buffer,
    check_create,
    check_key,
    check_prefix,
    is_name,
    views,
)
from splitfed.checks import install
from splitfed.errors import BusyError, IdError, InputError, StoreCapabilityError, StoreError

_TRIES = 5
_EXTRAS = {"s3fs": "s3", "gcsfs": "gcs", "adlfs": "azure"}

_SECRET_OPTION = re.compile(
    r"secret|token|key|passw|cred|sas|connection_string|auth", re.IGNORECASE
)
# The user part of a URL, and a query such as a signature.
_SECRET_IN_URL = re.compile(r"(?<=://)[^/\s'\"]*@|(?<=\?)[^\s'\"]+")
# A password or a query's value within those, for it may be quoted alone.
_SECRET_VALUE = re.compile(r"[:=]([^&@]{4,})")


class Redactor:
    """Replaces secrets by `***`: those of one store, and the user and query of any URL.

    Args:
        url: The URL of a store.
        options: The storage options, nested ones included; those whose names tell of credentials
            are secret.
    """

    def __init__(self, url: str, options: Mapping[str, Any]) -> None:
        secrets = set(_secret_values(options))
        for part in _SECRET_IN_URL.findall(url):
            secrets.update([part, *_SECRET_VALUE.findall(part)])
        secrets.discard("")
        # The longest first: one secret may be a part of another.
        self._secrets = sorted(secrets, key=len, reverse=True)

    def __call__(self, text: str) -> str:
        """Return `text` without secrets."""
        text = _SECRET_IN_URL.sub("***", text)
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text


def _secret_values(options: Mapping[str, Any]) -> Iterator[str]:
    for name, value in options.items():
        if isinstance(value, str) and _SECRET_OPTION.search(name):
            yield value
        elif isinstance(value, Mapping):
            yield from _secret_values(value)


class RemoteBlobs:
    """The objects beneath an fsspec URL.

    It connects at the first use.

    Args:
        url: The URL of a bucket, or of a directory in it.
        storage_options: Go to fsspec's filesystem.

    Raises:
        InputError: the URL's protocol is unknown.
        StoreError: its package isn't installed.
    """

    def __init__(self, url: str, **storage_options: Any) -> None:
        self._url = url
        self._options = storage_options
        self._redact = Redactor(url, storage_options)
        self.url = self._redact(url)
        # The filesystem and our directory in it, by process id: a forked child keeps its parent's,
        # unused. An asynchronous one is shared by all threads, a synchronous one is its thread's.
        self._shared: dict[int, tuple[Any, str]] = {}
        self._own = threading.local()
        protocol = url.partition("://")[0]
        try:
            fsspec.get_filesystem_class(protocol)
        except ValueError as exc:
            raise InputError(
                f"unknown protocol in {self.url!r}: expected a directory, file://, memory:// "
                "or a protocol of fsspec such as s3://, gs:// or abfs://"
            ) from exc
        except ImportError as exc:
            raise StoreError(
                f"{self.url!r} needs a package that can't be imported ({exc}): "
                f"{_installation(protocol)}"
            ) from exc

    def __repr__(self) -> str:
        return f"RemoteBlobs({self.url!r})"

    def get(self, key: str) -> memoryview | None:
        """Return the object, copied into writable memory; None when absent."""
        fs, path = self._at(check_key(key))
        return self._read(fs, path, key)

    def create(self, key: str, parts: Sequence[Buffer], *, durable: bool = True) -> bool:
        """Store the object by a conditional write; return what the storage says, see the module."""
        data = b"".join(views(check_key(key), parts))
        fs, path = self._at(key)
        # Python chains a new error to the one that our caller is handling: that one tells nothing
        # about this create.
        outer = sys.exc_info()[1]
        for _ in range(_TRIES):
            try:
                fs.pipe_file(path, data, mode="create")
                return True
            except (NotImplementedError, TypeError) as exc:
                raise StoreCapabilityError(
                    f"{self!r} can't create conditionally: {self._redact(str(exc))}"
                ) from exc
            except Exception as exc:
                status = _status(exc, outer)
                if status == 412:
                    return False
                if status != 409:
                    raise self._failed("create", key, exc) from exc
            # A conflict: if no object is there, two writers met, and neither may have won.
            if self._read(fs, path, key) is not None:
                return False
        raise BusyError(
            f"can't create {key!r} in {self!r}: {_TRIES} conflicts (HTTP 409) in a row; try again"
        )

    def put(self, key: str, parts: Sequence[Buffer], *, durable: bool = False) -> None:
        """Create or replace the object."""
        data = b"".join(views(check_key(key), parts))
        fs, path = self._at(key)
        try:
            fs.pipe_file(path, data)
        except Exception as exc:
            raise self._failed("put", key, exc) from exc

    def delete(self, key: str) -> None:
        """Delete the object, if it is there."""
        fs, path = self._at(check_key(key))
        try:
            fs.rm_file(path)
        except FileNotFoundError:
            return
        except Exception as exc:
            raise self._failed("delete", key, exc) from exc

    def delete_tree(self, prefix: str) -> int:
        """Delete all keys beneath `prefix`, one by one; return how many."""
        if not prefix:
            raise IdError(
                "delete_tree of the whole store isn't allowed: expected a directory within it"
            )
        keys = self.list(prefix)
        for key in keys:
            self.delete(key)
        return len(keys)

    def list(self, prefix: str) -> builtins.list[str]:
        """Return all keys beneath `prefix`, sorted."""
        return [*self.sizes(prefix)]

    def sizes(self, prefix: str) -> dict[str, int]:
        """Return the keys beneath `prefix`, sorted, with their sizes in bytes."""
        prefix = check_prefix(prefix)
        fs, path = self._at(prefix)
        try:
            files = [(str(fs._strip_protocol(name)), size) for name, size in _find(fs, path)]
        except FileNotFoundError:
            return {}
        except Exception as exc:
            raise self._failed("list", prefix, exc) from exc
        root = f"{self._at('')[1]}/".lstrip("/")
        beneath = f"{root}{prefix}/" if prefix else root
        found = {}
        for name, size in files:
            # Some filesystems answer with a leading slash; some list names that aren't beneath.
            name = name.lstrip("/")
            key = name.removeprefix(root)
            if name.startswith(beneath) and all(map(is_name, key.split("/"))):
                found[key] = size
        return dict(sorted(found.items()))

    def probe(self) -> None:
        """Refuse a filesystem without a conditional create of its own, then race for a few keys."""
        fs, _ = self._at("")
        if not fs.async_impl and type(fs).pipe_file is fsspec.AbstractFileSystem.pipe_file:
            raise StoreCapabilityError(
                f"{self!r} doesn't honour create-if-absent: {type(fs).__name__} has only fsspec's "
                "default, which asks and then writes; "
                "use a local directory, or an object store with conditional writes (S3, GCS, Azure)"
            )
        check_create(self)

    def lock(self, key: str, timeout: float) -> AbstractContextManager[bool]:
        """Yield False at once: there are no locks here."""
        check_key(key)
        return contextlib.nullcontext(False)

    def _at(self, key: str) -> tuple[Any, str]:
        """Return this process's (or thread's) filesystem and the key's path in it."""
        pid = os.getpid()
        opened = self._shared.get(pid) or getattr(self._own, "opened", {}).get(pid)
        if opened is None:
            opened = self._open()
            if opened[0].async_impl:
                opened = self._shared.setdefault(pid, opened)
            else:
                self._own.__dict__.setdefault("opened", {})[pid] = opened
        fs, root = opened
        return fs, f"{root}/{key}" if key else root

    def _open(self) -> tuple[Any, str]:
        try:
            fs, root = fsspec.core.url_to_fs(
                self._url, use_listings_cache=False, skip_instance_cache=True, **self._options
            )
        except Exception as exc:
            reason = self._redact(f"{type(exc).__name__}: {exc}")
            raise StoreError(f"can't open {self!r}: {reason}") from exc
        if not root.strip("/"):
            raise InputError(
                f"{self.url!r} names no bucket or directory: expected such as s3://bucket/run"
            )
        return fs, root.rstrip("/")

    def _read(self, fs: Any, path: str, key: str) -> memoryview | None:
        try:
            return memoryview(bytearray(fs.cat_file(path, **_one_get(type(fs)))))
        except FileNotFoundError:
            return None
        except Exception as exc:
            raise self._failed("read", key, exc) from exc

    def _failed(self, verb: str, key: str, exc: Exception) -> StoreError:
        reason = self._redact(f"{type(exc).__name__}: {exc}")
        if isinstance(exc, FileNotFoundError):
            reason += "; is there such a bucket? It has to be made first"
        return StoreError(f"can't {verb} {key!r} in {self!r}: {reason}")


def _installation(protocol: str) -> str:
    """Return how to install the package that fsspec's protocol needs."""
    package = known_implementations.get(protocol, {}).get("class", protocol).partition(".")[0]
    if package in _EXTRAS:
        return install(_EXTRAS[package])
    if package == "fsspec":
        # The filesystem is fsspec's own; the error names what it needs.
        return "install what it asks for"
    return f"pip install {package}"


def _one_get(filesystem: type) -> dict[str, int]:
    """Return the option by which s3fs reads an object with one request.

    Other filesystems do so anyway, and don't know the option; nor do older versions of s3fs.
    """
    code = getattr(getattr(filesystem, "_cat_file", None), "__code__", None)
    if not filesystem.__module__.startswith("s3fs.") or code is None:
        return {}
    return {"max_concurrency": 1} if "max_concurrency" in code.co_varnames else {}


def _find(fs: Any, path: str) -> Iterator[tuple[str, int]]:
    """Yield the files beneath `path` and their sizes; an error is raised, not omitted."""
    if fs.async_impl:
        flat = type(fs)._find is not AsyncFileSystem._find
    else:
        flat = type(fs).find is not fsspec.AbstractFileSystem.find
    if not flat:
        yield from _walk(fs, path)
        return
    found = fs.find(path, detail=True)
    # adlfs answers a list when `path` itself is an object: nothing is beneath it.
    if isinstance(found, dict):
        for name, info in found.items():
            if info.get("type") != "directory":
                yield name, info.get("size") or 0


def _walk(fs: Any, path: str) -> Iterator[tuple[str, int]]:
    """Yield the files beneath `path` and their sizes, directory by directory."""
    for info in fs.ls(path, detail=True):
        name = info["name"].rstrip("/")
        if info["type"] != "directory":
            yield name, info.get("size") or 0
        # Some stores list a placeholder for the directory itself: it would never end.
        elif name.lstrip("/") != path.lstrip("/"):
            with contextlib.suppress(FileNotFoundError):  # emptied meanwhile
                yield from _walk(fs, name)


def _status(exc: BaseException, outer: BaseException | None) -> int | None:
    """Return the HTTP status, 409 or 412, of the first error in the chain that has one."""
    for error in _causes(exc, outer):
        if isinstance(error, FileExistsError):
            return 412
        for status in _statuses(error):
            if isinstance(status, int | str) and str(status) in ("409", "412"):
                return int(status)
    return None


def _causes(exc: BaseException | None, outer: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and what it was raised from, up to what the caller was handling already."""
    seen: set[int] = set()
    while exc is not None and exc is not outer and id(exc) not in seen:
        seen.add(id(exc))
        yield exc
        exc = exc.__cause__ or exc.__context__


def _statuses(error: BaseException) -> Iterator[object]:
    """Yield what may be the HTTP status of an error, wherever a client library keeps it."""
    response = getattr(error, "response", None)
    if isinstance(response, Mapping):  # botocore
        response = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    yield response
    for place in (error, response):
        for name in ("status", "status_code", "code"):
            yield getattr(place, name, None)
