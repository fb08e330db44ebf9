"""Storage backends for tests: each of ours by a name, and filesystems of fsspec that live in memory."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import fsspec
from fsspec.asyn import AsyncFileSystem

import splitfed
from splitfed.blobs import open_blobs
from splitfed.blobs.contract import Blobs
from splitfed.blobs.files import Way
from splitfed.blobs.local import LocalBlobs

WAYS: list[Way] = ["unnamed", "named", "locked"] if hasattr(os, "O_TMPFILE") else ["named", "locked"]
BACKENDS = [*WAYS, "memory", "fsspec", "fsspec-async"]


class Objects(fsspec.AbstractFileSystem):  # type: ignore[misc]
    """An object store with an atomic conditional create; its objects are shared by all instances."""

    protocol = "objects"
    objects: ClassVar[dict[str, bytes]] = {}
    guard: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.options, self.born_in = options, (os.getpid(), threading.get_ident())

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        """Store bytes, conditionally when `mode` is "create"."""
        assert self.born_in == (os.getpid(), threading.get_ident()), "this instance is another thread's"
        with self.guard:
            if mode == "create" and path in self.objects:
                self.refuse(path)
            self.objects[path] = bytes(value)

    def refuse(self, path: str) -> None:
        """Say that the object exists."""
        raise FileExistsError(path)

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        """Return bytes."""
        try:
            return self.objects[path]
        except KeyError:
            raise FileNotFoundError(path) from None

    def rm_file(self, path: str) -> None:
        """Delete an object that must exist."""
        if self.objects.pop(path, None) is None:
            raise FileNotFoundError(path)

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> list[Any]:
        """List one level, with a placeholder for the directory itself as some stores have it."""
        start = path.rstrip("/") + "/"
        names = {start + name[len(start) :].partition("/")[0] for name in list(self.objects) if name.startswith(start)}
        if not names:
            raise FileNotFoundError(path)
        kinds = {name: "file" if name in self.objects else "directory" for name in names} | {start: "directory"}
        return [{"name": name, "type": kind, "size": len(self.objects.get(name, b""))} for name, kind in kinds.items()]


class AsyncObjects(AsyncFileSystem):  # type: ignore[misc]
    """The same through fsspec's event loop, which is one for all threads and dies in a fork."""

    protocol = "asyncobjects"
    backend: ClassVar[type[Objects]] = Objects

    async def _pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        self.backend().pipe_file(path, value, mode)

    async def _cat_file(self, path: str, start: Any = None, end: Any = None, **kwargs: Any) -> bytes:
        return self.backend().cat_file(path)

    async def _rm_file(self, path: str, **kwargs: Any) -> None:
        self.backend().rm_file(path)

    async def _ls(self, path: str, detail: bool = True, **kwargs: Any) -> list[Any]:
        return self.backend().ls(path, detail)


def open_backend(kind: str, root: Path) -> Blobs:
    """Open the backend `kind` for a test whose own directory is `root`: the same store each time."""
    if kind == "memory":
        return open_blobs(f"memory://{root}")
    if kind in ("unnamed", "named", "locked"):
        return LocalBlobs(root / "store", way=kind, fsync=False)  # type: ignore[arg-type]
    return open_blobs(("objects://" if kind == "fsspec" else "asyncobjects://") + f"bucket{root}")


def content(blobs: Blobs, key: str) -> bytes | None:
    """The object's bytes, or None."""
    data = blobs.get(key)
    return None if data is None else bytes(data)


def names_beneath(root: Path) -> list[str]:
    """All files and directories, hidden ones too, relative to the root."""
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*"))


def in_threads(count: int, work: Callable[[int], Any]) -> list[Any]:
    """Run `work(0..count-1)` in threads that begin together; their results in order."""
    gate = threading.Barrier(count)

    def run(number: int) -> Any:
        gate.wait(30)
        return work(number)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


def child(code: str, *arguments: object) -> subprocess.Popen[str]:
    """Start a Python process that can import splitfed."""
    environment = {**os.environ, "PYTHONPATH": str(Path(splitfed.__file__).parents[1])}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)
