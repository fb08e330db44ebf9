"""Workers: who claims a request, who takes it over, and what is swept."""

from __future__ import annotations

import logging
import threading
from typing import Any

import pytest
import torch
from harness_post import Clock, answer, ends, post
from harness_requests import Site, ahead, back
from harness_store import Crash, Nth, crash, hooked

from splitfed.errors import (
    BodyError,
    FormatError,
    IdError,
    InputError,
    MissingError,
    SplitFedError,
    TooLargeError,
)
from splitfed.protocol.messages import Housekeeping, PullRequest
from splitfed.protocol.packing import pack
from splitfed.service.limits import MessageLimits
from splitfed.service.mailbox.worker import MAX_CLAIMS, Worker

PULL = PullRequest("a")


@pytest.fixture
def site(store_url: str) -> Site:
    """A store with two replicas."""
    return Site(store_url)


@pytest.fixture
def clock() -> Clock:
    """The workers' clock."""
    return Clock()


@pytest.fixture
def worker(site: Site, clock: Clock) -> Worker:
    """A worker whose claims stand for 60 seconds."""
    return Worker(site.server, site.store, clock=clock.monotonic)


def test_a_worker_answers_what_a_server_would(site: Site, worker: Worker) -> None:
    """Forward and backward through files have the bits of the calls themselves."""
    direct, place = site.forward(), post(site.store, ahead())
    assert worker.step() == 1
    found = answer(site.store, place, "forward")
    assert found.outputs.equal(direct.outputs)
    assert (found.version, found.incarnation, found.crcs) == (direct.version, direct.incarnation, direct.crcs)
    place = post(site.store, back(), 1)
    assert worker.step() == 1
    answered = answer(site.store, place, "backward")
    assert answered.status == "stored"
    assert answered.grad_inputs[0].equal(torch.full((2, 2), 2.0))
    assert [str(batch) for batch in site.store.waiting()] == ["a/1/0"]


def test_an_answered_request_is_left_alone(site: Site, worker: Worker) -> None:
    """The answer waits for its client; nobody computes it again."""
    post(site.store, PULL)
    assert worker.step() == 1
    assert worker.step() == 0
    assert ends(site.store) == ["answer", "claim-0000", "request"]


def test_a_claim_of_another_is_respected_until_it_expires(site: Site, worker: Worker, clock: Clock) -> None:
    """Another worker has 60 seconds, counted from when this one first saw its claim."""
    place = post(site.store, PULL)
    site.store.blobs.create(f"{place}.claim-0000", [b"dead"])
    assert worker.step() == 0
    clock.now = 59.9
    assert worker.step() == 0
    clock.now = 60.0
    assert worker.step() == 1
    assert answer(site.store, place, "pull").version == -1
    assert ends(site.store) == ["answer", "claim-0000", "claim-0001", "request"]


def test_the_next_claim_has_its_own_time(site: Site, worker: Worker, clock: Clock) -> None:
    """Whoever took over gets 60 seconds too."""
    place = post(site.store, PULL)
    for number in range(2):
        site.store.blobs.create(f"{place}.claim-{number:04d}", [b"dead"])
        assert worker.step() == 0
        clock.now += 59.0
    assert worker.step() == 0
    clock.now += 1.0
    assert worker.step() == 1


def test_of_two_workers_with_one_listing_one_answers(site: Site, worker: Worker) -> None:
    """Both see an unclaimed request; the claim is create-once."""
    post(site.store, PULL)
    second = Worker(site.other, site.store)
    posts = second._look()
    assert worker.step() == 1
    assert not any(second._claim(place, found.claims) for place, found in posts.items())


def test_the_first_answer_stands(site: Site, worker: Worker) -> None:
    """A worker that was thought dead answers after its successor: the client may have read the first already."""
    place = post(site.store, PULL)
    posts = worker._look()
    site.store.blobs.create(f"{place}.answer", [b"the first"])
    assert worker._answer(place, posts[place])
    assert bytes(site.store.blobs.raw.get(f"{place}.answer") or b"") == b"the first"


