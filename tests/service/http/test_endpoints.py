"""Each bad request gets its 4xx or 5xx, by the right error; never a 500 or a hang, and healthy ones keep flowing."""

from __future__ import annotations

import copy
import functools
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from harness_http import Service, read_all, serving
from harness_requests import ONES, SEAL, Site, X, ahead, back
from hostile import HOSTILE, REFUSED

from splitfed.errors import SplitFedError
from splitfed.protocol.messages import Chain, ForwardAnswer, LossRequest, PullRequest, PushRequest
from splitfed.protocol.packing import _plain, pack, pack_tree, unpack
from splitfed.protocol.transport import VERBS
from splitfed.service.http.auth import new_token
from splitfed.service.http.contract import decode_error
from splitfed.service.http.limits import Limits

LIMITS = Limits(body=4 << 20, in_flight=8 << 20, requests=8, tensors=40, samples=100, push_samples=1000)
PUSH = PushRequest("a", 1, "first", 0, 0, None, {}, {}, {}, 1.0, 1.0)


@pytest.fixture(scope="module")
def place() -> Iterator[tuple[Site, Service]]:
    """A service with small limits, that computes a loss too."""
    with serving(f"memory://{uuid.uuid4()}", LIMITS, loss_fn=lambda outputs, target: (outputs - target).sum()) as found:
        yield found


@pytest.fixture
def service(place: tuple[Site, Service]) -> Service:
    """How to ask it."""
    return place[1]


def check(found: tuple[int, Any, dict[str, str]], status: int, error: str, said: str = "") -> None:
    """The answer is this error of ours, as JSON."""
    got, body, headers = found
    assert (got, body["error"], body["status"] in (status, body["status"])) == (status, error, True), body
    assert said in body["message"]
    assert headers["content-type"] == "application/json"


def test_a_forward_and_its_backward_are_served(service: Service) -> None:
    """The answer's body is the packed message, and its numbers are those of `x -> 2x`."""
    status, data, headers = service.send("forward", ahead(process="ordinary", client_id="ordinary"))
    assert (status, headers["content-type"]) == (200, "application/octet-stream")
    answer = unpack(ForwardAnswer, data)
    assert torch.equal(answer.outputs, 2 * X)
    status, data, _ = service.send("backward", back(client_id="ordinary"))
    assert status == 200
    assert b"stored" in data


@pytest.mark.parametrize("body", [body for body, _ in REFUSED.values()], ids=REFUSED)
def test_foreign_bytes_are_a_400(service: Service, body: bytes) -> None:
    """Every body that the codec refuses is the client's mistake."""
    check(service.ask("/v1/forward", body), 400, "FormatError")


@pytest.mark.parametrize("client_id", HOSTILE.values(), ids=HOSTILE)
def test_hostile_ids_are_a_400(service: Service, client_id: Any) -> None:
    """In every message that has one."""
    if isinstance(client_id, bytes):
        client_id = client_id.decode()
        return
    loss = LossRequest(ahead(client_id=client_id), 0, X, 2.0)
    for method, message in (
        ("forward", ahead(client_id=client_id)),
        ("backward", back(client_id=client_id)),
        ("push", replace(PUSH, client_id=client_id)),
        ("pull", PullRequest(client_id)),
        ("loss", loss),
    ):
        check(service.send(method, message), 400, "IdError")


WRONG: list[Any] = [None, -1, 2**70, float("nan"), "x", True, (), {}, [1], X]


def mutants() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """The tree of each request, with one field of it, or of a message within it, replaced by a wrong value."""
    loss = LossRequest(ahead(), 0, X, 2.0)
    messages = {"forward": ahead(), "backward": back(), "loss": loss, "push": PUSH, "pull": PullRequest("a")}
    for method, message in messages.items():
        for path in paths(_plain(message)):
            for value in WRONG:
                tree: Any = copy.deepcopy(_plain(message))
                *above, last = path
                spot = functools.reduce(lambda found, key: found[key], above, tree)
                spot[last] = value
                yield method, f"{path} = {value!r}", tree


def paths(tree: dict[str, Any]) -> Iterator[tuple[Any, ...]]:
    """Where a value stands in a tree of dicts; those in tuples aside."""
    for name, value in tree.items():
        yield (name,)
        if isinstance(value, dict):
            yield from ((name, *path) for path in paths(value))


