"""Every misuse has an error of its own, with what was expected and how to mend it: the list of acceptance 6."""

from __future__ import annotations

import math
import uuid
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from bodies import sandwich
from harness import Split, Wire, sgd
from harness_requests import Site, ahead, back
from torch import Tensor, nn

import splitfed
from splitfed.errors import (
    ArchitectureError,
    IdError,
    InputError,
    SharedParameterError,
    SplitFedError,
    UnknownCutError,
)
from splitfed.protocol.messages import BackwardAnswer, BackwardRequest, LossRequest, PullRequest, PushRequest
from splitfed.protocol.packing import pack, pack_tree, unpack, unpack_tree


def memory() -> str:
    """The URL of an empty store in memory."""
    return f"memory://{uuid.uuid4()}"


def x() -> Tensor:
    """A batch `(4, 6)`."""
    return torch.randn(4, 6)


def test_an_unknown_cut() -> None:
    """Says which names are near."""
    with pytest.raises(UnknownCutError, match=r"no submodule 'bodi': the nearest are \['body'"):
        splitfed.split(sandwich(nn.Linear(8, 8)), "bodi")


def shared(how: str) -> nn.Module:
    """A model whose body and client half share something."""
    model = sandwich(nn.Linear(8, 8))
    model.bottom = nn.Linear(8, 8)
    if how == "tied":
        model.body.weight = model.bottom.weight
    elif how == "buffer":
        model.register_buffer("seen", torch.zeros(1), persistent=False)
        model.body.register_buffer("seen", model.seen)
    elif how == "half_attribute":
        object.__setattr__(model, "also", model.body)
    elif how == "half_list":
        model.also = [model.body]
    elif how == "half_dict":
        model.also = {"weight": model.body.weight}
    elif how == "half_nested":
        model.also = [[model.body]]
    elif how == "body_list":
        model.body.also = [model.bottom.weight]
    elif how == "body_module":
        model.body.also = [model.bottom]
    return model


HOW = "tied buffer half_attribute half_list half_dict half_nested body_list body_module".split()


@pytest.mark.parametrize("how", HOW)
def test_shared_parameters_across_the_cut(how: str) -> None:
    """Registered or in a plain attribute, from either side: two copies of it would drift apart without a word."""
    with pytest.raises(SharedParameterError, match="move the cut"):
        splitfed.split(shared(how), "body")


def frozen() -> nn.Module:
    """A layer whose weight doesn't train."""
    layer = nn.Linear(8, 8)
    layer.weight.requires_grad_(False)
    return layer


OTHERS = {
    "shape": (nn.Linear(8, 9), r"weight: the store has trainable float32 \(8, 8\), got trainable float32 \(9, 8\)"),
    "dtype": (nn.Linear(8, 8).double(), r"weight: the store has trainable float32 \(8, 8\), got trainable float64"),
    "missing": (nn.Linear(8, 8, bias=False), r"1 of 2 tensors differ: bias: .*got nothing"),
    "frozen": (frozen(), r"1 of 2 tensors differ: weight: the store has trainable .*got frozen float32"),
    "named": (nn.Sequential(nn.Linear(8, 8)), r"weight: .*got nothing.*0.weight: the store has nothing"),
}


def accumulate(body: nn.Module, store: splitfed.GradientStore) -> splitfed.Accumulator:
    """An accumulator with plain SGD."""
    return splitfed.Accumulator(body, store, sgd)


@pytest.mark.parametrize("make", [splitfed.SplitServer, accumulate], ids=["server", "accumulator"])
@pytest.mark.parametrize(("body", "said"), OTHERS.values(), ids=OTHERS)
def test_a_wrong_architecture_on_an_existing_store(body: nn.Module, said: str, make: Callable[..., Any]) -> None:
    """Shape, dtype, names or frozen parameters: the differing tensors are named, and the store stays as it was."""
    made = Split(sandwich(nn.Linear(8, 8)), "body", memory())
    with pytest.raises(ArchitectureError, match=said):
        make(body, splitfed.GradientStore(made.store.url))
    assert made.store.latest_version() == 0


def test_a_body_on_a_different_dtype_than_what_arrives() -> None:
    """Activations of a half that was cast, and the body's own error says so."""
    made = Split(sandwich(nn.Linear(8, 8)), "body", memory())
    made.client.to(torch.float64)
    with pytest.raises(splitfed.BodyError, match=r"RuntimeError.*(dtype|Double)"):
        made.client(x().double())


WRONG: list[tuple[str, str, Any]] = [
    ("forward", "cut", 5),
    ("forward", "inputs", 5),
    ("forward", "inputs", (torch.ones(2), 3)),
    ("forward", "requires_grad", 5),
    ("forward", "requires_grad", ("yes",)),
    ("forward", "training", "yes"),
    ("forward", "seed", "x"),
    ("forward", "seed", -1),
    ("forward", "seed", 2**64),
    ("forward", "autocast", 5),
    ("forward", "seen", None),
    ("forward", "version", "0"),
    ("forward", "previous", "0"),
    ("forward", "housekeeping", 5),
    ("backward", "grad_outputs", (5,)),
    ("backward", "grad_outputs", None),
    ("backward", "seal", 5),
    ("backward", "housekeeping", None),
]


