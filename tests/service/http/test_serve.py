"""Running the service: sockets, workers that die, HTTPS, and an end that loses no request."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import urllib3
from processes import CONTEXT
from programs import Program, command, program
from torch import nn

import splitfed
from splitfed.errors import InputError
from splitfed.protocol.messages import PullRequest
from splitfed.service.http import serve as serving
from splitfed.service.http.client import HttpTransport
from splitfed.service.http.limits import Limits
from splitfed.service.http.serve import Place, is_loopback, serve

APP = """
import os, time
import torch
from torch import nn

class Slow(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)
    def forward(self, x):
        if x.shape[0] == 3:
            open("begun", "w").close()
            time.sleep(1.0)
        if x.shape[0] == 4:
            open("begun", "w").close()
            time.sleep(600.0)
        return self.layer(x)

def body():
    torch.manual_seed(0)
    return Slow()
"""
SETTINGS = ["--store", "run", "--sync", "process", "--port", "0"]


@contextmanager
def process(folder: Path, *arguments: str) -> Iterator[tuple[Program, str]]:
    """`splitfed serve` as a process, and the URL that it prints."""
    (folder / "site_app.py").write_text(APP)
    words = ["serve", "site_app:body", *SETTINGS, *arguments]
    with program(command, *words, folder=folder) as found:
        line = found.stdout.readline()
        assert line.startswith("splitfed: serving on http"), found.communicate().stderr
        yield found, line.split()[-1]


def half() -> nn.Module:
    """Nothing but the cut."""
    return nn.Sequential(splitfed.CutPoint())


def test_sigterm_lets_a_request_end_and_exits_with_0(tmp_path: Path) -> None:
    """A forward that is computing is answered; a new request finds nobody; nothing is on standard error but the log."""
    with process(tmp_path, "--receive-seconds", "60") as (server, url):
        client = splitfed.SplitClient(half(), url, "a", patience=0.0)
        x = torch.ones(3, 2)
        with ThreadPoolExecutor(1) as pool:
            under_way = pool.submit(client, x)
            while not (tmp_path / "begun").exists():
                time.sleep(0.01)
            server.send_signal(signal.SIGTERM)
            assert under_way.result().shape == (3, 2)
        ended = server.communicate(timeout=60)
        assert ended.returncode == 0
        assert "Traceback" not in ended.stderr
        with pytest.raises(splitfed.UnreachableError):
            client(x)


def test_a_worker_that_is_killed_is_started_anew(tmp_path: Path) -> None:
    """The port stays, and requests go on; SIGTERM ends them all. What the killed ones have counted stays counted."""
    with process(tmp_path, "--workers", "2") as (server, url):
        transport = HttpTransport(url)
        transport.pull(PullRequest("a"))
        children = subprocess.run(["pgrep", "-P", str(server.pid)], capture_output=True, text=True, check=True).stdout
        workers = {int(pid) for pid in children.split() if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()}
        assert len(workers) == 2
        variables = Path(f"/proc/{min(workers)}/environ").read_text().split("\0")
        (counted,) = [Path(one.partition("=")[2]) for one in variables if one.startswith("PROMETHEUS_MULTIPROC_DIR=")]
        for pid in workers:
            os.kill(pid, signal.SIGKILL)
        assert transport.pull(PullRequest("a")).version == -1
        # Another connection each, so any worker answers.
        for _ in range(4):
            with urllib.request.urlopen(f"{url}/metrics", timeout=60) as answer:
                assert 'splitfed_requests_total{path="/v1/pull",status="200"} 2.0' in answer.read().decode()
        server.send_signal(signal.SIGTERM)
        ended = server.communicate(timeout=120)
        assert ended.returncode == 0
        assert not counted.exists()
        assert "another one begins" in ended.stderr


def test_https_with_the_certificate_that_the_client_trusts(tmp_path: Path) -> None:
    """And not without: that fails at once, since no retry mends it."""
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"),
            *("-days", "2", "-keyout", str(key), "-out", str(certificate)),
            *("-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"),
        ],
        check=True,
        capture_output=True,
    )
    with process(tmp_path, "--tls-cert", str(certificate), "--tls-key", str(key)) as (_, url):
        assert url.startswith("https://127.0.0.1:")
        assert HttpTransport(url, ca_certs=str(certificate)).ready()["status"] == "ready"
        begun = time.monotonic()
        with pytest.raises(splitfed.UnreachableError, match="certificate"):
            HttpTransport(url).pull(PullRequest("a"))
        assert time.monotonic() - begun < 30


def test_an_address_that_can_t_be_used_is_told() -> None:
    """A port that is taken, a host that isn't ours, a port beyond the numbers."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for place in (Place(port=port), Place(host="no-such-host.invalid"), Place(port=70_000)):
            with pytest.raises(InputError, match="can't listen at"):
                serve(lambda: None, Limits(), place, print)


