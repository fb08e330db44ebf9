"""Symbolic links in a local store: followed, or refused by name; nothing that was acknowledged is overlooked."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness_store import Point, again, batch, folder, record, sgd

from splitfed.accumulator.accumulator import Accumulator
from splitfed.blobs.local import LocalBlobs
from splitfed.diagnostics.integrity import verify
from splitfed.diagnostics.repair import repair
from splitfed.errors import StoreError
from splitfed.store.store import GradientStore

PLACES = [".", "body", "body/grad", "body/grad/a", "body/forward", "body/commit", "body/weights", "clients"]


def moved(path: Path, disk: Path) -> Path:
    """Move a folder to another disk, and leave a link."""
    target = disk / path.name
    disk.mkdir(exist_ok=True)
    path.rename(target)
    path.symlink_to(target)
    return target


@pytest.mark.parametrize("place", PLACES)
def test_a_folder_may_be_a_link(tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was in it counts, what comes to it counts, each once; and nothing is missed by `verify`."""
    monkeypatch.setattr("splitfed.store.lineage.PRUNE_EVERY", 2)
    store = GradientStore(tmp_path / "store", sync="power")
    Accumulator(Point(), store, sgd())
    store.open_client("a")
    (folder(store) / "body/forward").mkdir()
    store.pile().create(batch(0), record())
    whole = set(store.blobs.list(""))
    target = moved(folder(store) / place, tmp_path / "disk")
    assert set(again(store).blobs.list("")) == whole
    accumulator = Accumulator(Point(), again(store), sgd())
    again(store).pile().create(batch(1), record())
    commit = accumulator.step()
    assert commit is not None
    assert list(commit.folded) == [batch(0), batch(1)]
    for _ in range(4):  # over a sweep that removes empty folders
        seq = accumulator.store.latest_version() + 1
        again(store).pile().create(batch(seq), record(base_version=seq - 1))
        assert accumulator.step() is not None
    accumulator.step()
    assert again(store).waiting() == []
    assert verify(again(store)).ok
    assert target.is_dir()
    assert (folder(store) / place).resolve() == target


@pytest.mark.parametrize("at", ["body/grad", "body/grad/a", "body/grad/a/00000001-0000000000"])
def test_a_link_to_nowhere_is_refused_by_name(tmp_path: Path, at: str) -> None:
    """By who writes there, who reads there and who lists: it is neither an empty folder nor an existing batch."""
    store = GradientStore(tmp_path / "store", sync="process")
    accumulator = Accumulator(Point(), store, sgd())
    link = folder(store) / at
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(tmp_path / "unmounted")
    with pytest.raises(StoreError, match=f"{at}' is a link to .*unmounted.*is its disk mounted"):
        store.pile().create(batch(0), record())
    with pytest.raises(StoreError, match=f"{at}' is a link to .*unmounted"):
        accumulator.step()
    with pytest.raises(StoreError, match="unmounted"):
        verify(again(store))
    if at.endswith("0"):
        with pytest.raises(StoreError, match="unmounted"):
            store.pile().read(batch(0))


@pytest.mark.parametrize("to", ["../b", "..", "../..", "../../..", "../../../.."])
def test_a_link_to_what_has_a_name_already_is_refused(tmp_path: Path, to: str) -> None:
    """Another client's folder, or one around: each batch in it would count under two ids, or the listing never end."""
    store = GradientStore(tmp_path / "store", sync="process")
    accumulator = Accumulator(Point(), store, sgd())
    store.pile().create(batch(0, "b"), record())
    (folder(store) / "body/grad/a").symlink_to(Path(to.removeprefix("../")) if to == "../b" else to)
    with pytest.raises(StoreError, match=r"'body/grad/a'.* has a name in the store already.*Remove the link"):
        accumulator.step()
    (folder(store) / "body/grad/a").unlink()
    commit = accumulator.step()
    assert commit is not None
    assert list(commit.folded) == [batch(0, "b")]


def test_two_links_to_one_folder_are_refused(tmp_path: Path) -> None:
    """As its batches would count twice."""
    store = GradientStore(tmp_path / "store", sync="process")
    accumulator = Accumulator(Point(), store, sgd())
    store.pile().create(batch(0), record())
    target = moved(folder(store) / "body/grad/a", tmp_path / "disk")
    (folder(store) / "body/grad/b").symlink_to(target)
    with pytest.raises(StoreError, match="has a name in the store already"):
        accumulator.step()


def test_a_loop_of_links_is_refused(tmp_path: Path) -> None:
    """By whoever lists it."""
    blobs = LocalBlobs(tmp_path / "store")
    blobs.create("d/key", [b"1"])
    (tmp_path / "store/d/one").symlink_to(tmp_path / "store/d/other")
    (tmp_path / "store/d/other").symlink_to(tmp_path / "store/d/one")
    with pytest.raises(StoreError, match=r"d/o(ne|ther)' is a link to"):
        blobs.list("d")


def test_repair_leaves_what_a_link_leads_to(tmp_path: Path) -> None:
    """A damaged gradient in a linked folder is set aside; the folder stays, and the link."""
    store = GradientStore(tmp_path / "store", sync="process")
    Accumulator(Point(), store, sgd())
    store.pile().create(batch(0), record())
    target = moved(folder(store) / "body/grad", tmp_path / "disk")
    path = target / "a/00000001-0000000000"
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    done = repair(again(store))
    assert done.lost == ["a/1/0"]
    assert verify(again(store)).ok
    assert target.is_dir()
    assert (folder(store) / "body/grad").is_symlink()
