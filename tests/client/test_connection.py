"""A client's process: its numbers, what it confirms with each request, and what it warns of."""

from __future__ import annotations

import gc
import math
import warnings
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from splitfed.client.connection import MOST_NOTES, Connection, Counted
from splitfed.errors import InputError
from splitfed.protocol.messages import Housekeeping


def connection(loss_scale: Any = 1.0) -> Connection:
    """A connection to nowhere."""
    return Connection(SimpleNamespace(), "a", loss_scale)  # type: ignore[arg-type]


def call(number: int, version: int = 0) -> Any:
    """A recorded call."""
    return SimpleNamespace(version=version, number=number)


class Node(torch.autograd.Function):
    """Identity, with something saved for the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """The same."""
        ctx.save_for_backward(x)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """The same."""
        return grads[0]


def watched(made: Connection, number: int) -> Tensor:
    """The output of a call whose graph is watched."""
    y: Tensor = Node.apply(torch.ones(2, requires_grad=True))
    made.watch(call(number), y.grad_fn)
    return y


def confirmed(made: Connection) -> tuple[Any, ...]:
    """What the next request would confirm."""
    with made.housekeeping() as notes:
        return notes.released, notes.abandoned, notes.answered


def test_each_kind_of_number_counts_by_itself() -> None:
    """Calls, batches and pushes, each from 0; threads never get one twice."""
    made = connection()
    assert [made.number("call"), made.number("call"), made.number("batch"), made.number("push")] == [0, 1, 0, 0]
    with ThreadPoolExecutor(8) as pool:
        numbers = list(pool.map(lambda _: made.number("call"), range(200)))
    assert sorted(numbers) == list(range(2, 202))


def test_the_first_answer_names_the_process() -> None:
    """Later ones change nothing; the newest version ever seen stays."""
    made = connection()
    for incarnation, version in ((None, 3), (5, 1), (6, 2)):
        made.opened(incarnation, version)
    assert (made.incarnation, made.seen) == (5, 3)


def test_two_connections_call_themselves_differently() -> None:
    """So that a repeated first request is told from another process."""
    assert connection().process != connection().process


def test_a_request_confirms_what_happened_once() -> None:
    """Given up, answered and released: with the next request, and not again."""
    made = connection()
    made.abandon(3)
    made.answered(4)
    made.release(call(7, version=2))
    assert confirmed(made) == (((2, 7),), (3,), (4,))
    assert confirmed(made) == ((), (), ())


def test_no_request_confirms_more_than_a_service_takes() -> None:
    """What is left rides with the next one."""
    made = connection()
    for number in range(MOST_NOTES + 5):
        made.abandon(number)
    assert [len(confirmed(made)[1]) for _ in range(3)] == [MOST_NOTES, 5, 0]


def test_a_request_that_fails_hands_it_back() -> None:
    """To ride with the next one, in any order."""
    made = connection()
    made.abandon(1)
    made.answered(2)
    made.release(call(0))

    def fail() -> None:
        with made.housekeeping() as notes:
            made.abandon(5)
            raise OSError(notes)

    with pytest.raises(OSError, match="Housekeeping") as caught:
        fail()
    assert isinstance(caught.value.args[0], Housekeeping)
    released, abandoned, answered = confirmed(made)
    assert (released, sorted(abandoned), answered) == (((0, 0),), [1, 5], (2,))


def test_a_graph_that_is_gone_is_confirmed() -> None:
    """Dropped without a backward, or run and freed; one that is alive or retained isn't."""
    made = connection()
    graphs = [watched(made, number) for number in range(4)]
    assert confirmed(made)[0] == ()
    graphs[1].sum().backward()
    graphs[2].sum().backward(retain_graph=True)
    graphs[0] = graphs[3]
    gc.collect()
    assert confirmed(made)[0] == ((0, 0), (0, 1))
    graphs[2].sum().backward()
    assert confirmed(made)[0] == ((0, 2),)


def test_outstanding_calls_are_those_that_the_pass_will_reach() -> None:
    """Asked from within a backward; a graph that the pass doesn't touch isn't among them."""
    made = connection()
    a, b, c = (watched(made, number) for number in range(3))
    seen: list[list[int]] = []
    total = a.sum() + b.sum()
    total.register_hook(lambda grad: seen.append([found.number for found in made.outstanding()]))
    total.backward()
    assert seen == [[0, 1]]
    assert c.requires_grad


@pytest.mark.parametrize(
    ("value", "scale"), [(2, 2.0), (lambda: 1024, 1024.0), (lambda: torch.tensor(0.5), 0.5), (-1.0, -1.0)]
)
def test_the_loss_scale_is_a_number_or_asked_for(value: Any, scale: float) -> None:
    """A function is asked each time, as GradScaler's changes."""
    assert connection(value).scale() == scale


@pytest.mark.parametrize(
    "value",
    [0, math.nan, math.inf, lambda: 0.0, "two", None, lambda: None],
    ids="zero nan inf asked_zero text none asked_none".split(),
)
def test_a_loss_scale_that_isnt_one_is_refused(value: Any) -> None:
    """Finite and not zero, since gradients are divided by it."""
    with pytest.raises(InputError, match=r"loss_scale is .*expected a finite number other than 0"):
        connection(value).scale()


def test_samples_of_stored_batches_add_up() -> None:
    """For the weight and the scale of the next push; rejected ones are kept apart, and warned of once."""
    made = connection()
    made.note_status("stored", 3, 0.5)
    with pytest.warns(UserWarning, match="'a' isn't finite"):
        made.note_status("rejected", 4, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for status in ("rejected", "stored", "uncounted", "part"):
            made.note_status(status, 5, 0.25)
    assert made.counted == Counted(num_samples=8, loss_scale=0.75, rejected=9)
    assert made.counted - Counted(3, 0.5, 4) == Counted(5, 0.25, 5)
