"""What a user types at a prompt prints as one line that says what it is, and reads nothing for it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import toy
from harness_store import Point, batch, plant, record

from splitfed import Accumulator, Federation, GradientStore, History, SplitServer
from splitfed.blobs.local import LocalBlobs


def sgd(params: object) -> torch.optim.Optimizer:
    """SGD at rate 1."""
    return torch.optim.SGD(params, lr=1.0)  # type: ignore[arg-type]


def test_one_line_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the place, the version and what matters most of the settings."""
    url = str(tmp_path / "run")
    store = GradientStore(url, sync="process")
    accumulator = Accumulator(Point(), store, sgd)
    bounded = Accumulator(Point(), store, sgd, max_batches=3)
    half = Accumulator(Point(), store, sgd, lineage="client")
    federation = Federation(accumulator, half, mode="sflv2", clients_per_round=2)
    server = SplitServer(Point(), store)
    for seq in range(2):
        plant(store, batch(seq), record())
    commit = accumulator.step()
    history = History()
    history.append({"kind": "run"})
    history.append({"kind": "round", "round": 1})
    read: list[str] = []
    monkeypatch.setattr(LocalBlobs, "get", lambda self, key: read.append(key))
    shown = store.shown
    assert repr(accumulator) == f"Accumulator({shown!r}, lineage='body', version=1, min_batches=1)"
    assert repr(bounded) == f"Accumulator({shown!r}, lineage='body', version=1, min_batches=1, max_batches=3)"
    assert repr(server) == f"SplitServer({shown!r}, lineage='body', version=1, device='cpu')"
    assert repr(commit) == ("Commit(version=1, kind='fold', num_batches=2, num_samples=2, staleness={0: 2})")
    assert repr(federation) == (
        f"Federation({shown!r}, mode='sflv2', clients_per_round=2, min_clients=1, deadline=None)"
    )
    assert repr(History(store)) == f"History({shown!r})"
    assert (repr(History()), repr(history)) == ("History(in memory)", "History(in memory: 1 run, 1 round)")
    assert read == []


def test_a_simulation_says_how_far_it_is() -> None:
    """In rounds."""
    run = toy.run(mode="sflv2", rounds=2)
    assert repr(run) == "Simulation('simulation', mode='sflv2': 0 of 2 rounds, 3 clients)"
    next(run)
    assert repr(run) == "Simulation('simulation', mode='sflv2': 1 of 2 rounds, 3 clients)"
    run.close()
