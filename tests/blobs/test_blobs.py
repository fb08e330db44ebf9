"""Blobs: one suite over all backends, then what only files and only remote filesystems can get wrong."""

from __future__ import annotations

import errno
import os
import random
import re
import stat
import subprocess
import sys
import threading
import uuid
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.asyn import AsyncFileSystem
from hypothesis import given
from hypothesis import strategies as st

import splitfed
from splitfed.blobs import files, open_blobs
from splitfed.blobs.contract import Blobs, check_key
from splitfed.blobs.files import Publisher, Way
from splitfed.blobs.local import LocalBlobs
from splitfed.blobs.memory import MemoryBlobs
from splitfed.blobs.remote import RemoteBlobs
from splitfed.blobs.testing import BlobsSuite
from splitfed.errors import BusyError, IdError, InputError, StoreCapabilityError, StoreError

WAYS: list[Way] = ["unnamed", "named", "locked"] if hasattr(os, "O_TMPFILE") else ["named", "locked"]
BACKENDS = [*WAYS, "memory", "fsspec", "fsspec-async"]

# --- filesystems of fsspec that behave, and some that don't ---------------------------------------------------------


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


class HttpError(Exception):
    """What an HTTP client raises: a status, here under the name that the client happens to give it."""

    def __init__(self, name: str, value: object) -> None:
        super().__init__("Precondition Failed")
        setattr(self, name, value)


def backends(kind: str, root: Path) -> Blobs:
    """Open the backend `kind` for a test whose own directory is `root`: the same store each time."""
    if kind == "memory":
        return open_blobs(f"memory://{root}")
    if kind in ("unnamed", "named", "locked"):
        return LocalBlobs(root / "store", way=kind, fsync=False)  # type: ignore[arg-type]
    return open_blobs(("objects://" if kind == "fsspec" else "asyncobjects://") + f"bucket{root}")


@pytest.fixture(autouse=True)
def protocols() -> Iterator[None]:
    """The filesystems above under their protocols, empty."""
    Objects.objects.clear()
    for filesystem in (Objects, AsyncObjects):
        fsspec.register_implementation(filesystem.protocol, filesystem, clobber=True)
    yield
    Objects.objects.clear()


@pytest.fixture(params=BACKENDS)
def blobs(request: pytest.FixtureRequest, tmp_path: Path) -> Blobs:
    """An empty store of each backend."""
    return backends(request.param, tmp_path)


@pytest.fixture(params=WAYS)
def local(request: pytest.FixtureRequest, tmp_path: Path) -> LocalBlobs:
    """An empty directory, for each way of publishing a file."""
    return LocalBlobs(tmp_path / "store", way=request.param, fsync=False)


def content(blobs: Blobs, key: str) -> bytes | None:
    """The object's bytes, or None."""
    data = blobs.get(key)
    return None if data is None else bytes(data)


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


# --- every backend --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BACKENDS)
class TestEveryBackend(BlobsSuite):
    """The public conformance suite, over each backend and each way of publishing a file."""

    @pytest.fixture(autouse=True)
    def where(self, kind: str, tmp_path: Path) -> None:
        """Which backend, and a directory for it."""
        self.kind, self.root = kind, tmp_path

    def open(self, place: str) -> Blobs:
        """Open a store of that name."""
        return backends(self.kind, self.root / place)


@given(st.text(st.sampled_from("aZ0_.@=-/\\%*?~ \n\0é"), max_size=12) | st.text(max_size=20))
def test_no_key_leaves_the_root(key: str) -> None:
    """Whatever passes the check stays beneath the root, hides nothing and is one path only."""
    try:
        check_key(key)
    except IdError:
        return
    assert os.path.normpath(f"/base/{key}") == f"/base/{key}"
    assert key.isascii()
    assert not re.search(r"(^|/)\.|[*?:%\\\s\0~]", key)


def test_probes_may_run_beside_each_other(blobs: Blobs) -> None:
    """Two processes that begin a store at once don't disturb each other, and no key of a probe remains."""
    in_threads(2, lambda _: blobs.probe())
    assert blobs.list("") == []


