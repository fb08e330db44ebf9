"""A restarted owner repeats its batches under their old numbers: each counts once, and no bit is another."""

from __future__ import annotations

import functools
import json
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from harness_http import running
from harness_store import Crash, commits
from restarting import STEPS, Mortal, Owner, Run, Step, cut, train
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

import splitfed
from splitfed.errors import InputError, ProtocolError, StoreError, SupersededError
from splitfed.service.http.app import make_app
from splitfed.service.mailbox.worker import Worker
from splitfed.store.store import GradientStore


def plain(client: Any, x: Tensor, y: Tensor) -> None:
    """One call, one pass."""
    cross_entropy(client(x), y).backward()


def two_calls(client: Any, x: Tensor, y: Tensor) -> None:
    """Two calls in one loss: a batch of two parts."""
    (cross_entropy(client(x), y) + client(x * 2).square().mean()).backward()


def summed(client: Any, x: Tensor, y: Tensor) -> None:
    """Two passes in a block that sums them."""
    with client.batch():
        (cross_entropy(client(x), y) / 2).backward()
        (cross_entropy(client(x.flip(0)), y) / 2).backward()


def weighed(client: Any, x: Tensor, y: Tensor) -> None:
    """A block that says what the batch counts."""
    with client.batch(num_samples=len(x) / 2):
        cross_entropy(client(x), y).backward()


def adversarial(client: Any, x: Tensor, y: Tensor) -> None:
    """A pass for the inputs' gradient, which doesn't count, before the one that does."""
    x = x.requires_grad_()
    (gradient,) = torch.autograd.grad(cross_entropy(client(x), y), x)
    cross_entropy(client((x + 0.1 * gradient.sign()).detach()), y).backward()


def evaluated(client: Any, x: Tensor, y: Tensor) -> None:
    """A look at the newest version before each pass."""
    client.eval()
    with torch.no_grad():
        client(x)
    client.train()
    cross_entropy(client(x), y).backward()


def checkpointed(client: Any, x: Tensor, y: Tensor, *, reentrant: bool) -> None:
    """The call is made again within the pass."""
    x = x.requires_grad_(reentrant)
    cross_entropy(checkpoint(client, x, use_reentrant=reentrant), y).backward()


SHAPES: dict[str, Step] = {
    "plain": plain,
    "two_calls": two_calls,
    "summed": summed,
    "weighed": weighed,
    "adversarial": adversarial,
    "evaluated": evaluated,
    "checkpointed": functools.partial(checkpointed, reentrant=False),
    "reentrant": functools.partial(checkpointed, reentrant=True),
}


def one_trip(client: Any, x: Tensor, y: Tensor) -> None:
    """The loss is computed by the server."""
    client.loss(x, y).backward()


def opened(keep_graphs: int = 8, **settings: Any) -> tuple[GradientStore, splitfed.SplitServer]:
    """A new store and its server."""
    store = GradientStore(f"memory://{uuid.uuid4()}", sync="process")
    body = cut(**settings)[1]
    return store, splitfed.SplitServer(body, store, keep_graphs=keep_graphs, loss_fn=cross_entropy)


@functools.cache
def undisturbed(shape: str) -> Run:
    """A run in which nobody dies."""
    return train(*opened(), SHAPES[shape])


def of_restart(run: Run, expected: Run) -> None:
    """Each batch counts once, by its id and its weight, and no bit differs."""
    assert run == expected
    ids = [batch for folded in run.folded for batch in folded]
    assert sorted(ids, key=lambda batch: int(batch.rpartition("/")[2])) == [f"a/1/{seq}" for seq in range(STEPS)]


# ------------------------------------------------------------------------------------ loops


@pytest.mark.filterwarnings("ignore:.*move the statistics of the unsplit model")
@pytest.mark.parametrize("shape", SHAPES)
def test_a_killed_owner_ends_with_the_bits_of_one_that_lived(shape: str) -> None:
    """Whatever a step is made of, and wherever it dies: by kept graphs and by recomputes, delivered or not."""
    expected = undisturbed(shape)
    for number, at in enumerate(range(3, expected.requests, 7)):
        run = train(*opened(8 * (number % 2)), SHAPES[shape], (at, number % 4 < 2))
        assert run.deaths == 1
        of_restart(run, expected)


