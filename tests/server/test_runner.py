"""Running calls out of a store: what is cached changes no result, not even after a body that wrote where it mustn't."""

from __future__ import annotations

import uuid
from typing import Any

import pytest
import torch
from bodies import Calls, sandwich
from harness import Split, sgd
from torch import Tensor, nn

import splitfed
from splitfed.errors import BodyError, UnsupportedError


def writing(how: str) -> nn.Module:
    """A model whose body writes to a parameter of its own."""

    def forward(m: Any, given: Tensor) -> Tensor:
        target = m.frozen if how == "frozen" else m.layer.weight
        with torch.no_grad():
            if how == "assigned":
                m.layer.weight = nn.Parameter(target * 0.5)
            elif how == "data":
                target.data.mul_(0.5)
            else:
                target.mul_(0.5)
        if how == "raises":
            raise KeyError("after it wrote")
        return m.layer(given) + m.frozen

    net = sandwich(Calls(forward, layer=nn.Linear(8, 8)))
    net.body.frozen = nn.Parameter(torch.ones(8), requires_grad=False)
    return net


@pytest.mark.parametrize("how", ["trainable", "frozen", "assigned", "data", "raises"])
def test_a_body_that_writes_to_its_parameters_spoils_no_version(how: str) -> None:
    """Refused, or BodyError if it raises besides; every reader of the store still finds what was committed."""
    made = Split(writing(how), "body", f"memory://{uuid.uuid4()}", optimizer=sgd)
    for _ in range(3):
        with pytest.raises(
            (UnsupportedError, BodyError), match=r"changes its own parameters in forward|after it wrote"
        ):
            made.client(torch.randn(4, 6))
        for store in (made.store, splitfed.GradientStore(made.store.url)):
            weights = store.load_weights(0)
            assert all(torch.equal(weights[name], tensor) for name, tensor in made.body.state_dict().items())


@pytest.mark.parametrize("keep_models", [1, 2])
@pytest.mark.parametrize("keep_graphs", [0, 1, 8])
def test_caches_of_any_size_give_the_same_bits(keep_graphs: int, keep_models: int) -> None:
    """Interleaved calls at two versions, with dropout and BatchNorm: the caches change speed only."""
    net = sandwich(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5)))
    found = []
    for graphs, models in ((8, 2), (keep_graphs, keep_models)):
        made = Split(net, "body", f"memory://{uuid.uuid4()}", optimizer=sgd)
        server = splitfed.SplitServer(made.body, made.store, keep_graphs=graphs, keep_models=models)
        client = splitfed.SplitClient(made.half, server, "a")
        torch.manual_seed(1)
        losses = [client(torch.randn(4, 6)).sum() for _ in range(2)]
        client(torch.randn(4, 6)).sum().backward()
        made.accumulator.step()
        losses.append(client(torch.randn(4, 6)).sum())
        for loss in (losses[2], losses[0], losses[1]):
            loss.backward()
        made.accumulator.step()
        found.append(splitfed.join(client, made.store.load_weights()).state_dict())
    assert all(torch.equal(found[0][name], tensor) for name, tensor in found[1].items())
