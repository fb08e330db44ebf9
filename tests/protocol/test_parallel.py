"""Tasks that run at the same time: results in order, errors, and how many threads they may have."""

from __future__ import annotations

import threading

import pytest
import torch

from splitfed.protocol import parallel


def test_tasks_run_at_the_same_time_and_answer_in_order() -> None:
    """Each waits for the other here, so that one after the other they would never end."""
    both = threading.Barrier(2, timeout=30)

    def task(number: int) -> int:
        both.wait()
        return number

    assert parallel.together(lambda: task(1), lambda: task(2)) == [1, 2]
    assert parallel.together(lambda: 3) == [3]


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_is_raised_once_all_have_ended(failing: int) -> None:
    """What the other task writes is there when the caller hears of the error."""
    ended = threading.Event()
    begun = threading.Event()

    def fail() -> None:
        begun.wait(30)
        raise KeyError("here")

    def work() -> None:
        begun.set()
        ended.set()

    tasks = [work, work]
    tasks[failing] = fail
    with pytest.raises(KeyError, match="here"):
        parallel.together(*tasks)
    assert ended.is_set()


def test_no_task_records_a_graph() -> None:
    """Whichever thread it runs in."""
    assert parallel.together(torch.is_grad_enabled, torch.is_grad_enabled) == [False, False]
    assert torch.is_grad_enabled()


def test_a_process_that_has_one_thread_keeps_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever runs a process a core has said so to torch; small work is never spread."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert parallel.is_worth_it(parallel.LARGE)
    assert not parallel.is_worth_it(parallel.LARGE - 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert not parallel.is_worth_it(parallel.LARGE)