@pytest.mark.parametrize("delivered", [False, True])
@pytest.mark.parametrize("stride", [5, pytest.param(1, marks=pytest.mark.soak)])
def test_a_kill_at_any_request(stride: int, delivered: bool) -> None:
    """Of a loop whose batches have two parts: forwards, parts and seals, with and without their answers."""
    expected = undisturbed("two_calls")
    for at in range(0, expected.requests, stride):
        of_restart(train(*opened(), two_calls, (at, delivered)), expected)


def test_it_may_be_killed_again_and_again() -> None:
    """Before the first checkpoint, while it repeats, and after it: from one checkpoint or from later ones."""
    expected = undisturbed("plain")
    for deaths in ([(3, True)] * 3, [(13, True), (5, False), (5, True)], [(9, True), (1, True), (8, True), (1, False)]):
        run = train(*opened(), plain, *deaths)
        assert run.deaths == len(deaths)
        of_restart(run, expected)


@pytest.mark.parametrize("delivered", [False, True])
def test_a_loss_in_one_trip_counts_once(delivered: bool) -> None:
    """The version that the earlier process had it run at is noted, or on record."""
    expected = train(*opened(ends_at_cut=True), one_trip, ends_at_cut=True)
    for at in range(0, expected.requests, 2):
        run = train(*opened(ends_at_cut=True), one_trip, (at, delivered), ends_at_cut=True)
        of_restart(run, expected)


# ------------------------------------------------------------------------------------ transports


@contextmanager
def over_http(store: GradientStore, server: Any) -> Iterator[Any]:
    """The server, over HTTP."""
    with running(make_app(server)) as service:
        yield splitfed.client.transports.open_transport(service.url, client_id="a")


@contextmanager
def by_mail(store: GradientStore, server: Any) -> Iterator[Any]:
    """The server, behind a mailbox."""
    worker, stop = Worker(server, store), threading.Event()
    thread = threading.Thread(target=worker.run, kwargs={"poll": 0.002, "stop": stop})
    thread.start()
    try:
        yield splitfed.client.transports.open_transport(store.url, client_id="a")
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize("way", [over_http, by_mail])
def test_through_any_transport(way: Any, tmp_path: Path) -> None:
    """What a restarted process says of itself travels."""
    store = GradientStore((tmp_path / "run").as_uri(), sync="process")
    server = splitfed.SplitServer(cut()[1], store, keep_graphs=0)
    with way(store, server) as transport:
        run = train(store, transport, two_calls, (20, True), (7, False))
    of_restart(run, undisturbed("two_calls"))


# ------------------------------------------------------------------------------------ what is there


def repeated(
    server: Any, *, before: int = 1, after: int = 3, step: Step = plain, **settings: Any
) -> tuple[bytes, Owner]:
    """A checkpoint after some steps, and the owner that has gone on since."""
    owner = Owner(server, step, **settings)
    for _ in range(before):
        owner.step()
    saved = owner.save()
    for _ in range(after):
        owner.step()
    return saved, owner


def counted(store: GradientStore) -> dict[str, float]:
    """The weight of each pending batch."""
    headers = {str(batch): store.pile().peek(batch) for batch in store.waiting()}
    return {name: header["num_samples"] for name, header in headers.items() if header is not None}  # type: ignore[misc]


def test_a_version_that_is_gone_is_repeated_at_the_newest() -> None:
    """No batch counts twice and none raises, though the outputs are others now."""
    store, server = opened()
    accumulator = splitfed.Accumulator(cut()[1], store, lambda p: torch.optim.SGD(p, lr=0.1), keep_versions=2)
    owner = Owner(server, plain)
    saved = owner.save()
    for _ in range(6):
        owner.step()
        accumulator.step()
    again = Owner(server, plain, saved)
    for _ in range(8):
        again.step()
    accumulator.step()
    folded = [str(batch) for commit in commits(store) for batch in commit.folded]
    assert folded == [f"a/1/{seq}" for seq in range(8)]
    assert sum(commit.num_samples for commit in commits(store)) == sum(range(3, 11))


