"""The server's two calls: what they answer, again and again, and what they refuse."""

from __future__ import annotations

import uuid
from dataclasses import replace
from typing import Any

import pytest
import torch
from harness_requests import ONES, SEAL, Site, X, ahead, back, body
from torch import nn

from splitfed.errors import (
    AlreadyAppliedError,
    ArchitectureError,
    BodyError,
    BusyError,
    DigestError,
    ExpiredError,
    FormatError,
    IdError,
    InputError,
    MissingError,
    StoreError,
    SupersededError,
)
from splitfed.protocol.ids import BatchId
from splitfed.protocol.messages import Chain, Housekeeping
from splitfed.server.server import SplitServer
from splitfed.store.batchset import BatchSet
from splitfed.store.store import GradientStore


@pytest.fixture
def site() -> Site:
    """An empty one, in memory."""
    return Site(f"memory://{uuid.uuid4()}")


def test_forward_and_backward(store_url: str) -> None:
    """Of 2x: ∂Σy/∂x = 2 and ∂Σy/∂w = the column sums of x; the gradient waits, and one commit steps by it."""
    site = Site(store_url)
    answer = site.forward()
    assert answer.outputs.tolist() == (2 * X).tolist()
    assert (answer.incarnation, answer.version, answer.requires_grad) == (1, 0, (True,))
    assert (answer.drew, answer.changed) == (False, {})
    grads = site.other.backward(back())
    assert grads.status == "stored"
    assert grads.grad_inputs[0].tolist() == [[2, 2], [2, 2]]  # type: ignore[union-attr]
    assert site.store.waiting() == [BatchId("a", 1, 0)]
    assert site.commit().num_samples == 2
    assert site.store.load_weights()["weight"].tolist() == [[-2, -2], [-4, 0]]
    assert site.forward(call=1, seen=1).outputs[0].tolist() == [2, -4]


def test_a_forward_without_grad_stores_nothing(site: Site) -> None:
    """Nor does it open a process."""
    before = site.store.blobs.list("")
    answer = site.forward(grad=False)
    assert (answer.incarnation, answer.requires_grad) == (None, (False,))
    assert site.store.blobs.list("") == before


@pytest.mark.parametrize("server", ["server", "other", "cached"])
@pytest.mark.parametrize("committed", [False, True], ids=["waiting", "committed"])
def test_a_repeated_backward_has_the_same_answer_until_it_is_confirmed(
    committed: bool, server: str, site: Site
) -> None:
    """On any replica, before and after the commit, counted once; then AlreadyAppliedError."""
    again = getattr(site, server)
    site.forward()
    first = site.server.backward(back())
    if committed:
        site.commit()
    for _ in range(3):
        repeated = again.backward(back())
        assert repeated.status == "stored"
        assert torch.equal(repeated.grad_inputs[0], first.grad_inputs[0])
    site.forward(incarnation=1, call=1, housekeeping=Housekeeping(released=((0, 0),)))
    with pytest.raises(AlreadyAppliedError, match="batch a/1/0 is counted already"):
        again.backward(back())
    assert site.store.waiting() == ([] if committed else [BatchId("a", 1, 0)])


OTHERS = {
    "element": {"grad_outputs": (ONES * 2,)},
    "samples": {"seal": replace(SEAL, num_samples=3.0)},
    "scale": {"seal": replace(SEAL, loss_scale=2.0)},
    "chains": {"seal": replace(SEAL, chains=(Chain(1.0, 0),))},
    "call": {"call": 1},
}


@pytest.mark.parametrize("changes", OTHERS.values(), ids=OTHERS)
def test_the_same_id_with_other_content_is_refused(changes: dict[str, Any], site: Site) -> None:
    """Whatever it is that differs; what waits stays as it was."""
    site.forward()
    site.forward(incarnation=1, call=1)
    site.server.backward(back())
    with pytest.raises(DigestError, match="batch a/1/0 was sent before with other content"):
        site.other.backward(back(**changes))
    assert site.store.pile().peek(BatchId("a", 1, 0))["num_samples"] == 2  # type: ignore[index]


