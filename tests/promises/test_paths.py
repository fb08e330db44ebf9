"""How many of the library's files a reader opens to follow one call, and how deep it goes."""

from __future__ import annotations

import inspect

import pytest
from tracing import ROOT, Trace, trace_step

import splitfed

# A file for each thing that a call asks on its way: what it counts, whose buffers it goes on from, what the half has
# changed, whether its arguments can cross; what its client may still write and hold; and whether a file is whole.
FORWARD_FILES = 38
FORWARD_DEPTH = 17
BACKWARD_FILES = 36


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trace, Trace]:
    """The forward and the backward of the fourth step."""
    return trace_step(tmp_path_factory.mktemp("paths") / "run")


def test_a_forward_enters_few_files(traces: tuple[Trace, Trace]) -> None:
    """A forward enters few files of the library."""
    forward, _ = traces
    assert len(forward.files) <= FORWARD_FILES, forward.summary("forward")


def test_a_forward_is_not_deep(traces: tuple[Trace, Trace]) -> None:
    """A forward has few frames of the library on the stack at once."""
    forward, _ = traces
    assert forward.depth <= FORWARD_DEPTH, forward.summary("forward")


def test_a_backward_enters_few_files(traces: tuple[Trace, Trace]) -> None:
    """A backward enters few files of the library."""
    _, backward = traces
    assert len(backward.files) <= BACKWARD_FILES, backward.summary("backward")


def test_the_whole_path_is_traced(traces: tuple[Trace, Trace]) -> None:
    """Both traces reach the server and the disk: one that missed them would meet any limit."""
    server = inspect.getfile(splitfed.SplitServer).removeprefix(ROOT)
    for found in traces:
        assert server in found.files
        assert any(file.startswith("blobs/") for file in found.files)
