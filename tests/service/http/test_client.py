"""The transport over HTTP: the same bits, the same errors, patience with what may pass and none with a wrong URL."""

from __future__ import annotations

import gzip
import os
import random
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import programs
import pytest
import torch
from harness import Split, assert_step, sgd
from harness_http import answer, listener, read_request, running, scripted, serving
from harness_post import Clock
from harness_requests import ahead, back, body
from servers import free_ports
from torch import nn

import splitfed
from splitfed.errors import (
    ArchitectureError,
    BusyError,
    ExpiredError,
    InputError,
    SupersededError,
    TokenError,
    UnreachableError,
)
from splitfed.protocol import backoff
from splitfed.protocol.messages import LossRequest, PullAnswer, PullRequest
from splitfed.protocol.packing import pack
from splitfed.service.http.app import make_app
from splitfed.service.http.auth import new_token
from splitfed.service.http.client import HttpTransport
from splitfed.service.http.contract import encode_error
from splitfed.service.mailbox.worker import Worker

PULLED = b"".join(pack(PullAnswer(-1, None, {})))
BUSY = answer(429, encode_error(BusyError("much to do")), retry_after=0)


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No token of the machine's."""
    monkeypatch.delenv("SPLITFED_TOKEN", raising=False)


def model() -> nn.Module:
    """With dropout and running statistics in the body, so that a seed or a mode that got lost would show."""
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Linear(6, 8), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.ReLU(), nn.Linear(8, 3)
    )


def test_a_step_over_http_has_the_bits_of_the_unsplit_model(tmp_path: Path) -> None:
    """Outputs, gradients, and torch's generator afterwards."""
    split = Split(model(), "1:5", tmp_path, optimizer=sgd)
    reference = splitfed.reference(model(), "1:5")
    with running(make_app(split.servers[0])) as service:
        split.client = splitfed.SplitClient(split.half, service.url, "a")
        assert_step(split, reference, ((torch.randn(4, 6),), {}))


def test_training_over_http_ends_in_the_weights_of_training_in_one_process(tmp_path: Path) -> None:
    """One argument differs; the same weights, bit for bit, body and half, after five commits and an averaging."""
    ended = []
    for place in ("here", "http"):
        torch.manual_seed(0)
        split = Split(model(), "1:5", tmp_path / place, optimizer=sgd)
        with running(make_app(split.servers[0])) as service:
            given = split.servers[0] if place == "here" else service.url
            client = splitfed.SplitClient(split.half, given, client_id="a")
            optimizer = torch.optim.SGD(client.parameters(), lr=0.1, momentum=0.9)
            client.pull()
            for _ in range(5):
                optimizer.zero_grad()
                nn.functional.cross_entropy(client(torch.randn(4, 6)), torch.randint(0, 3, (4,))).backward()
                optimizer.step()
                split.accumulator.step()
            client.push()
        ended.append(splitfed.join(client, split.store.load_weights()).state_dict())
    assert all(torch.equal(ended[0][name], ended[1][name]) for name in ended[0])


