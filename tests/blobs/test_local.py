"""What only files can get wrong."""

from __future__ import annotations

import errno
import os
import random
import stat
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from backends import WAYS, child, content, in_threads, names_beneath

from splitfed.blobs import files, open_blobs
from splitfed.blobs.files import Way
from splitfed.blobs.local import LocalBlobs
from splitfed.errors import BusyError, StoreError

RACER = """
import sys
from splitfed.blobs.local import LocalBlobs
root, way, tag, count = sys.argv[1:]
blobs = LocalBlobs(root, way=way, fsync=False)
print("ready", flush=True)
sys.stdin.readline()
won = [n for n in range(int(count)) if blobs.create(f"race/{n}", [tag.encode() * 3000, tag.encode() * 3000])]
print(*won)
"""


ENDLESS = """
import itertools, sys
from splitfed.blobs.local import LocalBlobs
root, way, tag = sys.argv[1:]
blobs = LocalBlobs(root, way=way, fsync=False)
body = tag.encode() * 1_000_000
print("ready", flush=True)
for n in itertools.count():
    blobs.create(f"w/{tag}/{n % 40}", [body, body])
    blobs.put(f"w/{tag}/head", [body, body])
    blobs.delete(f"w/{tag}/{(n + 20) % 40}")
"""


def test_racing_processes_have_one_winner_a_key(local: LocalBlobs, request: pytest.FixtureRequest) -> None:
    """Of processes that create the same keys, exactly one wins each, and its object is there, whole."""
    way, count = request.node.callspec.params["local"], 60
    racers = {tag: child(RACER, local.root, way, tag, count) for tag in "xyz"}
    assert all(racer.stdout and racer.stdout.readline() == "ready\n" for racer in racers.values())
    for racer in racers.values():
        assert racer.stdin
        racer.stdin.write("go\n")
        racer.stdin.flush()
    won = {tag: {int(word) for word in racer.communicate(timeout=60)[0].split()} for tag, racer in racers.items()}
    assert sorted(number for numbers in won.values() for number in numbers) == list(range(count))
    for tag, numbers in won.items():
        assert all(content(local, f"race/{number}") == tag.encode() * 6000 for number in numbers)


@pytest.mark.parametrize(("way", "kills"), [(way, 10 if way == WAYS[0] else 4) for way in WAYS])
def test_a_killed_writer_leaves_whole_objects_only(way: Way, kills: int, tmp_path: Path) -> None:
    """SIGKILL at random moments leaves each key absent or whole, no lock held, and nothing once probed."""
    chance, local = random.Random(way), LocalBlobs(tmp_path, way=way, fsync=False)
    for round_number in range(kills):
        tag = "abcdefghij"[round_number]
        writer = child(ENDLESS, tmp_path, way, tag)
        assert writer.stdout
        assert writer.stdout.readline() == "ready\n"
        with pytest.raises(subprocess.TimeoutExpired):
            writer.wait(chance.uniform(0, 0.08))
        writer.kill()
        writer.communicate()
        for key in local.list(f"w/{tag}"):
            assert content(local, key) == tag.encode() * 2_000_000, key
        local.delete_tree(f"w/{tag}")
        assert local.create(f"w/{tag}/0", [b"free"])
    local.probe()
    assert not [name for name in names_beneath(tmp_path) if ".tmp/" in name]


def test_files_and_directories_are_private(local: LocalBlobs, tmp_path: Path) -> None:
    """Files are 0600 and directories 0700, whatever the umask, the missing ones above the root too."""
    deep = LocalBlobs(tmp_path / "new" / "er" / "store", fsync=False)
    before = os.umask(0)
    try:
        for blobs in (local, deep):
            blobs.create("a/b/c", [b"1"])
            blobs.put("a/d", [b"1"])
            with blobs.lock("a/b", 1) as held:
                assert held
    finally:
        os.umask(before)
    for path in tmp_path.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_a_chdir_does_not_move_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative root means the directory in which the process was when the store was opened."""
    monkeypatch.chdir(tmp_path)
    blobs = open_blobs("runs/demo", fsync=False)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    blobs.create("a", [b"1"])
    assert (tmp_path / "runs/demo/a").read_bytes() == b"1"


def test_what_is_not_a_key_is_neither_listed_nor_deleted(local: LocalBlobs) -> None:
    """Temporary files, locks and odd names are left alone, and so is where a link leads when a tree is deleted."""
    outside = Path(local.root).with_name("outside")
    outside.mkdir()
    (outside / "precious").write_bytes(b"1")
    local.create("d/key", [b"1"])
    directory = Path(local.root) / "d"
    for name in [".tmp-x", ".hidden", "naïve", "a b", "x~"]:
        (directory / name).write_bytes(b"1")
    (directory / ".dir").mkdir()
    (directory / ".dir" / "inner").write_bytes(b"1")
    (directory / "link").symlink_to(outside)
    assert local.list("") == ["d/key", "d/link/precious"]
    local.prune("d")
    assert local.delete_tree("d") == 1
    assert (outside / "precious").exists()
    assert len(list(directory.iterdir())) == 7


def test_sizes_leave_out_what_vanishes(local: LocalBlobs, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file deleted between the listing and its size is gone; one that can't be looked at is an error with its key."""
    local.create("a", [b"12"])
    monkeypatch.setattr(local, "list", lambda prefix: ["a", "gone"])
    assert local.sizes("") == {"a": 2}

    def broken(path: str) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", broken)
        with pytest.raises(StoreError, match=r"'a'.*Input/output error"):
            local.sizes("")