def test_lock_is_released_by_an_error(blobs: Blobs) -> None:
    """An exception in the guarded block passes through and frees the lock."""
    with pytest.raises(KeyError, match="mine"), blobs.lock("x", 1):
        raise KeyError("mine")
    with blobs.lock("x", 0) as held:
        assert held is not isinstance(blobs, RemoteBlobs)


def test_locked_sections_never_overlap(blobs: Blobs) -> None:
    """Threads that wait for the lock take turns."""
    if isinstance(blobs, RemoteBlobs):
        pytest.skip("no locks there")
    inside: list[int] = []

    def work(number: int) -> bool:
        with blobs.lock("turn", 30) as held:
            inside.append(number)
            alone = len(inside) == 1
            inside.remove(number)
        return held and alone

    assert all(in_threads(4, work))


# --- local files ----------------------------------------------------------------------------------------------------

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
    assert not [name for name in names_beneath(tmp_path) if ".tmp" in name]


def names_beneath(root: Path) -> list[str]:
    """All files and directories, hidden ones too, relative to the root."""
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*"))


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
    """Temporary files, locks, odd names and symbolic links are left alone, and so is where a link leads."""
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
    assert local.list("") == ["d/key"]
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


# --- remote filesystems ---------------------------------------------------------------------------------------------


@pytest.fixture
def remote(monkeypatch: pytest.MonkeyPatch) -> Callable[..., RemoteBlobs]:
    """Open a store on a filesystem that is `Objects` but for the methods given."""

    def build(base: type[Any] = Objects, **methods: Any) -> RemoteBlobs:
        protocol = f"x{uuid.uuid4().hex}"
        fsspec.register_implementation(protocol, type("Odd", (base,), {"protocol": protocol, **methods}))
        return RemoteBlobs(f"{protocol}://bucket/run")

    return build


def test_a_store_that_ignores_the_condition_is_refused(remote: Callable[..., RemoteBlobs]) -> None:
    """The probe finds that a second create replaced the first, and cleans up."""
    blobs = remote(pipe_file=lambda self, path, value, mode="", **kwargs: Objects.pipe_file(self, path, value))
    with pytest.raises(StoreCapabilityError, match="create-if-absent"):
        blobs.probe()
    assert blobs.list("") == []


def test_a_store_that_asks_and_then_writes_is_refused(remote: Callable[..., RemoteBlobs]) -> None:
    """The probe's race finds two winners where a single writer would find nothing wrong."""
    together, main = threading.Barrier(4), threading.get_ident()

    def pipe_file(self: Objects, path: str, value: bytes, mode: str = "") -> None:
        exists = path in self.objects
        if threading.get_ident() != main:
            together.wait(30)
        if exists:
            raise FileExistsError(path)
        Objects.pipe_file(self, path, value)

    blobs = remote(pipe_file=pipe_file)
    with pytest.raises(StoreCapabilityError, match="4 of 4 racing writers"):
        blobs.probe()
    assert blobs.list("") == []


def test_a_store_that_answers_wrongly_about_the_winner_is_refused(remote: Callable[..., RemoteBlobs]) -> None:
    """One writer is told that it won, but another's object stands there."""

    def pipe_file(self: Objects, path: str, value: bytes, mode: str = "") -> None:
        with self.guard:
            fresh = path not in self.objects
            if fresh or not path.endswith("/twice"):
                self.objects[path] = value
            if not fresh:
                raise FileExistsError(path)

    with pytest.raises(StoreCapabilityError, match="another's object"):
        remote(pipe_file=pipe_file).probe()


def test_the_default_of_fsspec_is_refused_unseen(remote: Callable[..., RemoteBlobs]) -> None:
    """A filesystem without a conditional create of its own is refused without a race that it might win by luck."""
    with pytest.raises(StoreCapabilityError, match="only fsspec's default"):
        remote(pipe_file=fsspec.AbstractFileSystem.pipe_file).probe()


