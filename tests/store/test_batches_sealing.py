"""Closing a batch: what its parts add up to, and parts that aren't what a server put there."""

from __future__ import annotations

import uuid
from dataclasses import replace
from typing import Any

import pytest
import torch
from bodies import sandwich
from harness import Split
from harness_requests import ONES, SEAL, Site, X, ahead, back, body
from harness_store import Nth, hooked, meanwhile, sgd
from torch import Tensor, nn

from splitfed.accumulator.accumulator import Accumulator
from splitfed.errors import BusyError, DigestError, ExpiredError, InputError, SplitFedError
from splitfed.protocol import packing
from splitfed.protocol.ids import BatchId
from splitfed.protocol.messages import Chain, GradientRecord, Housekeeping, LossRequest, Seal
from splitfed.server.server import SplitServer
from splitfed.store.batchset import MAX_GAPS
from splitfed.store.numbers import MAX_SKIPS

CLOSE = Seal(((0, 0), (0, 1)), 5.0, 0.5, (Chain(2.0, 0), Chain(3.0, 1)))


def two_parts() -> Site:
    """Two calls of one batch, on x and 2x, both sent and not yet sealed."""
    site = Site(f"memory://{uuid.uuid4()}")
    site.forward()
    site.server.forward(ahead(incarnation=1, call=1, inputs=((2 * X,), {})))
    assert site.server.backward(back(part=0, seal=None)).status == "part"
    assert site.other.backward(back(part=1, call=1, seal=None)).status == "part"
    return site


def waiting(site: Site) -> GradientRecord:
    """The one batch that waits."""
    (batch,) = site.store.waiting()
    found = site.store.pile().read(batch)
    assert found is not None
    return found


def test_parts_add_up_once_they_are_sealed() -> None:
    """∂Σ2x/∂w + ∂Σ2(2x)/∂w = 3 · the column sums (4, 2) of x; samples, scale and the parts' files as the seal says."""
    site = two_parts()
    assert site.store.waiting() == []
    answer = site.other.backward(back(part=2, call=None, grad_outputs=(), seal=CLOSE))
    assert (answer.status, answer.grad_inputs) == ("stored", ())
    record = waiting(site)
    assert record.gradients["weight"].tolist() == [[12, 6], [12, 6]]
    assert (record.num_samples, record.loss_scale) == (5, 0.5)
    assert [update.num_samples for update in record.buffers] == [2, 3]
    assert site.store.blobs.list("body/part") == []
    assert site.commit().num_samples == 5
    assert site.store.load_weights()["weight"].tolist() == [[2 - 24, -12], [-24, 2 - 12]]


def test_a_seal_may_ride_along_with_the_last_part() -> None:
    """The same sum in one request less."""
    site = Site(f"memory://{uuid.uuid4()}")
    site.forward()
    site.server.forward(ahead(incarnation=1, call=1, inputs=((2 * X,), {})))
    site.server.backward(back(part=0, seal=None))
    seal = replace(CLOSE, parts=((0, 0),))
    assert site.other.backward(back(part=1, call=1, seal=seal)).status == "stored"
    assert waiting(site).gradients["weight"].tolist() == [[12, 6], [12, 6]]


def test_a_repeated_seal_answers_as_before() -> None:
    """Its parts are gone by then; before the commit and after it."""
    site = two_parts()
    close = back(part=2, call=None, grad_outputs=(), seal=CLOSE)
    for _ in range(2):
        assert site.server.backward(close).status == "stored"
    site.commit()
    assert site.other.backward(close).status == "stored"
    assert site.store.waiting() == []


def test_another_seal_whose_parts_are_gone_is_refused() -> None:
    """A copy of a running process bears its incarnation, and may close the same number with other samples."""
    site = two_parts()
    site.server.backward(back(part=2, call=None, grad_outputs=(), seal=CLOSE))
    other = replace(CLOSE, num_samples=7.0)
    with pytest.raises(DigestError, match="batch a/1/0 was sent before with other content"):
        site.other.backward(back(part=2, call=None, grad_outputs=(), seal=other))
    assert waiting(site).num_samples == 5