def test_delete_tree_removes_emptied_directories(local: LocalBlobs) -> None:
    """Locally the emptied directories go too, beneath the prefix only."""
    local.create("a/b/c/1", [b"1"])
    local.delete_tree("a/b")
    assert "a" in os.listdir(local.root)
    assert os.listdir(f"{local.root}/a") == []


def test_a_directory_that_vanishes_is_made_again(local: LocalBlobs) -> None:
    """Creating beneath a directory that others keep deleting loses no create that said True, and raises nothing."""
    done = threading.Event()

    def work(number: int) -> int:
        if number == 0:
            deleted = 0
            while not done.is_set():
                deleted += local.delete_tree("a")
            return deleted + local.delete_tree("a")
        try:
            return sum(local.create(f"a/b/{number}", [b"1"]) for _ in range(150))
        finally:
            if number == 1:
                done.set()

    deleted, created = in_threads(2, work)
    assert created == deleted


def test_a_key_cannot_be_the_directory_of_another(local: LocalBlobs) -> None:
    """The clash raises an error that names the key, instead of an answer that isn't true."""
    local.create("a/b", [b"1"])
    for write in (local.create, local.put):
        with pytest.raises(StoreError, match="'a'"):
            write("a", [b"1"])
        with pytest.raises(StoreError, match="'a/b/c'"):
            write("a/b/c", [b"1"])
    assert local.get("a") is None
    assert local.get("a/b/c") is None
    local.delete("a")
    local.delete("a/b/c")
    assert local.list("") == ["a/b"]


def test_a_write_that_fails_half_way_leaves_nothing(local: LocalBlobs) -> None:
    """When the disk refuses more, the error names the key, and neither object nor temporary file remains."""
    resource = pytest.importorskip("resource")
    local.put("small", [b"1"])
    before = names_beneath(Path(local.root))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # a write beyond is cut short, the next one fails
    try:
        for write in (local.create, local.put):
            with pytest.raises(StoreError, match="'large'") as caught:
                write("large", [b"x" * 70_000, b"y" * 70_000])
            assert isinstance(caught.value.__cause__, OSError)
            assert caught.value.__cause__.errno == errno.EFBIG
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [name for name in names_beneath(Path(local.root)) if ".locks" not in name] == before
    assert local.create("large", [b"fits"])