@pytest.mark.parametrize("exc", [TypeError("unexpected keyword argument 'mode'"), NotImplementedError()])
def test_a_store_without_a_conditional_create_says_so(remote: Callable[..., RemoteBlobs], exc: Exception) -> None:
    """A filesystem that doesn't know the mode is named as unfit."""

    def pipe_file(self: Objects, path: str, value: bytes, **kwargs: Any) -> None:
        raise exc

    with pytest.raises(StoreCapabilityError, match="conditionally"):
        remote(pipe_file=pipe_file).create("a", [b"1"])


def test_an_error_of_the_storage_in_the_probe_is_itself(remote: Callable[..., RemoteBlobs]) -> None:
    """A broken connection in one racing thread is reported as such, and no thread hangs."""
    main = threading.get_ident()

    def pipe_file(self: Objects, path: str, value: bytes, mode: str = "") -> None:
        if threading.get_ident() != main and value.endswith(b"2"):
            raise ConnectionError("gone")
        Objects.pipe_file(self, path, value, mode)

    with pytest.raises(StoreError, match="ConnectionError: gone") as caught:
        remote(pipe_file=pipe_file).probe()
    assert not isinstance(caught.value, StoreCapabilityError)


CAUSES = [
    HttpError("status", 412),
    HttpError("status_code", 412),
    HttpError("code", "412"),
    HttpError("response", {"ResponseMetadata": {"HTTPStatusCode": 412}}),
    HttpError("response", HttpError("status_code", 412)),
    FileExistsError("beneath"),
    HttpError("status", 409),
]


@pytest.mark.parametrize("cause", CAUSES, ids=lambda cause: f"{vars(cause) or type(cause).__name__}")
@pytest.mark.parametrize("chained", ["cause", "context", "twice"])
def test_exists_is_told_by_its_status(remote: Callable[..., RemoteBlobs], cause: Exception, chained: str) -> None:
    """An OSError over HTTP 412, wherever the client library keeps the status, means that the key exists."""

    def refuse(self: Objects, path: str) -> None:
        error = OSError(errno.EINVAL, "At least one of the pre-conditions you specified did not hold")
        if chained == "cause":
            raise error from cause
        try:
            raise cause
        except type(cause) as first:
            if chained == "context":
                raise error  # noqa: B904
            middle = OSError("in between")
            middle.__cause__ = first
            raise error from middle

    blobs = remote(refuse=refuse)
    assert (blobs.create("a", [b"1"]), blobs.create("a", [b"2"])) == (True, False)
    assert content(blobs, "a") == b"1"


@pytest.mark.parametrize(("conflicts", "outcome"), [(1, True), (4, True), (5, BusyError)])
def test_a_conflict_over_an_absent_key_is_tried_again(
    remote: Callable[..., RemoteBlobs], conflicts: int, outcome: object
) -> None:
    """409 without an object means "two at once": the create is repeated, and gives up in the end."""
    left = [conflicts]

    def pipe_file(self: Objects, path: str, value: bytes, mode: str = "") -> None:
        left[0] -= 1
        if left[0] >= 0:
            raise OSError(errno.EBUSY, "conflict") from HttpError("status", 409)
        Objects.pipe_file(self, path, value, mode)

    blobs = remote(pipe_file=pipe_file)
    if outcome is BusyError:
        with pytest.raises(BusyError, match="'a/b'"):
            blobs.create("a/b", [b"1"])
    else:
        assert blobs.create("a/b", [b"1"]) is outcome


def test_what_the_caller_is_handling_is_no_answer(remote: Callable[..., RemoteBlobs]) -> None:
    """A create from within the handling of an older 412 doesn't mistake a broken connection for "exists"."""

    def pipe_file(self: Objects, path: str, value: bytes, mode: str = "") -> None:
        raise ConnectionError("gone")

    blobs = remote(pipe_file=pipe_file)
    try:
        raise OSError from HttpError("status", 412)
    except OSError:
        with pytest.raises(StoreError, match=r"can't create 'a'.*gone"):
            blobs.create("a", [b"1"])


