"""`splitfed work` and the arguments that it shares with `serve`."""

from __future__ import annotations

import os
import signal
import threading
import urllib.request
from pathlib import Path

import pytest
import torch
from harness_post import answer, post, transport
from harness_requests import ahead, body

from splitfed.cli.command import main
from splitfed.protocol.messages import LossRequest, PullRequest
from splitfed.store.store import GradientStore


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> GradientStore:
    """The store of the folder that the verb runs in."""
    monkeypatch.chdir(tmp_path)
    return GradientStore(tmp_path / "run", sync="process")


def work(*arguments: str) -> int:
    """Run the verb; the body doubles two features."""
    return main(["work", "harness_requests:body", "--store", "run", "--sync", "process", *arguments])


def test_once_answers_what_waits(store: GradientStore, capsys: pytest.CaptureFixture[str]) -> None:
    """A forward that was posted before any worker ran is answered: twice the input."""
    place = post(store, ahead())
    assert work("--once") == 0
    assert capsys.readouterr().out == "splitfed: 1 answered\n"
    found = answer(store, place, "forward").outputs
    assert found.tolist() == [[2.0, -4.0], [6.0, 8.0]]


def test_a_loss_function_by_name(store: GradientStore) -> None:
    """With --loss the worker answers `client.loss()`; the labels travel."""
    place = post(store, LossRequest(ahead(), 0, torch.tensor([0, 1]), 2.0))
    assert work("--once", "--loss", "torch.nn.functional:cross_entropy") == 0
    expected = torch.nn.functional.cross_entropy(body()(torch.tensor([[1.0, -2.0], [3.0, 4.0]])), torch.tensor([0, 1]))
    assert answer(store, place, "loss").loss.equal(expected)


def test_sigterm_ends_it(store: GradientStore, capsys: pytest.CaptureFixture[str]) -> None:
    """A client is answered while it runs; then a signal ends it with status 0."""

    def client() -> None:
        assert transport(store.url).pull(PullRequest("a")).version == -1
        os.kill(os.getpid(), signal.SIGTERM)

    asking = threading.Thread(target=client)
    asking.start()
    assert work("--poll", "0.01") == 0
    asking.join(60)
    assert capsys.readouterr().out == "splitfed: working in run\n"


def test_prometheus_is_answered_while_it_works(store: GradientStore, capsys: pytest.CaptureFixture[str]) -> None:
    """At the address that it prints: one pull that was answered, and one that failed, with its class."""
    found: list[str] = []

    def client() -> None:
        post(store, PullRequest("b"), client_id="a")
        transport(store.url).pull(PullRequest("a"))
        url = capsys.readouterr().out.partition("splitfed: metrics on ")[2].split()[0]
        while not any(line.startswith("splitfed_errors_total") for line in found):
            with urllib.request.urlopen(url, timeout=60) as told:
                found[:] = told.read().decode().splitlines()
        os.kill(os.getpid(), signal.SIGTERM)

    asking = threading.Thread(target=client)
    asking.start()
    assert work("--poll", "0.01", "--metrics-port", "0") == 0
    asking.join(60)
    assert 'splitfed_requests_total{path="post/pull",status="200"} 1.0' in found
    assert 'splitfed_errors_total{error="IdError"} 1.0' in found


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--poll", "0"], "--poll is 0.0"),
        (["--claim-seconds", "0"], "claim_seconds is 0.0"),
        (["--keep-graphs", "-1"], "--keep-graphs is -1"),
        (["--threads", "0"], "--threads is 0"),
        (["--threads", "99999999999"], "--threads is 99999999999"),
        (["--loss", "torch:nothing"], "--loss 'torch:nothing'"),
        (["--loss", "torch:__version__"], "expected a function"),
        (["--device", "nowhere"], "--device 'nowhere' can't be used"),
    ],
)
def test_a_mistake_is_told_in_one_line(
    store: GradientStore, capsys: pytest.CaptureFixture[str], arguments: list[str], told: str
) -> None:
    """Exit status 2, one line, no traceback."""
    assert work("--once", *arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert told in line


def test_threads_are_set_before_anything_is_computed(store: GradientStore) -> None:
    """The numerics class of the store has the number that was asked for."""
    assert work("--once", "--threads", "1") == 0
    assert torch.get_num_threads() == 1
    assert b'"threads": 1' in bytes(store.blobs.get("format.json") or b"")


def test_a_device_that_is_here(store: GradientStore) -> None:
    """Every machine has a CPU."""
    assert work("--once", "--device", "cpu") == 0