@pytest.mark.parametrize("keep_graphs", [0, 8])
def test_a_repeated_loss_whose_version_is_gone_runs_at_the_newest(keep_graphs: int) -> None:
    """Also where the earlier process had noted a version, and nobody has confirmed its answer."""
    store, server = opened(keep_graphs, ends_at_cut=True)
    body = cut(ends_at_cut=True)[1]
    accumulator = splitfed.Accumulator(body, store, lambda p: torch.optim.SGD(p, lr=0.1), keep_versions=2)
    saved, _ = repeated(server, step=one_trip, ends_at_cut=True)
    pins = {key: bytes(store.blobs.get(key) or b"") for key in store.blobs.list("body/pin")}
    accumulator.step()
    for seq in range(4):
        other = splitfed.SplitClient(cut(ends_at_cut=True)[0], server, f"b{seq}")
        other.loss(torch.randn(2, 6), torch.tensor([0, 1])).backward()
        torch.optim.SGD(other.parameters(), lr=0.1).step()
        accumulator.step()
    for key, version in pins.items():  # as if the sweep hadn't come to it
        store.blobs.put(key, [version])
    again = Owner(server, one_trip, saved, ends_at_cut=True)
    for _ in range(4):
        again.step()
    assert counted(store) == {"a/1/4": 7.0}


class Held(Mortal):
    """Keeps the last request, which it dies of: it is still on its way."""

    held: Any = None

    def send(self, method: str, request: Any) -> Any:
        """Pass it on."""
        self.held = request
        return super().send(method, request)


@pytest.mark.parametrize("first", ["late", "repeated"])
def test_a_request_of_the_killed_process_that_comes_late_counts_once(first: str) -> None:
    """It waited in a mailbox or a proxy while the batch was repeated: one of the two is stored."""
    store, server = opened()
    saved, _ = repeated(server, after=0)
    wire = Held(server, 3)
    owner = Owner(wire, plain, saved)
    owner.step()
    with pytest.raises(Crash):
        owner.step()

    def between(client: Any, x: Tensor, y: Tensor) -> None:
        loss = cross_entropy(client(x), y)
        if first == "late" and len(x) == 5:
            server.backward(wire.held)
        loss.backward()

    again = Owner(server, between, saved)
    for _ in range(4):
        again.step()
    if first == "repeated":
        assert server.backward(wire.held).status == "stored", "by another"
    assert counted(store) == {f"a/1/{seq}": 3.0 + seq for seq in range(5)}


def test_a_process_that_wasnt_dead_is_told() -> None:
    """It goes on under numbers that are taken: an error, and each number counts once."""
    store, server = opened()
    saved, owner = repeated(server, after=0)
    again = Owner(server, plain, saved)
    again.step()
    with pytest.raises(ProtocolError, match="was sent before with other content"):
        owner.step()
    assert counted(store) == {"a/1/0": 3.0, "a/1/1": 4.0}


def test_a_number_that_was_given_up_stays_so() -> None:
    """The earlier process went on after an error; its successor is told, once, and the others are where they were."""
    store, server = opened()
    saved, owner = repeated(server, after=0)
    owner.client._connection.abandon(owner.client._connection.number("batch"))
    owner.steps += 1
    owner.step()
    again = Owner(server, plain, saved)
    with pytest.warns(UserWarning, match="repeats a batch that it gave up before it was restarted"):
        again.step()
    again.step()
    again.step()
    assert counted(store) == {"a/1/0": 3.0, "a/1/1": 0.0, "a/1/2": 5.0, "a/1/3": 6.0}


def test_what_was_given_up_before_the_checkpoint_is_closed_after_it() -> None:
    """Else its number would be a hole for ever."""
    store, server = opened()
    owner = Owner(server, plain)
    owner.step()
    owner.client._connection.abandon(owner.client._connection.number("batch"))
    again = Owner(server, plain, owner.save())
    again.step()
    assert [str(batch) for batch in store.waiting()] == ["a/1/0", "a/1/1", "a/1/2"]


def test_a_batch_that_isnt_finite_is_repeated_as_rejected() -> None:
    """Closed before, closed now."""
    store, server = opened()

    def exploding(client: Any, x: Tensor, y: Tensor) -> None:
        (client(x).sum() * (float("inf") if len(x) == 4 else 1.0)).backward()
        if len(x) == 4:
            client.zero_grad()  # or the step would spoil all batches after it

    with pytest.warns(UserWarning, match="isn't finite"):
        saved, _ = repeated(server, step=exploding)
    again = Owner(server, exploding, saved)
    with pytest.warns(UserWarning, match="isn't finite"):
        again.step()
    assert [store.pile().peek(batch)["kind"] for batch in store.waiting()] == [  # type: ignore[index]
        *("gradient", "rejected", "gradient", "gradient")
    ]


# ------------------------------------------------------------------------------------ misuse


