"""A batch without examples takes its course on this side: nothing is sent, and nothing counts."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bodies import Calls, Pair, sandwich
from harness import Split, Wire, gradients
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import splitfed
from splitfed.errors import InputError


class Counting(Wire):
    """Notes which requests come."""

    def send(self, method: str, request: Any) -> Any:
        """Note it, and pass it on."""
        self.__dict__.setdefault("seen", []).append(method)
        return super().send(method, request)


def made(body: nn.Module, run: Callable[..., Any] | None = None) -> tuple[Split, nn.Module]:
    """A split model in memory, and its reference."""
    model = sandwich(body)
    if run is not None:
        model.run = run
    split = Split(model, "body", f"memory://{uuid.uuid4()}", wire=Counting)
    return split, splitfed.reference(model, "body")


BODIES: dict[str, tuple[Callable[[], nn.Module], Callable[..., Any] | None]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)), None),
    "wider": (lambda: nn.Linear(8, 8).double(), lambda m, x: m.head(m.body(m.bottom(x).double()).float())),
    "pair": (
        lambda: Calls(lambda m, x: Pair(m.left(x), x.argmax(1)), left=nn.Linear(8, 8)),
        lambda m, x: m.head(m.body(m.bottom(x)).left),
    ),
    "sequence": (lambda: nn.LSTM(8, 8, batch_first=True), lambda m, x: m.head(m.body(m.bottom(x)[:, None])[0][:, 0])),
    "by_keyword": (
        lambda: nn.TransformerEncoderLayer(8, 2, 8, batch_first=True),
        lambda m, x: m.head(m.body(m.bottom(x)[:, None], src_mask=torch.zeros(1, 1))[:, 0]),
    ),
}


@pytest.mark.parametrize("kind", BODIES)
def test_an_empty_batch_is_answered_without_a_request(kind: str) -> None:
    """Shapes, dtypes and the half's gradients are the reference's; a batch with examples counts as ever after it."""
    build, run = BODIES[kind]
    split, reference = made(build(), run)
    found: list[Tensor] = []
    for net in (split.client, reference):
        x = torch.empty(0, 6, requires_grad=True)
        state = torch.get_rng_state()
        output = net(x)
        output.sum().backward()
        assert x.grad is not None
        found += [output, x.grad]
        assert torch.equal(state, torch.get_rng_state())
    assert [(t.shape, t.dtype) for t in found[:2]] == [(t.shape, t.dtype) for t in found[2:]]
    own = gradients(split.client)
    assert own.keys() == {name for name, _ in split.client.named_parameters()}
    assert not any(gradient.any() for gradient in own.values())
    assert not hasattr(split.wire, "seen")
    assert split.store.waiting() == []
    split.client(torch.ones(3, 6)).sum().backward()
    assert [record.num_samples for record in split.waiting()] == [3]


def test_a_part_that_needs_values_is_asked_for_shapes() -> None:
    """By one request that leaves nothing in the store."""
    body = Calls(lambda m, x: m.up(x) if float(x.sum()) >= 0 else x, up=nn.Linear(8, 8))
    split, _ = made(body)
    output = split.client(torch.empty(0, 6))
    output.sum().backward()
    assert output.shape == (0, 3)
    assert split.wire.seen == ["forward"]
    assert split.stored("forward") == split.store.waiting() == []


def test_outputs_that_have_values_go_the_ordinary_way() -> None:
    """A sum over no rows is a value: it is the server's, and what can't be weighed is refused as before."""
    split, _ = made(Calls(lambda m, x: m.up(x).sum(0), up=nn.Linear(8, 8)))
    output = split.client(torch.empty(0, 6))
    assert output.shape == (3,)
    with pytest.raises(InputError, match="num_samples is 0"):
        output.sum().backward()


def test_a_checkpoint_recomputes_an_empty_call() -> None:
    """Beside calls with examples in the same pass, which find their records."""
    split, _ = made(nn.Linear(8, 8))
    outputs = [checkpoint(split.client, torch.ones(count, 6), use_reentrant=False) for count in (2, 0, 3)]
    sum(output.sum() for output in outputs).backward()
    assert [record.num_samples for record in split.waiting()] == [5]


def test_evaluation_of_an_empty_batch_is_the_servers() -> None:
    """Under no_grad nothing is stored anyway."""
    split, _ = made(nn.Linear(8, 8))
    with torch.no_grad():
        assert split.client(torch.empty(0, 6)).shape == (0, 3)
    assert split.wire.seen == ["forward"]