def test_a_certificate_that_isn_t_one_is_told(tmp_path: Path) -> None:
    """Before it listens."""
    file = tmp_path / "cert.pem"
    file.write_text("nonsense")
    with pytest.raises(InputError, match=r"cert.pem or its key can't be used"):
        serve(lambda: None, Limits(), Place(port=0, certificate=str(file)), print)


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.8.8.8", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.1", False),
        ("localhost.example.org", False),
    ],
)
def test_what_only_this_machine_reaches(host: str, loopback: bool) -> None:
    """Addresses, not names that look like them."""
    assert is_loopback(host) == loopback


def test_serving_over_ipv6(tmp_path: Path) -> None:
    """Its URL has brackets."""
    with process(tmp_path, "--host", "::1") as (_, url):
        assert url.startswith("http://[::1]:")
        assert urllib3.request("GET", f"{url}/healthz").status == 200


@pytest.mark.parametrize("workers", [1, 2])
def test_a_call_that_outlasts_the_drain_is_told_to_come_again_and_holds_up_nobody(tmp_path: Path, workers: int) -> None:
    """It would compute for ten minutes: its client hears a BusyError that it repeats, and the process ends with 0."""
    with process(tmp_path, "--drain-seconds", "1", "--workers", str(workers)) as (server, url):
        client = splitfed.SplitClient(half(), url, "a", patience=0.0)
        if workers == 1:
            client(torch.ones(1, 2))
        with ThreadPoolExecutor(1) as pool:
            under_way = pool.submit(client, torch.ones(4, 2))
            until = time.monotonic() + 120
            while not (tmp_path / "begun").exists() and time.monotonic() < until:
                time.sleep(0.01)  # another process writes it
            server.send_signal(signal.SIGTERM)
            with pytest.raises(splitfed.BusyError, match="is being stopped: try again"):
                under_way.result()
        assert server.communicate(timeout=60).returncode == 0


def test_a_signal_as_soon_as_the_url_is_known_ends_it(tmp_path: Path) -> None:
    """Before uvicorn has begun."""
    with process(tmp_path) as (server, _):
        server.send_signal(signal.SIGTERM)
        assert server.communicate(timeout=60).returncode == 0


def test_a_signal_before_uvicorn_takes_signals_isn_t_lost() -> None:
    """It comes while the URL is told: the server begins, and ends at once."""
    began: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        while (message := await receive())["type"] != "lifespan.shutdown":
            began.append(message["type"])
            await send({"type": "lifespan.startup.complete"})
        await send({"type": "lifespan.shutdown.complete"})

    before = signal.getsignal(signal.SIGTERM)
    left = serve(lambda: app, Limits(), Place(port=0), lambda url: os.kill(os.getpid(), signal.SIGTERM))
    assert left == 0
    assert began == ["lifespan.startup"]
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_worker_that_doesn_t_end_is_killed(caplog: pytest.LogCaptureFixture) -> None:
    """One that ignores SIGTERM."""
    here, there = CONTEXT.Pipe()
    worker = CONTEXT.Process(target=deaf, args=(there,))
    worker.start()
    assert here.recv() == "deaf"
    serving._end_processes([worker], 0.1)
    assert worker.exitcode == -signal.SIGKILL
    assert "it is killed" in caplog.text


def deaf(told: Any) -> None:
    """The main function of a process that SIGTERM doesn't end."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    told.send("deaf")
    threading.Event().wait()