def test_other_errors_are_wrapped_with_the_key(remote: Callable[..., RemoteBlobs]) -> None:
    """Whatever a client library raises becomes a StoreError with the key, and the original as its cause."""

    def fail(self: Objects, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError("throttled")

    blobs = remote(pipe_file=fail, cat_file=fail, rm_file=fail, ls=fail)
    calls: list[Callable[[], object]] = [
        lambda: blobs.create("a/b", [b"1"]),
        lambda: blobs.put("a/b", [b"1"]),
        lambda: blobs.get("a/b"),
        lambda: blobs.delete("a/b"),
        lambda: blobs.list("a/b"),
    ]
    for call in calls:
        with pytest.raises(StoreError, match=r"'a/b'.*RuntimeError: throttled") as caught:
            call()
        assert isinstance(caught.value.__cause__, RuntimeError)


@pytest.mark.parametrize("kind", [Objects, AsyncObjects])
def test_half_a_listing_is_an_error(remote: Callable[..., RemoteBlobs], kind: type[Any]) -> None:
    """A directory that can't be listed raises; fsspec's own find would leave it out in silence."""

    def ls(self: Objects, path: str, detail: bool = True, **kwargs: Any) -> list[Any]:
        if path.endswith("/d"):
            raise ConnectionError("slow")
        return Objects.ls(self, path, detail)

    async def _ls(self: AsyncObjects, path: str, detail: bool = True, **kwargs: Any) -> list[Any]:
        return ls(Objects(), path)

    blobs = remote(kind, ls=ls) if kind is Objects else remote(kind, _ls=_ls)
    blobs.create("a/1", [b"1"])
    blobs.create("d/2", [b"1"])
    assert blobs.list("a") == ["a/1"]
    with pytest.raises(StoreError, match="slow"):
        blobs.list("")


def test_a_flat_listing_is_used_where_there_is_one(remote: Callable[..., RemoteBlobs]) -> None:
    """A filesystem with its own find is asked once; directories and names that aren't keys are left out."""

    def find(self: Objects, path: str, detail: bool = False, **kwargs: Any) -> Any:
        found = {name: {"type": "file"} for name in self.objects}
        return {**found, f"{path}/dir": {"type": "directory"}, f"{path}/": {"type": "file"}, f"{path}/a b": {}}

    blobs = remote(find=find, ls=None)
    blobs.create("x/1", [b"1"])
    blobs.create("y", [b"1"])
    assert blobs.list("") == ["x/1", "y"]
    assert blobs.list("x") == ["x/1"]
    assert remote(find=lambda self, path, **kwargs: [path]).list("x") == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.parametrize("kind", ["fsspec", "fsspec-async"])
def test_a_forked_child_gets_an_instance_of_its_own(kind: str, tmp_path: Path) -> None:
    """A store that was used before a fork works after it, in the child and in the parent."""
    blobs = backends(kind, tmp_path)
    blobs.create("a", [b"1"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork with threads: that is what we test
        pid = os.fork()
    if pid == 0:
        os._exit(0 if content(blobs, "a") == b"1" and blobs.create("b", [b"2"]) and blobs.list("") == ["a", "b"] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert blobs.create("c", [b"3"])
    assert blobs.list("") == ["a", "c"]


def test_synchronous_filesystems_are_one_a_thread_and_uncached(tmp_path: Path) -> None:
    """Each thread has its own instance, kept from call to call, made with our options and without any cache."""
    blobs = RemoteBlobs("objects://bucket/run", flavour="sour")
    before = [blobs._at("")[0] for _ in range(2)]
    others = in_threads(2, lambda _: blobs._at("")[0])
    assert before[0] is before[1]
    assert len({id(fs) for fs in [before[0], *others]}) == 3
    assert before[0].options == {"flavour": "sour", "use_listings_cache": False}


# --- opening --------------------------------------------------------------------------------------------------------


def test_open_blobs_by_kind_of_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths and file URLs are local and absolute, memory is by name, the rest is fsspec's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    roots: dict[str | Path, str] = {
        "runs/demo": f"{tmp_path}/runs/demo",
        Path("runs"): f"{tmp_path}/runs",
        "~/runs": "/home/someone/runs",
        "file:///abs/path": "/abs/path",
        "FILE:///abs/path/": "/abs/path",
        "local:///abs": "/abs",
        (tmp_path / "a b%1").as_uri(): f"{tmp_path}/a b%1",
        Path("odd:/dir"): f"{tmp_path}/odd:/dir",
    }
    for url, root in roots.items():
        opened = open_blobs(url)
        assert isinstance(opened, LocalBlobs)
        assert opened.root == root
    assert isinstance(open_blobs("memory://a"), MemoryBlobs)
    assert repr(open_blobs("objects://bucket/run")) == "RemoteBlobs('objects://bucket/run')"
    assert os.listdir(tmp_path) == []


def test_memory_is_shared_by_name() -> None:
    """Two opens of one memory URL are one store, two names are two."""
    name = uuid.uuid4()
    open_blobs(f"memory://{name}").create("a", [b"1"])
    assert open_blobs(f"memory://{name}/").list("") == ["a"]
    assert open_blobs(f"memory://{name}x").list("") == []


@pytest.mark.parametrize(
    "url",
    ["", "a\0b", "file://relative", "file://", "file:///%00", "nosuch://a/b", "://a", "4://a", "simplecache::s3://b"],
)
def test_urls_that_cannot_be_stores(url: str) -> None:
    """What isn't a URL of ours raises, with what would be."""
    with pytest.raises(InputError, match="expected"):
        open_blobs(url)


def test_options_where_none_apply() -> None:
    """Local and memory stores take no storage options."""
    for url in ("runs", "memory://a"):
        with pytest.raises(InputError, match="anon"):
            open_blobs(url, anon=True)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A protocol whose package isn't installed says what to install."""
    fsspec.register_implementation("absent", "absentfs.core.AbsentFileSystem", clobber=True)
    with pytest.raises(StoreError, match=r"absent://bucket/run.*pip install absentfs"):
        open_blobs("absent://bucket/run")


def test_a_url_without_a_bucket(tmp_path: Path) -> None:
    """A URL that names no place raises at the first use."""
    with pytest.raises(InputError, match="bucket"):
        open_blobs("objects://").get("a")


def test_credentials_do_not_appear_in_messages(remote: Callable[..., RemoteBlobs]) -> None:
    """Neither the URL's password and signature nor secret options are shown, whoever quotes them."""
    secrets = ["hunter2", "sig-nature", "AKIA123", "wJalr", "nested-pass"]

    class Leaky(Objects):
        protocol = "leaky"

        def pipe_file(self, *args: Any, **kwargs: Any) -> None:
            raise OSError(f"403 for https://me:other@host/p?X-Signature=abc with {' '.join(secrets)}")

    fsspec.register_implementation("leaky", Leaky, clobber=True)
    blobs = open_blobs(
        "leaky://me:hunter2@bucket/run?sig=sig-nature",
        key="AKIA123",
        secret="wJalr",
        client={"password": "nested-pass", "endpoint_url": "https://host"},
        token="",
    )
    with pytest.raises(StoreError) as caught:
        blobs.create("a", [b"1"])
    shown = f"{caught.value} {blobs!r}"
    assert "403 for https://***host/p?***" in shown
    for secret in [*secrets, "other", "abc"]:
        assert secret not in shown
    with pytest.raises(InputError) as refused:
        open_blobs("nosuch://me:hunter2@host/x")
    assert "hunter2" not in str(refused.value)


def test_a_filesystem_that_cannot_be_built_is_named() -> None:
    """Options that the filesystem doesn't take raise with the URL at the first use."""

    class Strict(Objects):
        protocol = "strict"

        def __init__(self, colour: str, **options: Any) -> None:
            super().__init__(**options)

    fsspec.register_implementation("strict", Strict, clobber=True)
    with pytest.raises(StoreError, match=r"strict://bucket.*colour"):
        open_blobs("strict://bucket").get("a")


def test_the_experiment_leaves_no_trace(tmp_path: Path) -> None:
    """Finding out how to publish a file leaves the directory as it was."""
    assert Publisher(str(tmp_path))._experiment() in WAYS
    assert names_beneath(tmp_path) == []
