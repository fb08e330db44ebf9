"""A run that is deleted, or replaced by another, under the processes that have it open: the next call says so."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from backends import Objects
from harness_store import Hooked, Nth, Point, again, batch, folder, record, sgd
from servers import Place

from splitfed.accumulator.accumulator import Accumulator
from splitfed.blobs.contract import Blobs
from splitfed.cli.command import main
from splitfed.client.client import SplitClient
from splitfed.errors import CorruptedError
from splitfed.model.cutpoint import CutPoint
from splitfed.server.server import SplitServer
from splitfed.service.mailbox.worker import Worker
from splitfed.store.checked import LOOK_EVERY
from splitfed.store.store import GradientStore

GONE = "isn't there any more, or is another: it was deleted or begun anew"


@pytest.fixture(params=["file", "memory", "objects"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty store: files, memory, or an object store that is far away."""
    if request.param == "objects":
        found: str = request.getfixturevalue("far")
        return found
    return (tmp_path / "run").as_uri() if request.param == "file" else f"memory://{uuid.uuid4()}"


@pytest.fixture
def far() -> Iterator[str]:
    """An empty store in objects of fsspec."""
    fsspec.register_implementation(Objects.protocol, Objects, clobber=True)
    yield f"objects://bucket/{uuid.uuid4()}"
    Objects.objects.clear()


def remove(store: GradientStore, how: str) -> None:
    """Delete a run as an operator would: the folder, all that is in it, or for another run."""
    if isinstance(getattr(store.blobs, "root", None), str):
        shutil.rmtree(folder(store))
    else:
        for key in store.blobs.list(""):
            store.blobs.delete(key)
    if how == "emptied" and hasattr(store.blobs, "root"):
        folder(store).mkdir()
    if how == "replaced":
        Accumulator(Point(), again(store), sgd())


def calls(store: GradientStore) -> Iterator[tuple[str, Callable[[], Any]]]:
    """What somebody may ask of a run, by those that have had it open."""
    server = SplitServer(Point(), again(store))
    half = torch.nn.Sequential(torch.nn.Linear(2, 2), CutPoint())
    client = SplitClient(half, server, client_id="a")
    client(torch.ones(1, 2)).sum().backward()
    accumulator = Accumulator(Point(), again(store), sgd())
    assert accumulator.step() is not None
    pending = client(torch.ones(1, 2)).sum()
    worker = Worker(server, server.store)
    opened = again(store)
    opened.waiting()
    yield "a backward", pending.backward
    yield "a forward", lambda: client(torch.ones(1, 2))
    yield "without grad", lambda: client.eval()(torch.ones(1, 2))
    yield "pull", client.pull
    yield "a commit", accumulator.step
    yield "a worker", worker.step
    yield "the newest", opened.latest_version
    yield "what is pending", opened.waiting
    yield "weights", opened.load_weights


@pytest.mark.parametrize("how", ["deleted", "emptied", "replaced"])
def test_whoever_has_it_open_is_told_at_the_next_call(url: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each by name and with what to do; nothing of the old run is written into the new one."""
    monkeypatch.setattr("splitfed.store.checked.LOOK_EVERY", 1)
    store = GradientStore(url, sync="process")
    asked = list(calls(store))
    remove(store, how)
    before = again(store).blobs.list("")
    for name, call in asked:
        with pytest.raises(CorruptedError, match=GONE):
            call(), name
    assert again(store).blobs.list("") == before
    if url.startswith("file:") and how == "deleted":
        assert not folder(store).exists()


def test_far_away_it_is_looked_at_seldom(far: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One read in so many calls: an ordinary batch costs none, and no clock decides."""
    store = GradientStore(far, sync="process")
    Accumulator(Point(), store, sgd())
    store.lineage().head()
    read: list[str] = []
    get = store.blobs.raw.get
    monkeypatch.setattr(store.blobs.raw, "get", lambda key: read.append(key) or get(key))
    for _ in range(2 * LOOK_EVERY):
        store.confirm()
    assert read == [store.lineage().keys.commit(0)] * 2
    for key in store.blobs.list(""):
        store.blobs.delete(key)
    for _ in range(LOOK_EVERY - 1):
        store.confirm()
    with pytest.raises(CorruptedError, match=GONE):
        store.confirm()


def test_far_away_a_missing_file_makes_it_look(far: str) -> None:
    """Not "raise keep_versions": what is missing has gone with all the rest."""
    store = GradientStore(far, sync="process")
    accumulator = Accumulator(Point(), store, sgd())
    store.pile().create(batch(0), record())
    assert accumulator.step() is not None
    reader = again(store)
    assert reader.latest_version() == 1
    reader.lineage().commit(0)
    remove(store, "deleted")
    for call in (lambda: reader.load_weights(0), lambda: reader.lineage().state(0), reader.lineage().fingerprint):
        with pytest.raises(CorruptedError, match=GONE):
            call()


def test_a_format_record_that_was_lost_alone_stops_nobody(store_url: str) -> None:
    """As long as the newest version is what it was, it is the same run."""
    store = GradientStore(store_url, sync="process")
    accumulator = Accumulator(Point(), store, sgd())
    store.blobs.delete("format.json")
    store.pile().create(batch(0), record())
    assert accumulator.step() is not None
    assert store.latest_version() == 1
    Accumulator(Point(), again(store), sgd())  # writes it again
    assert store.waiting() == []


@pytest.mark.parametrize("verb", ["work", "accumulate"])
def test_a_command_ends_with_it(verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """It doesn't go on looking at an empty folder for ever."""
    monkeypatch.chdir(tmp_path)
    store = GradientStore(tmp_path / "run", sync="process")
    looks = {"work": Worker, "accumulate": Accumulator}[verb]
    step = looks.step

    def delete_then_step(self: Any, *arguments: Any) -> Any:
        if folder(store).exists():
            remove(store, "deleted")
        return step(self, *arguments)

    monkeypatch.setattr(looks, "step", delete_then_step)
    options = ["--optimizer", "SGD", "--lr", "1"] if verb == "accumulate" else []
    assert main([verb, "harness_requests:body", "--store", "run", *options]) != 0
    assert GONE in capsys.readouterr().err
    assert not folder(store).exists()


def test_a_step_costs_a_read_for_each_of_its_calls(store_url: str) -> None:
    """Of one small file where reads cost next to nothing: once for the forward, once for the backward."""
    store = GradientStore(store_url, sync="process")
    server = SplitServer(Point(), store)
    client = SplitClient(torch.nn.Sequential(torch.nn.Linear(2, 2), CutPoint()), server, client_id="a")
    client(torch.ones(1, 2)).sum().backward()
    count = Nth(at=f"get {store.lineage().keys.commit(0)}")
    raw: Blobs = store.blobs.raw
    store.blobs.raw = Hooked(raw, count)  # type: ignore[assignment]
    with count.armed():
        client(torch.ones(1, 2)).sum().backward()
    assert count.count == 2


@pytest.mark.soak
def test_on_s3(moto: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same on an emulator of S3."""
    for name, value in moto.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("splitfed.store.checked.LOOK_EVERY", 1)
    for how in ("deleted", "replaced"):
        store = GradientStore(moto.url(how), sync="process")
        asked = list(calls(store))
        remove(store, how)
        for name, call in asked:
            with pytest.raises(CorruptedError, match=GONE):
                call(), name