def test_a_part_that_was_never_sent_loses_the_batch() -> None:
    """Loudly; what was sent counts nowhere."""
    site = two_parts()
    seal = replace(CLOSE, parts=(*CLOSE.parts, (0, 7)))
    with pytest.raises(ExpiredError, match=r"part 7 of batch a/1/0 .*counts nowhere"):
        site.server.backward(back(part=8, call=None, grad_outputs=(), seal=seal))
    assert site.store.waiting() == []


def test_a_part_sent_again_with_other_content_is_refused() -> None:
    """A retry is a success, anything else is not it."""
    site = two_parts()
    assert site.other.backward(back(part=0, seal=None)).status == "part"
    with pytest.raises(DigestError, match="part 0 of batch a/1/0 was sent before with other content"):
        site.server.backward(back(part=0, seal=None, grad_outputs=(ONES * 2,)))


def test_one_part_that_isnt_finite_rejects_the_batch() -> None:
    """The sum isn't finite either."""
    site = two_parts()
    site.server.forward(ahead(incarnation=1, call=2))
    assert site.server.backward(back(part=2, call=2, seal=None, grad_outputs=(ONES * float("nan"),))).status == "part"
    seal = replace(CLOSE, parts=(*CLOSE.parts, (0, 2)))
    assert site.server.backward(back(part=3, call=None, grad_outputs=(), seal=seal)).status == "rejected"
    assert (waiting(site).kind, waiting(site).gradients) == ("rejected", {})


def test_numbers_that_were_given_up_are_closed_once() -> None:
    """A batch that is known already stays what it is."""
    site = Site(f"memory://{uuid.uuid4()}")
    site.forward()
    site.server.backward(back(seal=SEAL))
    for call in (1, 2):
        site.server.forward(ahead(incarnation=1, call=call, housekeeping=Housekeeping(abandoned=(0, 1))))
    kinds = {str(batch): site.store.pile().peek(batch) for batch in site.store.waiting()}
    assert {name: found and found["kind"] for name, found in kinds.items()} == {"a/1/0": "gradient", "a/1/1": "skip"}
    assert BatchId("a", 1, 1) in site.commit().skipped


def given_up(*numbers: int, call: int = 5, incarnation: int = 1) -> Any:
    """A forward that gives numbers up."""
    return ahead(incarnation=incarnation, call=call, housekeeping=Housekeeping(abandoned=numbers))


def test_five_requests_leave_no_twenty_thousand_skips() -> None:
    """As many as may wait, and the request says so; a commit without a gradient closes them."""
    site = Site(f"memory://{uuid.uuid4()}")
    site.forward()
    for first in range(0, 5 * 4096, 4096):
        with pytest.raises(BusyError, match="given up more than 1024 batches"):
            site.server.forward(given_up(*range(first, first + 4096)))
    assert len(site.store.blobs.list("body/grad")) == MAX_SKIPS
    before = site.store.load_weights()
    commit = site.commit()
    assert (commit.num_batches, len(commit.skipped)) == (0, MAX_SKIPS)
    assert site.store.load_weights()["weight"].equal(before["weight"])
    assert site.store.blobs.list("body/grad") == []


def test_a_few_skips_wait_for_a_gradient_and_many_dont() -> None:
    """255 make no version of their own."""
    site = Site(f"memory://{uuid.uuid4()}")
    site.forward()
    accumulator = Accumulator(body(), site.store, sgd(), min_batches=2)
    site.server.forward(given_up(*range(255)))
    assert accumulator.step() is None
    site.server.forward(given_up(255, call=6))
    commit = accumulator.step()
    assert commit is not None
    assert len(commit.skipped) == 256


def test_numbers_given_up_with_holes_are_refused_soon() -> None:
    """Each would be a run of the applied table: as many holes as a process has passes under way, and no more."""
    site = Site(f"memory://{uuid.uuid4()}")
    site.forward()
    with pytest.raises(BusyError, match="more than 64 holes"):
        site.server.forward(given_up(*range(0, 1000, 2)))
    assert len(site.store.blobs.list("body/grad")) == 66
    assert site.server.forward(given_up(*range(1, 120, 2), call=6)).version == 0  # these fill them


