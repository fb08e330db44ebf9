"""Files without a name, made ahead: a create then only writes and links.

A file system takes 0.04 to 1 ms to find room for a new file, the longer the more files were deleted lately, and a
batch creates two. So a thread makes them ahead, some at a time: each time that it is woken it competes with the request
under way. Nobody else sees one: it has no name until it is linked, and dies with the process that holds it open.

The trap: after a fork both processes hold the same files open. Whoever didn't make a file mustn't write to it.
"""

from __future__ import annotations

import os
import queue
import threading
import weakref
from collections import deque
from contextlib import suppress

from splitfed.blobs import files

LEAST, MOST = 2, 8
"""With fewer ready than the first, the thread makes as many as the second."""


class Spares:
    """Unnamed files of one directory's file system.

    Args:
        directory: Where they are made; it must exist once one is asked for.
    """

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._ready: deque[int] = deque()
        self._process = os.getpid()
        weakref.finalize(self, _close, self._ready)

    def __reduce__(self) -> tuple[type[Spares], tuple[str]]:
        return Spares, (self._directory,)  # a copy with the same numbers would write to the same files, or to any

    def take(self) -> int:
        """Open an unnamed file for writing; the caller closes it.

        Raises:
            OSError: that isn't possible here.
        """
        if self._process != os.getpid():
            _close(self._ready)
            self._process = os.getpid()
        try:
            found = self._ready.popleft()
        except IndexError:
            found = files.create_unnamed(self._directory)
        if len(self._ready) < LEAST:
            _worker().put(self)
        return found

    def refill(self) -> None:
        """Make what is missing; called by the thread."""
        with suppress(OSError):  # the directory is gone, or no descriptor is left: who needs a file will hear of it
            while len(self._ready) < MOST:
                self._ready.append(files.create_unnamed(self._directory))


def _close(ready: deque[int]) -> None:
    with suppress(IndexError):  # another thread of a fork may have closed the last
        while True:
            os.close(ready.popleft())


_workers: dict[int, queue.SimpleQueue[Spares]] = {}  # by process: a fork takes no thread along


def _worker() -> queue.SimpleQueue[Spares]:
    found = _workers.get(os.getpid())
    if found is None:
        own: queue.SimpleQueue[Spares] = queue.SimpleQueue()
        found = _workers.setdefault(os.getpid(), own)
        if found is own:
            threading.Thread(target=_work, args=(own,), name="spare files", daemon=True).start()
    return found


def _work(asked: queue.SimpleQueue[Spares]) -> None:
    while True:
        asked.get().refill()
