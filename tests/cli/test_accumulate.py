"""`splitfed accumulate`: the same commits as an `Accumulator` in one's own script, and mistakes told in one line."""

from __future__ import annotations

import copy
import io
import os
import signal
import sys
import threading
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch
from harness_store import Point, again, batch, bits, commits, net, plant, record

from splitfed import History, SplitClient, SplitServer
from splitfed.accumulator.accumulator import Accumulator
from splitfed.cli.command import main
from splitfed.store.store import GradientStore

APP = """
import splitfed
import torch
from harness_store import Point

body = Point()
calls = []

def optimizer(params):
    calls.append("optimizer")
    return torch.optim.SGD(params, lr=2.0)

def halving(optimizer):
    return torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)

def sides():
    return splitfed.split(torch.nn.Sequential(*(torch.nn.Linear(1, 1, bias=False) for _ in range(2))), "1")

half, last = sides()
for part in (half, last):
    torch.nn.init.ones_(next(part.parameters()))

def broken(params):
    raise RuntimeError("no such rate")
"""


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> GradientStore:
    """The store of the folder that the verb runs in, where the user's module lies too."""
    (tmp_path / "points.py").write_text(APP)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "points", raising=False)
    return GradientStore(tmp_path / "run", sync="process")


def begun(store: GradientStore, count: int = 0) -> GradientStore:
    """With version 0, and so many batches of gradient (1, 1) that wait."""
    Accumulator(Point(), store, lambda params: torch.optim.SGD(params, lr=1.0))
    for seq in range(count):
        plant(store, batch(seq), record())
    return store


def accumulate(*arguments: str) -> int:
    """Run the verb."""
    return main(["accumulate", "points:body", "--store", "run", "--sync", "process", *arguments])


def test_once_folds_what_waits(store: GradientStore, capsys: pytest.CaptureFixture[str]) -> None:
    """Three gradients of 1 at rate 0.5 move the weights to -0.5; a second call finds nothing to do."""
    begun(store, 3)
    assert accumulate("--optimizer", "SGD", "--lr", "0.5", "--once") == 0
    assert capsys.readouterr().out == "version 1: 3 batches, 3 samples\n"
    assert again(store).load_weights()["w"].tolist() == [-0.5, -0.5]
    assert accumulate("--optimizer", "SGD", "--lr", "0.5", "--once") == 0
    assert capsys.readouterr().out == "nothing to commit: 0 of 1 batches wait\n"
    assert again(store).latest_version() == 1


def test_once_respects_the_policy(store: GradientStore, capsys: pytest.CaptureFixture[str]) -> None:
    """Fewer than --min-batches wait: nothing is committed, and that is no failure."""
    begun(store, 3)
    assert accumulate("--optimizer", "SGD", "--once", "--min-batches", "4") == 0
    assert capsys.readouterr().out == "nothing to commit: 3 of 4 batches wait\n"


def test_it_begins_a_store(store: GradientStore) -> None:
    """It may be started before any server: version 0 is the body as APP has it."""
    assert accumulate("--optimizer", "Adam", "--once") == 0
    assert store.load_weights()["w"].tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("arguments", "make"),
    [
        (["--optimizer", "SGD", "--lr", "0.5", "--momentum", "0.9"], {"lr": 0.5, "momentum": 0.9}),
        (["--optimizer", "AdamW", "--lr", "0.1", "--weight-decay", "0.2"], {"lr": 0.1, "weight_decay": 0.2}),
    ],
)
def test_the_optimizer_is_the_class_with_its_settings(
    store: GradientStore, tmp_path: Path, arguments: list[str], make: dict[str, float]
) -> None:
    """Two commits through the verb have the bits of two commits of an `Accumulator`."""
    begun(store)
    twin = begun(GradientStore(tmp_path / "twin", sync="process"))
    kind: Any = getattr(torch.optim, arguments[1])
    own = Accumulator(Point(), twin, lambda params: kind(params, **make))
    for seq in range(2):
        for here in (store, twin):
            plant(here, batch(seq), record((1.0, -3.0)))
        assert accumulate(*arguments, "--once") == 0
        assert own.step() is not None
    assert bits(again(store).load_weights()) == bits(again(twin).load_weights())


def test_factories_of_the_users_own(store: GradientStore) -> None:
    """A gradient of 1 at rate 2, then at rate 1: -2, then -3."""
    begun(store, 1)
    named = ["--optimizer", "points:optimizer", "--lr-scheduler", "points:halving", "--once"]
    assert accumulate(*named) == 0
    assert again(store).load_weights()["w"].tolist() == [-2.0, -2.0]
    plant(store, batch(1), record(base_version=1))
    assert accumulate(*named) == 0
    assert again(store).load_weights()["w"].tolist() == [-3.0, -3.0]


