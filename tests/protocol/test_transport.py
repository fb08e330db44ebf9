"""Requests go to the replicas in turn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from splitfed.protocol.transport import RoundRobin


def test_round_robin_serves_the_backward_elsewhere() -> None:
    """With two replicas, requests alternate, whatever they are."""
    served: list[str] = []

    class Replica:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getattr__(self, verb: str) -> Callable[[object], None]:
            return lambda request: served.append(f"{self.name}.{verb}({request})")

    replicas: Any = RoundRobin([Replica("a"), Replica("b")])  # type: ignore[list-item]
    for verb in ("pull", "forward", "backward", "forward", "backward", "loss", "push"):
        getattr(replicas, verb)(1)
    expected = ["a.pull", "b.forward", "a.backward", "b.forward", "a.backward", "b.loss", "a.push"]
    assert served == [f"{call}(1)" for call in expected]
