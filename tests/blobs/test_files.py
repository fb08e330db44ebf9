"""How a file is written, gets its name, and is swept when its writer died."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from backends import WAYS, child, content, in_threads, names_beneath
from harness_store import Point, batch, record, sgd

from splitfed.accumulator.accumulator import Accumulator
from splitfed.blobs import files
from splitfed.blobs.files import Publisher
from splitfed.blobs.local import LocalBlobs
from splitfed.errors import StoreError
from splitfed.store.store import GradientStore


def test_partial_writes_are_continued(local: LocalBlobs, monkeypatch: pytest.MonkeyPatch) -> None:
    """A system that takes a few bytes at a time, or refuses more than so many, gets all of them in order."""
    real = os.writev

    def stingy(fd: int, buffers: Sequence[memoryview]) -> int:
        assert sum(map(len, buffers)) <= 1000
        return real(fd, [buffers[0][:7]])

    monkeypatch.setattr(os, "writev", stingy)
    monkeypatch.setattr(files, "_MAX_WRITE", 1000)
    parts = [random.Random(size).randbytes(size) for size in (1, 7, 8, 3000, 14, 1)]
    local.create("a", parts)
    assert content(local, "a") == b"".join(parts)


def test_without_hard_links_it_creates_under_a_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a file system that refuses links every create still has one winner."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    local = LocalBlobs(tmp_path, fsync=False)
    answers = in_threads(4, lambda _: [local.create(f"d/{number}", [b"1"]) for number in range(20)])
    assert [sum(won) for won in zip(*answers, strict=True)] == [1] * 20
    assert any(name.startswith(".locks/.create-") for name in names_beneath(tmp_path))


def test_a_passing_error_is_not_taken_for_missing_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk at the first create raises; it must not turn this writer to a lock that others don't look at."""

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    local = LocalBlobs(tmp_path, fsync=False)
    with monkeypatch.context() as patch:
        patch.setattr(os, "link", full)
        with pytest.raises(StoreError, match=r"create 'a/b'.*No space left"):
            local.create("a/b", [b"1"])
    assert local.create("a/b", [b"1"])
    assert names_beneath(tmp_path) == [".tmp", "a", "a/b"]


def test_without_unnamed_files_it_links_named_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where O_TMPFILE is missing, create and the exists answer work the same, and no temporary file remains."""
    monkeypatch.setattr(files, "_UNNAMED", 0)
    local = LocalBlobs(tmp_path, fsync=False)
    assert (local.create("a", [b"1"]), local.create("a", [b"2"])) == (True, False)
    assert names_beneath(tmp_path) == [".tmp", "a"]


def test_a_link_whose_reply_was_lost_counts_as_created(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS may answer "exists" to its own repeated link: the link count tells that it was ours."""
    real = os.link

    def lost(source: str, target: str) -> None:
        real(source, target)
        raise FileExistsError(target)

    local = LocalBlobs(tmp_path, way="named", fsync=False)
    monkeypatch.setattr(os, "link", lost)
    assert local.create("a", [b"1"]) is True


WRITER = """
import os, sys
from splitfed.blobs import files
from splitfed.blobs.local import LocalBlobs
def stop(*arguments, **named):
    print("written", flush=True)
    sys.stdin.readline()
files.os.link = files.os.replace = stop
LocalBlobs(sys.argv[1], way="named", fsync=False).put("a/b", [b"1"])
"""


def test_a_sweep_removes_what_killed_writers_left(tmp_path: Path) -> None:
    """A temporary file whose writer was killed is gone after the next commit; one of a writer that lives stays."""
    store = GradientStore(tmp_path, sync="process")
    accumulator = Accumulator(Point(), store, sgd())
    writer = child(WRITER, tmp_path)
    assert writer.stdout
    assert writer.stdout.readline() == "written\n"
    (left,) = os.listdir(tmp_path / ".tmp")
    writer.kill()
    writer.communicate()
    held = os.open(tmp_path / ".tmp" / "held", os.O_WRONLY | os.O_CREAT)
    fcntl.flock(held, fcntl.LOCK_EX)
    assert left in os.listdir(tmp_path / ".tmp")
    store.pile().create(batch(0), record())
    assert accumulator.step() is not None
    assert os.listdir(tmp_path / ".tmp") == ["held"]
    os.close(held)
    store.pile().create(batch(1), record())
    assert accumulator.step() is not None
    assert os.listdir(tmp_path / ".tmp") == []


def test_a_writer_whose_temporary_file_is_swept_writes_it_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between its last byte and the link it holds no lock: whoever sweeps then costs it a second try."""
    for way, name in (("named", "link"), ("named", "replace"), ("locked", "replace")):
        local = LocalBlobs(tmp_path / f"{way}-{name}", way=way, fsync=False)  # type: ignore[arg-type]
        real, swept = getattr(os, name), []

        def sweeping(*arguments: object, local: LocalBlobs = local, swept: list[int] = swept, real: Any = real) -> None:
            if not swept:
                swept.append(1)
                local.sweep()
            real(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(os, name, sweeping)
            assert (name == "replace" and way == "named") or local.create("a/b", [b"1"])
            local.put("a/b", [b"2"])
        assert swept
        assert content(local, "a/b") == b"2"
        assert os.listdir(f"{local.root}/.tmp") == []


def test_without_locks_only_old_files_are_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the file system has no locks, a temporary file goes once nobody has written to it for a day."""

    def refuse(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    local = LocalBlobs(tmp_path, way="named", fsync=False)
    local.create("a", [b"1"])
    for name, age in (("new", 0.0), ("old", 90_000.0)):
        (tmp_path / ".tmp" / name).write_bytes(b"1")
        then = time.time() - age
        os.utime(tmp_path / ".tmp" / name, (then, then))
    local.sweep()
    assert os.listdir(tmp_path / ".tmp") == ["new"]


def test_short_reads_are_continued(local: LocalBlobs, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network mount may answer a read with less than there is: that isn't the end of the file."""
    local.create("a", [bytes(range(256))])
    real = os.read
    monkeypatch.setattr(os, "read", lambda fd, size: real(fd, min(size, 100)))
    assert content(local, "a") == bytes(range(256))


def test_the_experiment_leaves_no_trace(tmp_path: Path) -> None:
    """Finding out how to publish a file leaves nothing but the folder for temporary files."""
    assert Publisher(str(tmp_path))._experiment() in WAYS
    assert names_beneath(tmp_path) == [".tmp"]
