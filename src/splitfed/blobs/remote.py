"""Blobs on any other filesystem of fsspec: S3, GCS, Azure and what else has conditional writes.

The race is left to the storage: `pipe_file(mode="create")` becomes a conditional request there. What fsspec adds to it
isn't uniform, and each difference is a way to lose or double a gradient:

- Some filesystems ignore the mode, and fsspec's own default asks first and writes then: `probe` refuses them.
- "It exists" is a FileExistsError here and an OSError over HTTP status 412 there. 409 means "exists" on Azure and "two
  of you at once, try again" on S3: so then we look, and try again if nothing is there.
- "It exists" can mean "I won": when the reply is lost, the retry inside the client library meets its own object. Only
  the caller can tell, by a nonce in the object that it reads back.
- S3 truncates instead of refusing when an empty body meets an existing key: empty objects are refused beforehand.
- `find` and `walk` of fsspec's default swallow errors, and half a listing looks like a whole one: we walk ourselves.
- s3fs reads in concurrent ranges after a HEAD, torn when the object is replaced meanwhile, and asks several times for
  what is absent; held to one range it is one GET.
- Listings and instances are cached by default, and instances break in a forked child: no caches, and one instance per
  process (per thread, where it is synchronous, as fsspec itself has it).

`durable` has no meaning here: a reply is given once the object is durable.
"""

from __future__ import annotations

import builtins
import contextlib
import os
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import fsspec
from fsspec.asyn import AsyncFileSystem
from fsspec.registry import known_implementations

from splitfed.blobs.contract import Buffer, check_create, check_key, check_prefix, is_name, views
from splitfed.blobs.redaction import Redactor
from splitfed.errors import BusyError, IdError, InputError, StoreCapabilityError, StoreError

_TRIES = 5
_EXTRAS = {"s3fs": "s3", "gcsfs": "gcs", "adlfs": "azure"}