def test_a_skip_that_races_a_late_gradient_is_none_and_raises_nothing() -> None:
    """The gradient comes between the look and the create: it counts, and the forward is answered."""
    url = f"memory://{uuid.uuid4()}"
    site = Site(url)
    site.forward()
    hook = Nth(0, meanwhile(lambda: site.other.backward(back())), "create body/grad")
    server = SplitServer(body(), hooked(url, hook), keep_graphs=0)
    with hook.armed():
        server.forward(given_up(0))
    assert hook.count == 1
    assert waiting(site).kind == "gradient"


@pytest.mark.parametrize("incarnation", [1, 7], ids=["superseded", "never opened"])
def test_only_the_newest_process_gives_numbers_up(incarnation: int) -> None:
    """The call is answered, and nothing is closed."""
    site = Site(f"memory://{uuid.uuid4()}")
    site.forward()
    site.store.open_client("a", "second")
    site.server.forward(given_up(0, 1, 2, incarnation=incarnation))
    assert site.store.waiting() == []


def test_holes_are_counted_with_what_is_pending() -> None:
    """On every path that adds a batch: by a seal and by a loss; a push is stored by the same `Sealer`."""
    site = Site(f"memory://{uuid.uuid4()}", loss_fn=lambda outputs, target: (outputs - target).sum())
    site.forward()
    pile = site.store.pile()
    for seq in range(0, 2 * MAX_GAPS + 4, 2):
        pile.create(BatchId("a", 1, seq), GradientRecord("gradient", 0, 1.0, 1.0, "by hand", "", {}, []))
    with pytest.raises(BusyError, match="more than 1024 holes"):
        site.server.backward(back(seq=9_000))
    with pytest.raises(BusyError, match="more than 1024 holes"):
        site.server.loss(LossRequest(ahead(incarnation=1, call=3), 9_000, torch.zeros(2, 2), 2.0))
    with pytest.raises(BusyError, match="more than 64 holes"):
        site.server.forward(given_up(9_000))
    assert site.server.backward(back(seq=1)).status == "stored"


def test_a_seal_repeated_while_its_batch_is_committed_is_answered_as_before() -> None:
    """At each of its reads the commit may come: the file goes, and the number is in the table."""
    for at in range(12):
        site = two_parts()
        close = back(part=2, call=None, grad_outputs=(), seal=CLOSE)
        site.server.backward(close)
        nth = Nth(at, meanwhile(site.commit))
        # A server that has seen no commit yet, as one in another process hasn't.
        other = SplitServer(body(), hooked(site.store.url, nth), keep_graphs=0)
        with nth.armed():
            assert other.backward(close).status == "stored"
        if nth.count <= at:
            break
    assert 2 < at < 11, "it reads the parts, the file and the table"


def test_a_number_given_up_while_its_gradient_lands_is_closed_by_the_gradient() -> None:
    """A forward that gives the number up is answered, and the gradient that was under way counts."""
    site = Site(f"memory://{uuid.uuid4()}")
    site.forward()
    late = meanwhile(lambda: site.server.backward(back(seal=SEAL)))
    store = hooked(site.store.url, Nth(0, late, at="create body/grad"))
    store.blobs._hook.arm()  # type: ignore[attr-defined]
    other = SplitServer(body(), store, keep_graphs=0)
    other.forward(ahead(incarnation=1, call=1, housekeeping=Housekeeping(abandoned=(0,))))
    assert waiting(site).kind == "gradient"


PARTS: list[tuple[str, Any]] = [
    ("gradients", [1]),
    ("gradients", {"weight": 1}),
    ("buffers", []),
    ("buffers", 5),
    ("base_version", "x"),
]


@pytest.mark.parametrize(("field", "value"), PARTS, ids=str)
def test_a_part_that_was_changed(field: str, value: Any) -> None:
    """A batch of two calls, the first of whose parts isn't what was put there when the second seals it."""
    net = sandwich(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)))
    net.run = lambda m, given: m.head(m.body(hooked(m.body(m.bottom(given)))))
    made = Split(net, "body", f"memory://{uuid.uuid4()}")

    def tamper(grad: Tensor) -> None:
        (key,) = made.stored("part")
        record = packing.unpack(GradientRecord, made.store.blobs.get(key) or b"")
        made.store.blobs.put(key, packing.pack(replace(record, **{field: value})))

    def hooked(h: Tensor) -> Tensor:
        h.register_hook(tamper)
        return h

    with pytest.raises(SplitFedError):
        made.client(torch.randn(4, 6)).sum().backward()
    assert made.waiting() == []