def test_a_field_of_the_wrong_kind_is_never_a_500(service: Service) -> None:
    """Whatever stands in any field of any message: it is served, or refused as the client's mistake."""
    wrong, tried = [], 0
    for method, what, tree in mutants():
        status, body, _ = service.ask(f"/v1/{method}", b"".join(pack_tree(VERBS[method][0].__name__, tree)))
        tried += 1
        if status == 500:
            wrong.append((method, what, body["message"]))
    assert tried > 500
    assert not wrong, f"{len(wrong)} of {tried}: {wrong[:5]}"


def test_a_name_that_isn_t_text_is_the_clients_mistake(service: Service) -> None:
    """In any mapping of a message: of a first push too, whose names become those of the lineage."""
    fingerprint = {None: {"role": "trainable", "shape": [2, 2], "dtype": "float32"}}
    first = {**_plain(PUSH), "base_version": -1, "gradients": {"weight": ONES}}
    trees: list[tuple[str, dict[str, Any]]] = [
        ("push", {**first, "fingerprint": fingerprint}),
        *(("push", {**first, name: {None: ONES}}) for name in ("gradients", "values", "bases")),
        ("forward", {**_plain(ahead()), "inputs": ((X,), {3: X})}),
        ("forward", {**_plain(ahead()), "settings": {None: 1.0}}),
    ]
    for method, tree in trees:
        status, said, _ = service.ask(f"/v1/{method}", b"".join(pack_tree(VERBS[method][0].__name__, tree)))
        assert 400 <= status < 500, (method, tree, said)


def test_whoever_has_seen_more_than_there_is_is_no_failure_of_the_server(service: Service) -> None:
    """A client may say anything: a 429, after which another replica may be asked, and not a 5xx."""
    check(service.send("forward", ahead(seen=514)), 429, "BusyError")


@pytest.mark.parametrize(
    ("message", "said"),
    [
        (ahead(inputs=((torch.zeros(101, 2),), {})), "101 samples: this server takes 100"),
        (back(seal=replace(SEAL, num_samples=1e6)), "1e+06 samples"),
        (back(seal=replace(SEAL, chains=(Chain(200.0, 0),))), "200 samples"),
        (LossRequest(ahead(), 0, X, 101.0), "101 samples"),
        (replace(PUSH, num_samples=1001.0), "1001 samples: this server takes 1000"),
        (ahead(inputs=((torch.zeros(1, 1).expand(100, 1 << 18),), {})), "bytes when they are expanded"),
        (back(grad_outputs=(torch.zeros(1, 1).expand(100, 1 << 18),)), "bytes when they are expanded"),
    ],
)
def test_what_is_too_much_is_a_413(service: Service, message: Any, said: str) -> None:
    """Samples, weights and tensors that are larger than their bytes."""
    method = {"F": "forward", "B": "backward", "L": "loss", "P": "push"}[type(message).__name__[0]]
    check(service.send(method, message), 413, "TooLargeError", said)


def test_too_many_tensors_are_a_400(service: Service) -> None:
    """The count stands in the header, so nothing is made of it."""
    many = tuple(torch.zeros(1, 2) for _ in range(41))
    check(
        service.send("forward", ahead(inputs=(many, {}), requires_grad=(False,) * 41)), 400, "FormatError", "too many"
    )


def test_a_body_over_the_limit_is_a_413_whether_or_not_it_says_so_first(service: Service) -> None:
    """By its declared length at once; without one when the bytes have come."""
    check(service.ask("/v1/forward", bytes((4 << 20) + 1)), 413, "TooLargeError", "this server takes 4194304")
    head = b"POST /v1/forward HTTP/1.1\r\nhost: x\r\ncontent-type: application/octet-stream\r\n"
    with service.raw(head + b"transfer-encoding: chunked\r\n\r\n") as stream:
        chunk = b"100000\r\n" + bytes(1 << 20) + b"\r\n"
        for _ in range(5):
            stream.sendall(chunk)
        assert stream.recv(1 << 16).startswith(b"HTTP/1.1 413")


