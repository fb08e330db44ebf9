"""Backward passes: which calls make one batch, what it weighs, when it is sealed, and what ends without one."""

from __future__ import annotations

import math
import uuid
import warnings
from typing import Any

import pytest
import torch
from bodies import sandwich
from harness import Split, Wire, sgd
from torch import Tensor, nn

from splitfed.errors import ExpiredError, InputError, StoreError
from splitfed.protocol.messages import BackwardAnswer, BackwardRequest


class Recorder(Wire):
    """Notes the backward requests, and refuses the next one when told to, before or after it was served."""

    def __init__(self, *servers: Any) -> None:
        super().__init__(*servers)
        self.asked: list[BackwardRequest] = []
        self.fail = ""

    def backward(self, request: BackwardRequest, /) -> BackwardAnswer:
        """Pass it on, unless it shall fail."""
        self.asked.append(request)
        fail, self.fail = self.fail, ""
        if fail == "before":
            raise StoreError("unreachable")
        answer = self.send("backward", request)
        if fail == "after":
            raise StoreError("the reply was lost")
        return answer


def split(model: nn.Module | None = None, at: Any = "body", **settings: Any) -> Any:
    """A split model in memory, whose wire notes what it carries."""
    net = model or sandwich(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)))
    return Split(net, at, f"memory://{uuid.uuid4()}", wire=Recorder, optimizer=sgd, **settings)


def x(count: int = 4) -> Tensor:
    """A batch `(N, 6)`."""
    return torch.randn(count, 6)


def thrice() -> nn.Module:
    """A body that is called three times in a forward."""
    model = sandwich(nn.Linear(8, 8))
    model.run = lambda m, given: m.head(m.body(m.body(m.body(m.bottom(given)))))
    return model


def test_an_ordinary_batch_is_one_request() -> None:
    """The seal rides along with the only call's gradient."""
    made = split()
    made.client(x(5)).sum().backward()
    (request,) = made.wire.asked
    assert (request.seq, request.part, request.call) == (0, 0, 0)
    assert request.seal.parts == ()
    assert (request.seal.num_samples, request.seal.loss_scale) == (5, 1)
    assert [(chain.num_samples, chain.last_part) for chain in request.seal.chains] == [(5, 0)]


def test_several_cut_calls_are_parts_of_one_batch() -> None:
    """Three calls make three requests, from the last call to the first; the third has the seal and names the others."""
    made = split(thrice())
    made.client(x(5)).sum().backward()
    assert [(r.seq, r.part, r.call, r.seal is None) for r in made.wire.asked] == [
        (0, 0, 2, True),
        (0, 1, 1, True),
        (0, 2, 0, False),
    ]
    seal = made.wire.asked[-1].seal
    assert seal.parts == ((0, 0), (0, 1))
    assert (seal.num_samples, [(c.num_samples, c.last_part) for c in seal.chains]) == (5, [(5, 0)])
    assert len(made.waiting()) == 1
    assert made.stored("part") == []


def test_several_client_calls_add_their_samples() -> None:
    """One loss over calls of 2, 3 and 4 samples: 9, a chain each; the share of buffers is by samples."""
    made = split()
    sum(made.client(x(count)).mean() for count in (2, 3, 4)).backward()
    seal = made.wire.asked[-1].seal
    assert seal.num_samples == 9
    assert sorted(chain.num_samples for chain in seal.chains) == [2, 3, 4]


def test_a_scope_says_what_its_calls_count_together() -> None:
    """client.batch(100) over calls of 1 and 3: 100, of which 25 and 75; with a call outside of 6: 106."""
    made = split()
    with made.client.batch(100):
        inside = made.client(x(1).repeat(2, 1)[:2]).mean() + made.client(x(6)).mean()
    (inside + made.client(x(6)).mean()).backward()
    seal = made.wire.asked[-1].seal
    assert seal.num_samples == 106
    assert sorted(chain.num_samples for chain in seal.chains) == [6, 25, 75]


@pytest.mark.parametrize("reached", [0, 1])
def test_a_call_that_the_pass_doesnt_reach_adds_nothing(reached: int) -> None:
    """Neither its gradient nor its samples, nor does the seal wait for it."""
    made = split()
    losses = [made.client(x(count)).sum() for count in (3, 5)]
    losses[reached].backward()
    (request,) = made.wire.asked
    assert (request.call, request.seal.num_samples) == (reached, (3, 5)[reached])


