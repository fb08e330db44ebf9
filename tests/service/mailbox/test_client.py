"""A store as the way to a server: the same bits as any other way, and nothing left behind."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import Wire, assert_same
from harness_post import clocked, ends, transport
from harness_requests import Site, ahead, back
from harness_store import Nth, hooked, refuse
from processes import AT, Owner, model, new_accumulator
from torch import nn

import splitfed
from splitfed.errors import BusyError, ExpiredError, IdError, InputError, StoreCapabilityError, StoreError
from splitfed.protocol.messages import PullRequest
from splitfed.protocol.transport import Transport
from splitfed.server.server import SplitServer
from splitfed.service.mailbox import client as storetransport
from splitfed.service.mailbox.worker import Worker
from splitfed.store.store import GradientStore

PULL = PullRequest("a")


@pytest.fixture
def site(store_url: str) -> Site:
    """A store with two replicas."""
    return Site(store_url)


@pytest.fixture
def serving(site: Site) -> Iterator[Callable[..., Worker]]:
    """Starts workers in threads; they end with the test."""
    started: list[tuple[Worker, threading.Thread]] = []

    def start(server: Any = None) -> Worker:
        worker = Worker(server or site.server, site.store)
        thread = threading.Thread(target=worker.run, kwargs={"poll": 0.01})
        started.append((worker, thread))
        thread.start()
        return worker

    yield start
    for worker, thread in started:
        worker.stop()
        thread.join(60)


def test_it_is_a_transport(site: Site) -> None:
    """It has the methods of the seam."""
    assert isinstance(transport(site.store.url), Transport)


def train(server: Any, url: str) -> tuple[dict[str, bytes], dict[str, torch.Tensor]]:
    """Five steps of an owner, with a commit after each second one; its half and the body."""
    owner, store = Owner("a", server), GradientStore(url, sync="process")
    accumulator = new_accumulator(store)
    for step in range(5):
        owner.step()
        if step % 2:
            assert accumulator.step() is not None
    assert [str(batch) for batch in store.waiting()] == ["a/1/4"]
    return owner.bits(), store.load_weights()


def test_training_has_the_bits_of_a_server_in_the_process(store_url: str, tmp_path: Path) -> None:
    """Two workers answer a client that reaches only the store; every bit is that of a direct call."""
    direct = (tmp_path / "direct").as_uri()
    expected = train(SplitServer(splitfed.split(model(), AT)[1], GradientStore(direct, sync="process")), direct)
    store = GradientStore(store_url, sync="process")
    workers = [Worker(SplitServer(splitfed.split(model(), AT)[1], store), store) for _ in range(2)]
    threads = [threading.Thread(target=worker.run, kwargs={"poll": 0.01}) for worker in workers]
    for thread in threads:
        thread.start()
    try:
        got = train(transport(store_url), store_url)
    finally:
        for worker, thread in zip(workers, threads, strict=True):
            worker.stop()
            thread.join(60)
    assert got[0] == expected[0]
    assert_same(got[1], expected[1])
    assert "request" not in ends(store)
    assert "answer" not in ends(store)
    Worker(Wire(), store).step()
    assert ends(store) == []


def test_pull_push_and_loss_travel_too(store_url: str) -> None:
    """The whole of the seam: halves are averaged, and the server's loss is the local one."""
    half, body = splitfed.split(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), "1")
    store = GradientStore(store_url, sync="process")
    worker = Worker(SplitServer(body, store, loss_fn=nn.functional.cross_entropy), store)
    thread = threading.Thread(target=worker.run, kwargs={"poll": 0.01})
    thread.start()
    try:
        client = splitfed.SplitClient(half, transport(store_url), "a")
        assert client.pull() == 0
        x, y = torch.randn(4, 3), torch.tensor([0, 1, 1, 0])
        loss = client.loss(x, y)
        loss.backward()
        client.push()
    finally:
        worker.stop()
        thread.join(60)
    assert loss.equal(nn.functional.cross_entropy(body(half[0](x)), y))
    assert len(store.waiting()) == 1
    assert len(store.waiting("client")) == 1


def test_an_error_arrives_as_its_class(site: Site, serving: Callable[..., Worker]) -> None:
    """A backward without a forward is the ExpiredError that the server raised."""
    site.forward()
    serving()
    with pytest.raises(ExpiredError, match="isn't in the store"):
        transport(site.store.url).backward(back(call=5))


