"""The server's two calls: what they answer, again and again, and what they refuse."""

from __future__ import annotations

import uuid
from dataclasses import replace
from typing import Any

import pytest
import torch
from harness_requests import ONES, SEAL, Site, X, ahead, back, body
from torch import nn

from splitfed.accumulator.accumulator import Accumulator
from splitfed.client.client import SplitClient
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
    UnsupportedError,
)
from splitfed.model.cut import split
from splitfed.protocol.ids import BatchId
from splitfed.protocol.messages import Chain, Housekeeping, LossRequest
from splitfed.server.server import SplitServer
from splitfed.store.batchset import BatchSet, Verdict
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


def one_trip() -> LossRequest:
    """A batch in one trip, as its retry is too."""
    return LossRequest(ahead(), 0, ONES, 2.0)


@pytest.fixture
def one_trip_site() -> Site:
    """A site with a one-trip batch that is pending, two versions after the window of its own has closed."""
    site = Site(f"memory://{uuid.uuid4()}", loss_fn=lambda outputs, target: (outputs * target).sum())
    assert site.server.loss(one_trip()).status == "stored"
    accumulator = Accumulator(body(), site.store, lambda p: torch.optim.SGD(p, lr=1.0), keep_versions=2, keep_bytes=0)
    for seq in range(1, 4):
        call = site.forward(incarnation=1, call=seq)
        site.server.backward(back(seq=seq, call=seq, version=call.version))
        assert accumulator.step(only=Verdict(folded=BatchSet([BatchId("a", 1, seq)]))) is not None
    assert site.store.blobs.list("body/pin") == []
    return site


@pytest.mark.parametrize("note", [None, 3], ids=["gone", "of a retry that was killed"])
def test_a_one_trip_batch_whose_version_is_gone_is_told_that_it_counts(note: int | None, one_trip_site: Site) -> None:
    """Not that its content is another's: pending or counted, on any replica, it counts once."""
    site, batch = one_trip_site, BatchId("a", 1, 0)
    for committed in (False, True):
        for server in (site.server, site.other, site.cached):
            if note is not None:
                site.store.pile().pin(batch, note)
            with pytest.raises(AlreadyAppliedError, match=r"batch a/1/0 is counted already, or will be.*no longer on"):
                server.loss(one_trip())
        assert site.store.waiting() == ([] if committed else [batch])
        if not committed:
            assert list(site.commit().folded) == [batch]


def test_other_content_under_the_id_of_a_one_trip_batch_is_refused_all_the_same(one_trip_site: Site) -> None:
    """Also where the version is gone that the first ran at."""
    other = replace(one_trip(), target=ONES * 2)
    for _ in range(2):
        with pytest.raises(DigestError, match="batch a/1/0 was sent before with other content"):
            one_trip_site.server.loss(other)


def test_a_copy_of_a_process_isnt_told_that_its_batch_counts(site: Site) -> None:
    """A number that the other copy has had counted, at an older version."""
    site.forward()
    site.server.backward(back())
    site.commit()
    call = site.forward(incarnation=1, call=1)
    with pytest.raises(DigestError, match="batch a/1/0 is counted with other content, of another version"):
        site.server.backward(back(call=1, version=call.version))


@pytest.mark.parametrize("continued", [False, True])
def test_a_copys_call_isnt_answered_from_the_others_graph(continued: bool) -> None:
    """Its record was confirmed elsewhere, and the copy's call of that number is on file in its place."""
    weights = []
    for name in ("cached", "other"):
        site = Site(f"memory://{uuid.uuid4()}", of_norm=continued)
        answering = getattr(site, name)
        site.forward(answering, nonce=7)
        site.other.backward(back(nonce=7))
        site.forward(site.other, grad=False, incarnation=1, call=9, housekeeping=Housekeeping(released=((0, 0),)))
        site.forward(site.other, incarnation=1, inputs=((3 * X,), {}), nonce=9)
        if continued:  # by a call that begins with the buffers which the copy's has left
            later = {"incarnation": 1, "call": 1, "previous": 0, "previous_nonce": 9, "nonce": 11}
            site.forward(answering, **later)
            answering.backward(back(seq=1, call=1, nonce=11))
        else:
            answering.backward(back(seq=1, nonce=9))
        site.commit()
        weights.append(site.store.load_weights())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_batch_whose_file_was_damaged_is_told_so_when_it_is_repeated(site: Site) -> None:
    """Its version is on record nowhere then: it is no copy's."""
    site.forward()
    site.forward(incarnation=1, call=1)
    site.server.backward(back(seq=1, call=1))
    site.commit()
    assert site.server.backward(back()).status == "stored"
    key = site.store.lineage().keys.gradient(BatchId("a", 1, 0))
    site.store.blobs.raw.put(key, [b"{}"], durable=False)
    with pytest.warns(UserWarning, match="batch a/1/0 is rejected: its file is unreadable"):
        assert site.commit().num_rejected == 1
    assert site.server.backward(back()).status == "rejected"


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
    """One that isn't made yet is missing; in a window of two, with none held, version 0 has expired at version 2."""
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
    verdict = Verdict(BatchSet(BatchId("a", 1, 2 * n) for n in range(1026)))
    made = replace(lineage.commit(0), version=1, kind="fold", verdict=verdict)
    lineage.publish(made, lineage.state(0), None)
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


