"""The graphs that a server keeps: in batches, in bytes, and in fairness between clients."""

from __future__ import annotations

import uuid
from typing import Any

import pytest
import torch
from bodies import sandwich
from harness import Split
from torch import nn

from splitfed.server.graphs import MOST_CALLS, CallKey, Graphs
from splitfed.server.memory import Memory


def key(call: int, client_id: str = "a", nonce: int = 0) -> CallKey:
    """A call of a client's first process."""
    return CallKey(0, client_id, 1, call, nonce)


def kept(graphs: Graphs) -> list[tuple[str, int]]:
    """The calls whose graph is there."""
    return sorted((found[1], found[3]) for found in graphs._entries)


def put(graphs: Graphs, call: int, client_id: str = "a", size: int = 1, after: int | None = None) -> None:
    """Keep something of so many bytes."""
    content: Any = object()
    graphs.put(key(call, client_id), content, content, size, None if after is None else key(after, client_id))


@pytest.mark.parametrize("most", [0, 1, 3])
def test_so_many_batches_are_kept(most: int) -> None:
    """The newest ones; of none, nothing."""
    memory = Memory()
    graphs = Graphs(most, memory)
    for call in range(5):
        put(graphs, call)
    assert kept(graphs) == [("a", call) for call in range(5 - most, 5)]
    assert memory.kept == most


def test_the_calls_of_one_client_call_are_one_batch() -> None:
    """Three cut points: six graphs are two batches, and go together."""
    memory = Memory()
    graphs = Graphs(2, memory)
    for call in range(9):
        put(graphs, call, after=None if call % 3 == 0 else call - 1)
    assert kept(graphs) == [("a", call) for call in range(3, 9)]
    assert graphs.pop(key(4)) is not None
    assert graphs.pop(key(4)) is None
    put(graphs, 9)
    assert kept(graphs) == [("a", call) for call in (6, 7, 8, 9)]
    assert memory.kept == 4


def test_a_copys_call_of_the_same_number_finds_no_graph_of_the_other() -> None:
    """Neither takes it, continues it, nor joins its batch; one that is kept after it takes its place."""
    memory = Memory()
    graphs = Graphs(8, memory)
    ours, theirs = object(), object()
    one: Any = ours
    other: Any = theirs
    graphs.put(key(4, nonce=7), one, one, 1)
    assert graphs.get(key(4, nonce=9)) is None
    assert key(4, nonce=9) not in graphs
    assert graphs.pop(key(4, nonce=9)) is None
    graphs.put(key(5, nonce=9), other, other, 1, previous=key(4, nonce=9))
    assert len(graphs._groups) == 2
    graphs.put(key(4, nonce=9), other, other, 1)
    assert graphs.get(key(4, nonce=7)) is None
    assert graphs.get(key(4, nonce=9)) == (theirs, theirs)
    graphs.drop(key(4).place)
    graphs.drop(key(5).place)
    assert memory.kept == 0


def test_a_client_that_never_comes_back_displaces_its_own() -> None:
    """Of eight places the hostile one loses its oldest; the other's stays, however old."""
    graphs = Graphs(8, Memory())
    put(graphs, 0, "healthy")
    for call in range(50):
        put(graphs, call, "hostile")
    assert kept(graphs) == [("healthy", 0), *[("hostile", call) for call in range(43, 50)]]


def test_bytes_of_one_client_and_of_all() -> None:
    """Of 100 bytes for a client and 150 in all; the newest is kept whatever its size."""
    memory = Memory(total=150, client=100)
    graphs = Graphs(8, memory)
    for call in range(3):
        put(graphs, call, size=40)
    assert kept(graphs) == [("a", 1), ("a", 2)]
    put(graphs, 0, "b", size=90)
    assert kept(graphs) == [("a", 2), ("b", 0)]
    put(graphs, 1, "b", size=1000)
    assert kept(graphs) == [("b", 1)]
    assert memory.kept == 1000
    put(graphs, 3, size=1)
    assert kept(graphs) == [("a", 3)]


def test_of_a_very_long_call_the_newest_graphs_are_kept() -> None:
    """A recurrent one of thousands of cut calls."""
    graphs = Graphs(8, Memory())
    for call in range(MOST_CALLS + 10):
        put(graphs, call, after=call - 1 if call else None)
    assert len(kept(graphs)) == MOST_CALLS
    assert graphs.get(key(MOST_CALLS + 9)) is not None
    assert graphs.get(key(9)) is None


def test_a_graph_that_is_put_again_counts_once() -> None:
    """A repeated forward."""
    memory = Memory()
    graphs = Graphs(8, memory)
    for _ in range(3):
        put(graphs, 0, size=10)
    assert memory.kept == 10


def test_a_call_with_many_cut_points_is_no_recompute() -> None:
    """Twelve cuts in one call, more than `keep_graphs` counts batches: all graphs are still there at the backward."""
    net = sandwich(nn.Sequential(nn.Linear(8, 8)))

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        h = m.bottom(x)
        for _ in range(12):
            h = m.body(h)
        return m.head(h)  # type: ignore[no-any-return]

    net.run = forward
    made = Split(net, "body", f"memory://{uuid.uuid4()}", keep_graphs=2)
    loss = made.client(torch.randn(4, 6)).sum()
    assert len(made.servers[0]._lines.of("a").runner._graphs._entries) == 12
    loss.backward()
    assert made.servers[0].memory.kept == 0