def test_a_worker_that_dies_with_a_claim_is_succeeded(store_url: str, clock: Clock) -> None:
    """Killed between claim and answer, at the last moment: the gradient is stored once, and the answer is the same."""
    site = Site(store_url)
    site.forward()
    place = post(site.store, back())
    hook = Nth(0, crash, "create post/")
    dying = Worker(site.server, hooked(store_url, hook), clock=clock.monotonic)
    hook.n = 1  # the claim goes through, the answer doesn't
    with hook.armed(), pytest.raises(Crash):
        dying.step()
    heir = Worker(site.other, site.store, clock=clock.monotonic)
    assert heir.step() == 0
    clock.now = 60.0
    assert heir.step() == 1
    assert answer(site.store, place, "backward").status == "stored"
    assert [str(batch) for batch in site.store.waiting()] == ["a/1/0"]


def test_a_request_that_ends_its_workers_is_given_up(site: Site, worker: Worker, clock: Clock) -> None:
    """Five claims without an answer: the sixth worker answers an error instead of dying too."""
    place = post(site.store, PULL)
    for number in range(MAX_CLAIMS):
        site.store.blobs.create(f"{place}.claim-{number:04d}", [b"dead"])
    worker.step()
    clock.now = 60.0
    assert worker.step() == 1
    with pytest.raises(BodyError, match="5 workers have taken this request"):
        answer(site.store, place, "pull")


def test_a_request_for_another_client_is_refused(site: Site, worker: Worker) -> None:
    """Who may write in one folder may not speak for another client."""
    place = post(site.store, PullRequest("b"))
    assert worker.step() == 1
    with pytest.raises(IdError, match="'b' lies in the folder of 'a'"):
        answer(site.store, place, "pull")


@pytest.mark.parametrize("data", [b"{}", b"\x00" * 100])
def test_foreign_bytes_are_answered_with_an_error(site: Site, worker: Worker, data: bytes) -> None:
    """Rubbish in a request ends no worker."""
    place = post(site.store, data)
    assert worker.step() == 1
    with pytest.raises(FormatError):
        answer(site.store, place, "pull")


def test_an_error_of_the_server_is_the_answer(site: Site, worker: Worker) -> None:
    """A version that doesn't exist is the client's MissingError."""
    place = post(site.store, ahead(version=5))
    assert worker.step() == 1
    with pytest.raises(MissingError):
        answer(site.store, place, "forward")


