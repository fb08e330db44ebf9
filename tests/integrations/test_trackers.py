"""Trackers hold every metric of a run: the real packages, without a network."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import toy
from pages import ROOT, blocks, run

from splitfed import History
from splitfed.tracking.callbacks import Log, MLflow, scalars

ROUNDS = 2


def trained(*callbacks: Any) -> list[dict[str, Any]]:
    """The rows of a run of two rounds in which three clients train, with a callback besides."""
    history = History()
    for _ in toy.run(mode="sflv2", rounds=ROUNDS, evaluate=toy.examples(), callbacks=[history, *callbacks]):
        pass
    return history.rows


def expected(rows: list[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """Each metric of the rows with its steps: rounds by number, commits by version."""
    found: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        for name, value in scalars(row).items():
            found.setdefault(name, []).append((row["round"] if row["kind"] == "round" else row["version"], value))
    return found


def test_mlflow_holds_every_metric(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each value at its round or version, and the settings as parameters; the run that it began is ended."""
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.chdir(tmp_path)
    mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())
    rows = trained(MLflow())
    assert mlflow.active_run() is None
    client = mlflow.MlflowClient()
    (found,) = client.search_runs(["0"])
    assert (found.info.status, found.info.run_name) == ("FINISHED", "simulation")
    assert found.data.params["mode"] == "sflv2"
    assert found.data.params["batch_size"] == "4"
    wanted = expected(rows)
    assert {"round/accuracy", "commit/body/num_batches", "client/train_loss/client-0"} <= set(wanted)
    assert set(found.data.metrics) == set(wanted)
    for name, points in wanted.items():
        held = [(one.step, one.value) for one in client.get_metric_history(found.info.run_id, name)]
        assert sorted(held) == sorted(points), name
    with mlflow.start_run() as own:
        trained(MLflow(clients=False))
        assert mlflow.active_run() is not None  # whose it is ends it
    assert set(client.get_run(own.info.run_id).data.metrics) == {
        name for name in wanted if not name.startswith("client/")
    }


def lines_of(path: Path) -> Iterator[dict[str, Any]]:
    """The metrics on disk, a dict for each step: records of a LevelDB log, in blocks of 32 KiB, as protocol buffers."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, parts = path.read_bytes(), 7, b""  # after the file's own header
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            record = Record.FromString(parts)
            parts = b""
            if record.HasField("history"):
                yield {
                    "/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item
                }


def test_wandb_holds_every_metric(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step a row, none dropped, each with all its metrics; rounds and versions are there as axes."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    with wandb.init(mode="offline", dir=tmp_path, project="toy") as tracked:
        rows = trained(Log(tracked))
    (path,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    held = {line["_step"]: line for line in lines_of(path)}
    told = [row for row in rows if scalars(row)]
    assert list(held) == list(range(len(told)))
    for line, row in zip(held.values(), told, strict=True):
        axis = "round" if row["kind"] == "round" else f"version/{row['lineage']}"
        wanted = {**scalars(row), axis: row["round"] if row["kind"] == "round" else row["version"]}
        assert {name: value for name, value in line.items() if not name.startswith("_")} == wanted


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of `docs/trackers.md`, one after another in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    pytest.importorskip("mlflow").set_tracking_uri((tmp_path / "mlruns").as_uri())
    pytest.importorskip("wandb").teardown()  # it remembers the folder of an earlier test
    page = ROOT / "docs/trackers.md"
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for line, code in blocks(page, "python"):
        run(code, str(page), line, namespace)
    assert list((tmp_path / "mlruns").glob("*/*/metrics/round/accuracy"))
    assert list((tmp_path / "wandb").glob("offline-run-*"))