class Stop(torch.autograd.Function):
    """Identity forward; no gradient at all backward."""

    @staticmethod
    def forward(ctx: Any, given: Tensor) -> Tensor:
        """The same."""
        return given.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Nothing."""
        return None


def test_a_call_whose_outputs_get_no_gradient_makes_no_request() -> None:
    """A pass may reach a call and have nothing to say to it; what others of the pass made is sealed at its end."""
    made = split()
    (Stop.apply(made.client(x(3))).sum() + made.client(x(5)).sum()).backward()
    assert [(r.call, r.seal and r.seal.num_samples) for r in made.wire.asked] == [(1, None), (None, 5)]
    Stop.apply(made.client(x())).sum().backward()
    assert (len(made.wire.asked), len(made.waiting())) == (2, 1)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("model", [None, thrice], ids=["one_call", "three_calls"])
def test_a_pass_that_fails_counts_at_most_once_and_the_loop_goes_on(model: Any, when: str) -> None:
    """The error leaves backward(); the number is given up with the next request, unless it was served and counts."""
    made = split(model and model())
    made.wire.fail = when
    with pytest.raises(StoreError):
        made.client(x()).sum().backward()
    made.client(x()).sum().backward()
    kinds = [record.kind for record in made.waiting()]
    assert kinds == [("gradient" if when == "after" and model is None else "skip"), "gradient"]
    commit = made.accumulator.step()
    assert commit.num_batches + commit.num_skipped == 2
    assert made.store.waiting() == []


def test_an_error_elsewhere_in_the_pass_gives_the_batch_up() -> None:
    """A hook that raises after the parts were sent and before the seal."""
    made = split(thrice())

    def explode(grad: Tensor) -> None:
        raise ZeroDivisionError

    inner = made.half.body
    made.half.run = lambda m, given: inner(hooked(inner(m.bottom(given)), explode)).sum()
    with pytest.raises(ZeroDivisionError):
        made.client(x()).backward()
    made.half.run = lambda m, given: inner(m.bottom(given)).sum()
    made.client(x()).backward()
    assert [record.kind for record in made.waiting()] == ["skip", "gradient"]


def hooked(tensor: Tensor, hook: Any) -> Tensor:
    """The tensor, with a hook on its gradient."""
    tensor.register_hook(hook)
    return tensor


@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf], ids=str)
def test_a_weight_that_isnt_one_is_refused(value: float) -> None:
    """By the time of the backward; the batch counts nowhere, and the next one does."""
    made = split()
    with (
        pytest.raises(InputError, match=r"num_samples is .*expected a finite number above 0"),
        made.client.batch(value),
    ):
        made.client(x()).sum().backward()
    made.client(x()).sum().backward()
    commit = made.accumulator.step()
    assert commit is not None
    assert (commit.num_batches, commit.num_skipped, commit.num_samples) == (1, 1, 4)


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf, lambda: 0.0], ids=["zero", "nan", "inf", "callable"])
def test_a_loss_scale_that_isnt_one_is_refused(value: Any) -> None:
    """A number or what a function returns: finite and not zero."""
    made = split(loss_scale=value)
    with pytest.raises(InputError, match=r"loss_scale is .*expected a finite number other than 0"):
        made.client(x()).sum().backward()
    assert made.store.waiting() == []


def test_a_gradient_that_isnt_finite_is_warned_of_once() -> None:
    """Answered, closed as rejected, counted in the next commit; the second one makes no noise."""
    made = split(sandwich(nn.Linear(8, 8)))
    with pytest.warns(UserWarning, match="'a' isn't finite.*counts nowhere"):
        (made.client(x()).sum() * math.nan).backward()
    assert bool(made.half.bottom.weight.grad.isnan().any())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (made.client(x()).sum() * math.inf).backward()
        made.client(x()).sum().backward()
    commit = made.accumulator.step()
    assert commit is not None
    assert (commit.num_batches, commit.num_rejected) == (1, 2)


def test_a_backward_that_comes_too_late_says_so() -> None:
    """When its version has left the window the batch is lost, loudly; the loop goes on."""
    made = split(keep_versions=2, keep_bytes=0)
    late = made.client(x()).sum()
    for _ in range(3):
        made.client(x()).sum().backward()
        made.accumulator.step()
    made.servers[0]._lines.of("a").runner._graphs._entries.clear()
    with pytest.raises(ExpiredError, match="the loop may go on"):
        late.backward()
    made.client(x()).sum().backward()
    assert [record.kind for record in made.waiting()] == ["skip", "gradient"]
