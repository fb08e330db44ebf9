"""Files made ahead: nobody else's, never written twice, and gone with their process."""

from __future__ import annotations

import copy
import errno
import gc
import os
import pickle
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

import pytest

from splitfed.blobs import files
from splitfed.blobs.files import MOST_SPARES, Spares, _close_all
from splitfed.blobs.local import LocalBlobs

pytestmark = pytest.mark.skipif(not hasattr(os, "O_TMPFILE"), reason="this system has no unnamed files")


def full(spares: Spares) -> list[int]:
    """The descriptors that lie ready once the thread has caught up."""
    until = time.monotonic() + 10
    while len(spares._ready) < MOST_SPARES and time.monotonic() < until:
        time.sleep(0.001)
    return list(spares._ready)


def test_a_file_is_taken_once(tmp_path: Path) -> None:
    """What was taken isn't ready any more, and others are made in its place."""
    spares = Spares(str(tmp_path))
    first = spares.take()
    ready = full(spares)
    assert first not in ready
    assert spares.take() == ready[0]
    assert os.listdir(tmp_path) == []
    for fd in (first, ready[0]):
        os.close(fd)


def test_what_lies_ready_is_closed_with_its_owner(tmp_path: Path) -> None:
    """A store that is let go leaves no descriptor open."""
    spares = Spares(str(tmp_path))
    os.close(spares.take())
    ready = full(spares)
    until = time.monotonic() + 10
    del spares
    while time.monotonic() < until:  # the thread lets go of it a moment later
        gc.collect()
        try:
            os.fstat(ready[0])
        except OSError:
            break
        time.sleep(0.001)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(ready[0])


def test_a_fork_makes_its_own(tmp_path: Path) -> None:
    """A child never writes to the files that its parent holds ready, nor the parent to the child's."""
    blobs = LocalBlobs(tmp_path / "store", fsync=False)
    blobs.create("a/first", [b"1"])
    full(blobs._publisher._spares)
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            created = [blobs.create(f"a/child-{i}", [b"child %d" % i]) for i in range(8)]
            code = 0 if all(created) else 2
        finally:
            os._exit(code)
    assert all(blobs.create(f"a/parent-{i}", [b"parent %d" % i]) for i in range(8))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    for who in ("child", "parent"):
        assert [bytes(blobs.get(f"a/{who}-{i}") or b"") for i in range(8)] == [
            b"%s %d" % (who.encode(), i) for i in range(8)
        ]


@pytest.mark.parametrize("again", [copy.deepcopy, lambda blobs: pickle.loads(pickle.dumps(blobs))])
def test_a_copy_makes_its_own(tmp_path: Path, again: Callable[[LocalBlobs], LocalBlobs]) -> None:
    """A number of a descriptor means nothing in another process, and another file after a while in this one."""
    blobs = LocalBlobs(tmp_path / "store", fsync=False)
    blobs.create("a/first", [b"1"])
    full(blobs._publisher._spares)
    copied = again(blobs)
    assert not copied._publisher._spares._ready
    for who in (blobs, copied):
        assert all(who.create(f"{id(who)}/{i}", [b"%d" % i]) for i in range(8))
        assert [bytes(who.get(f"{id(who)}/{i}") or b"") for i in range(8)] == [b"%d" % i for i in range(8)]


def test_two_threads_of_a_fork_may_close_what_it_inherited() -> None:
    """One finds that the other was faster: that is no error."""

    class Emptied(deque[int]):
        def __bool__(self) -> bool:
            return True

    _close_all(Emptied())


def test_a_directory_of_another_file_system_gets_files_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file can't be linked across a mount: then it is made where it belongs."""
    blobs = LocalBlobs(tmp_path, fsync=False)
    assert blobs.create("a/b", [b"1"])
    real, refused = files._link_unnamed, list[int]()

    def across(fd: int, path: str) -> None:
        if not refused:
            refused.append(fd)
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        real(fd, path)

    monkeypatch.setattr(files, "_link_unnamed", across)
    assert blobs.create("a/c", [b"2"])
    assert refused
    assert bytes(blobs.get("a/c") or b"") == b"2"


def test_a_failure_to_make_one_ahead_is_nobodys_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever then needs a file makes it, or hears why that isn't possible."""
    spares = Spares(str(tmp_path))

    def none_left(directory: str, mode: int) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(files, "_open_unnamed", none_left)
        with pytest.raises(OSError, match="Too many open files"):
            spares.take()
        spares.refill()
    os.close(spares.take())