def test_groups_over_http_and_through_the_store_end_in_the_bits_of_one_process(tmp_path: Path) -> None:
    """Each pull brings a pair and each push its batches: the same versions of both, and the same weights."""
    ended = []
    for place in ("here", "http", "store"):
        torch.manual_seed(0)
        url = (tmp_path / place).as_uri()
        store, (half, body) = splitfed.GradientStore(url, sync="process"), splitfed.split(model(), "1:5")
        mode = splitfed.policies.mode("grouped", group=2)
        updates = splitfed.Accumulator(half, store, sgd, lineage="client", **mode.settings())
        both = splitfed.Accumulator(body, store, sgd, halves=updates, **mode.settings())
        server = splitfed.SplitServer(body, store)
        worker = Worker(server, store)
        thread = threading.Thread(target=worker.run, kwargs={"poll": 0.01})
        thread.start()
        with running(make_app(server)) as service:
            given = {"here": server, "http": service.url, "store": url}[place]
            client = splitfed.SplitClient(half, given, client_id="a")
            for step in range(4):
                client.pull()
                assert (client.version, client._sync.body_version) == (step // 2, step // 2)
                client.zero_grad()
                nn.functional.cross_entropy(client(torch.randn(4, 6)), torch.randint(0, 3, (4,))).backward()
                client.push(gradient=True)
                assert (both.step() is None) == (step % 2 == 0)
            client.pull()
        worker.stop()
        thread.join(60)
        ended.append(splitfed.join(client, store.load_weights()).state_dict())
    for found in ended[1:]:
        assert all(torch.equal(ended[0][name], found[name]) for name in found)


def test_the_loss_call_goes_over_http() -> None:
    """Sum of `2x - target`: 2 * (1 - 2 + 3 + 4) - 4 = 8."""
    with serving(f"memory://{uuid.uuid4()}", loss_fn=lambda outputs, target: (outputs - target).sum()) as (_, service):
        found = HttpTransport(service.url).loss(LossRequest(ahead(), 0, torch.ones(2, 2), 2.0))
    assert found.loss == 8.0


def test_large_bodies_go_both_ways_without_a_change() -> None:
    """Several MiB, and values that any shift of bytes would show."""
    x = torch.randn(300_000, 2)
    with serving(f"memory://{uuid.uuid4()}") as (_, service):
        transport = HttpTransport(service.url)
        found = transport.forward(ahead(inputs=((x,), {})))
        transport.close()
        assert transport.forward(ahead(inputs=((x,), {}), call=1)).version == 0
    assert torch.equal(found.outputs, nn.functional.linear(x, body().weight))


def test_the_server_s_errors_arrive_as_their_classes_with_its_message() -> None:
    """As if it stood in this process."""
    with serving(f"memory://{uuid.uuid4()}") as (site, service):
        transport = HttpTransport(service.url)
        transport.forward(ahead())
        for request, kind in ((back(call=9), ExpiredError), (back(incarnation=7), SupersededError)):
            with pytest.raises(kind) as here:
                site.server.backward(request)
            with pytest.raises(kind) as there:
                transport.backward(request)
            assert str(here.value) == str(there.value)
            assert type(here.value) is type(there.value)


def test_a_wrong_url_fails_at_once_and_is_named() -> None:
    """Nobody listens there, or nobody has that name: no second try."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        silent = bound.getsockname()[1]  # not listened at, and nobody else's while this is bound
        begun = time.monotonic()
        for url in (f"http://127.0.0.1:{silent}", "http://no-such-host.invalid"):
            with pytest.raises(UnreachableError, match=url) as caught:
                HttpTransport(url).pull(PullRequest("a"))
            assert isinstance(caught.value, ConnectionError)
        assert time.monotonic() - begun < 30


@pytest.mark.parametrize(
    ("said", "status"),
    [(b"<html>login</html>", 200), (b"<html>nothing here</html>", 404), (b"", 302), (b"[1]", 500), (b'{"a": 1}', 418)],
)
def test_something_else_at_the_url_is_told_at_once(said: bytes, status: int) -> None:
    """A login page, a redirect, another service: not ours, whatever it says."""
    script = scripted(answer(status, said, location="http://127.0.0.1:9/"))
    with script as (url, seen), pytest.raises(UnreachableError, match="is the URL right") as caught:
        HttpTransport(url).pull(PullRequest("a"))
    assert len(seen) == 1
    assert url in str(caught.value)


def test_an_answer_that_a_proxy_has_compressed_is_told_as_that() -> None:
    """The URL is right, so it isn't doubted."""
    script = scripted(answer(200, gzip.compress(PULLED), content_encoding="gzip"))
    with (
        script as (url, _),
        pytest.raises(UnreachableError, match=r"content-encoding 'gzip'.*proxy in between") as caught,
    ):
        HttpTransport(url).pull(PullRequest("a"))
    assert "is the URL right" not in str(caught.value)


@pytest.mark.parametrize(
    "failures",
    [
        [None],
        [BUSY, BUSY],
        [answer(503, encode_error(BusyError("full")), retry_after=0)],
        [answer(502, b"<html>bad gateway</html>"), answer(504, b"")],
        [b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\nhalf"],
        [b"HTTP/1.1 200 OK\r\ncontent-length: 3000000\r\n\r\n" + bytes(2_000_000)],
        [answer(429, encode_error(BusyError("x")), retry_after="nonsense")],
    ],
    ids=["dies", "busy", "full", "gateway", "half an answer", "half a large answer", "nonsense"],
)
def test_what_may_pass_is_tried_again_with_the_same_bytes(failures: list[bytes | None]) -> None:
    """The answer comes in the end, and the server has seen one and the same request each time."""
    with scripted(*failures, answer(200, PULLED)) as (url, seen):
        assert HttpTransport(url).pull(PullRequest("a")).version == -1
    assert len(seen) == len(failures) + 1
    assert len(set(seen)) == 1


def test_patience_ends_with_the_last_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the class that the server gave, or the URL that doesn't answer; only pauses take time here."""
    monkeypatch.setattr(backoff, "time", Clock())
    with scripted(*[BUSY] * 100) as (url, seen), pytest.raises(BusyError, match="much to do"):
        HttpTransport(url, patience=0.3).pull(PullRequest("a"))
    assert len(seen) > 1
    with scripted(None) as (url, _), pytest.raises(UnreachableError, match=url):
        HttpTransport(url, patience=0.0).pull(PullRequest("a"))


def test_retry_after_is_waited_for_but_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """2 seconds are about 2; a day is 5; without it the pauses grow."""
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    answers = [answer(503, encode_error(BusyError("x")), retry_after=wait) for wait in (2, 86_400)]
    with scripted(*answers, None, None, answer(200, PULLED)) as (url, _):
        HttpTransport(url).pull(PullRequest("a"))
    for wait, asked in zip(waits, (2, 5, 0.2, 0.4), strict=True):
        assert asked / 2 <= wait <= 1.5 * asked


def test_a_server_that_was_met_once_may_be_away_for_a_while() -> None:
    """A connection that is refused later is a restart, not a wrong URL."""
    (port,) = free_ports(1)
    with scripted(answer(200, PULLED), port=port) as (url, _):
        transport = HttpTransport(url, patience=30.0)
        transport.pull(PullRequest("a"))
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(transport.pull(PullRequest("a")).version))
    thread.start()
    with listener(port) as back_again:
        stream, _ = back_again.accept()
        with stream:
            read_request(stream)
            stream.sendall(answer(200, PULLED))
    thread.join()
    assert found == [-1]


def test_a_retry_draws_nothing_from_the_user_s_generators() -> None:
    """A seeded program goes the same way whether or not a request was repeated."""
    states = random.getstate(), torch.get_rng_state()
    with scripted(BUSY, None, answer(200, PULLED)) as (url, _):
        HttpTransport(url).pull(PullRequest("a"))
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])


