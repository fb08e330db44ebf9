"""Models, each with a place to cut it and an input: what the transparency tests run on.

A process that serves a case's backward builds the same body from this file and the seed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import bodies
import torch
from bodies import container, conv_block, pooled, sandwich, twice
from torch import nn

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """A model, where to cut it, and an input."""

    name: str
    build: Callable[[], nn.Module]
    at: str | list[str]
    inputs: Callable[[], Inputs]
    draws: bool = False
    """Whether the model has dropout."""
    grouped: bool = False
    """Whether the cut groups a sum: an activation used by the client and several times in the body, or a parameter that
    each of several calls uses more than once."""
    library: str = ""
    """Whose model it is, where the import alone takes seconds: such a case is one of `make integrations`."""

    @property
    def raw(self) -> bool:
        """Whether the reference must equal the raw model too."""
        return not self.draws and not self.grouped

    def model(self) -> nn.Module:
        """The model, always with the same weights, in train mode."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return self.build().train()


def rand(*shape: int) -> Callable[[], Inputs]:
    """Inputs of one float tensor of this shape."""
    return lambda: ((torch.randn(*shape),), {})


def words() -> Inputs:
    """Embedded words `(N, length, 16)` and the mask of those that count."""
    mask = torch.ones(2, 5, dtype=torch.long)
    mask[0, 3:] = 0
    return (torch.randn(2, 5, 16), mask), {}


def channels_last() -> Inputs:
    """Images `(N, 2, 8, 8)` whose channels lie innermost."""
    return (torch.randn(2, 2, 8, 8).contiguous(memory_format=torch.channels_last),), {}


CASES = [
    Case("mlp", lambda: sandwich(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))), "body", rand(4, 6)),
    Case("conv_batchnorm", lambda: pooled(conv_block(4)), "1", rand(2, 2, 8, 8)),
    Case("dropout", lambda: sandwich(nn.Sequential(nn.Dropout(0.4), nn.Linear(8, 8))), "body", rand(4, 6), draws=True),
    Case("lstm", bodies.lstm, "body", rand(3, 5, 6), draws=True),
    Case(
        "transformer",
        bodies.transformer,
        "body",
        lambda: ((torch.randn(2, 5, 6),), {"padding": torch.arange(5) >= torch.tensor([[5], [3]])}),
        draws=True,
    ),
    Case("control_flow", bodies.control_flow, "body", rand(4, 6)),
    Case("densenet_block", bodies.densenet, "features.denseblock1", rand(2, 1, 32, 32), True, library="monai"),
    Case("unet", bodies.unet, "model.1.submodule", rand(2, 1, 16, 16), True, library="monai"),
    Case("bert_layer", lambda: bodies.hugging_face("bert"), "model.encoder.layer.0", words, draws=True),
    Case("gpt2_layer", lambda: bodies.hugging_face("gpt2"), "model.h.1", words, draws=True),
    Case("inplace_relu", bodies.residual, "1", rand(2, 2, 8, 8)),
    Case("tied", bodies.tied, "body", rand(4, 6)),
    Case("twice", lambda: twice(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))), "body", rand(4, 6)),
    Case(
        "twice_dropout", lambda: twice(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.3))), "body", rand(4, 6), draws=True
    ),
    Case("two_cuts", bodies.two_cuts, ["low", "high"], rand(4, 6), draws=True),
    Case("slice", lambda: pooled(conv_block(4), nn.Dropout2d(0.3), conv_block(4)), "1:4", rand(2, 2, 8, 8), draws=True),
    Case("namedtuple", lambda: container(bodies.Pair, lambda out: out.left * out.right), "body", rand(4, 6)),
    Case(
        "dict",
        lambda: container(lambda a, b: {"a": [a], "b": b, "step": 3}, lambda out: out["a"][0] * out["step"] - out["b"]),
        "body",
        rand(4, 6),
    ),
    Case("model_output", bodies.model_output, "body", rand(4, 6)),
    Case("odd_outputs", bodies.odd_outputs, "body", rand(4, 6)),
    Case("spectral_norm", bodies.spectral, "body", rand(4, 6), grouped=True),
    Case("channels_last", bodies.memory_order, "1", channels_last),
    Case("embedding", bodies.embedding, "0:4", lambda: ((torch.randint(0, 9, (4, 3)),), {})),
    Case("frozen_bottom", bodies.frozen, "body", rand(4, 6), draws=True),
    Case("attention", bodies.attention, "body", rand(2, 5, 6), draws=True),
    Case("fan_out", bodies.fan_out, "body", rand(4, 6), grouped=True),
]
BY_NAME = {case.name: case for case in CASES}


def parameters(cases: Iterable[Case] = CASES) -> list[Any]:
    """The cases as the parameters of a test."""
    import pytest  # here: the process that serves a case has no use for it

    marks = {True: [pytest.mark.integration], False: []}
    return [pytest.param(case, id=case.name, marks=marks[bool(case.library)]) for case in cases]
