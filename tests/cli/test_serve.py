"""`splitfed serve`: who is let in, what is limited, and mistakes in one line."""

from __future__ import annotations

import argparse
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from splitfed.cli import serve
from splitfed.cli.command import main
from splitfed.server.server import SplitServer
from splitfed.service.http import serve as serving
from splitfed.service.http.auth import new_token
from splitfed.service.http.limits import Limits
from splitfed.store import GradientStore


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder has a body."""
    (tmp_path / "my_body.py").write_text("from torch import nn\nbody = nn.Linear(2, 2)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "my_body", raising=False)
    return tmp_path


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What would be served: the app, its limits and its place; nothing listens."""
    found: list[Any] = []

    def note(make: Any, limits: Limits, place: serving.Place, listening: Any) -> None:
        found.extend((make(), limits, place))
        listening("http://127.0.0.1:1")

    monkeypatch.setattr(serving, "serve", note)
    return found


def run(*arguments: str) -> int:
    """The verb, on a store of this folder."""
    return main(["serve", "my_body:body", "--store", "run", *arguments])


def test_this_machine_only_is_the_default(served: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    """And is said."""
    assert run() == 0
    assert served[1:] == [Limits(), serving.Place()]
    out, err = capsys.readouterr()
    assert out == "splitfed: serving on http://127.0.0.1:1\n"
    assert "for this machine only" in err


def test_limits_and_place_are_the_arguments(served: list[Any]) -> None:
    """Each arrives."""
    assert run("--max-body", "1000", "--max-in-flight", "2000", "--max-requests", "3", "--max-connections", "4") == 0
    assert served[1] == Limits(body=1000, in_flight=2000, requests=3, connections=4)
    served.clear()
    assert run("--max-tensors", "5", "--max-samples", "6", "--receive-seconds", "7.5", "--port", "0") == 0
    assert served[1] == Limits(tensors=5, samples=6, receive_seconds=7.5)
    served.clear()
    assert run("--workers", "2", "--drain-seconds", "9", "--tls-cert", "c", "--tls-key", "k") == 0
    assert served[2] == serving.Place(workers=2, drain_seconds=9, certificate="c", key="k")


def test_others_are_let_in_with_tokens_or_in_so_many_words(
    served: list[Any], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not by --host alone."""
    assert run("--host", "0.0.0.0") == 2
    assert "--tokens FILE" in capsys.readouterr().err
    assert not served
    assert run("--host", "0.0.0.0", "--insecure") == 0
    assert "for everybody" in capsys.readouterr().err
    new_token(folder / "tokens", "a")
    assert run("--host", "0.0.0.0", "--tokens", "tokens") == 0
    assert "for clients with a token" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tokens", "nowhere"], "token file nowhere can't be read"),
        (["--workers", "0"], "--workers takes 1 or more"),
        (["--workers", "2", "--store", "memory://run"], "each would have a memory://run of its own"),
        (["--tls-key", "k"], "--tls-key needs --tls-cert"),
        (["--max-body", "0"], "limit body is 0"),
        (["--max-in-flight", "5"], "less than one body may have"),
        (["--port", "x"], "invalid int value"),
        (["--store", "s3:/bucket"], "expected s3://bucket, or './s3:/bucket' for a folder of that name"),
        (["--store", "http://host:8000"], "is a service's URL"),
        (["--shared", "--store", "memory://run"], "shared=True is about the modes of local files"),
        (["--loss", "torch.nn.functional:cros_entropy"], "nearest there are ['cross_entropy'"),
        (["--device", "cuda:99"], "--device 'cuda:99' can't be used"),
    ],
)
def test_a_mistake_is_one_line_and_exit_status_2(
    served: list[Any], folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    """No traceback, and no store."""
    assert run(*arguments) == 2
    assert not (folder / "run").exists()
    err = capsys.readouterr().err
    assert said in err
    assert "Traceback" not in err
    assert err.count("\n") == 1


def test_what_isn_t_installed_is_told_with_its_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one line."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "uvicorn" else object())
    assert run() == 2
    assert 'serve needs uvicorn: pip install ".[http]" in a clone of splitfed' in capsys.readouterr().err


def test_the_settings_of_a_worker_can_cross_a_process(served: list[Any]) -> None:
    """Each makes its own app from them."""
    import pickle

    found = serve.limits(argparse.Namespace(**dict.fromkeys((*LIMITS, "receive_seconds"))))
    assert pickle.loads(pickle.dumps(found)) == Limits()


LIMITS = ("max_body", "max_in_flight", "max_requests", "max_connections", "max_tensors", "max_samples")


def test_the_store_is_named_without_its_credentials(
    served: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Logs are read by others."""

    def opened(arguments: argparse.Namespace) -> SplitServer:
        store = GradientStore(f"memory://{uuid.uuid4()}", sync="process")
        monkeypatch.setattr(store.blobs, "url", "s3://***@bucket/run", raising=False)
        return SplitServer(nn.Linear(2, 2), store)

    monkeypatch.setattr(serve, "open_server", opened)
    assert main(["serve", "my_body:body", "--store", "s3://key:secret@bucket/run"]) == 0
    out, err = capsys.readouterr()
    assert "my_body:body from s3://***@bucket/run, for" in err
    assert "secret" not in out + err


def test_it_leaves_what_still_computes(served: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that goes on would hold up the end of the process; without one it ends as any other."""
    left: list[bool] = []
    monkeypatch.setattr(serving, "leave", lambda: left.append(True))
    for computing in (0, 1):
        monkeypatch.setattr(serving, "serve", lambda *args, found=computing: found)
        assert run() == 0
    assert left == [True]
