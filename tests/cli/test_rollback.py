"""`splitfed rollback`: an older version comes back, and what is lost is listed."""

from __future__ import annotations

import json
import uuid

import pytest
from harness_store import Point, again, batch, record, sgd

from splitfed.accumulator.accumulator import Accumulator
from splitfed.cli.command import main
from splitfed.store.store import GradientStore


@pytest.fixture
def store() -> GradientStore:
    """A run of three commits."""
    store = GradientStore(f"memory://{uuid.uuid4()}")
    accumulator = Accumulator(Point(), store, sgd())
    for seq in range(3):
        store.pile().create(batch(seq), record(base_version=seq))
        accumulator.step()
    return store


def test_an_older_version_comes_back(store: GradientStore, capsys: pytest.CaptureFixture[str]) -> None:
    """As text and as JSON."""
    assert main(["rollback", "--store", store.url, "--to", "1"]) == 0
    assert capsys.readouterr().out.split("\n")[1:3] == ["LOST  a/1/1", "LOST  a/1/2"]
    assert again(store).load_weights()["w"].tolist() == [-1.0, -1.0]
    assert main(["rollback", "--store", store.url, "--to", "3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"version": 5, "restored": 3, "lost": []}
    assert again(store).load_weights()["w"].tolist() == [-3.0, -3.0]


def test_what_cant_come_back(
    store: GradientStore, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A version that isn't older, a lineage that isn't there, a store at work."""
    for version in ("3", "-1", "99"):
        assert main(["rollback", "--store", store.url, "--to", version]) == 2
        assert "expected" in capsys.readouterr().err
    assert main(["rollback", "--store", store.url, "--to", "1", "--lineage", "client"]) == 1
    assert "no lineage 'client'" in capsys.readouterr().err
    monkeypatch.setattr("splitfed.store.store.LOCK_SECONDS", 0.1)
    with store.blobs.lock(store.lineage().keys.lock, 1.0):
        assert main(["rollback", "--store", store.url, "--to", "1"]) == 1
    assert "at work" in capsys.readouterr().err
    assert again(store).latest_version() == 3
