"""Limits: what one request may be, and what may be under way."""

from __future__ import annotations

import asyncio
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from harness_requests import SEAL, ahead, back

from splitfed.errors import BusyError, InputError, TooLargeError
from splitfed.protocol.messages import Chain, Housekeeping, LossRequest, PullRequest
from splitfed.service.http.limits import Budget, Limits, check_body, check_message


@pytest.mark.parametrize("wrong", [{"body": 0}, {"requests": -1}, {"receive_seconds": math.nan}, {"samples": math.inf}])
def test_a_limit_is_a_number_above_0(wrong: dict[str, Any]) -> None:
    """The message names it."""
    with pytest.raises(InputError, match=next(iter(wrong))):
        Limits(**wrong)


def test_a_body_of_the_largest_size_must_fit_into_what_may_be_under_way() -> None:
    """Else it would be refused for ever, as if the server were busy."""
    with pytest.raises(InputError, match=r"in_flight=100 bytes are less than one body may have \(200\)"):
        Limits(body=200, in_flight=100)


def test_the_budget_counts_in_and_out() -> None:
    """Two requests of three and four bytes of ten; then there is room again."""
    budget = Budget(Limits(body=5, in_flight=10, requests=2))
    budget.enter()
    budget.enter()
    with pytest.raises(BusyError, match="2 requests under way"):
        budget.enter()
    assert budget.reserve(3) + budget.reserve(4) == 7
    with pytest.raises(BusyError, match="7 bytes under way and takes 10: 4 more"):
        budget.reserve(4)
    budget.leave(3)
    assert (budget.requests, budget.num_bytes) == (1, 4)
    budget.enter()
    budget.reserve(6)


def test_a_body_of_just_the_limit_is_taken() -> None:
    """One byte more isn't."""
    check_body(10, Limits(body=10, in_flight=10))
    with pytest.raises(TooLargeError, match="11 bytes or more: this server takes 10"):
        check_body(11, Limits(body=10, in_flight=10))


def test_messages_within_the_limits_pass() -> None:
    """Of every kind, those without tensors and scalars among them."""
    small = Limits(samples=2)
    for message in (ahead(), ahead(inputs=((), {})), ahead(inputs=((torch.tensor(1.0),), {})), back(seal=None)):
        check_message(message, small)
    check_message(PullRequest("a"), small)
    with pytest.raises(TooLargeError, match="2 samples: this server takes 1 "):
        check_message(ahead(), Limits(samples=1))


@pytest.mark.parametrize("name", ["released", "abandoned", "answered"])
def test_what_rides_along_is_counted(name: str) -> None:
    """Each number is work: two of them pass where two are taken, three don't, in any request that has them."""
    limits = Limits(notes=2)
    for count in (2, 3):
        notes = Housekeeping(**{name: ((0, 1),) * count if name == "released" else tuple(range(count))})
        first = ahead(housekeeping=notes)
        for message in (first, LossRequest(first, 0, torch.ones(2, 2), 2.0), back(housekeeping=notes)):
            if count == 2:
                check_message(message, limits)
                continue
            with pytest.raises(TooLargeError, match=rf"names 3 .* {name}: this server takes 2 at a time"):
                check_message(message, limits)


@pytest.mark.parametrize(("name", "one"), [("parts", (0, 0)), ("chains", Chain(1.0, 0))])
def test_parts_and_chains_of_a_batch_are_counted(name: str, one: Any) -> None:
    """A seal names them."""
    limits = Limits(notes=2)
    check_message(back(seal=replace(SEAL, **{name: (one,) * 2})), limits)
    with pytest.raises(TooLargeError, match=f"names 3 {name} of a batch"):
        check_message(back(seal=replace(SEAL, **{name: (one,) * 3})), limits)


def test_a_target_counts_where_the_inputs_hold_no_tensor() -> None:
    """The first tensor of inputs and target is the batch."""
    loss = LossRequest(ahead(inputs=((1.0,), {})), 0, torch.zeros(3, 4), 1.0)
    with pytest.raises(TooLargeError, match="3 samples: this server takes 2 "):
        check_message(loss, Limits(samples=2))


def test_one_client_has_so_many_requests_and_a_body_under_way() -> None:
    """Two of it, and eight bytes; of another client more; and what is counted goes again."""
    budget = Budget(Limits(body=8, in_flight=100, client_requests=2))
    budget.enter_client("a")
    budget.check_client("a", 100)  # the limit of a body is another one
    budget.reserve(6, "a")
    budget.enter_client("a")
    budget.check_client("a", 2)
    with pytest.raises(BusyError, match="client 'a' has 6 bytes under way and this server takes 8 of one client: 3"):
        budget.check_client("a", 3)
    with pytest.raises(BusyError, match="client 'a' has 2 requests under way"):
        budget.enter_client("a")
    budget.enter_client("b")
    budget.check_client("b", 8)
    budget.hold("a", 5)
    assert (budget.num_bytes, budget._bytes["a"]) == (11, 11)
    budget.leave_client("a", 11)
    budget.leave_client("a", 0)
    assert (budget._requests, budget._bytes) == ({"b": 1}, {})


def test_a_refused_client_waits_for_its_answer_and_not_with_all_its_requests() -> None:
    """Of two that may be under way two are kept waiting for half a second, the third is answered at once."""
    budget = Budget(Limits(client_requests=2))

    async def refuse() -> list[bool]:
        paused = [asyncio.create_task(budget.pause("a")) for _ in range(3)]
        await asyncio.sleep(0.05)
        early = [task.done() for task in paused]
        await asyncio.gather(*paused)
        return early

    assert sorted(asyncio.run(refuse())) == [False, False, True]
    assert not budget._refused