def test_a_number_that_was_given_up_cant_come_late(site: Site) -> None:
    """A pass that failed at the client is closed by the next request."""
    site.forward()
    site.forward(incarnation=1, call=1, housekeeping=Housekeeping(abandoned=(0,)))
    with pytest.raises(DigestError, match="batch a/1/0 was given up by its client"):
        site.server.backward(back())
    assert site.server.backward(back(seq=1)).status == "stored"
    assert (site.commit().num_skipped, site.store.waiting()) == (1, [])


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "shape": ({"grad_outputs": (torch.ones(2, 3),)}, r"float32 \(2, 3\): expected float32 \(2, 2\), as the output"),
    "dtype": ({"grad_outputs": (ONES.double(),)}, r"float64 \(2, 2\): expected float32"),
    "too_few": ({"grad_outputs": ()}, "for each of 1 outputs, got 0"),
    "too_many": ({"grad_outputs": (ONES, ONES)}, "for each of 1 outputs, got 2"),
    "no_call_no_seal": ({"call": None, "seal": None}, "neither a call nor a seal"),
    "empty_seal": ({"call": None}, "names no part"),
    "chain": ({"seal": replace(SEAL, chains=(Chain(1.0, 3),))}, r"names part 3, which isn't among its parts \[0\]"),
    "chain_samples": ({"seal": replace(SEAL, chains=(Chain(-1.0, 0),))}, "num_samples is -1.0"),
    "samples_zero": ({"seal": replace(SEAL, num_samples=0.0)}, "num_samples is 0.0: expected a finite number above"),
    "samples_nan": ({"seal": replace(SEAL, num_samples=float("nan"))}, "num_samples is nan"),
    "samples_inf": ({"seal": replace(SEAL, num_samples=float("inf"))}, "num_samples is inf"),
    "scale_zero": ({"seal": replace(SEAL, loss_scale=0.0)}, "loss_scale of batch a/1/0 is 0.0"),
    "scale_inf": ({"seal": replace(SEAL, loss_scale=float("inf"))}, "loss_scale of batch a/1/0 is inf"),
}


@pytest.mark.parametrize(("changes", "said"), WRONG.values(), ids=WRONG)
def test_a_backward_that_doesnt_fit_is_refused(changes: dict[str, Any], said: str, site: Site) -> None:
    """With what was expected; nothing is stored, and the right request works after it."""
    site.forward(site.cached)
    with pytest.raises(InputError, match=said):
        site.cached.backward(back(**changes))
    assert site.store.waiting() == []
    assert site.cached.backward(back()).status == "stored"


def test_a_process_that_isnt_the_newest_cant_count(site: Site) -> None:
    """Superseded by a newer one, or never opened at all."""
    site.forward()
    with pytest.raises(SupersededError, match="never opened process 2"):
        site.server.backward(back(incarnation=2))
    assert site.forward(site.other, process="second").incarnation == 2
    with pytest.raises(SupersededError, match=r"newer process than its number 1.*same client_id"):
        site.server.backward(back())
    assert site.server.backward(back(incarnation=2)).status == "stored"


def test_a_forward_that_isnt_there_is_expired(site: Site) -> None:
    """A call that was never made, or was released without a backward: the batch is lost, and the loop may go on."""
    site.forward()
    with pytest.raises(ExpiredError, match=r"call 5 of client 'a' at version 0.*counts nowhere"):
        site.server.backward(back(call=5))
    site.forward(incarnation=1, call=1, housekeeping=Housekeeping(released=((0, 0),)))
    with pytest.raises(ExpiredError, match="the loop may go on"):
        site.server.backward(back())


def test_versions_come_and_go(site: Site) -> None:
    """One that isn't made yet is missing; with keep_versions=2 version 0 has expired when version 2 is there."""
    with pytest.raises(MissingError, match="no version 9: the newest is 0"):
        site.forward(version=9)
    site.forward()
    for seq in range(3):
        version = site.forward(incarnation=1, call=seq + 1, seen=seq).version
        site.server.backward(back(call=seq + 1, seq=seq, version=version))
        site.commit()
    fresh = SplitServer(body(), GradientStore(site.store.url, sync="process"))
    with pytest.raises(ExpiredError, match=r"version 0 .*raise keep_versions"):
        fresh.forward(ahead(version=0))
    with pytest.raises(ExpiredError, match="left the retention window"):
        fresh.backward(back(seq=9))
    assert fresh.forward(ahead(version=2)).version == 2