def test_a_silent_server_is_given_up_after_the_timeout() -> None:
    """Nothing comes: what was asked is named."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        bound.listen()
        url = f"http://127.0.0.1:{bound.getsockname()[1]}"
        with pytest.raises(UnreachableError, match=url):
            HttpTransport(url, timeout=0.2, patience=0.0).pull(PullRequest("a"))


def test_one_connection_serves_many_requests() -> None:
    """It is kept open; a child after a fork takes its own."""
    with serving(f"memory://{uuid.uuid4()}") as (_, service):
        transport = HttpTransport(service.url)
        for _ in range(5):
            transport.pull(PullRequest("a"))
        pool = transport._connections()
        assert pool.num_connections == 1
        transport._process = os.getpid() + 1
        assert transport._connections() is not pool
        assert transport.ready()["status"] == "ready"
        assert transport.status()["lineages"][0]["version"] == 0


def test_the_token_is_the_argument_or_the_environment_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With neither, or another one, the server's TokenError arrives; no text shows the token."""
    token = new_token(tmp_path / "tokens", "a")
    with serving(f"memory://{uuid.uuid4()}", None, tmp_path / "tokens") as (_, service):
        with pytest.raises(TokenError, match="needs a token"):
            HttpTransport(service.url).pull(PullRequest("a"))
        assert HttpTransport(service.url, token=token).pull(PullRequest("a")).version == -1
        monkeypatch.setenv("SPLITFED_TOKEN", token)
        transport = HttpTransport(service.url)
        assert transport.pull(PullRequest("a")).version == -1
        assert token not in repr(transport)
        with pytest.raises(TokenError, match="doesn't know") as caught:
            HttpTransport(service.url, token="sf_wrong").pull(PullRequest("a"))
        assert "sf_wrong" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("ftp://host", "isn't a service's URL"),
        ("http://", "isn't a"),
        ("http://host?token=x", "isn't a service's URL"),
        ("http://user:secret@host", "holds a password"),
        ("http://host:99999999", "isn't a"),
    ],
)
def test_what_isn_t_a_service_s_url_is_refused_when_it_is_given(url: str, said: str) -> None:
    """Before anything is sent; a password in it is not repeated."""
    with pytest.raises(InputError, match=said) as caught:
        HttpTransport(url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("token", ["", "a b", "a\r\nx: y", "kö"])
def test_a_token_that_can_t_stand_in_a_header_is_refused(token: str) -> None:
    """It could smuggle one."""
    with pytest.raises(InputError, match="splitfed token new"):
        HttpTransport("http://host", token=token)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("timeout", 0),
        ("timeout", -1.0),
        ("timeout", "5"),
        ("timeout", float("inf")),
        ("patience", -1),
        ("patience", float("nan")),
    ],
)
def test_a_time_that_is_none_is_refused(option: str, value: Any) -> None:
    """When it is given; with a patience that is NaN the tries would never end."""
    with pytest.raises(InputError, match=f"{option} is {value!r}: expected"):
        HttpTransport("http://127.0.0.1:1", **{option: value})


