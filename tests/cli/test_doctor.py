"""`splitfed doctor`: what is well is told, what isn't is told with its cure, and the exit status says which."""

from __future__ import annotations

import importlib.util
import re
import uuid
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
from harness_store import Point, batch, drain, plant, record, sgd, spoil
from servers import Place

import splitfed
from splitfed.accumulator.accumulator import Accumulator
from splitfed.blobs.memory import MemoryBlobs
from splitfed.cli import doctor
from splitfed.cli.command import main
from splitfed.errors import TokenError, UnreachableError
from splitfed.service.http.client import HttpTransport
from splitfed.store.store import GradientStore


@pytest.fixture
def url() -> str:
    """A store at version 1."""
    url = f"memory://{uuid.uuid4()}"
    accumulator = Accumulator(Point(), GradientStore(url), sgd())
    accumulator.step()
    plant(GradientStore(url), batch(0), record())
    drain(accumulator)
    return url


def report(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, tuple[str, str]]]:
    """Exit status, and the report: of each check its state and detail."""
    status = main(["doctor", *arguments])
    lines = capsys.readouterr().out.splitlines()
    rows = [re.fullmatch(r"(\w+) +(.+?)  +(.+)", line) for line in lines[: lines.index("")]]
    return status, {row[2]: (row[1], row[3]) for row in rows if row is not None}


def test_a_good_store(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Everything passes, and nothing of the checks is left in the store."""
    before = GradientStore(url).blobs.list("")
    status, found = report(capsys, "--store", url)
    assert status == 0
    assert found["create-if-absent"][0] == found["read after write"][0] == found["health"][0] == "ok"
    assert found["lineage body"][1].startswith("version 1 is what was committed: 8 B")
    assert found["numerics class"][0] == "ok"
    assert GradientStore(url).blobs.list("") == before


def test_an_empty_place_is_fit_to_begin(capsys: pytest.CaptureFixture[str]) -> None:
    """A store before its run passes, with a note."""
    status, found = report(capsys, "--store", f"memory://{uuid.uuid4()}")
    assert (status, found["run"][0]) == (0, "note")


def test_a_folder_that_is_not_there_is_not_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It may be mistyped: the report names what is near, and says how to have it checked all the same."""
    (tmp_path / "demo").mkdir()
    for name in ("dmeo", "dmeo/deeper/run"):
        status, found = report(capsys, "--store", str(tmp_path / name))
        assert (status, found["store"][0]) == (1, "FAIL")
        assert "has no 'dmeo'; the nearest there are ['demo']. Nothing was made" in found["store"][1]
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]
    (tmp_path / "file").write_text("x")
    assert "is no folder" in report(capsys, "--store", str(tmp_path / "file"))[1]["store"][1]


def test_nothing_stays_in_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The probe clears up behind itself, folders and all."""
    status, found = report(capsys, "--store", str(tmp_path))
    assert (status, found["create-if-absent"][0]) == (0, "ok")
    assert list(tmp_path.iterdir()) == []


def test_damage_is_found(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A flipped bit in the newest weights fails its lineage; a missing optimizer state fails the health."""
    store = GradientStore(url)
    (key,) = [key for key in store.blobs.list("body/weights") if "/0000000001" in key]
    spoil(store, key)
    status, found = report(capsys, "--store", url)
    assert status == 1
    assert found["lineage body"][0] == "FAIL"
    assert "GradientStore.rollback()" in found["lineage body"][1]
    for name in store.blobs.list("body/optimizer"):
        store.blobs.delete(name)
    assert report(capsys, "--store", url)[1]["health"][0] == "FAIL"


def test_another_numerics_class_is_a_note(
    url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that computes other bits may take part, and is told what differs."""
    monkeypatch.setattr("torch.get_num_threads", lambda: 17)
    status, found = report(capsys, "--store", url)
    assert (status, found["numerics class"][0]) == (0, "note")
    assert "17 threads" in found["numerics class"][1]


def test_storage_that_gives_back_something_else(
    url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An object that isn't what was written fails, however well the creates behave."""
    real = MemoryBlobs.get
    monkeypatch.setattr(MemoryBlobs, "get", lambda self, key: None if key.endswith("/speed") else real(self, key))
    status, found = report(capsys, "--store", url)
    assert (status, found["read after write"][0]) == (1, "FAIL")


def test_a_store_that_ignores_the_condition(
    ignoring: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It fails with what could be used instead, and the credentials in the environment are enough to find out."""
    for name, value in ignoring.environment.items():
        monkeypatch.setenv(name, value)
    status, found = report(capsys, "--store", ignoring.url())
    assert (status, found["store"][0]) == (1, "FAIL")
    assert "StoreCapabilityError" in found["store"][1]
    assert "use a local directory, or an object store with conditional writes" in found["store"][1]


def test_packages(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing extra is a note with its install line, since not everyone needs it."""
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "s3fs" else real(name))
    status, found = report(capsys)
    assert status == 0
    assert found["extra s3"] == (
        "note",
        's3fs not installed; if you need it: pip install ".[s3]" in a clone of splitfed',
    )
    assert found["extra http"][0] == "ok"
    monkeypatch.setattr(doctor, "version", raising(PackageNotFoundError("x")))
    assert doctor._version("mystery") == "of unknown version"


def raising(error: Exception) -> Any:
    """A function that raises."""

    def call(*args: object, **kwargs: object) -> Any:
        raise error

    return call


def answering(monkeypatch: pytest.MonkeyPatch, ready: Any, status: Any) -> None:
    """Let every service answer so."""
    monkeypatch.setattr(HttpTransport, "ready", ready)
    monkeypatch.setattr(HttpTransport, "status", status)


def test_a_server(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its version is compared with ours, the token tried, and what its status says passed on."""
    good = {"status": "ready", "version": 3, "splitfed": splitfed.__version__}
    answering(monkeypatch, lambda self: good, lambda self: {"problems": []})
    status, found = report(capsys, "--server", "http://127.0.0.1:1")
    assert (status, found["server is ready"][0], found["access"][0]) == (0, "ok", "ok")
    assert "at version 3" in found["server is ready"][1]
    answering(monkeypatch, lambda self: {**good, "splitfed": "9"}, lambda self: {"problems": ["the weights are gone"]})
    status, found = report(capsys, "--server", "http://127.0.0.1:1")
    assert (status, found["server version"][0]) == (1, "note")
    assert found["the server's store"] == ("FAIL", "the weights are gone")
    answering(monkeypatch, lambda self: good, raising(TokenError("a token is needed")))
    status, found = report(capsys, "--server", "http://127.0.0.1:1")
    assert (status, found["server"]) == (1, ("FAIL", "TokenError: a token is needed"))
    answering(monkeypatch, raising(UnreachableError("nobody there")), None)
    assert report(capsys, "--server", "http://127.0.0.1:1")[1]["server"][0] == "FAIL"


def test_a_server_needs_the_extra(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without urllib3 the report says what to install."""
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "urllib3" else real(name))
    status, found = report(capsys, "--server", "http://127.0.0.1:1")
    assert (status, found["server"]) == (
        1,
        ("FAIL", 'urllib3 isn\'t installed: pip install ".[http]" in a clone of splitfed'),
    )
