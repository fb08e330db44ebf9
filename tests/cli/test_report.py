"""`splitfed report` of a store that only workers and an accumulator have written, in a bucket."""

from __future__ import annotations

from pathlib import Path

import programs
import pytest
import torch
from servers import Place

import splitfed
from splitfed.cli.command import main

APP = """
import splitfed, torch
from torch import nn
torch.manual_seed(0)
half, body = splitfed.split(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)), "1:2")
"""


def test_a_bucket_with_a_worker_is_drawn(
    seaweed: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two owners train through the bucket alone; the page has curve, participants, commits and staleness of it."""
    (tmp_path / "bucket_app.py").write_text(APP)
    monkeypatch.chdir(tmp_path)
    for name, value in seaweed.environment.items():
        monkeypatch.setenv(name, value)
    url = seaweed.url("drawn")
    words = ("work", "bucket_app:body", "--store", url, "--poll", "0.05")
    with programs.program(programs.command, *words, folder=tmp_path) as worker:
        assert worker.stdout.readline().startswith("splitfed: working in")
        torch.manual_seed(0)
        half, body = splitfed.split(torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(3))), "1:2")
        store = splitfed.GradientStore(url)
        accumulator = splitfed.Accumulator(body, store, lambda params: torch.optim.SGD(params, lr=0.1))
        for name in ("site-a", "site-b"):
            splitfed.SplitClient(half, url, name)(torch.ones(3, 2)).sum().backward()
            assert accumulator.step() is not None
    assert main(["report", url, "-o", "page.html"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "page.html"
    page = (tmp_path / "page.html").read_text("utf-8")
    for expected in ("Batches over time", "Who took part", "Updates over time", "Staleness", "2 clients · 2 commits"):
        assert expected in page, expected
    assert page.count('class="commit ') == 2
    assert page.count('<span class="strip">') == 2
