"""A tracer of the library's own calls: which files a call enters, how deep, and by which path.

What counts is a Python frame whose code is in a file of the library: functions, lambdas, and
generators each time that they are resumed. Frames of torch and of the standard library between them
don't count, and neither does code without a file (a dataclass's own `__init__`). The depth is the
number of such frames on the stack at once, the first included. Up to Python 3.11 a comprehension is
a frame of its own and counts; from 3.12 on it is part of its function.

The traps: a profile function belongs to a thread. Threads that start within the call are traced,
those that run already are not (on the CPU, autograd runs a backward in the caller's thread). And a
garbage collection runs finalizers of whatever died before, so the collector is off meanwhile.

    python tests/support/tracing.py [--tree]

prints what a training step enters; `tests/promises/test_paths.py` has the limits.
"""

from __future__ import annotations

import gc
import os
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import NamedTuple, TypeVar

import torch
from torch import nn

import splitfed

T = TypeVar("T")
ROOT = os.path.join(os.path.dirname(splitfed.__file__), "")
STEP = 4


class Frame(NamedTuple):
    """A function of the library that is being run."""

    file: str
    """Its file, from the library's root."""
    function: str
    """Its qualified name; before Python 3.11 the bare one."""

    def __str__(self) -> str:
        return f"{self.file}:{self.function}"


@dataclass(frozen=True)
class Trace:
    """What one call entered of the library."""

    stacks: tuple[tuple[Frame, ...], ...] = field(repr=False)
    """For each call of a library function, in order: its callers, outermost first, then it."""

    @property
    def files(self) -> list[str]:
        """The files that were entered, sorted."""
        return sorted({stack[-1].file for stack in self.stacks})

    @property
    def deepest(self) -> tuple[Frame, ...]:
        """The first of the longest chains of calls."""
        return max(self.stacks, key=len, default=())

    @property
    def depth(self) -> int:
        """The length of that chain, in frames of the library."""
        return len(self.deepest)

    def tree(self) -> str:
        """All calls in their order, one a line, indented by their depth."""
        return "\n".join(f"{'  ' * (len(stack) - 1)}{stack[-1]}" for stack in self.stacks)

    def summary(self, what: str) -> str:
        """The figures, the files and the deepest chain as text."""
        chain = "\n".join(f"  {depth:2} {frame}" for depth, frame in enumerate(self.deepest, 1))
        return (
            f"{what}: {len(self.files)} files, depth {self.depth}, {len(self.stacks)} calls\n"
            f"files: {', '.join(self.files)}\n"
            f"deepest chain:\n{chain}"
        )


def trace(call: Callable[[], T]) -> tuple[T, Trace]:
    """What `call()` returns, and what it entered of the library."""
    stacks: list[tuple[Frame, ...]] = []

    def profile(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(ROOT):
            stacks.append(_stack(frame))

    before, collects = sys.getprofile(), gc.isenabled()
    gc.collect()
    gc.disable()
    threading.setprofile(profile)
    sys.setprofile(profile)
    try:
        result = call()
    finally:
        sys.setprofile(before)
        threading.setprofile(None)
        if collects:
            gc.enable()
    return result, Trace(tuple(stacks))


def _stack(frame: FrameType | None) -> tuple[Frame, ...]:
    found = []
    while frame is not None:
        code = frame.f_code
        if code.co_filename.startswith(ROOT):
            file = code.co_filename.removeprefix(ROOT).replace(os.sep, "/")
            found.append(Frame(file, getattr(code, "co_qualname", code.co_name)))
        frame = frame.f_back
    return tuple(reversed(found))


def trace_step(folder: str | os.PathLike[str]) -> tuple[Trace, Trace]:
    """The forward and the backward of a training step that finds all caches warm: the fourth.

    Five linear layers, three of them on a server in this process. Its store is a local folder
    without fsync, and nobody commits there meanwhile.

    Args:
        folder: Where the store is made.
    """
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(5)))
    half, body = splitfed.split(model, "1:4")
    store = splitfed.GradientStore(folder, sync="process")
    client = splitfed.SplitClient(half, splitfed.SplitServer(body, store), client_id="site-a")
    optimizer = torch.optim.SGD(client.parameters(), lr=0.1)
    batches = [(torch.randn(4, 8), torch.randn(4, 8)) for _ in range(STEP)]
    for inputs, targets in batches[:-1]:
        optimizer.zero_grad()
        nn.functional.mse_loss(client(inputs), targets).backward()
        optimizer.step()
    inputs, targets = batches[-1]
    optimizer.zero_grad()
    outputs, forward = trace(partial(client, inputs))
    _, backward = trace(nn.functional.mse_loss(outputs, targets).backward)
    return forward, backward


def main() -> None:
    """Print what the step enters; with `--tree`, every call too."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        traces = trace_step(Path(folder) / "run")
    for what, found in zip(("forward", "backward"), traces, strict=True):
        print(found.summary(what), end="\n\n")
        if "--tree" in sys.argv[1:]:
            print(found.tree(), end="\n\n")


if __name__ == "__main__":
    main()
