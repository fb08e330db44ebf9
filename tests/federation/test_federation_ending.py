"""When a federation ends, the activations of open calls go; who is late hears it, and nothing counts twice."""

from __future__ import annotations

import uuid

import pytest
import torch
from coalition import Coalition, halves, set_weight
from harness_store import Nth, hooked, meanwhile
from torch import Tensor

from splitfed import AlreadyAppliedError, ExpiredError, GradientStore, SplitClient, SplitServer
from splitfed.store.layout import TRANSIENT


def open_calls(run: Coalition) -> list[str]:
    """The keys of forwards, parts and pins, of whichever lineage."""
    return [key for key in run.store.blobs.list("") if set(TRANSIENT) & set(key.split("/"))]


def forward(run: Coalition, name: str, x: float = 1.0) -> Tensor:
    """The loss of a batch whose backward is still to come."""
    loss: Tensor = run.client(name)(torch.tensor([[x]])).sum()
    return loss


def replaced(run: Coalition) -> None:
    """Let another replica answer from now on: it has no graph at hand."""
    run.server = SplitServer(halves()[1], GradientStore(run.url, sync="process"))
    for client in run.clients.values():
        client._connection.transport = run.server


def trained(*names: str, **settings: object) -> Coalition:
    """A round in which each client trains one batch and pushes."""
    run = Coalition.begun(f"memory://{uuid.uuid4()}", *names, **settings)
    for name in names:
        run.batch(name, 2.0)
        run.train(name, to=3.0)
    return run


@pytest.mark.parametrize("mode", ["round", "synchronous", "sflv1"])
def test_no_activations_stay_when_the_last_round_is_over(mode: str) -> None:
    """The last batch of each client is on record until then, since nothing confirmed it; gradients are untouched."""
    run = trained("a", "b", mode=mode)
    assert len(open_calls(run)) == 2
    assert run.poll()["status"] == "complete"
    assert len(open_calls(run)) == 2, "a next round may follow, and its clients confirm what they have"
    run.federation.finish()
    assert open_calls(run) == []
    assert run.store.latest_version("client") == 1


def test_run_ends_so_too() -> None:
    """The coordinator that finds all rounds over removes what is left, also where another was killed before it did."""
    run = trained("a")
    run.poll()
    run.store.rounds().finish(1)
    assert len(open_calls(run)) == 1
    assert list(run.another().run(1, poll=0.001)) == []
    assert open_calls(run) == []


def test_an_end_that_is_said_before_the_round_is_over_waits_for_it() -> None:
    """Clients of the round under way still need their records; whoever ends it removes them."""
    run = Coalition.begun(f"memory://{uuid.uuid4()}", "a")
    loss = forward(run, "a", 2.0)
    run.federation.finish()
    assert len(open_calls(run)) == 1
    replaced(run)
    loss.backward()
    run.train("a", to=3.0)
    assert run.another().close()["status"] == "complete"
    assert (run.weight(), run.weight("body")) == (3.0, -1.0)
    assert open_calls(run) == []


def test_a_late_client_hears_that_its_batch_is_lost() -> None:
    """Its backward raises, nothing of it counts, and the batch after it does, once."""
    run = trained("a")
    loss = forward(run, "a", 7.0)
    run.poll()
    run.federation.finish()
    replaced(run)
    with pytest.raises(ExpiredError, match="the run was finished"):
        loss.backward()
    assert run.store.waiting() == []
    assert run.federation.open() is not None
    run.pull("a")
    run.batch("a", 4.0)
    run.train("a", to=5.0)
    assert run.poll()["batches"] == 1
    assert run.weight("body") == 1.0 - 2.0 - 4.0 * 3.0


def test_a_backward_that_is_repeated_after_the_end_counts_once() -> None:
    """Its batch was counted and its record is gone: the answer says so."""
    run = Coalition.begun(f"memory://{uuid.uuid4()}", "a")
    sent = []
    backward = run.server.backward
    run.server.backward = lambda request: (sent.append(request), backward(request))[1]  # type: ignore[method-assign]
    run.batch("a", 2.0)
    run.train("a", to=3.0)
    run.poll()
    run.federation.finish()
    for server in (run.server, SplitServer(halves()[1], GradientStore(run.url, sync="process"))):
        with pytest.raises(AlreadyAppliedError):
            server.backward(sent[0])
    assert run.store.waiting() == []
    assert run.weight("body") == -1.0


def test_a_batch_of_several_calls_is_lost_as_one() -> None:
    """A part of it went with the end; the other part alone doesn't count as the batch."""
    run = Coalition.begun(f"memory://{uuid.uuid4()}", "a")
    losses = forward(run, "a", 2.0) + forward(run, "a", 4.0)
    backward = run.server.backward
    answered = []

    def between(request: object) -> object:
        if answered:
            run.federation.close()
            run.federation.finish()
        answered.append(backward(request))  # type: ignore[arg-type]
        return answered[-1]

    run.server.backward = between  # type: ignore[method-assign, assignment]
    with pytest.raises(ExpiredError):
        losses.backward()
    assert len(answered) == 1
    assert run.store.waiting() == []


def test_a_round_that_is_opened_meanwhile_keeps_its_records() -> None:
    """A coordinator that ends the run late removes nothing of the one that goes on."""
    run = trained("a")
    run.poll()
    assert len(open_calls(run)) == 1
    going_on: list[Tensor] = []

    def next_round() -> None:
        run.federation.open()
        run.pull("a")
        going_on.append(forward(run, "a", 4.0))

    hook = Nth(0, meanwhile(next_round), at="create rounds/0000000001/finished")
    with hook.armed():
        list(run.another(hooked(run.url, hook)).run(1, poll=0.001))
    replaced(run)
    going_on[0].backward()
    run.train("a", to=5.0)
    assert run.poll()["batches"] == 1
    run.pull("a")
    assert run.store.rounds().is_finished(1)
    assert not run.store.rounds().is_finished(2)


def test_a_coordinator_of_a_shorter_run_ends_no_longer_one() -> None:
    """Round 2 was opened by another before run(1) came to its end: its clients aren't told that it is the last."""
    run = trained("a")
    shorter = run.another().run(1, poll=0.001)
    assert next(shorter)["round"] == 1
    run.federation.open()
    run.pull("a")
    loss = forward(run, "a", 4.0)
    assert list(shorter) == []
    replaced(run)
    loss.backward()
    assert not run.store.rounds().is_finished(2)


def test_an_answer_in_one_trip_is_not_given_at_another_version() -> None:
    """The pin goes with the end: a repeated `client.loss` that was counted raises, and answers no newer body's loss."""
    run = Coalition.begun(f"memory://{uuid.uuid4()}", "a")
    served = SplitServer(halves()[1], run.store, loss_fn=lambda outputs, target: (outputs - target).sum())
    sent = []
    loss = served.loss
    served.loss = lambda request: (sent.append(request), loss(request))[1]  # type: ignore[method-assign]
    client = SplitClient(halves()[0], served, "a")
    client.pull()
    client.loss(torch.tensor([[2.0]]), torch.tensor([[1.0]])).backward()
    assert loss(sent[0]).loss == 1.0, "as long as it is on record it is answered again"
    set_weight(client, 3.0)
    client.push()
    assert run.poll()["batches"] == 1
    run.federation.finish()
    assert open_calls(run) == []
    with pytest.raises(AlreadyAppliedError, match="the version that it ran at is no longer on record"):
        loss(sent[0])
    assert run.weight("body") == -1.0
