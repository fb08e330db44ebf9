"""`gc`: what nobody can need is deleted, nothing else; a dry run only tells."""

from __future__ import annotations

import json
import uuid

import pytest
import torch
from harness_store import Point, again, batch, bits, record, sgd

from splitfed.accumulator.accumulator import Accumulator
from splitfed.cli.command import main
from splitfed.client.client import SplitClient
from splitfed.diagnostics.garbage import collect
from splitfed.diagnostics.integrity import verify
from splitfed.diagnostics.replay import replay
from splitfed.errors import BusyError, MissingError
from splitfed.model.cut import split
from splitfed.server.server import SplitServer
from splitfed.store.store import GradientStore


def used(**settings: object) -> GradientStore:
    """A store with a call under way, one of a superseded process, a pending and a counted gradient."""
    store = GradientStore(f"memory://{uuid.uuid4()}", **settings)  # type: ignore[arg-type]
    half, body = split(torch.nn.Sequential(torch.nn.Linear(2, 2), Point()), "1")
    server = SplitServer(body, store)
    accumulator = Accumulator(body, store, sgd(), keep_versions=4)
    old = SplitClient(half, server, "a")
    for _ in range(6):
        old(torch.ones(1, 2)).sum().backward()
        accumulator.step()
    old(torch.ones(1, 2))
    SplitClient(half, server, "a")(torch.ones(1, 2))
    store.open_client("b")
    store.pile().create(batch(0, "b"), record(base_version=6))
    store.pile().create(batch(0, "a", 1), record(base_version=0))  # counted: its clean-up crashed
    return store


def test_what_nobody_can_need_is_deleted_and_the_run_goes_on() -> None:
    """The call of the superseded process and the counted gradient go; what is pending stays."""
    store = used()
    key = "body/weights/0000000005-0000000000000000.safetensors"
    store.blobs.create(key, [b"{}"])
    told = collect(store, dry_run=True)
    assert sorted(one.key.split("/")[1] for one in told) == ["forward", "grad", "weights"]
    before = bits(store.load_weights())
    assert store.blobs.list("") == sorted({*store.blobs.list(""), *(one.key for one in told)})
    assert collect(store) == told
    assert not {one.key for one in told} & {*store.blobs.list("")}
    assert bits(again(store).load_weights()) == before
    assert [str(one) for one in again(store).waiting()] == ["b/1/0"]
    assert verify(store).ok
    assert collect(store) == []
    Accumulator(Point(), again(store), sgd(), keep_versions=4).step()
    assert again(store).waiting() == []


def test_older_versions_go_if_that_is_asked_for() -> None:
    """Weights, optimizer states and calls before the newest two; never the first weights or a table in use."""
    store = used()
    found = collect(store, keep_versions=2)
    assert any("/weights/" in one.key for one in found)
    assert store.lineage().kept() == {0, 5, 6} - ({0} - store.lineage().kept())
    assert verify(store).ok


def test_a_run_that_is_kept_can_still_be_replayed() -> None:
    """Of a counted gradient that lies about its content is kept first."""
    store = used(keep_forwards=True)
    store.blobs.delete(store.lineage().keys.kept(batch(0, "a", 1)))
    collect(store, keep_versions=2)
    assert store.lineage().keys.kept(batch(0, "a", 1)) in store.blobs.list("body/kept")
    store = used(keep_forwards=True)
    collect(store, keep_versions=2)
    assert replay(Point(), store).ok


def test_what_repair_set_aside_stays_unless_asked_for() -> None:
    """It may be all that is left of something."""
    store = used()
    store.blobs.create("aside/1/body/head", [b"{}"])
    assert "aside/1/body/head" not in [one.key for one in collect(store)]
    assert [one.key for one in collect(store, aside=True)] == ["aside/1/body/head"]


def test_the_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """As text and JSON; refused where there is no run or an accumulator is at work."""
    store = used()
    assert main(["gc", "--store", store.url, "--dry-run"]) == 0
    assert "would be deleted" in capsys.readouterr().out
    assert main(["gc", "--store", store.url, "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["files"]) == 2
    assert main(["gc", "--store", store.url, "--keep-versions", "1"]) == 2
    monkeypatch.setattr("splitfed.store.store.LOCK_SECONDS", 0.1)
    with store.blobs.lock(store.lineage().keys.lock, 1.0), pytest.raises(BusyError, match="at work"):
        collect(store)
    with pytest.raises(MissingError, match="no run"):
        collect(GradientStore(f"memory://{uuid.uuid4()}"))