def test_a_chunked_body_is_served(service: Service) -> None:
    """One that doesn't say its length."""
    data = b"".join(pack(ahead(client_id="chunked", process="chunked")))
    head = b"POST /v1/forward HTTP/1.1\r\nhost: x\r\ncontent-type: application/octet-stream\r\nconnection: close\r\n"
    parts = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (data[:100], data[100:], b""))
    with service.raw(head + b"transfer-encoding: chunked\r\n\r\n" + parts) as stream:
        assert stream.recv(1 << 16).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"content_type": "application/json"}, 415),
        ({"content_type": ""}, 415),
        ({"content_encoding": "gzip"}, 415),
        ({"cookie": "a" * 40_000}, 431),
    ],
)
def test_wrong_headers_have_their_status(service: Service, headers: dict[str, str], status: int) -> None:
    """Before the body is looked at."""
    assert service.send("forward", ahead(), **headers)[0] == status


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/forward", 405),
        ("PUT", "/v1/forward", 405),
        ("POST", "/healthz", 405),
        ("GET", "/", 404),
        ("GET", "/v1/forward/", 404),
        ("GET", "/v2/forward", 404),
        ("GET", "/../../etc/passwd", 404),
        ("GET", "/v1/%2e%2e/%00", 404),
        ("GET", "/v1/status?x=%00", 200),
    ],
)
def test_paths_and_methods_that_aren_t_served(service: Service, method: str, path: str, status: int) -> None:
    """An error of ours, with what is allowed."""
    found, body, headers = service.ask(path, method=method)
    assert found == status
    if status != 200:
        assert decode_error(str(body).replace("'", '"').encode()) is not None or body["error"]
    assert ("allow" in headers) == (status == 405)


def test_tokens_are_asked_for_and_bind_a_client_to_its_own_ids(tmp_path: Path) -> None:
    """Without one, with a wrong one, with another client's; what is open stays open."""
    file = tmp_path / "tokens"
    token = new_token(file, "a")
    with serving(f"memory://{uuid.uuid4()}", LIMITS, file) as (_, service):
        for wrong in ("", "Bearer", "Bearer ", "Basic YTpi", "Bearer nonsense", "Bearer kö", token):
            found = service.send("forward", ahead(), authorization=wrong)
            check(found, 401, "TokenError")
            assert found[2]["www-authenticate"] == "Bearer"
        own = {"authorization": f"Bearer {token}"}
        assert service.send("forward", ahead(), **own)[0] == 200
        assert service.send("backward", back(), **own)[0] == 200
        for method, message in (
            ("forward", ahead(client_id="b")),
            ("backward", back(client_id="b")),
            ("loss", LossRequest(ahead(client_id="b"), 0, X, 1.0)),
            ("push", replace(PUSH, client_id="b")),
            ("pull", PullRequest("b")),
        ):
            check(service.send(method, message, **own), 403, "AccessError", "client 'a'")
        assert service.ask("/v1/status")[0] == 401
        assert service.ask("/v1/status", **own)[0] == 200
        assert {service.ask(path)[0] for path in ("/healthz", "/readyz", "/metrics", "/openapi.json")} == {200}