def test_a_path_in_the_url_is_kept() -> None:
    """A gateway may serve several bodies under paths of its own."""
    with scripted(answer(200, PULLED)) as (url, seen):
        HttpTransport(f"{url}/site/7/").pull(PullRequest("a"))
    assert seen[0].startswith(b"POST /site/7/v1/pull HTTP/1.1")


def test_the_client_s_side_loads_nothing_of_the_server_s() -> None:
    """A device needs urllib3, and neither starlette nor fsspec nor a module of the store's."""
    code = "import sys, splitfed.service.http.client; print(*sys.modules)"
    without = ("splitfed", "starlette", "uvicorn", "fsspec", "filelock", "urllib3")
    loaded = set(programs.run(programs.code, code, without).stdout.split())
    assert "urllib3" in loaded
    assert not loaded & {"starlette", "uvicorn", "fsspec", "filelock", "splitfed.store", "splitfed.server"}


def test_push_over_http_refuses_a_half_of_another_architecture() -> None:
    """Of pushes and pulls the errors cross as well."""
    with serving(f"memory://{uuid.uuid4()}") as (_, service):
        first = splitfed.SplitClient(nn.Sequential(nn.Linear(2, 2), splitfed.CutPoint()), service.url, "a")
        first.pull()
        other = splitfed.SplitClient(nn.Sequential(nn.Linear(2, 3), splitfed.CutPoint()), service.url, "b")
        with pytest.raises(ArchitectureError):
            other.pull()