def test_an_unforeseen_error_is_logged_here_and_named_there(
    site: Site, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The traceback stays with the worker, which goes on."""

    def broken(request: Any) -> Any:
        raise OSError("/secret is full")

    monkeypatch.setattr(site.server, "pull", broken)
    place = post(site.store, PULL)
    with caplog.at_level(logging.ERROR):
        assert Worker(site.server, site.store).step() == 1
    assert "/secret is full" in caplog.text
    with pytest.raises(SplitFedError, match="OSError") as caught:
        answer(site.store, place, "pull")
    assert "secret" not in str(caught.value)


def test_what_has_no_request_is_swept(site: Site, worker: Worker) -> None:
    """The client has had its answer and died before it deleted it: nothing stays."""
    place = post(site.store, PULL)
    assert worker.step() == 1
    site.store.blobs.delete(f"{place}.request")
    assert worker.step() == 0
    assert ends(site.store) == []


def test_an_answer_that_nobody_fetches_goes_in_the_end(site: Site, worker: Worker, clock: Clock) -> None:
    """A client that was killed while it waited leaves nothing for ever."""
    post(site.store, PULL)
    worker.step()
    worker.step()
    clock.now = 3599.0
    worker.step()
    assert ends(site.store) == ["answer", "claim-0000", "request"]
    clock.now = 3600.0
    worker.step()
    assert ends(site.store) == []


def test_a_request_that_vanishes_is_no_answer(site: Site, worker: Worker) -> None:
    """Its client has given up between the look and the claim."""
    place = post(site.store, PULL)
    posts = worker._look()
    site.store.blobs.delete(f"{place}.request")
    assert worker._claim(place, 0)
    assert not worker._answer(place, posts[place])


def test_foreign_keys_are_left_alone(site: Site, worker: Worker) -> None:
    """What isn't ours is neither answered nor swept."""
    keys = ["post/a/notes", f"post/a/{'0' * 32}-0000000000.claim-x", f"post/a=b/{'0' * 32}-0000000000.request"]
    for key in keys:
        site.store.blobs.put(key, [b"x"])
    assert worker.step() == 0
    assert site.store.blobs.list("post") == sorted(keys)


def test_run_ends_when_it_is_told(site: Site, worker: Worker) -> None:
    """It answers what waits, reports it, and returns how much that was."""
    for number in range(3):
        post(site.store, PULL, number)
    stop, told = threading.Event(), []

    def on_answer(answered: int) -> None:
        told.append(answered)
        stop.set()

    assert worker.run(stop, on_answer=on_answer) == 3
    assert told == [3]


def test_a_worker_that_is_stopped_begins_nothing(site: Site, worker: Worker) -> None:
    """`stop()` before `run()` counts, and a step that is told to stop leaves the rest to others."""
    post(site.store, PULL)
    stop = threading.Event()
    stop.set()
    assert worker.step(stop) == 0
    worker.stop()
    assert worker.run() == 0
    assert worker.step() == 0
    assert ends(site.store) == ["request"]


def test_run_waits_for_work(site: Site, worker: Worker) -> None:
    """A request that comes while nothing waits is found."""
    runner = threading.Thread(target=worker.run, kwargs={"poll": 0.01, "on_answer": lambda n: worker.stop()})
    runner.start()
    place = post(site.store, PULL)
    runner.join(60)
    assert not runner.is_alive()
    assert answer(site.store, place, "pull").version == -1


@pytest.mark.parametrize("settings", [{"claim_seconds": 0}, {"keep_seconds": -1.0}])
def test_times_must_be_positive(site: Site, settings: dict[str, float]) -> None:
    """A claim that expires at once would be no claim."""
    with pytest.raises(InputError):
        Worker(site.server, site.store, **settings)


def test_a_store_is_needed() -> None:
    """A URL isn't one."""
    with pytest.raises(InputError, match="GradientStore"):
        Worker(None, "runs/demo")  # type: ignore[arg-type]


def test_clients_take_turns(site: Site, worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of twenty requests of one and one of another, that is the first or second; who comes meanwhile isn't the last."""
    order: list[str] = []
    pull = site.server.pull

    def noted(request: PullRequest) -> Any:
        order.append(request.client_id)
        if len(order) == 5:
            post(site.store, PullRequest("late"), 0, "late")
        return pull(request)

    monkeypatch.setattr(site.server, "pull", noted)
    for number in range(20):
        post(site.store, PULL, number)
    post(site.store, PullRequest("b"), 0, "b")
    assert worker.step() == 22
    assert order.index("b") <= 1
    assert order.index("late") <= 6
    assert worker.step() == 0


def test_a_request_that_is_too_large_is_answered_and_not_read(site: Site) -> None:
    """Nor is one computed that has too many samples, tensors or numbers."""
    limits = MessageLimits(body=5000, samples=1, tensors=1, notes=2)
    reads = Nth()
    worker = Worker(
        site.server, hooked(site.store.url, reads) if "file" in site.store.url else site.store, limits=limits
    )
    for number, (request, said) in enumerate(
        {
            bytes(6000): "6000 bytes or more: this server takes 5000",
            b"".join(pack(ahead())): "2 samples: this server takes 1",
            b"".join(pack(ahead(inputs=((torch.ones(1), torch.ones(1)), {})))): "too many tensors: expected at most 1",
            b"".join(pack(ahead(inputs=((), {}), housekeeping=Housekeeping(abandoned=(1, 2, 3))))): "names 3 calls",
        }.items()
    ):
        place = post(site.store, request, number)
        with reads.armed():
            assert worker.step() == 1
        with pytest.raises((TooLargeError, FormatError), match=said):
            answer(site.store, place, "forward")
        assert number or ("get", f"{place}.request") not in reads.log
    assert site.store.waiting() == []


def test_a_worker_s_limits_hold_for_its_server(site: Site) -> None:
    """As those of an HTTP service do."""
    Worker(site.server, site.store, limits=MessageLimits(client_memory=77))
    assert site.server.memory.client == 77
