"""Bodies that set attributes in forward: those that only write them, and those that go on from them."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any

import torch
from bodies import Calls
from torch import Tensor, nn


class Tally:
    """An object that changes from within."""

    def __init__(self) -> None:
        self.items: list[Tensor] = []

    def update(self, y: Tensor) -> Tensor:
        """Everything so far, added up."""
        self.items.append(y.detach().mean(0))
        return y + torch.stack(self.items).sum(0)


def body(forward: Callable[..., Any], **attributes: Any) -> nn.Module:
    """A linear layer `(N, 8)` -> `(N, 8)`, and what a function of it and of its output makes of that."""
    made = Calls(lambda m, x, *more: forward(m, m.layer(x), *more), layer=nn.Linear(8, 8))
    for name, value in attributes.items():
        setattr(made, name, value)
    return made


def keep(m: Any, name: str, value: Any) -> Any:
    """Set an attribute, and go on with the value."""
    setattr(m, name, value)
    return value


def hidden(m: Any, y: Tensor) -> Tensor:
    """A hidden state that the next call begins with."""
    return keep(m, "h", y if m.h is None else y + m.h.detach())


def counted(m: Any, y: Tensor) -> Tensor:
    """A factor that falls from call to call."""
    m.steps += 1
    return y / m.steps


def remembered(m: Any, y: Tensor) -> Tensor:
    """The sum of a list that grows."""
    m.memory.append(y.detach().mean(0))
    return y + torch.stack(m.memory).sum(0)


def in_place(m: Any, y: Tensor) -> Tensor:
    """A tensor that isn't registered, written in place."""
    m.total += y.detach().mean(0)
    return y + m.total


def lazily_registered(m: Any, y: Tensor) -> Tensor:
    """A buffer that the first call makes."""
    if "late" not in m._buffers:
        m.register_buffer("late", torch.zeros(8))
    m.late = m.late + y.detach().mean(0)
    return y + m.late


def in_the_gradient(m: Any, y: Tensor) -> Tensor:
    """A state that shows in no output, but in the gradients."""
    scale = m.scale
    m.scale = 2.0
    return y.detach() + (y - y.detach()) * scale


def of_a_backward(m: Any, y: Tensor) -> Tensor:
    """What a hook left in the backward of the call before."""
    scaled = y * m.scale
    if scaled.requires_grad:
        scaled.register_hook(lambda grad: setattr(m, "scale", 3.0))
    return scaled


def of_the_first_batch(m: Any, y: Tensor) -> Tensor:
    """A scale that is measured on the first batch and kept."""
    if m.scale is None:
        m.scale = y.detach().std()
    return y / m.scale


def dependent() -> dict[str, nn.Module]:
    """Bodies whose answers depend on what an earlier call left, by the attribute."""
    transient = body(lambda m, y: keep(m, "carried", y.detach().mean(0) + m.carried))
    transient.register_buffer("carried", torch.zeros(8), persistent=False)
    empty = body(lambda m, y: y + keep(m, "none", torch.ones(8) if m.none is None else m.none + 1))
    empty.register_buffer("none", None)
    return {
        "h": body(hidden, h=None),
        "steps": body(counted, steps=0),
        "memory": body(remembered, memory=[]),
        "total": body(in_place, total=torch.zeros(8)),
        "tally": body(lambda m, y: m.tally.update(y), tally=Tally()),
        "numbers": body(lambda m, y: y * next(m.numbers), numbers=itertools.count(1)),
        "late": body(lazily_registered),
        "carried": transient,
        "none": empty,
    }


def table(m: Any, y: Tensor) -> Tensor:
    """A mask that is built at need, and kept."""
    if m.mask is None or len(m.mask) < len(y):
        m.mask = torch.tril(torch.ones(len(y), len(y)))
    return m.mask[: len(y), : len(y)] @ y


def mapped(m: Any, y: Tensor) -> Tensor:
    """Attention maps, with dropout, in a dict."""
    weights = nn.functional.dropout(y.softmax(-1), 0.3, m.training)
    m.maps["last"] = weights
    return weights * y


def timed(m: Any, y: Tensor) -> Tensor:
    """When it ran."""
    m.at = time.perf_counter()
    return y


def independent() -> dict[str, nn.Module]:
    """Bodies that only write: by the attribute."""
    return {
        "kl": body(lambda m, y: y + 0 * keep(m, "kl", y.pow(2).mean())),
        "maps": body(mapped, maps={}),
        "mask": body(table, mask=None),
        "at": body(timed),
        "extra": body(lambda m, y: keep(m, "extra", nn.Identity())(y)),
        "seen": body(lambda m, y: keep(m, "seen", {"mean": y.mean()}) and y),
    }


def counting() -> dict[str, nn.Module]:
    """Bodies that count on from call to call, though no answer shows it: by the attribute."""

    def only(update: Callable[[Any, Tensor], object]) -> Callable[[Any, Tensor], Tensor]:
        return lambda m, y: (update(m, y), y)[1]

    return {
        "steps": body(only(lambda m, y: keep(m, "steps", m.steps + 1)), steps=0),
        "memory": body(only(lambda m, y: m.memory.append(y.detach())), memory=[]),
        "tally": body(only(lambda m, y: m.tally.update(y)), tally=Tally()),
    }