@pytest.mark.filterwarnings("ignore:version 1 .* other settings")
def test_stale_batches_are_left_out_and_told(store: GradientStore, capsys: pytest.CaptureFixture[str]) -> None:
    """With --max-staleness 0 a batch of version 0 is stale once version 1 is there."""
    begun(store, 1)
    accumulate("--optimizer", "SGD", "--once")
    plant(store, batch(1), record())
    plant(store, batch(2), record(base_version=1))
    accumulate("--optimizer", "SGD", "--once", "--max-staleness", "0")
    assert capsys.readouterr().out.splitlines()[1] == "version 2: 1 batch, 1 samples, 1 stale"


@pytest.mark.filterwarnings("ignore:version 1 .* other settings")
def test_staleness_can_weigh_less(store: GradientStore) -> None:
    """One commit behind weighs 1/sqrt(2) of a gradient of 1, at rate 1."""
    begun(store, 1)
    accumulate("--optimizer", "SGD", "--lr", "1", "--once")
    plant(store, batch(1), record())
    accumulate("--optimizer", "SGD", "--lr", "1", "--once", "--staleness-weight", "inverse_sqrt")
    assert again(store).load_weights()["w"][0].item() == pytest.approx(-1 - 2**-0.5)


def test_a_group_is_committed_with_its_halves(store: GradientStore, capsys: pytest.CaptureFixture[str]) -> None:
    """By the settings of the mode and one optimizer, whose rate may be another for the halves; then nothing waits."""
    import points  # type: ignore[import-not-found]

    named = ["--mode", "grouped", "--group", "2", "--half", "points:half", "--optimizer", "SGD", "--lr", "0.5"]
    arguments = ["accumulate", "points:last", "--store", "run", "--sync", "process", *named, "--half-lr", "0.25"]
    assert main([*arguments, "--once"]) == 0
    assert capsys.readouterr().out == "nothing to commit: 0 of 2 batches wait\n"
    server = SplitServer(points.last, store)
    for name in "ab":
        client = SplitClient(copy.deepcopy(points.half), server, name)
        client.pull()
        client(torch.ones(1, 1)).sum().backward()
        client.push(gradient=True)
    assert main([*arguments, "--once"]) == 0
    assert capsys.readouterr().out == "version 1: 2 batches, 2 samples\n"
    assert (store.pair().body, store.pair().client) == (1, 1)
    (body,), (half,) = (again(store).load_weights(lineage=name).values() for name in ("body", "client"))
    assert (body.item(), half.item()) == (0.5, 0.75)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--mode", "grouped", "--optimizer", "SGD"], "expected APP as the body, --half as the client half"),
        (["--half", "points:half", "--optimizer", "SGD"], "--half and --half-lr go with --mode grouped"),
        (["--group", "2", "--optimizer", "SGD"], "its clients publish no gradients"),
        (["--mode", "grouped", "--min-batches", "2", "--half", "points:half", "--optimizer", "SGD"], "give group=2"),
        (["--mode", "grouped", "--group", "0", "--half", "points:half", "--optimizer", "SGD"], "group is 0"),
        (["--mode", "grouped", "--half", "points:calls", "--optimizer", "SGD"], "expected the client half as an nn"),
        (["--optimizer", "Adagrad2"], "isn't a class of torch.optim"),
        (["--optimizer", "Optimizer2", "--lr", "1"], "isn't a class of torch.optim"),
        (["--optimizer", "Adam", "--momentum", "0.9"], "--momentum: torch.optim.Adam takes none"),
        (["--optimizer", "SGD", "--lr", "-1"], "torch.optim.SGD refuses {'lr': -1.0}"),
        (["--optimizer", "SGD", "--lr", "nan"], "--lr is nan: expected a finite number"),
        (["--optimizer", "points:optimizer", "--lr", "1"], "--lr goes with a class of torch.optim"),
        (["--optimizer", "points:nothing"], "--optimizer 'points:nothing'"),
        (["--optimizer", "points:broken"], "--optimizer 'points:broken' raised RuntimeError: no such rate"),
        (["--optimizer", "SGD", "--min-batches", "0"], "min_batches is 0"),
        (["--optimizer", "SGD", "--threads", "0"], "--threads is 0"),
        (["--optimizer", "SGD", "--device", "gpu"], "--device 'gpu' can't be used"),
        (["--optimizer", "SGD", "--poll", "0"], "--poll is 0.0"),
        (["--optimizer", "SGD", "--lineage", "halves"], "expected 'body', 'client'"),
        (["--optimizer", "SGD", "--lr", "fast"], "invalid float value"),
        ([], "--optimizer"),
    ],
)
def test_a_mistake_is_told_in_one_line(
    store: GradientStore, capsys: pytest.CaptureFixture[str], arguments: list[str], told: str
) -> None:
    """Exit status 2, one line, no traceback."""
    assert accumulate(*arguments, "--once") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("splitfed: error: ")
    assert told in line