@pytest.mark.parametrize("changes", [{"seed": 8}, {"inputs": ((X + 1,), {})}, {"training": False}], ids=str)
def test_a_call_isnt_overwritten_by_another_of_its_number(changes: dict[str, Any]) -> None:
    """As two copies of one running process would make them: the second is told, the first gets its own gradient."""
    site = Site(f"memory://{uuid.uuid4()}")
    site.forward()
    with pytest.raises(DigestError, match=r"call 0 of client 'a' was made before with other content.*new SplitClient"):
        site.forward(site.other, incarnation=1, **changes)
    assert site.other.backward(back()).status == "stored"
    assert waiting(site).gradients["weight"].tolist() == [[4, 2], [4, 2]]


def test_a_repeated_forward_is_answered_again() -> None:
    """On any replica; the record of one that was computed with other bits gives way, as the client gets the later."""
    site = Site(f"memory://{uuid.uuid4()}")
    first = site.forward()
    (key,) = site.store.blobs.list("body/forward")
    before = bytes(site.store.blobs.get(key) or b"")
    again = site.forward(site.other, incarnation=1)
    assert again.crcs == first.crcs
    assert bytes(site.store.blobs.get(key) or b"") == before
    record = site.store.pile().forward(0, "a", 1, 0)
    assert record is not None
    site.store.blobs.put(key, packing.pack(replace(record, crcs=(1,), numerics="another")))
    site.forward(site.other, incarnation=1)
    assert bytes(site.store.blobs.get(key) or b"") == before


def test_equal_gradients_at_the_cut_of_other_inputs_are_another_batch() -> None:
    """A plain sum has the same gradient whatever the inputs: the parameter gradients tell the two apart."""
    site = Site(f"memory://{uuid.uuid4()}")
    site.forward()
    site.server.backward(back())
    site.forward(incarnation=1, call=1, housekeeping=Housekeeping(released=((0, 0),)))
    site.forward(incarnation=1, call=0, inputs=((X + 1,), {}))
    with pytest.raises(DigestError, match=r"batch a/1/0 was sent before for other inputs.*new SplitClient"):
        site.other.backward(back())
    assert waiting(site).gradients["weight"].tolist() == [[4, 2], [4, 2]]


def test_what_isnt_counted_is_answered_and_not_stored() -> None:
    """The gradients of the inputs, and nothing on file; the same call may count after it."""
    site = Site(f"memory://{uuid.uuid4()}")
    site.forward()
    answer = site.server.backward(back(counted=False, seal=None))
    assert answer.status == "uncounted"
    assert answer.grad_inputs[0].tolist() == [[2, 2], [2, 2]]  # type: ignore[union-attr]
    assert site.store.waiting() == []
    assert site.server.backward(back()).status == "stored"


@pytest.mark.parametrize("after", [0, 5], ids=["itself", "none"])
def test_a_chain_after_none_is_refused(after: int) -> None:
    """What it continues must be an earlier chain of the seal."""
    site = Site(f"memory://{uuid.uuid4()}")
    site.forward()
    with pytest.raises(InputError, match=f"chain after part {after}: expected the last part of an earlier chain"):
        site.server.backward(back(seal=replace(SEAL, chains=(Chain(2.0, 0, after),))))
    assert site.store.waiting() == []


def test_chains_that_continue_each_other_are_one_update() -> None:
    """From what the first began with to what the last ended with, in the weight of both."""
    site = two_parts()
    seal = replace(CLOSE, chains=(Chain(2.0, 0), Chain(3.0, 1, 0)))
    site.other.backward(back(part=2, call=None, grad_outputs=(), seal=seal))
    assert [update.num_samples for update in waiting(site).buffers] == [5]