def test_it_waits_no_longer_than_it_was_told(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody answers for two seconds: the error says that nobody has taken the request, and it is withdrawn."""
    clock = clocked(monkeypatch)
    with pytest.raises(BusyError, match=r"within 2 seconds; no worker has taken it: start one"):
        transport(site.store.url, timeout=2.0).pull(PULL)
    assert clock.now == pytest.approx(2.0)
    assert max(clock.slept) == 0.25
    assert ends(site.store) == []


def test_it_says_when_the_store_is_nobodys(store_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong URL is the likeliest reason that nobody answers."""
    clocked(monkeypatch)
    with pytest.raises(BusyError, match="nobody has begun a store there"):
        transport(store_url, timeout=2.0).pull(PULL)


def test_it_says_when_a_worker_has_taken_the_request(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow or dead worker is another matter than none."""

    def claim() -> None:
        for key in site.store.blobs.list("post"):
            site.store.blobs.create(key.replace(".request", ".claim-0000"), [b"claimed"])

    clocked(monkeypatch, claim)
    with pytest.raises(BusyError, match="a worker has taken it"):
        transport(site.store.url, timeout=2.0).pull(PULL)


def test_it_warns_when_nobody_takes_a_request(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """After ten seconds the user hears why nothing happens, and the wait goes on."""
    worker = Worker(site.server, site.store)
    clock = clocked(monkeypatch)
    clock.meanwhile = lambda: worker.step() if clock.now > 12 else None
    with pytest.warns(UserWarning, match="no worker has taken a request of client 'a'"):
        assert transport(site.store.url).pull(PULL).version == -1


def test_a_request_that_was_swept_is_posted_again(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine slept for hours, and a worker has swept what lay there."""
    worker = Worker(site.server, site.store)

    def meanwhile() -> None:
        if clock.now < 9:
            for key in site.store.blobs.list("post"):
                site.store.blobs.delete(key)
        elif clock.now > 10.5:
            worker.step()

    clock = clocked(monkeypatch, meanwhile)
    assert transport(site.store.url).pull(PULL).version == -1


def test_a_busy_worker_is_asked_again(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer "try later" is no failure of the loop: here the third try is answered."""
    refusals = iter([BusyError("too many gaps"), StoreError("the storage hiccuped")])

    class Busy(Wire):
        def send(self, method: str, request: Any) -> Any:
            for error in refusals:
                raise error
            return super().send(method, request)

    worker = Worker(Busy(site.server), site.store)
    clock = clocked(monkeypatch, worker.step)
    assert transport(site.store.url).pull(PULL).version == -1
    assert [pause for pause in clock.slept if pause >= 0.1] == [0.1, 0.3]


def test_a_worker_that_stays_busy_is_reported(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the last pause the error is the loop's to handle, with what the worker said."""

    class Busy(Wire):
        def send(self, method: str, request: Any) -> Any:
            raise BusyError("too many gaps")

    worker = Worker(Busy(site.server), site.store)
    clock = clocked(monkeypatch, worker.step)
    with pytest.raises(BusyError, match="too many gaps"):
        transport(site.store.url).pull(PULL)
    assert [pause for pause in clock.slept if pause >= 0.1] == [0.1, 0.3, 1.0, 3.0]


def test_storage_that_fails_once_is_tried_again(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """A put that is refused is repeated."""
    worker = Worker(site.server, site.store)
    clocked(monkeypatch, worker.step)
    under = transport(site.store.url)
    hook = Nth(0, refuse, "put post/")
    under._blobs = hooked(site.store.url, hook).blobs
    with hook.armed():
        assert under.pull(PULL).version == -1
    assert hook.count == 2


def test_storage_that_is_unfit_is_reported_at_once(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """No pause mends a store without an atomic create."""

    class Unfit(Wire):
        def send(self, method: str, request: Any) -> Any:
            raise StoreCapabilityError("two winners")

    worker = Worker(Unfit(site.server), site.store)
    clock = clocked(monkeypatch, worker.step)
    with pytest.raises(StoreCapabilityError):
        transport(site.store.url).pull(PULL)
    assert max(clock.slept) < 0.1


def test_an_interrupt_withdraws_the_request(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while it waits leaves no work for anybody."""

    def interrupt() -> None:
        assert ends(site.store) == ["request"]
        raise KeyboardInterrupt

    clocked(monkeypatch, interrupt)
    with pytest.raises(KeyboardInterrupt):
        transport(site.store.url).pull(PULL)
    assert ends(site.store) == []


def test_what_cannot_be_deleted_stays_for_a_worker(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer is in hand: a delete that fails is no failure of the call."""
    worker = Worker(site.server, site.store)
    clocked(monkeypatch, worker.step)
    under = transport(site.store.url)
    hook = Nth(0, refuse, "delete post/")
    under._blobs = hooked(site.store.url, hook).blobs
    with hook.armed():
        assert under.pull(PULL).version == -1
    assert hook.count == 1


def test_a_forked_process_posts_under_its_own_name(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parent and child would else take each other's answers."""
    under = transport(site.store.url)
    first, second = under._place(), under._place()
    assert first[:-10] == second[:-10]
    monkeypatch.setattr(os, "getpid", lambda: 0)
    assert under._place()[:-10] != first[:-10]


def test_a_repeated_forward_opens_no_second_process(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first request was lost with its worker: posted anew, it gets the same incarnation."""
    worker = Worker(site.server, site.store)
    clocked(monkeypatch, worker.step)
    assert [transport(site.store.url).forward(ahead()).incarnation for _ in range(2)] == [1, 1]


def test_a_token_is_refused(store_url: str) -> None:
    """It would protect nothing here, and end up nowhere."""
    with pytest.raises(InputError, match="a token is for http"):
        storetransport.connect(store_url, client_id="a", token="secret")
    assert "client_id='a'" in repr(storetransport.connect(store_url, client_id="a", timeout=1.0))


@pytest.mark.parametrize("options", [{"timeout": 0}, {"poll": -1}])
def test_times_must_be_positive(store_url: str, options: dict[str, float]) -> None:
    """A timeout of 0 would post and withdraw."""
    with pytest.raises(InputError):
        transport(store_url, **options)


def test_the_id_is_checked(store_url: str) -> None:
    """It becomes a key."""
    with pytest.raises(IdError):
        storetransport.connect(store_url, client_id="../a")


def test_options_that_do_not_apply_are_refused(store_url: str) -> None:
    """A misspelt option of ours is no option of a folder."""
    with pytest.raises(InputError, match="time_out"):
        storetransport.connect(store_url, client_id="a", time_out=3)


class Sealed:
    """Blobs of a client that may not list: what isn't there is refused as if it were, and so is all of `closed`."""

    def __init__(self, blobs: Any, closed: str = "store") -> None:
        self._blobs = blobs
        self._closed = closed

    def get(self, key: str) -> memoryview | None:
        """As S3 answers."""
        found: memoryview | None = self._blobs.get(key)
        if found is None or not key.startswith("post/") or key.endswith(self._closed):
            raise StoreError(f"can't read {key!r}: Access Denied") from PermissionError("Access Denied")
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(self._blobs, name)


def test_a_client_that_may_not_list_takes_a_refusal_for_not_yet(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer comes after twelve seconds; the look at the request and its claim is no failure either."""
    worker = Worker(site.server, site.store)
    clock = clocked(monkeypatch)
    clock.meanwhile = lambda: worker.step() if clock.now > 12 else None
    under = transport(site.store.url)
    under._blobs = Sealed(under._blobs)  # type: ignore[assignment]
    with pytest.warns(UserWarning, match="no worker has taken"):
        assert under.pull(PULL).version == -1


def test_a_client_that_may_not_list_hears_that_nobody_answers(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """It can't know whether a store was begun, so nothing is said of that."""
    clocked(monkeypatch)
    under = transport(site.store.url, timeout=2.0)
    under._blobs = Sealed(under._blobs)  # type: ignore[assignment]
    with pytest.raises(BusyError, match="no worker has taken it"):
        under.pull(PULL)


def test_a_client_that_may_not_read_at_all_is_told(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own request, a moment after it was put, is refused: not after the whole timeout."""
    clock = clocked(monkeypatch)
    under = transport(site.store.url, pauses=())
    under._blobs = Sealed(under._blobs, closed=".request")  # type: ignore[assignment]
    with pytest.raises(StoreError, match="Access Denied"):
        under.pull(PULL)
    assert clock.now < 20


def test_storage_that_fails_while_it_waits_is_no_not_yet(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a refusal is."""
    clocked(monkeypatch)
    under = transport(site.store.url, pauses=())
    hook = Nth(0, refuse, "get post/")
    under._blobs = hooked(site.store.url, hook).blobs
    with hook.armed(), pytest.raises(StoreError):
        under.pull(PULL)