def test_no_replica_answers_at_an_older_version_than_the_client_has_seen(site: Site) -> None:
    """Another store, or one that was put back: loud, never silently behind."""
    with pytest.raises(StoreError, match="at version 0, the client has seen 3: is it the same store"):
        site.forward(seen=3)


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"cut": "layer.9"}, InputError, "no part 'layer.9'"),
        ({"cut": "../x"}, InputError, "no part"),
        ({"inputs": ((X[:, :1],), {})}, BodyError, "the body raised RuntimeError: mat1 and mat2"),
        ({"inputs": ((X,), {"mask": X + 1})}, InputError, "for each of 2 input"),
        ({"autocast": "int3"}, InputError, "autocast dtype 'int3' isn't known"),
        ({"previous": 4, "incarnation": 1}, ExpiredError, "call 4 of 'a', whose buffers this one continues, is gone"),
        ({"call": -1}, IdError, "call"),
        ({"version": -1}, IdError, "version"),
    ],
    ids=["part", "path", "shape", "flags", "autocast", "previous", "call", "version"],
)
def test_a_forward_that_doesnt_fit_is_refused(changes: Any, error: type[Exception], said: str, site: Site) -> None:
    """With what was expected; it leaves no record."""
    changes = {"requires_grad": (True,), **changes}
    with pytest.raises(error, match=said):
        site.forward(**changes)
    assert site.store.blobs.list("body/forward") == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_isnt_finite_is_answered_and_rejected(value: float, site: Site) -> None:
    """As autograd would answer it; its id is closed, and a commit counts it as rejected."""
    site.forward()
    bad = torch.full((2, 2), value)
    answer = site.server.backward(back(grad_outputs=(bad,)))
    assert answer.status == "rejected"
    assert not bool(answer.grad_inputs[0].isfinite().any())  # type: ignore[union-attr]
    assert site.other.backward(back(grad_outputs=(bad,))).status == "rejected"
    site.server.backward(back(seq=1))
    commit = site.commit()
    assert (commit.num_batches, commit.num_rejected) == (1, 1)


def test_an_eval_forward_is_answered_and_not_counted(site: Site) -> None:
    """Its gradient goes to the client and nowhere else."""
    site.forward(training=False)
    answer = site.server.backward(back())
    assert answer.status == "uncounted"
    assert answer.grad_inputs[0].tolist() == [[2, 2], [2, 2]]  # type: ignore[union-attr]
    assert site.store.waiting() == []


def test_too_many_holes_say_try_again(site: Site) -> None:
    """A client whose batches are lost by the thousand may fill the holes and begin nothing new."""
    site.forward()
    lineage = site.store.lineage()
    applied = BatchSet(BatchId("a", 1, 2 * n) for n in range(1026))
    lineage.publish(replace(lineage.commit(0), version=1, kind="fold"), lineage.state(0), None, applied)
    with pytest.raises(BusyError, match="more than 1024 holes"):
        site.server.backward(back(seq=5000))
    assert site.server.backward(back(seq=1)).status == "stored"


def test_a_server_needs_a_store_and_its_own_body(site: Site) -> None:
    """A path is no store, and another architecture is named by its tensors."""
    with pytest.raises(InputError, match="store is a str: expected a GradientStore"):
        SplitServer(body(), "runs/demo")  # type: ignore[arg-type]
    with pytest.raises(ArchitectureError, match=r"weight: the store has trainable float32 \(2, 2\)"):
        SplitServer(nn.Linear(3, 2, bias=False), site.store)


@pytest.mark.parametrize(
    "changes", [{"seed": -1}, {"cut": 5}, {"training": 1}, {"autocast": torch.bfloat16}, {"housekeeping": None}]
)
def test_a_request_of_the_same_process_is_checked_as_one_of_bytes(site: Site, changes: dict[str, Any]) -> None:
    """A middleware or a hand-written client may put anything into a field: nothing is stored of it."""
    with pytest.raises(FormatError, match="not of the kind that it must be"):
        site.server.forward(ahead(**changes))
    assert site.store.blobs.list("body/forward") == []
    site.forward()
    with pytest.raises(FormatError, match=r"Seal\.loss_scale is a Tensor"):
        site.server.backward(back(seal=replace(SEAL, loss_scale=torch.tensor(2.0))))
    assert site.store.waiting() == []