@pytest.mark.parametrize(("method", "field", "value"), WRONG, ids=lambda value: str(value).replace("\n", "")[:20])
def test_a_request_whose_field_is_of_another_kind(method: str, field: str, value: Any) -> None:
    """What comes over a wire may hold anything in any field: our own error, whoever finds it."""
    site = Site(memory())
    site.forward()
    request = ahead(incarnation=1, call=1) if method == "forward" else back()
    kind = type(request)
    tree = {**unpack_tree(kind.__name__, b"".join(pack(request))), field: value}
    data = b"".join(pack_tree(kind.__name__, tree))
    with pytest.raises(SplitFedError):
        getattr(site.server, method)(unpack(kind, data))
    assert site.server.backward(back()).status == "stored"


class Bending(Wire):
    """Changes gradients on their way."""

    bend: Any = staticmethod(lambda grad: grad)

    def backward(self, request: BackwardRequest, /) -> BackwardAnswer:
        """Pass a changed one on."""
        return self.send("backward", replace(request, grad_outputs=tuple(map(self.bend, request.grad_outputs))))


@pytest.mark.parametrize(
    ("bend", "said"),
    [
        (lambda grad: grad[:, :4], r"output 0 is float32 \(4, 4\): expected float32 \(4, 8\)"),
        (lambda grad: grad.double(), r"output 0 is float64 \(4, 8\): expected float32 \(4, 8\)"),
    ],
    ids=["shape", "dtype"],
)
def test_a_gradient_of_the_wrong_shape(bend: Any, said: str) -> None:
    """Raised from loss.backward(); nothing waits, and the next step counts."""
    made = Split(sandwich(nn.Linear(8, 8)), "body", memory(), wire=Bending, optimizer=sgd)
    made.wire.bend = bend  # type: ignore[attr-defined]
    with pytest.raises(InputError, match=said):
        made.client(x()).sum().backward()
    assert made.waiting() == []
    made.wire.bend = lambda grad: grad  # type: ignore[attr-defined]
    made.client(x()).sum().backward()
    assert [record.kind for record in made.waiting()] == ["skip", "gradient"]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_nan_gradient(value: float) -> None:
    """Answered as autograd would, warned of, counted as rejected, and it moves no weight."""
    made = Split(sandwich(nn.Linear(8, 8)), "body", memory(), optimizer=sgd)
    with pytest.warns(UserWarning, match="isn't finite"):
        (made.client(x()).sum() * value).backward()
    made.client(x()).sum().backward()
    commit = made.accumulator.step()
    assert commit is not None
    assert (commit.num_batches, commit.num_rejected) == (1, 1)
    assert all(bool(tensor.isfinite().all()) for tensor in made.store.load_weights().values())


@pytest.mark.parametrize("client_id", ["..", "../a", "a/b", "a\0b", "a" * 300, "", ".", "a%00", "*", "a?versionId=1"])
def test_bad_ids_at_the_client(client_id: str) -> None:
    """Before anything is asked of a server."""
    made = Split(sandwich(nn.Linear(8, 8)), "body", memory())
    with pytest.raises(IdError, match=r"isn't allowed: expected 1 to 64 of the characters"):
        splitfed.SplitClient(made.half, made.wire, client_id)


@pytest.mark.parametrize("client_id", ["..", "a/b", "", "a\0", "a" * 300])
@pytest.mark.parametrize("method", ["forward", "backward", "loss", "push", "pull"])
def test_bad_ids_at_the_server(method: str, client_id: str) -> None:
    """In each of the five requests, before the storage is touched."""
    site = Site(memory(), loss_fn=lambda outputs, target: outputs.sum())
    request = {
        "forward": ahead(client_id=client_id),
        "backward": back(client_id=client_id),
        "loss": LossRequest(ahead(client_id=client_id), 0, None, 1.0),
        "push": PushRequest(client_id, None, "first", 0, 0, None, {}, {}, {}, 1.0, 1.0),
        "pull": PullRequest(client_id),
    }[method]
    before = site.store.blobs.list("")
    with pytest.raises(IdError, match="client id"):
        getattr(site.server, method)(request)
    assert site.store.blobs.list("") == before


@pytest.mark.parametrize("number", ["call", "seq", "part", "version", "incarnation"])
@pytest.mark.parametrize("value", [-1, 10**12, 0.5, "../0"], ids=repr)
def test_bad_numbers_at_the_server(number: str, value: Any) -> None:
    """They come from outside, and become part of a path."""
    site = Site(memory())
    site.forward()
    with pytest.raises(IdError, match="expected an integer from 0"):
        site.server.backward(back(**{number: value, "seal": None}))
