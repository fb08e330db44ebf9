"""How a file is written, gets its name, and is swept when its writer died."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
from backends import WAYS, child, content, in_threads, names_beneath

from splitfed.blobs import files
from splitfed.blobs.files import Publisher
from splitfed.blobs.local import LocalBlobs
from splitfed.errors import StoreError


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
    assert names_beneath(tmp_path) == ["a", "a/b"]


def test_without_unnamed_files_it_links_named_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where O_TMPFILE is missing, create and the exists answer work the same, and no temporary file remains."""
    monkeypatch.setattr(files, "_UNNAMED", 0)
    local = LocalBlobs(tmp_path, fsync=False)
    assert (local.create("a", [b"1"]), local.create("a", [b"2"])) == (True, False)
    assert names_beneath(tmp_path) == ["a"]


def test_a_link_whose_reply_was_lost_counts_as_created(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS may answer "exists" to its own repeated link: the link count tells that it was ours."""
    real = os.link

    def lost(source: str, target: str) -> None:
        real(source, target)
        raise FileExistsError(target)

    local = LocalBlobs(tmp_path, way="named", fsync=False)
    monkeypatch.setattr(os, "link", lost)
    assert local.create("a", [b"1"]) is True


def test_probe_sweeps_what_dead_processes_left(tmp_path: Path) -> None:
    """Temporary files of dead processes of this host go; those of live ones, other hosts and other kinds stay."""
    gone = child("")
    gone.communicate()
    host, other = files.host_tag(), "00000000"
    names = [f".tmp-{host}-{gone.pid}-ab", f".tmp-{host}-{os.getpid()}-ab", f".tmp-{other}-{gone.pid}-ab", ".tmp-mine"]
    local = LocalBlobs(tmp_path, fsync=False)
    local.create("a/b", [b"1"])
    for name in names:
        (tmp_path / "a" / name).write_bytes(b"1")
    local.probe()
    assert sorted(os.listdir(tmp_path / "a")) == sorted([*names[1:], "b"])


def test_the_experiment_leaves_no_trace(tmp_path: Path) -> None:
    """Finding out how to publish a file leaves the directory as it was."""
    assert Publisher(str(tmp_path))._experiment() in WAYS
    assert names_beneath(tmp_path) == []
