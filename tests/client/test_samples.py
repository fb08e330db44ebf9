"""What a call counts if nobody says it, and what it then warns of."""

from __future__ import annotations

import uuid
import warnings
from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from harness import Split, sgd
from torch import Tensor, nn

from splitfed.client.samples import weigh


@dataclass
class Graphs:
    """A batch of graphs."""

    x: Tensor
    name: str = "graphs"


@dataclass
class Settings:
    """Nothing of a batch."""

    depth: int = 3


class Movable:
    """A batch of some library."""

    def __init__(self) -> None:
        self.inside = {"x": torch.ones(7, 2)}

    def to(self, device: Any) -> Movable:
        """Itself."""
        return self


Pair = namedtuple("Pair", "left right")
X = torch.ones(5, 2)
IMAGES = [torch.ones(3, 4, 4 + number) for number in range(8)]

PLAIN: dict[str, tuple[Any, float]] = {
    "tensor": ((X,), 5),
    "second": ((None, "text", 3, X), 5),
    "tuple": (((X, torch.ones(9)),), 5),
    "named_tuple": ((Pair(X, torch.ones(9)),), 5),
    "dict": (({"ids": X, "mask": torch.ones(9)},), 5),
    "images": ((IMAGES,), 8),
    "one_image": ((IMAGES[:1],), 1),
    "examples": (([{"image": image} for image in IMAGES[:2]],), 2),
    "list_of_lists": (([[torch.ones(3)], [torch.ones(3)], [torch.ones(3)]],), 3),
    "list_of_numbers": (([1, 2, 3], X), 5),
    "settings": ((Settings(), nn.ReLU(), torch.float32, X), 5),
    "keyword": (((), {"x": X}), 5),
}
DOUBTFUL: dict[str, tuple[Any, float, str]] = {
    "scalar": ((torch.tensor(1.0), X), 1, "a scalar tensor comes first"),
    "dataclass": ((Graphs(X),), 1, "a Graphs comes first"),
    "object": ((Movable(), X), 5, "a Movable comes first"),
    "nothing": ((3, "text"), 1, "no tensor is among them"),
}


@pytest.mark.parametrize(("given", "samples"), PLAIN.values(), ids=PLAIN)
def test_what_is_plain(given: Any, samples: float) -> None:
    """The leading dimension of the first tensor; a list of tensors is one example each, a tuple several inputs."""
    assert weigh(*given) == (samples, None)


@pytest.mark.parametrize(("given", "samples", "doubt"), DOUBTFUL.values(), ids=DOUBTFUL)
def test_what_is_doubtful(given: Any, samples: float, doubt: str) -> None:
    """A number all the same, and why it may be another."""
    assert weigh(*given) == (samples, doubt)


class Reading(nn.Module):
    """A model of something that isn't a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(2, 2)

    def forward(self, graphs: Graphs, factor: float = 1.0) -> Tensor:
        """`(N, 2)` to `(N, 2)`."""
        return self.body(graphs.x * factor)


def test_a_doubt_is_told_once_where_it_matters() -> None:
    """Not if the weight is said, nor where nothing counts."""
    made = Split(Reading(), "body", f"memory://{uuid.uuid4()}", optimizer=sgd)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made.client(Graphs(X))
        made.client.eval()(Graphs(X)).sum().backward()
        made.client.train()
        with made.client.batch(num_samples=5):
            made.client(Graphs(X)).sum().backward()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(3):
            made.client(Graphs(X)).sum().backward()
    (one,) = told
    assert "counts 1 examples, and that may be wrong: a Graphs comes first" in str(one.message)
    assert "client.batch(num_samples=...)" in str(one.message)
    assert [record.num_samples for record in made.waiting()] == [5, 1, 1, 1]


def test_batches_of_images_weigh_what_they_hold() -> None:
    """Eight and one, whatever the channels."""

    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Conv2d(3, 2, 3)

        def forward(self, images: list[Tensor]) -> Tensor:
            return self.body(torch.stack([image[:, :4, :4] for image in images])).mean((2, 3))

    made = Split(Detector(), "body", f"memory://{uuid.uuid4()}", optimizer=sgd)
    for count in (8, 1):
        made.client(IMAGES[:count]).sum().backward()
    assert [record.num_samples for record in made.waiting()] == [8, 1]