def test_an_unforeseen_failure_tells_its_class_and_nothing_of_its_text(
    place: tuple[Site, Service], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A 500 of ours; the text is in the log."""

    def fail(*args: object) -> None:
        raise RuntimeError("secret path")

    monkeypatch.setattr(place[0].server._halves, "pull", fail)
    status, body, _ = place[1].send("pull", PullRequest("a"))
    assert (status, body["error"]) == (500, "SplitFedError")
    assert "secret" not in str(body)
    assert "RuntimeError" in body["message"]
    assert "secret path" in caplog.text


def test_64_parallel_requests_against_a_cap_of_8(place: tuple[Site, Service], monkeypatch: pytest.MonkeyPatch) -> None:
    """8 are served, the rest told to come again; meanwhile the health page answers, and afterwards all is free."""
    site, service = place
    inside, go, serve = threading.Semaphore(0), threading.Event(), site.server._halves.pull

    def wait(request: Any) -> Any:
        inside.release()
        assert go.wait(60)
        return serve(request)

    monkeypatch.setattr(site.server._halves, "pull", wait)
    with ThreadPoolExecutor(64) as pool:
        first = [pool.submit(service.send, "pull", PullRequest("a")) for _ in range(8)]
        for _ in first:
            assert inside.acquire(timeout=60)
        rest = [pool.submit(service.send, "pull", PullRequest("a")) for _ in range(56)]
        refused = [found.result() for found in rest]
        assert service.ask("/healthz")[0] == 200
        go.set()
        assert [found.result()[0] for found in first] == [200] * 8
    for status, body, headers in refused:
        assert (status, body["error"], headers["retry-after"]) == (503, "BusyError", "1")
    assert b"splitfed_requests_in_flight 0.0" in service.ask("/metrics")[1]


def test_bytes_in_flight_are_bounded_by_a_429(service: Service) -> None:
    """Two bodies of 4 MiB are on their way; a third doesn't fit, until one of them goes."""
    head = (
        b"POST /v1/forward HTTP/1.1\r\nhost: x\r\ncontent-type: application/octet-stream\r\ncontent-length: %d\r\n\r\n"
    )
    with service.raw(head % (4 << 20)) as first, service.raw(head % (4 << 20)) as second:
        while b"splitfed_bytes_in_flight 8.388608e+06" not in service.ask("/metrics")[1]:
            pass
        found = service.ask("/v1/forward", bytes(100))
        check(found, 429, "BusyError", "bytes under way")
        assert found[2]["retry-after"] == "1"
        first.close()
        while b"splitfed_bytes_in_flight 4.194304e+06" not in service.ask("/metrics")[1]:
            pass
        check(service.ask("/v1/forward", bytes(100)), 400, "FormatError")
        second.close()


def test_an_error_of_every_kind_comes_back_as_its_class(place: tuple[Site, Service]) -> None:
    """What the server raises in this process is what the body names."""
    site, service = place
    for message in (back(version=7), back(call=99), back(incarnation=9), back(grad_outputs=(ONES, ONES))):
        with pytest.raises(SplitFedError) as caught:
            site.server.backward(message)
        error = caught.value
        status, body, _ = service.send("backward", message)
        assert (status, body["error"], body["message"]) == (error.status, type(error).__name__, str(error))


def test_a_request_with_two_tokens_is_refused(tmp_path: Path) -> None:
    """Whatever their order: what is in front may have looked at the other one."""
    token = new_token(tmp_path / "tokens", "a")
    with serving(f"memory://{uuid.uuid4()}", tokens=tmp_path / "tokens") as (_, service):
        assert service.send("pull", PullRequest("a"), authorization=f"Bearer {token}")[0] == 200
        body = b"".join(pack(PullRequest("a")))
        lines = [f"authorization: Bearer {token}", "authorization: Bearer other"]
        for first, second in (lines, reversed(lines)):
            head = f"POST /v1/pull HTTP/1.1\r\nhost: x\r\n{first}\r\n{second}\r\nconnection: close\r\n"
            head += f"content-type: application/octet-stream\r\ncontent-length: {len(body)}\r\n\r\n"
            found = read_all(service.raw(head.encode() + body))
            assert found.startswith(b"HTTP/1.1 401")
            assert b"several Authorization headers" in found


def test_one_account_takes_a_share_of_the_places(tmp_path: Path) -> None:
    """Two of it are served or wait; the third is its own to repeat, and another account is served meanwhile."""
    tokens = {name: {"authorization": f"Bearer {new_token(tmp_path / 'tokens', name)}"} for name in ("a", "b")}
    limits = Limits(client_requests=2)
    with serving(f"memory://{uuid.uuid4()}", limits, tokens=tmp_path / "tokens") as (site, service):
        inside, go, pull = threading.Semaphore(0), threading.Event(), site.server._halves.pull

        def wait(request: Any) -> Any:
            if request.client_id == "a":
                inside.release()
                assert go.wait(60)
            return pull(request)

        site.server._halves.pull = wait  # type: ignore[method-assign]
        with ThreadPoolExecutor(3) as pool:
            first = [pool.submit(service.send, "pull", PullRequest("a"), **tokens["a"]) for _ in range(2)]
            assert inside.acquire(timeout=60)
            while b"splitfed_requests_in_flight 2.0" not in service.ask("/metrics")[1]:
                pass
            check(service.send("pull", PullRequest("a"), **tokens["a"]), 429, "BusyError", "client 'a' has 2 requests")
            assert service.send("pull", PullRequest("b"), **tokens["b"])[0] == 200
            go.set()
            assert [found.result()[0] for found in first] == [200, 200]
        assert b"splitfed_bytes_in_flight 0.0" in service.ask("/metrics")[1]
