"""Messages: frozen, slotted, told apart by identity, and never compared element by element."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from typing import Any

import pytest
import torch

from splitfed.protocol import messages

CLASSES = [found for _, found in inspect.getmembers(messages, inspect.isclass) if found.__module__ == messages.__name__]


def blank(cls: Any) -> Any:
    """An instance whose every field is a tensor: `==` between two of them would be ambiguous."""
    return cls(**{field.name: torch.zeros(2) for field in dataclasses.fields(cls)})


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_a_message_cant_be_changed(cls: type) -> None:
    """Neither a field nor an attribute of its own: what was sent stays what was sent."""
    message = blank(cls)
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(message, dataclasses.fields(cls)[0].name, 1)
    assert not hasattr(message, "__dict__")


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_messages_are_compared_by_identity(cls: type) -> None:
    """`==` on tensors is elementwise, so two messages are equal only if they are one."""
    message = blank(cls)
    assert message == message
    assert message != copy.copy(message)
    assert len({message, copy.copy(message)}) == 2


def test_there_are_requests_answers_and_records() -> None:
    """Each request of the protocol has its answer."""
    names = {cls.__name__ for cls in CLASSES}
    for verb in ("Forward", "Backward", "Loss", "Push", "Pull"):
        assert {f"{verb}Request", f"{verb}Answer"} <= names