def test_errors_of_the_system_name_the_key(local: LocalBlobs, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the system refuses becomes a StoreError with the key and the system's own words."""
    local.create("a/b", [b"1"])

    def broken(*args: object, **kwargs: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    calls: dict[str, Callable[[str], object]] = {
        "open": local.get,
        "unlink": local.delete,
        "scandir": local.list,
        "mkdir": lambda key: local.put(f"{key}/c", [b"1"]),
    }
    for name, call in calls.items():
        with monkeypatch.context() as patch:
            patch.setattr(os, name, broken)
            with pytest.raises(StoreError, match=r"'a/b.*Input/output error"):
                call("a/b")


def test_a_directory_that_never_stays_is_given_up(local: LocalBlobs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the directory vanishes each time the write ends in "try again", not in an endless loop."""
    monkeypatch.setattr(os, "mkdir", lambda *args, **kwargs: None)
    for write in (local.create, local.put):
        with pytest.raises(BusyError, match="'a/b'"):
            write("a/b", [b"1"])


def test_a_root_that_links_to_nowhere_is_told_as_that(tmp_path: Path) -> None:
    """As a disk that isn't mounted leaves it: trying again wouldn't help, so it isn't proposed."""
    (tmp_path / "run").symlink_to(tmp_path / "disk" / "run")
    blobs = LocalBlobs(tmp_path / "run")
    for write in (blobs.create, blobs.put):
        with pytest.raises(StoreError, match=r"a link to .*which isn't there; is its disk mounted") as caught:
            write("a/b", [b"x"])
        assert not isinstance(caught.value, BusyError)
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "run").mkdir()
    assert blobs.create("a/b", [b"x"])


def test_a_directory_above_the_root_may_be_another_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A parent of the root that we may not read stops no durable create; one of our own directories does."""
    real, closed = files.sync_directory, [str(tmp_path)]

    def sync_directory(path: str) -> None:
        if path in closed:
            raise PermissionError(errno.EACCES, "Permission denied", path)
        real(path)

    monkeypatch.setattr(files, "sync_directory", sync_directory)
    local = LocalBlobs(tmp_path / "store")
    assert local.create("a/b", [b"1"])
    closed.append(f"{tmp_path}/store")
    with pytest.raises(StoreError, match=r"'c/d'.*Permission denied"):
        local.create("c/d", [b"1"])


def test_memory_of_directories_is_bounded(local: LocalBlobs, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many directories are written to, only so many are remembered."""
    monkeypatch.setattr("splitfed.blobs.local._MAX_MADE", 5)
    for number in range(20):
        assert local.create(f"clients/{number}/x", [b"1"])
        assert len(local._made) <= 5
    assert len(local.list("clients")) == 20


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="names open files through /proc")
@pytest.mark.parametrize("way", WAYS)
def test_durable_means_file_and_directories(way: Way, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The content is synced before it has its name, then each directory that is new to us; without fsync nothing is."""
    calls: list[str] = []
    real_sync, real_link, real_replace = os.fsync, os.link, os.replace

    def fsync(fd: int) -> None:
        path = os.readlink(f"/proc/self/fd/{fd}")
        calls.append("file" if not os.path.isdir(path) else os.path.relpath(path, tmp_path))
        real_sync(fd)

    def named(real: Callable[..., None]) -> Callable[..., None]:
        def call(*args: Any, **kwargs: Any) -> None:
            real(*args, **kwargs)
            calls.append("named")

        return call

    local = LocalBlobs(tmp_path / "store", way=way)
    relaxed = LocalBlobs(tmp_path / "store", way=way, fsync=False)
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "link", named(real_link))
    monkeypatch.setattr(os, "replace", named(real_replace))
    cases: list[tuple[Callable[[], object], list[str]]] = [
        (lambda: relaxed.create("a/b/1", [b"1"]), ["named"]),
        (lambda: relaxed.put("a/b/2", [b"1"], durable=True), ["named"]),
        (lambda: local.create("a/b/3", [b"1"], durable=False), ["named"]),
        (lambda: local.create("a/b/4", [b"1"]), [".", "store", "store/a", "file", "named", "store/a/b"]),
        (lambda: local.put("a/b/5", [b"1"], durable=True), ["file", "named", "store/a/b"]),
        (lambda: local.put("a/b/5", [b"1"]), ["named"]),
    ]
    for act, expected in cases:
        calls.clear()
        act()
        assert calls == expected
    calls.clear()
    assert local.create("a/b/1", [b"1"]) is False
    assert calls == ["file", "file", "store/a/b"], "what another process left unsynced is synced before we say so"


def test_another_process_is_locked_out(tmp_path: Path) -> None:
    """The lock holds between processes, and a killed holder frees it."""
    holder = child(
        "import sys; from splitfed.blobs.local import LocalBlobs\n"
        "with LocalBlobs(sys.argv[1]).lock('a/b', 5) as held: print(held, flush=True); sys.stdin.readline()",
        tmp_path,
    )
    assert holder.stdout
    assert holder.stdout.readline() == "True\n"
    with LocalBlobs(tmp_path).lock("a/b", 0.02) as held:
        assert held is False
    holder.kill()
    holder.communicate()
    with LocalBlobs(tmp_path).lock("a/b", 10) as held:
        assert held is True


def test_lock_never_raises(tmp_path: Path) -> None:
    """Where no lock file can be made the answer is False."""
    (tmp_path / "file").write_bytes(b"1")
    with LocalBlobs(tmp_path / "file" / "store").lock("a", 1) as held:
        assert held is False