def test_a_position_is_plain_json() -> None:
    """The same after a trip through a file, of a client that has done nothing too."""
    _, server = opened()
    owner = Owner(server, plain)
    for _ in range(2):
        position = owner.client.position()
        assert json.loads(json.dumps(position)) == position
        assert len(json.dumps(position)) < 500
        owner.step()
    assert position["batch"] == 1


def test_a_position_of_another_client_is_refused() -> None:
    """Each owner has a checkpoint of its own."""
    _, server = opened()
    position = splitfed.SplitClient(cut()[0], server, "b").position()
    with pytest.raises(InputError, match="a position of client 'b', and this client is 'a'"):
        splitfed.SplitClient(cut()[0], server, "a").resume(position)


@pytest.mark.parametrize(
    "change",
    [
        *({"batch": -1}, {"batch": 1.5}, {"process": None}, {"incarnation": "1"}, {"counted": [1.0]}, {"format": 2}),
        *({"abandoned": None}, {"round": {"number": 1}}, {"client_id": "../b"}, {"more": 1}, {"seen": 10**13}),
        *({"abandoned": [-1]}, {"half": -1}, {"incarnation": -1}, {"counted": "abc"}, {"round": []}),
    ],
    ids=str,
)
def test_what_isnt_a_position_is_refused(change: dict[str, Any]) -> None:
    """Before anything comes of it."""
    _, server = opened()
    client = splitfed.SplitClient(cut()[0], server, "a")
    position = {**client.position(), **change}
    with pytest.raises(InputError, match="position"):
        client.resume(position)
    with pytest.raises(InputError, match="position"):
        client.resume(None)  # type: ignore[arg-type]


def test_a_client_that_was_used_doesnt_resume() -> None:
    """Its numbers are its own by then; nor does one resume twice."""
    _, server = opened()
    saved, owner = repeated(server)
    with pytest.raises(InputError, match=r"has made calls already.*resume\(\) comes first, on a new SplitClient"):
        owner.client.resume(owner.client.position())
    again = Owner(server, plain, saved)
    with pytest.raises(InputError, match="has made calls already"):
        again.client.resume(again.client.position())


def test_a_position_of_another_store_is_refused() -> None:
    """Whether the client has trained there or not; nothing is begun in it."""
    _, server = opened()
    saved, _ = repeated(server)
    store, other = opened()
    with pytest.raises(ProtocolError, match="from a position of another run"):
        Owner(other, plain, saved).step()
    assert store.clients() == []
    Owner(other, plain).step()
    with pytest.raises(ProtocolError, match="from a position of another run"):
        Owner(other, plain, saved).step()
    assert [str(batch) for batch in store.waiting()] == ["a/1/0"]


def test_a_newer_client_supersedes_a_resumed_one() -> None:
    """One that trained without resuming is a newer process, whoever resumes the older one afterwards."""
    _, server = opened()
    saved, _ = repeated(server)
    again = Owner(server, plain, saved)
    again.step()
    Owner(server, plain).step()
    with pytest.raises(SupersededError):
        again.step()
    with pytest.raises(SupersededError, match="has begun a newer process"):
        Owner(server, plain, saved).step()


def test_a_position_within_a_backward_is_refused() -> None:
    """Half of the batch is sent, and would be lost."""
    _, server = opened()
    client = splitfed.SplitClient(cut()[0], server, "a")
    outputs = client(torch.randn(4, 6))
    errors = []

    def look(gradient: Tensor) -> None:
        with pytest.raises(InputError) as caught:
            client.position()
        errors.append(str(caught.value))

    outputs.register_hook(look)
    outputs.sum().backward()
    assert len(errors) == 1
    assert "within a backward pass" in errors[0]
    assert client.position()["batch"] == 1


def test_a_position_within_a_block_that_sums_is_refused() -> None:
    """Within one that only says what calls count it is as good as any."""
    _, server = opened()
    client = splitfed.SplitClient(cut()[0], server, "a")
    with client.batch():
        client(torch.randn(4, 6)).sum().backward()
        with pytest.raises(InputError, match=r"within client\.batch\(\)"):
            client.position()
    with client.batch(num_samples=3):
        assert client.position()["batch"] == 1


def test_a_pass_that_failed_leaves_a_position() -> None:
    """Its number was given up, and that is in it."""
    _, server = opened()
    client = splitfed.SplitClient(cut()[0], Mortal(server, 1), "a")
    with pytest.raises(Crash):
        client(torch.randn(4, 6)).sum().backward()
    position = client.position()
    assert (position["batch"], position["abandoned"]) == (1, [0])


