"""The walk through an object: it sees what changed from within, ends everywhere, and raises nothing."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from splitfed.model.walk import Walk, is_atom, of_content, of_identity


def walked(value: Any) -> list[Any]:
    """What one walk finds."""
    return Walk(of_identity).through([("it", value)])["it"]


class Slotted:
    """An object without a `__dict__`."""

    __slots__ = ("held",)

    def __init__(self) -> None:
        self.held = [1]


OBJECTS: list[tuple[Callable[[], Any], Callable[[Any], object]]] = [
    (lambda: SimpleNamespace(a=SimpleNamespace(b=[1.0])), lambda o: o.a.b.append(2.0)),
    (lambda: SimpleNamespace(t=torch.zeros(2)), lambda o: o.t.add_(1)),
    (lambda: SimpleNamespace(d={"k": {1, 2}}), lambda o: o.d["k"].add(3)),
    (Slotted, lambda o: o.held.append(2)),
    (lambda: random.Random(0), lambda o: o.random()),
    (torch.Generator, lambda o: torch.rand(1, generator=o)),
    (lambda: nn.Linear(2, 2), lambda o: setattr(o, "scale", 2)),
    (lambda: (1, [2]), lambda o: o[1].append(3)),
    (lambda: iter([1, 2, 3]), next),
]


@pytest.mark.parametrize(("make", "change"), OBJECTS)
def test_a_change_from_within_is_seen(make: Callable[[], Any], change: Callable[[Any], object]) -> None:
    """And nothing else: two walks with nothing in between are equal."""
    value = make()
    before = walked(value)
    assert walked(value) == before
    change(value)
    assert walked(value) != before


def test_a_walk_ends() -> None:
    """In a circle, in what is too large or too deep, and in what can't be told."""
    circle: list[Any] = []
    circle.append(circle)
    deep: list[Any] = []
    for _ in range(200):
        deep = [deep]
    for value in (circle, deep, list(range(20_000)), threading.Lock(), float("nan"), walked):
        assert walked(value) == walked(value)
    assert walked(deep) == walked(list(range(20_000))) == []


def test_modules_that_are_known_arent_entered() -> None:
    """They are looked at by themselves."""
    known = nn.Linear(2, 2)
    walk = Walk(of_identity, [known])
    before = walk.through([("it", [known])])
    known.scale = 2
    assert walk.through([("it", [known])]) == before


def test_content_tells_tensors_apart_by_their_bits() -> None:
    """Whichever objects they are; a sparse one by its kind alone."""
    assert of_content(torch.zeros(2)) == of_content(torch.zeros(2))
    assert of_content(torch.zeros(2)) != of_content(-torch.zeros(2))
    assert of_content(torch.zeros(2).to_sparse()) == ([2], "float32")


def test_atoms_are_what_nothing_can_change_in() -> None:
    """A tuple only of atoms."""
    assert all(map(is_atom, (None, 1, 1.5, "a", (1, (2, "b")), torch.float32, len, nn.Linear)))
    assert not any(map(is_atom, ([], (1, []), torch.zeros(1), {})))
