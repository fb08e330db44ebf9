"""The report of a round in a real federation: what its clients' compression has done."""

from __future__ import annotations

import json
import uuid
from contextlib import ExitStack
from dataclasses import replace
from threading import Thread
from typing import Any

import pytest
import torch
from harness_http import running
from harness_store import sgd
from torch import nn
from torch.nn.functional import cross_entropy

from splitfed import Accumulator, Federation, GradientStore, History, SplitClient, SplitServer, report, split
from splitfed.cli.command import main
from splitfed.errors import InputError, StoreError
from splitfed.protocol.transport import Middleware
from splitfed.service.http.app import make_app
from splitfed.service.mailbox.worker import Worker

WIDTH = 32


def cut() -> tuple[nn.Module, nn.Module]:
    """Halves whose activations are worth coding: (64, 32) floats are 8 KiB, and 2,176 as int8."""
    torch.manual_seed(0)
    return split(nn.Sequential(nn.Linear(6, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)), "1")


class Run:
    """A store with a server, and a coordinator of two clients."""

    def __init__(self, tmp_path: Any, **settings: Any) -> None:
        half, body = cut()
        self.store = GradientStore(f"file://{tmp_path}/run", sync="process")
        self.server = SplitServer(body, self.store)
        bodies = Accumulator(body, self.store, sgd())
        halves = Accumulator(half, self.store, sgd(), lineage="client")
        self.federation = Federation(bodies, halves, clients=("a", "b"), deadline=60.0, **settings)

    def train(self, server: Any, name: str, compression: Any, batches: int = 2) -> SplitClient:
        """A client that trains on a few batches and pushes."""
        client = SplitClient(cut()[0], server, name, compression=compression)
        client.pull()
        self.more(client, batches)
        return client

    def more(self, client: SplitClient, batches: int) -> None:
        """Train, and push."""
        for _ in range(batches):
            cross_entropy(client(torch.randn(64, 6)), torch.zeros(64, dtype=torch.long)).backward()
        with torch.no_grad():
            client.client_half[0].weight.add_(0.1)
        client.push()


@pytest.mark.parametrize("way", ["direct", "http", "mailbox"])
def test_clients_tell_what_their_compression_has_done(way: str, tmp_path: Any) -> None:
    """In process, over HTTP and through a mailbox: bytes and errors add up over clients, one round at a time."""
    run = Run(tmp_path)
    with ExitStack() as stack:
        server: Any = run.server
        if way == "http":
            server = stack.enter_context(running(make_app(run.server))).url
        elif way == "mailbox":
            worker = Worker(run.server, run.store)
            thread = Thread(target=worker.run, kwargs={"poll": 0.01})
            thread.start()
            stack.callback(thread.join)
            stack.callback(worker.stop)
            server = run.store.url
        rows = []
        for number in range(2):
            run.federation.open()
            run.train(server, "a", "int8", batches=1 + number)
            run.train(server, "b", {"activations": "bfloat16"}, batches=1)
            rows.append(run.federation.close())
    assert [row["compression"]["activations"]["exact_bytes"] for row in rows] == [2 * 8192, 3 * 8192]
    assert [row["compression"]["activations"]["sent_bytes"] for row in rows] == [2176 + 4096, 2 * 2176 + 4096]
    assert rows[0]["compression"]["outputs"]["sent_bytes"] == 2176 + 8192
    assert all(0 < row[f"{flow}_error"] < 0.02 for row in rows for flow in ("activations", "grad_outputs"))
    assert run.store.lineage("client").commit(1).flows["activations"].coded == 2


def test_a_push_tells_of_what_came_since_the_last_one(tmp_path: Any) -> None:
    """Without a barrier the halves are committed as they come; a push whose reply was lost is told of once."""

    class Loses(Middleware):
        lost = False

        def send(self, verb: str, request: Any, /) -> Any:
            answer = super().send(verb, request)
            if verb == "push" and request.base_version >= 0 and not self.lost:
                self.lost = True
                raise StoreError("lost on the way back")
            return answer

    run = Run(tmp_path)
    run.federation.open()
    client = SplitClient(cut()[0], Loses(run.server), "a", compression="int8")
    client.pull()
    with pytest.raises(StoreError, match="lost on the way back"):
        run.more(client, 1)
    run.more(client, 2)
    told = [run.store.pile("client").read(batch) for batch in run.store.waiting("client")]
    assert [record.flows["activations"][0] for record in told if record is not None] == [1, 2]


def test_the_status_of_a_store_shows_the_newest(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """A line on the page, and numbers in JSON."""
    run = Run(tmp_path)
    run.federation.open()
    for name in ("a", "b"):
        run.train(run.server, name, {"activations": "int8"})
    run.federation.close()
    assert main(["status", "--store", run.store.url]) == 0
    found = " ".join(capsys.readouterr().out.split())
    assert "compressed activations 27% of the bytes, changed by 0." in found
    assert "(version 1 of client)" in found
    main(["status", "--store", run.store.url, "--json"])
    lines = json.loads(capsys.readouterr().out)["lineages"]
    told = {line["name"]: line["commits"][0].get("flows") for line in lines}
    assert told["client"]["activations"]["coded"] == 4
    assert told["body"] is None


def test_without_compression_reports_and_records_are_as_before(tmp_path: Any) -> None:
    """No key, and no byte."""
    run = Run(tmp_path)
    run.federation.open()
    for name in ("a", "b"):
        run.train(run.server, name, None)
    row = run.federation.close()
    assert not [key for key in row if key == "compression" or key.endswith("_error")]
    assert b"flows" not in run.store.lineage("client").commit(1).to_json()


def test_flows_that_can_t_be_added_up_are_refused(tmp_path: Any) -> None:
    """With the push, and so before they are in anybody's sum."""

    class Lies(Middleware):
        def send(self, verb: str, request: Any, /) -> Any:
            if verb == "push" and request.flows:
                request = replace(request, flows={"activations": [1, 1, 1, 1, float("inf"), 1.0]})
            return super().send(verb, request)

    run = Run(tmp_path)
    run.federation.open()
    with pytest.raises(InputError, match="isn't a flow: expected six numbers"):
        run.train(Lies(run.server), "a", "int8")
    assert run.store.waiting("client") == []


def test_the_page_shows_bytes_and_errors_by_flow(tmp_path: Any) -> None:
    """Over all rounds; a run without compression has no such card."""
    pages = []
    for compression in ("int8", None):
        run = Run(tmp_path / str(uuid.uuid4()))
        history = History()
        for _ in range(2):
            run.federation.open()
            for name in ("a", "b"):
                run.train(run.server, name, compression, batches=1)
            history.append(run.federation.close())
        report.write(history, tmp_path / "report.html")
        pages.append((tmp_path / "report.html").read_text())
    assert "Compression" in pages[0]
    assert "grad activations" in pages[0]
    assert "26.6 %" in pages[0]
    assert "Compression" not in pages[1]
