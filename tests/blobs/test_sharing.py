"""Who may use the files of a local store: its owner alone, or a group, where the folder or the user says so."""

from __future__ import annotations

import multiprocessing
import os
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from backends import WAYS
from torch import nn

import splitfed
from splitfed.blobs.files import Way
from splitfed.blobs.local import LocalBlobs
from splitfed.errors import SplitFedError

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")
needs_root = pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0 or sys.platform != "linux",
    reason="needs root on Linux, to be two users",
)
GROUP = 2000


@contextmanager
def masked(umask: int) -> Iterator[None]:
    """The umask within."""
    before = os.umask(umask)
    try:
        yield
    finally:
        os.umask(before)


def used(blobs: LocalBlobs) -> None:
    """Create, replace and lock."""
    blobs.create("a/b/c", [b"1"])
    blobs.put("a/b/c", [b"2"])
    blobs.put("a/d", [b"1"])
    with blobs.lock("a/b", 1) as held:
        assert held


def modes(root: Path) -> set[tuple[str, int]]:
    """The modes of all there is, files apart from folders."""
    found = [root, *root.rglob("*")]
    return {("folder" if path.is_dir() else "file", stat.S_IMODE(path.stat().st_mode)) for path in found}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("umask", "group"), [(0o000, 0o6), (0o002, 0o6), (0o022, 0o4), (0o077, 0o0)])
def test_group_bits_follow_the_umask_in_a_setgid_folder(umask: int, group: int, way: Way, tmp_path: Path) -> None:
    """Locks too, and with the folder's bit; others get none."""
    tmp_path.chmod(0o2775)
    with masked(umask):
        used(LocalBlobs(tmp_path / "new" / "run", fsync=False, way=way))
    folder = 0o700 | (group << 3) | (0o010 if group else 0)
    assert modes(tmp_path / "new") == {("file", 0o600 | (group << 3)), ("folder", folder | stat.S_ISGID)}


@pytest.mark.parametrize("way", WAYS)
def test_group_bits_follow_the_umask_in_a_shared_store(way: Way, tmp_path: Path) -> None:
    """Wherever it is; its folders are setgid, so that what another user adds is the group's."""
    with masked(0o002):
        used(LocalBlobs(tmp_path / "run", fsync=False, way=way, shared=True))
    assert modes(tmp_path / "run") == {("file", 0o660), ("folder", 0o2770)}


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o022])
def test_elsewhere_a_store_is_its_owners_alone(umask: int, tmp_path: Path) -> None:
    """Whatever the umask, and whatever the folder lets the group do."""
    tmp_path.chmod(0o775)
    with masked(umask):
        used(LocalBlobs(tmp_path / "run", fsync=False))
    assert modes(tmp_path / "run") == {("file", 0o600), ("folder", 0o700)}


def test_a_folder_of_its_own_that_is_not_setgid_decides(tmp_path: Path) -> None:
    """A folder that was made private within a shared one stays so."""
    tmp_path.chmod(0o2775)
    (tmp_path / "run").mkdir()
    (tmp_path / "run").chmod(0o700)
    with masked(0o002):
        used(LocalBlobs(tmp_path / "run", fsync=False))
    assert modes(tmp_path / "run") == {("file", 0o600), ("folder", 0o700)}


# ------------------------------------------------------------------------------------- two users


def model() -> nn.Module:
    """Three layers."""
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2))


def train(root: str, **settings: Any) -> str:
    """A batch and a commit; the new version."""
    half, body = splitfed.split(model(), "1")
    store = splitfed.GradientStore(root, sync="power", **settings)
    splitfed.SplitClient(half, splitfed.SplitServer(body, store), client_id="a")(torch.randn(4, 8)).sum().backward()
    commit = splitfed.Accumulator(body, store, lambda params: torch.optim.SGD(params, lr=0.1)).step()
    assert commit is not None
    return f"version {commit.version}"


def as_user(uid: int, umask: int, work: Callable[[], str]) -> str:
    """What the work of another user of the group answers, or the error that it raises."""
    context = multiprocessing.get_context("fork")
    said, answer = context.Pipe(duplex=False)

    def run() -> None:
        os.umask(umask)
        os.setgroups([GROUP])
        os.setgid(GROUP)
        os.setuid(uid)
        try:
            answer.send(work())
        except SplitFedError as error:
            answer.send(f"{type(error).__name__}: {error}")

    process = context.Process(target=run)
    process.start()
    assert said.poll(60)
    found: str = said.recv()
    process.join()
    return found


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder of the group's, that both users can reach."""
    with tempfile.TemporaryDirectory() as above:
        os.chmod(above, 0o755)
        folder = Path(above) / "shared"
        folder.mkdir()
        os.chown(folder, 0, GROUP)
        folder.chmod(0o2775)
        train(f"{above}/first")  # what is imported late is imported before the users are others
        yield folder


@needs_root
@pytest.mark.parametrize("umask", [0o002, 0o007])
def test_two_users_work_in_a_setgid_folder(place: Path, umask: int) -> None:
    """A server and accumulator of each, in turns."""
    root = str(place / "run")
    answers = [as_user(uid, umask, lambda: train(root)) for uid in (1001, 1002, 1001)]
    assert answers == ["version 1", "version 2", "version 3"]


@needs_root
def test_two_users_share_a_store_by_their_own_word(place: Path) -> None:
    """In a folder that isn't setgid."""
    place.chmod(0o775)
    root = str(place / "run")
    answers = [as_user(uid, 0o007, lambda: train(root, shared=True)) for uid in (1001, 1002, 1001)]
    assert answers == ["version 1", "version 2", "version 3"]


@needs_root
@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_a_umask_that_keeps_the_group_out_is_named(place: Path, umask: int) -> None:
    """By the mode that it has left, with the one that lets the group in."""
    root = str(place / "run")
    assert as_user(1001, umask, lambda: train(root)) == "version 1"
    said = as_user(1002, umask, lambda: train(root))
    assert said.startswith("StoreError: ")
    assert f"is of mode {0o2750 if umask == 0o022 else 0o2700:o} and belongs to user 1001" in said
    assert "umask that leaves the group its bits, such as 007" in said


@needs_root
def test_a_user_who_is_not_let_in_hears_whose_it_is(place: Path) -> None:
    """Its mode and owner, and the two ways to let the group in; and that way works for what is there."""
    place.chmod(0o775)
    root = str(place / "run")
    assert as_user(1001, 0o002, lambda: train(root)) == "version 1"
    said = as_user(1002, 0o002, lambda: train(root))
    assert f"'{root}' is of mode 0700 and belongs to user 1001 and group {GROUP}, this process is user 1002" in said
    assert "setgid (chmod g+rwxs) or it is opened with shared=True (--shared)" in said
    for path in (place / "run", *(place / "run").rglob("*")):
        path.chmod(path.stat().st_mode | (0o070 if path.is_dir() else 0o060))
    assert as_user(1002, 0o002, lambda: train(root)) == "version 2"