class RemoteBlobs:
    """The objects beneath an fsspec URL; `storage_options` go to its filesystem. Connects at the first use.

    Raises:
        InputError: the URL's protocol is unknown.
        StoreError: its package isn't installed.
    """

    def __init__(self, url: str, **storage_options: Any) -> None:
        self._url = url
        self._options = storage_options
        self._redact = Redactor(url, storage_options)
        self.url = self._redact(url)
        self._shared: dict[int, tuple[Any, str]] = {}  # by process id
        self._own = threading.local()
        protocol = url.partition("://")[0]
        try:
            fsspec.get_filesystem_class(protocol)
        except ValueError as exc:
            raise InputError(
                f"unknown protocol in {self.url!r}: expected a directory, file://, memory:// or a protocol of fsspec "
                "such as s3://, gs:// or abfs://"
            ) from exc
        except ImportError as exc:
            package = known_implementations.get(protocol, {}).get("class", protocol).partition(".")[0]
            mend = f"pip install {package}" if package != "fsspec" else "install what it asks for"
            mend = f"pip install 'splitfed[{_EXTRAS[package]}]'" if package in _EXTRAS else mend
            raise StoreError(f"{self.url!r} needs a package that can't be imported ({exc}): {mend}") from exc

    def __repr__(self) -> str:
        return f"RemoteBlobs({self.url!r})"

    def get(self, key: str) -> memoryview | None:
        """Return the object, copied into writable memory; None when absent."""
        fs, path = self._at(check_key(key))
        return self._read(fs, path, key)

    def create(self, key: str, parts: Sequence[Buffer], *, durable: bool = True) -> bool:
        """Store the object by a conditional write; return whether the storage says that this call did."""
        data = b"".join(views(check_key(key), parts))
        fs, path = self._at(key)
        outer = sys.exc_info()[1]
        for _ in range(_TRIES):
            try:
                fs.pipe_file(path, data, mode="create")
                return True
            except (NotImplementedError, TypeError) as exc:
                raise StoreCapabilityError(f"{self!r} can't create conditionally: {self._redact(str(exc))}") from exc
            except Exception as exc:
                status = _status(exc, outer)
                if status == 412:
                    return False
                if status != 409:
                    raise self._failed("create", key, exc) from exc
            if self._read(fs, path, key) is not None:
                return False
        raise BusyError(f"can't create {key!r} in {self!r}: {_TRIES} conflicts (HTTP 409) in a row; try again")

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
            raise IdError("delete_tree of the whole store isn't allowed: expected a directory within it")
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
        start = f"{self._at('')[1]}/".lstrip("/")
        try:
            found = {str(fs._strip_protocol(name)).lstrip("/"): size for name, size in _find(fs, path)}
        except FileNotFoundError:
            return {}
        except Exception as exc:
            raise self._failed("list", prefix, exc) from exc
        keys = sorted((name[len(start) :], size) for name, size in found.items() if name.startswith(start))
        beneath = f"{prefix}/" if prefix else ""
        return {key: size for key, size in keys if key.startswith(beneath) and all(map(is_name, key.split("/")))}

    def probe(self) -> None:
        """Refuse a filesystem without a conditional create of its own, then race for a few keys."""
        fs, _ = self._at("")
        if not fs.async_impl and type(fs).pipe_file is fsspec.AbstractFileSystem.pipe_file:
            raise StoreCapabilityError(
                f"{self!r} doesn't honour create-if-absent: {type(fs).__name__} has only fsspec's default, which asks "
                "and then writes; use a local directory, or an object store with conditional writes (S3, GCS, Azure)"
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
                self._own.__dict__.setdefault("opened", {})[pid] = opened  # a forked child keeps its parent's, unused
        fs, root = opened
        return fs, f"{root}/{key}" if key else root

    def _open(self) -> tuple[Any, str]:
        try:
            fs, root = fsspec.core.url_to_fs(
                self._url, use_listings_cache=False, skip_instance_cache=True, **self._options
            )
        except Exception as exc:
            raise StoreError(f"can't open {self!r}: {self._redact(f'{type(exc).__name__}: {exc}')}") from exc
        if not root.strip("/"):
            raise InputError(f"{self.url!r} names no bucket or directory: expected such as s3://bucket/run")
        return fs, root.rstrip("/")

    def _read(self, fs: Any, path: str, key: str) -> memoryview | None:
        try:
            return memoryview(bytearray(fs.cat_file(path, **_one_get(type(fs)))))
        except FileNotFoundError:
            return None
        except Exception as exc:
            raise self._failed("read", key, exc) from exc

    def _failed(self, verb: str, key: str, exc: Exception) -> StoreError:
        mend = "; is there such a bucket? It has to be made first" if isinstance(exc, FileNotFoundError) else ""
        return StoreError(f"can't {verb} {key!r} in {self!r}: {self._redact(f'{type(exc).__name__}: {exc}')}{mend}")


def _one_get(filesystem: type) -> dict[str, int]:
    """Return the option by which s3fs reads an object with one request; other filesystems do so anyway."""
    code = getattr(getattr(filesystem, "_cat_file", None), "__code__", None)
    has = filesystem.__module__.startswith("s3fs.") and code is not None and "max_concurrency" in code.co_varnames
    return {"max_concurrency": 1} if has else {}


def _find(fs: Any, path: str) -> Iterator[tuple[str, int]]:
    """Yield the files beneath `path` and their sizes; an error is raised, not omitted."""
    base = AsyncFileSystem._find if fs.async_impl else fsspec.AbstractFileSystem.find
    if getattr(type(fs), "_find" if fs.async_impl else "find") is not base:
        found = fs.find(path, detail=True)  # one flat listing
        if isinstance(found, dict):  # adlfs answers a list when `path` itself is an object: nothing is beneath it
            yield from (
                (name, info.get("size") or 0) for name, info in found.items() if info.get("type") != "directory"
            )
        return
    for info in fs.ls(path, detail=True):
        name = info["name"].rstrip("/")
        if info["type"] != "directory":
            yield name, info.get("size") or 0
        elif name.lstrip("/") != path.lstrip("/"):
            with contextlib.suppress(FileNotFoundError):  # emptied meanwhile
                yield from _find(fs, name)


def _status(exc: BaseException | None, outer: BaseException | None) -> int | None:
    """Return the HTTP status, 409 or 412, in the chain of causes, up to what the caller was handling already."""
    seen: set[int] = set()
    while exc is not None and exc is not outer and id(exc) not in seen:
        seen.add(id(exc))
        if isinstance(exc, FileExistsError):
            return 412
        response = getattr(exc, "response", None)
        if isinstance(response, Mapping):  # botocore
            response = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        places = (exc, response)
        names = ("status", "status_code", "code")
        for status in (response, *(getattr(place, name, None) for place in places for name in names)):
            if isinstance(status, int | str) and str(status) in ("409", "412"):
                return int(status)
        exc = exc.__cause__ or exc.__context__
    return None