class Features(nn.Linear):
    """Random features that are in no version: registered as transient, or plain."""

    def __init__(self, how: str, width: int = 2) -> None:
        super().__init__(2, 2)
        features = torch.randn(2, width)
        if how == "buffer":
            self.register_buffer("features", features, persistent=False)
        else:
            self.features = features


@pytest.mark.filterwarnings("ignore:the weights of this body are neither")
def test_a_replica_with_other_transient_buffers_is_refused(store_url: str) -> None:
    """Its answers would differ: the error names the buffer and the way out, and equal ones are served."""
    store = GradientStore(store_url, sync="process")
    torch.manual_seed(0)
    SplitServer(nn.Sequential(Features("buffer")), store)
    torch.manual_seed(0)
    SplitServer(nn.Sequential(Features("buffer")), store)
    with pytest.raises(ArchitectureError, match=r"'0.features'.*in no version.*persistent"):
        SplitServer(nn.Sequential(Features("buffer")), store)


@pytest.mark.filterwarnings("ignore:the weights of this body are neither")
@pytest.mark.parametrize(("how", "width"), [("attribute", 2), ("buffer", 3)])
def test_tensors_that_a_forward_may_have_set_are_only_warned_of(how: str, width: int) -> None:
    """A plain attribute, as an attention map that was left; a table that has grown."""
    store = GradientStore(f"memory://{uuid.uuid4()}")
    SplitServer(Features(how), store)
    with pytest.warns(UserWarning, match=r"'features'.*isn't as it was when the store was begun"):
        SplitServer(Features(how, width), store)


def test_a_body_without_such_tensors_leaves_no_record_of_them(site: Site) -> None:
    """A store has the files that it had."""
    assert site.store.blobs.get("body/beside.json") is None


def test_a_body_on_the_meta_device_takes_its_weights_from_the_store(site: Site) -> None:
    """On the CPU, or where it is asked to; a new store has none to give, and isn't begun."""
    with torch.device("meta"):
        empty = nn.Linear(2, 2, bias=False)
        transient = Features("buffer")
    served = SplitServer(empty, site.store)
    assert (served.device, served.forward(ahead()).outputs.tolist()) == (torch.device("cpu"), (2 * X).tolist())
    Accumulator(empty, site.store, lambda p: torch.optim.SGD(p, lr=1.0))
    for device in (None, "cpu"):
        store = GradientStore(f"memory://{uuid.uuid4()}")
        with pytest.raises(UnsupportedError, match=r"'weight' is on the meta device.*begin the store with"):
            SplitServer(empty, store, device=device)
        with pytest.raises(UnsupportedError, match="'weight' is on the meta device"):
            Accumulator(empty, store, lambda p: torch.optim.SGD(p, lr=1.0), device=device)
        assert store.lineage().head() == -1
    with pytest.raises(UnsupportedError, match="buffer 'features' of the body is on the meta device"):
        SplitServer(transient, GradientStore(f"memory://{uuid.uuid4()}"))


def test_a_body_that_is_itself_split_is_refused(site: Site) -> None:
    """A recompute would run it at another version of the server beyond: the error says what to do."""
    half, _ = split(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), "1")
    tier = SplitClient(half, site.server, client_id="edge")
    for served in (nn.Sequential(nn.Linear(2, 2), tier), half):
        with pytest.raises(UnsupportedError, match=r"holds a client half, with a cut point at '.*1'.*one after the"):
            SplitServer(served, GradientStore(f"memory://{uuid.uuid4()}"))


class Growing(nn.Module):
    """A buffer that changes its kind in forward."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.register_buffer("bank", torch.zeros(1, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x, remembered."""
        if self.how == "shape":
            self.bank = torch.cat([self.bank, x.detach()])
        elif self.how == "resized":
            self.bank.resize_(2, 2)
        else:
            self.bank = self.bank.double()
        return x * 1


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("how", ["shape", "resized", "dtype"])
def test_a_buffer_that_changes_its_kind_is_refused_at_the_first_call(how: str, grad: bool) -> None:
    """In train mode: no commit could ever take it. In eval mode nothing of it is kept."""
    server = SplitServer(nn.Sequential(Growing(how)), GradientStore(f"memory://{uuid.uuid4()}"))
    before, after = r"float32 \(1, 2\)", r"float64 \(1, 2\)" if how == "dtype" else r"float32 \([23], 2\)"
    with pytest.raises(UnsupportedError, match=f"buffer '0.bank' is {before} at the start.* and {after} at its end"):
        server.forward(ahead(grad=grad))
    assert server.forward(ahead(grad=grad, training=False)).outputs.tolist() == X.tolist()


def test_an_answer_says_whether_buffers_moved_and_what_was_set() -> None:
    """Moved: in train mode, here; set: each attribute that any forward was seen to set, from then on."""

    class Both(nn.BatchNorm1d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.training:
                self.spread = x.detach().std()
            return super().forward(x)

    server = SplitServer(nn.Sequential(Both(2)), GradientStore(f"memory://{uuid.uuid4()}"))
    answers = [server.forward(ahead(call=number, training=number == 1)) for number in range(3)]
    assert [(answer.moved, answer.written) for answer in answers] == [
        (False, ()),
        (True, ("0.spread",)),
        (False, ("0.spread",)),
    ]