def test_a_fork_of_a_resumed_client_is_a_process_of_its_own() -> None:
    """As any fork: nothing of the numbers is its own."""
    _, server = opened()
    saved, _ = repeated(server)
    connection = Owner(server, plain, saved).client._connection
    process = connection.process
    connection._begin()  # what a fork does first
    assert (connection.resumed, connection.incarnation) == (0, None)
    assert connection.process != process
    assert connection.ahead() is None


def test_a_resumed_client_asks_no_longer_once_it_is_where_it_was() -> None:
    """The first batch that the store doesn't have ends the repeating."""
    _, server = opened()
    saved, _ = repeated(server, after=2)
    again = Owner(server, plain, saved)
    asked = []
    for _ in range(4):
        asked.append(again.client._connection.ahead())
        again.step()
    assert asked == [1, 2, 3, None]


# ------------------------------------------------------------------------------------ client halves


class LosesPush(Mortal):
    """Loses the reply to the first push."""

    lost = False

    def send(self, method: str, request: Any) -> Any:
        """Pass it on."""
        answer = super().send(method, request)
        if method == "push" and request.base_version >= 0 and not self.lost:
            self.lost = True
            raise StoreError("the reply was lost")
        return answer


def updates(store: GradientStore) -> dict[str, tuple[float, int]]:
    """Weight and base of each pending update of halves."""
    found = {}
    for batch in store.waiting("client"):
        header = store.pile("client").peek(batch) or {}
        found[str(batch)] = header["num_samples"], header["base_version"]
    return found  # type: ignore[return-value]


def test_a_change_that_was_pushed_isnt_pushed_again() -> None:
    """The checkpoint lies within a round: the change is from the pull, and weighs all batches since."""
    store, server = opened()
    owner = Owner(server, plain)
    owner.client.pull()
    owner.step()
    saved = owner.save()
    owner.step()
    owner.client.push()
    expected = updates(store)
    assert expected == {"a/1/0": (7.0, 0)}
    again = Owner(server, plain, saved)
    assert again.client.version == 0
    again.step()
    again.client.push()
    assert updates(store) == expected
    again.step()
    again.client.push()
    assert updates(store) == {**expected, "a/1/1": (5.0, 0)}


def test_a_change_that_wasnt_pushed_has_the_bits_of_one_that_was() -> None:
    """It is the change since the pull of the process before, whose half is loaded as it was when it was killed."""
    pushed = []
    for dies in (False, True):
        store, server = opened()
        owner = Owner(server, plain)
        owner.client.pull()
        owner.step()
        if dies:
            owner = Owner(server, plain, owner.save())
        owner.step()
        owner.client.push()
        pushed += [store.pile("client").read(batch) for batch in store.waiting("client")]
    lived, died = pushed
    assert lived is not None
    assert died is not None
    assert (lived.num_samples, lived.digest) == (died.num_samples, died.digest)
    assert all(torch.equal(gradient, died.gradients[name]) for name, gradient in lived.gradients.items())


def test_a_push_without_an_answer_keeps_its_number() -> None:
    """Whether it has arrived or not, it counts once."""
    store, server = opened()
    owner = Owner(LosesPush(server), plain)
    owner.client.pull()
    owner.step()
    with pytest.raises(StoreError, match="reply was lost"):
        owner.client.push()
    again = Owner(server, plain, owner.save())
    again.client.push()
    assert updates(store) == {"a/1/0": (3.0, 0)}


def test_after_a_push_the_next_change_begins_with_a_pull() -> None:
    """What it would be the change from is in no version; the error says so."""
    store, server = opened()
    owner = Owner(server, plain)
    owner.client.pull()
    owner.step()
    owner.client.push()
    again = Owner(server, plain, owner.save())
    with pytest.raises(InputError, match=r"call client\.pull\(\)"):
        again.client.push(1)
    again.client.pull()
    again.step()
    again.client.push()
    assert updates(store) == {"a/1/0": (3.0, 0), "a/1/1": (4.0, 0)}


def test_a_half_of_another_store_is_refused() -> None:
    """Where nobody has published that version."""
    _, server = opened()
    owner = Owner(server, plain)
    owner.client.pull()
    saved = owner.save()
    _, other = opened()
    with pytest.raises(ProtocolError, match="version 0 of the client half, which was never published here"):
        Owner(other, plain, saved)
