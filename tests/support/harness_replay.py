"""Bodies, models and calls of them, for the tests of what runs them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from bodies import Calls
from torch import Tensor, nn

from splitfed.model.execution import Model
from splitfed.model.skeleton import Template
from splitfed.protocol.messages import ForwardRecord

CPU = torch.device("cpu")
X = torch.tensor([[1.0, -2.0], [3.0, 4.0]])


def model(body: nn.Module) -> Model:
    """A body at version 0, with weights of its own."""
    template = Template(body)
    return Model(template, {name: t.clone() for name, t in template.state(body).items()}, 0, CPU)


def call(*args: Any, **changes: Any) -> ForwardRecord:
    """A call of the body in train mode."""
    inputs = (args or (X,), {})
    flags = tuple(isinstance(arg, Tensor) and arg.is_floating_point() for arg in inputs[0])
    return replace(ForwardRecord("", inputs, flags, True, 7, None, None, (), (), "here"), **changes)


def body(forward: Any, **parts: nn.Module) -> nn.Module:
    """A body whose forward is a function of itself and its arguments."""
    return Calls(forward, **parts)


def linear(value: float = 2.0) -> nn.Linear:
    """`x -> value · x` on two features."""
    layer = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(2) * value)
    return layer
