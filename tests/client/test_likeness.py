"""The class of a client looks like its half's to whoever reads classes: trainers, and Python itself."""

from __future__ import annotations

import inspect
import uuid
from typing import Any

import pytest
import torch
from bodies import Calls
from torch import Tensor, nn

import splitfed
from splitfed.client.client import SplitClient
from splitfed.client.likeness import class_like, shown


class NetForQuestionAnswering(nn.Module):
    """A model whose labels have names that trainers look for."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 4)

    def forward(self, x: Tensor, start_positions: Tensor | None = None, *, return_loss: bool = True) -> Tensor:
        """As it is."""
        return self.body(x)


def client(model: nn.Module, at: str = "body", kind: type[SplitClient] = SplitClient) -> SplitClient:
    """A client of a model."""
    half, body = splitfed.split(model, at)
    return kind(half, splitfed.SplitServer(body, splitfed.GradientStore(f"memory://{uuid.uuid4()}")), "a")


def test_the_class_has_the_signature_and_the_name_of_the_half() -> None:
    """What Hugging Face's Trainer reads, by its own functions."""
    from transformers.utils.generic import can_return_loss, find_labels

    made = client(NetForQuestionAnswering())
    assert isinstance(made, SplitClient)
    assert type(made).__name__ == "SplitClient[NetForQuestionAnswering]"
    assert inspect.signature(type(made).forward) == inspect.signature(NetForQuestionAnswering.forward)
    assert find_labels(type(made)) == ["start_positions"]
    assert can_return_loss(type(made))
    assert made._get_name() == "NetForQuestionAnswering"
    assert repr(made).startswith("SplitClient[NetForQuestionAnswering](\n  (body): CutPoint")


def test_two_clients_of_one_kind_share_a_class() -> None:
    """So a compiled function or a table by type knows them as one; SplitClient itself stays as it is."""
    one, two = client(NetForQuestionAnswering()), client(NetForQuestionAnswering())
    assert type(one) is type(two) is not type(client(Calls(lambda m, x: m.body(x), body=nn.Linear(4, 4))))
    assert class_like(type(one), one.client_half) is type(one)
    assert list(inspect.signature(SplitClient.forward).parameters) == ["self", "args", "kwargs"]


def test_a_subclass_of_the_client_stays_one() -> None:
    """Its methods are kept, and what it overrides itself isn't."""

    class Named(SplitClient):
        def forward(self, x: Tensor, twice: bool = False) -> Any:
            return self.client_half.bottom(x)

        def __len__(self) -> int:
            return 7

    made = client(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), "1", Named)
    assert isinstance(made, Named)
    assert len(made) == 7
    assert list(inspect.signature(type(made).forward).parameters) == ["self", "x", "twice"]


def test_a_client_of_a_sequential_is_indexed_as_one() -> None:
    """Length, items, slices, iteration and assignment are the half's."""
    made = client(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), "1")
    half = made.client_half
    assert len(made) == 4
    assert made[0] is half[0]
    assert list(made) == list(half)
    assert isinstance(made[2:], nn.Sequential)
    made[3] = nn.Linear(4, 5)
    assert made(torch.ones(2, 4)).shape == (2, 5)
    with pytest.raises(TypeError, match="not subscriptable"):
        _ = client(NetForQuestionAnswering())[0]


def test_a_wrapper_without_a_signature_shows_what_it_wraps() -> None:
    """As trainers look through a PEFT model that forwards anything, and through a compiled one."""

    class Wrapper(nn.Module):
        def __init__(self, base: nn.Module) -> None:
            super().__init__()
            self.base = base

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.base(*args, **kwargs)

        def get_base_model(self) -> nn.Module:
            return self.base

    made = client(Wrapper(NetForQuestionAnswering()), "base.body")
    assert shown(made.client_half) is made.client_half.base
    assert inspect.signature(made.forward) == inspect.signature(made.client_half.base.forward)
    assert list(inspect.signature(type(made).forward).parameters)[1:] == list(
        inspect.signature(made.forward).parameters
    )
    assert made(torch.ones(2, 4)).shape == (2, 4)


def test_an_attribute_is_deleted_where_it_is() -> None:
    """Of the half, or of the client itself."""
    made = client(NetForQuestionAnswering())
    made.temperature = 2.0
    assert made.client_half.temperature == 2.0
    del made.temperature
    assert not hasattr(made.client_half, "temperature")
    with pytest.raises(AttributeError, match="temperature"):
        del made.temperature