def test_another_body_is_refused(store: GradientStore, capsys: pytest.CaptureFixture[str]) -> None:
    """The store's architecture isn't APP's: no mistake in the arguments, but a failure."""
    Accumulator(net(), store, lambda params: torch.optim.SGD(params, lr=1.0))
    assert accumulate("--optimizer", "SGD", "--once") == 1
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_sigterm_ends_it_after_the_commit(store: GradientStore, capsys: pytest.CaptureFixture[str]) -> None:
    """It commits what comes while it runs, and a signal ends it with status 0; the signal's handler is as before."""
    begun(store, 1)
    before = signal.getsignal(signal.SIGTERM)

    def end() -> None:
        while again(store).latest_version() < 1:
            threading.Event().wait(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    ending = threading.Thread(target=end)
    ending.start()
    assert accumulate("--optimizer", "SGD", "--lr", "1", "--poll", "0.01") == 0
    ending.join(60)
    assert capsys.readouterr().out == "splitfed: accumulating body in run\nversion 1: 1 batch, 1 samples\n"
    assert signal.getsignal(signal.SIGTERM) is before
    assert len(commits(store)) == 2


def test_a_commit_folds_so_many_at_most(store: GradientStore, capsys: pytest.CaptureFixture[str]) -> None:
    """Five wait: two commits of two, and one of what is left; below the least it is refused."""
    begun(store, 5)
    for _ in range(3):
        assert accumulate("--optimizer", "SGD", "--lr", "1", "--max-batches", "2", "--once") == 0
    assert [commit.num_batches for commit in commits(store)[1:]] == [2, 2, 1]
    assert accumulate("--optimizer", "SGD", "--min-batches", "3", "--max-batches", "2", "--once") != 0
    assert "max_batches is 2: expected at least min_batches=3" in capsys.readouterr().err


def test_each_commit_is_a_line_of_the_history(store: GradientStore, tmp_path: Path) -> None:
    """Those that were there before it too; `report` draws the file."""
    begun(store, 2)
    assert accumulate("--optimizer", "SGD", "--lr", "1", "--once") == 0
    plant(store, batch(2), record(base_version=1))
    assert accumulate("--optimizer", "SGD", "--lr", "1", "--once", "--history", "kept.jsonl") == 0
    found = History.load(tmp_path / "kept.jsonl")
    assert [(row["version"], row["folded"]) for row in found.commits("body")] == [(1, {"a": 2}), (2, {"a": 1})]
    assert main(["report", "kept.jsonl"]) == 0
    assert "Batches over time" in (tmp_path / "report.html").read_text("utf-8")


def test_prometheus_is_answered_while_it_runs(store: GradientStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the address that it prints: the commit that it has made, and that nothing waits."""
    begun(store, 3)
    found: list[str] = []
    printed = io.StringIO()  # pytest's own loses what is written in another thread while it is read
    monkeypatch.setattr(sys, "stdout", printed)
    pause = threading.Event()

    def scrape() -> None:
        while "version 1" not in printed.getvalue():
            pause.wait(0.01)
        url = printed.getvalue().partition("splitfed: metrics on ")[2].split()[0]
        with urllib.request.urlopen(url, timeout=60) as answer:
            found.extend(answer.read().decode().splitlines())
        os.kill(os.getpid(), signal.SIGTERM)

    scraping = threading.Thread(target=scrape)
    scraping.start()
    assert accumulate("--optimizer", "SGD", "--lr", "1", "--poll", "0.01", "--metrics-port", "0") == 0
    scraping.join(60)
    assert {'splitfed_batches_total{outcome="folded"} 3.0', "splitfed_version 1.0", "splitfed_waiting_batches 0.0"} <= {
        *found
    }


def test_metrics_without_their_library_are_a_mistake(
    store: GradientStore, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message names the extra, and the store isn't begun."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert accumulate("--optimizer", "SGD", "--metrics-port", "0", "--once") == 2
    assert 'pip install ".[metrics]"' in capsys.readouterr().err
    assert not Path("run").exists()
