"""Work on large tensors and files, spread over threads.

Python runs one thread at a time, but sums of tensors, checksums, hashes and writes let go of its
lock while they work, so a second thread nearly halves the time of those that are large. What is
computed is the same: each task has its own elements or bytes, and what order there is within a task
stays.

Only so many threads work as torch itself may use: who gives a process one thread, to have other
processes on the other cores, gets one here too. A task mustn't be small, as to start a thread takes
as long as to add up 100,000 numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")

LARGE = 8 << 20
"""Bytes from which on work is worth another thread."""


def is_worth_it(num_bytes: int) -> bool:
    """Whether work on so many bytes is to be spread."""
    return num_bytes >= LARGE and torch.get_num_threads() > 1


def together(*tasks: Callable[[], T]) -> list[T]:
    """The results of tasks that run at the same time, one of them in this thread.

    Returns once all have ended. If some raise, the error of the first of them is raised.
    """
    with ThreadPoolExecutor(len(tasks)) as pool:
        others = [pool.submit(_run, task) for task in tasks[1:]]
        first = _run(tasks[0])
    return [first, *(other.result() for other in others)]


def _run(task: Callable[[], T]) -> T:
    # torch keeps for each thread whether it records a graph: none of this is to be.
    with torch.no_grad():
        return task()
