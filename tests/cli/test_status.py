"""`splitfed status` on a store: the page, the JSON, the exit status, and the watch."""

from __future__ import annotations

import json
import threading
import time
import uuid

import pytest
from harness_store import Point, batch, drain, plant, record, sgd

from splitfed.accumulator.accumulator import Accumulator
from splitfed.cli.command import main
from splitfed.store.store import GradientStore


@pytest.fixture
def url() -> str:
    """Version 1 of one batch, another that was rejected, and a third that waits."""
    url = f"memory://{uuid.uuid4()}"
    store = GradientStore(url)
    accumulator = Accumulator(Point(), store, sgd())
    accumulator.step()
    store.open_client("a")
    plant(store, batch(0), record(num_samples=16.0))
    plant(store, batch(1), b"junk")
    with pytest.warns(UserWarning, match="batch a/1/1"):
        drain(accumulator)
    plant(store, batch(2, "b"), record(base_version=0))
    return url


def test_the_page(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Version, waiting batches and their staleness, last commit, clients and bytes are on it; all is well."""
    assert main(["status", "--store", url]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["health", "good"] in lines
    (row,) = [line for line in lines if line[:1] == ["body"]]
    assert row[:8] == ["body", "1", "0", "to", "1", "1", "1:", "1"]
    assert " ".join(row[8:]).startswith("1 batches, 16 samples, 1 rejected, ")
    assert ["a", "1", "0,", "2"] in lines
    assert ["b", "-", "1,", "0"] in lines
    assert [line[0] for line in lines if line[-1:] == ["B"]][-1] == "weights"


def test_a_young_store(capsys: pytest.CaptureFixture[str]) -> None:
    """Before the first batch there is a page too: an initial version, no clients."""
    url = f"memory://{uuid.uuid4()}"
    Accumulator(Point(), GradientStore(url), sgd()).step()
    assert main(["status", "--store", url]) == 0
    page = capsys.readouterr().out
    assert "initial, 0 s ago" in page
    assert "client" not in page


def test_json_and_problems(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A program gets one line, and exit status 1 where something is wrong; a person gets the problem and requests."""
    store = GradientStore(url)
    for key in store.blobs.list("body/applied"):
        store.blobs.delete(key)
    store.blobs.create(f"post/a/{'0' * 32}-0000000000.request", [b"1"])
    plant(store, batch(5), b"junk")
    assert main(["status", "--store", url, "--json"]) == 1
    (line,) = capsys.readouterr().out.splitlines()
    assert len(json.loads(line)["problems"]) == 1
    assert main(["status", "--store", url]) == 1
    page = capsys.readouterr().out
    assert page.count("PROBLEM") == 1
    assert "1 wait for a worker" in page
    assert "(and 1 not read)" in page


def test_a_store_being_begun_has_no_last_commit(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A lineage without a version has a row with a dash."""
    store = GradientStore(url)
    store.blobs.create("client/fingerprint.json", [store.blobs.get("body/fingerprint.json") or b""])
    assert main(["status", "--store", url]) == 1
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("client ") and "to -1" in line]
    assert row.endswith("-")


def test_mistakes(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    """No run there is a failure, a pause that is no time a mistake; each is one line."""
    assert main(["status", "--store", f"memory://{uuid.uuid4()}"]) == 1
    assert main(["status", "--store", url, "--watch", "0"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert [line.partition(": error: ")[0] for line in errors] == ["splitfed", "splitfed"]


def test_the_watch_ends_with_ctrl_c(
    url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It looks again after each pause, and an interrupt is a good end."""
    pauses = []

    def wait(event: threading.Event, timeout: float) -> None:
        pauses.append(timeout)
        if len(pauses) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(threading.Event, "wait", wait)
    began = time.monotonic()
    assert main(["status", "--store", url, "--json", "--watch", "30"]) == 0
    assert time.monotonic() - began < 30
    assert (pauses, len(capsys.readouterr().out.splitlines())) == ([30.0] * 3, 3)
