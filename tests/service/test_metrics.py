"""Metrics add up, in the form that Prometheus reads, over one process and over several."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import torch
from harness_store import Point, batch, plant, record

from splitfed import Accumulator, GradientStore
from splitfed.errors import InputError, StoreError
from splitfed.service.metrics import CommitMetrics, Counts, RequestMetrics, listening, newest_version

LINE = re.compile(r'splitfed_[a-z_]+(\{[a-z]+="[^"]*"(,[a-z]+="[^"]*")*\})? \d+(\.\d+)?(e[+-]?\d+)?')


def test_three_requests_by_hand() -> None:
    """2 ms, 200 ms and two minutes: 1, 2 and 3 requests below the bounds of 2.5 ms, 0.25 s and infinity."""
    metrics = RequestMetrics(now=lambda: [newest_version(7)])
    metrics.count("/v1/forward", 200, 0.002, 100, 10)
    metrics.count("/v1/forward", 200, 0.2, 200, 20)
    metrics.count("/v1/forward", 429, 120.0, 0, 5)
    metrics.error("BusyError")
    metrics.under_way(3, 8388608)
    text = metrics.counts.text().decode()
    for line in (
        'splitfed_requests_total{path="/v1/forward",status="200"} 2.0',
        'splitfed_requests_total{path="/v1/forward",status="429"} 1.0',
        'splitfed_errors_total{error="BusyError"} 1.0',
        'splitfed_request_seconds_bucket{le="0.001",path="/v1/forward"} 0.0',
        'splitfed_request_seconds_bucket{le="0.0025",path="/v1/forward"} 1.0',
        'splitfed_request_seconds_bucket{le="0.25",path="/v1/forward"} 2.0',
        'splitfed_request_seconds_bucket{le="+Inf",path="/v1/forward"} 3.0',
        'splitfed_request_seconds_sum{path="/v1/forward"} 120.202',
        'splitfed_request_seconds_count{path="/v1/forward"} 3.0',
        "splitfed_received_bytes_total 300.0",
        "splitfed_sent_bytes_total 35.0",
        "splitfed_requests_in_flight 3.0",
        "splitfed_bytes_in_flight 8.388608e+06",
        "splitfed_version 7.0",
    ):
        assert f"\n{line}\n" in text, line


def test_every_line_has_the_form_and_every_name_its_type() -> None:
    """A scraper reads line by line; the times at which counting began aren't among them."""
    metrics = RequestMetrics()
    metrics.count("/metrics", 200, 0.01, 0, 0)
    lines = metrics.counts.text().decode().splitlines()
    typed = {line.split()[2] for line in lines if line.startswith("# TYPE ")}
    for line in lines:
        if not line.startswith("#"):
            assert LINE.fullmatch(line), line
            name = re.split(r"[{ ]", line)[0]
            assert name in typed or re.sub(r"_(bucket|sum|count)$", "", name) in typed
    assert "_created" not in "\n".join(lines)


def test_graphs_are_counted_once_whoever_notes_them() -> None:
    """What a server has counted is added when it answers and when somebody asks, never twice."""
    uses = {"kept": 2, "recomputed": 0}
    metrics = RequestMetrics(lambda: uses)
    metrics.count("/v1/backward", 200, 0.1, 1, 1)
    uses["kept"] = 5
    for _ in range(2):
        assert 'splitfed_graphs_total{use="kept"} 5.0' in metrics.counts.text().decode()


def test_processes_count_together(tmp_path: Path) -> None:
    """One that has ended still counts, and has nothing under way any more; the last one tells of both."""
    code = """
import os, sys
from splitfed.service.metrics import RequestMetrics, forget_process
metrics = RequestMetrics()
metrics.count("/v1/forward", 200, 0.01, 100, 10)
metrics.under_way(1, 50)
if len(sys.argv) > 1:
    print([line for line in metrics.counts.text().decode().splitlines() if "in_flight " in line and line[0] != "#"])
    forget_process(int(sys.argv[1]), os.environ["PROMETHEUS_MULTIPROC_DIR"])
    print(metrics.counts.text().decode())
else:
    print(os.getpid())
"""
    (tmp_path / "count.py").write_text(code)
    (tmp_path / "files").mkdir()
    # A new interpreter: prometheus_client reads the folder when it is imported.
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path / "files")}

    def count(*others: str) -> str:
        command = [sys.executable, str(tmp_path / "count.py"), *others]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=100).stdout

    second = count(count().strip())
    for line in (
        "['splitfed_requests_in_flight 2.0', 'splitfed_bytes_in_flight 100.0']",
        'splitfed_requests_total{path="/v1/forward",status="200"} 2.0',
        "splitfed_received_bytes_total 200.0",
        "splitfed_requests_in_flight 1.0",
    ):
        assert f"{line}\n" in second, line


def test_commits_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three batches in one commit, one that waits; a store that fails hides nothing else."""
    store = GradientStore(tmp_path, sync="process")
    accumulator = Accumulator(Point(), store, lambda params: torch.optim.SGD(params, lr=1.0))
    metrics = CommitMetrics(store, "body", lambda: 4)
    for seq in range(3):
        plant(store, batch(seq), record())
    commit = accumulator.step()
    assert commit is not None
    metrics.note(commit)
    plant(store, batch(3), record())
    text = metrics.counts.text().decode()
    for line in (
        "splitfed_commits_total 1.0",
        'splitfed_batches_total{outcome="folded"} 3.0',
        'splitfed_batches_total{outcome="stale"} 0.0',
        "splitfed_samples_total 3.0",
        'splitfed_staleness_commits_bucket{le="0.0"} 3.0',
        "splitfed_conflicts_total 4.0",
        "splitfed_version 1.0",
        "splitfed_waiting_batches 1.0",
    ):
        assert f"\n{line}\n" in text, line
    (made,) = re.findall(r"\nsplitfed_last_commit_timestamp_seconds (.*)\n", text)
    assert float(made) == commit.time

    def fail(self: object) -> int:
        raise StoreError("the bucket is gone")

    monkeypatch.setattr(type(store.lineage()), "head", fail)
    text = CommitMetrics(store, "body").counts.text().decode()
    assert "splitfed_version" not in text
    assert "splitfed_commits_total 0.0" in text


def test_an_address_is_listened_at_until_the_end() -> None:
    """Prometheus is answered at the URL; one that is taken is a mistake in one line."""
    metrics = RequestMetrics()
    with listening(metrics.counts, "127.0.0.1", 0) as url:
        with urllib.request.urlopen(url, timeout=10) as answer:
            assert b"splitfed_sent_bytes_total 0.0" in answer.read()
        port = int(url.split(":")[2].partition("/")[0])
        taken = f"can't listen for metrics at '127.0.0.1', port {port}"
        with pytest.raises(InputError, match=taken), listening(Counts(), "127.0.0.1", port):
            pass
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(url, timeout=10)
