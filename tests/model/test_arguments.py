"""What a cut call is given: refused by its place if it can't cross, and not changed behind the caller's back."""

from __future__ import annotations

import uuid
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.masked import masked_tensor

import splitfed
from splitfed.errors import BodyError, ContainerError, InputError, SplitFedError, UnsupportedError
from splitfed.protocol.pytree import register_container

Use = Callable[[Tensor, Any], Any]


class Box:
    """A container of the user's, registered below."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items


class Tagged(Tensor):
    """A tensor subclass without values of its own, as image libraries have them."""


class Part(nn.Module):
    """A layer, and a use of its output and of the other argument."""

    def __init__(self, use: Use) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.use = use

    def forward(self, x: Tensor, other: Any) -> Any:
        """What the use makes of both."""
        return self.use(self.layer(x), other)


class Model(nn.Module):
    """A part that is given a tensor and whatever is made of it."""

    def __init__(self, use: Use, make: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.layer, self.part, self.make = nn.Linear(4, 4), Part(use), make

    def forward(self, x: Tensor) -> Any:
        """What the part returns."""
        x = self.layer(x)
        return self.part(x, other=self.make(x))


@pytest.fixture(autouse=True, scope="module")
def registered() -> None:
    """The box may cross."""
    register_container(Box, lambda box: list(box.items), Box)


def client(model: nn.Module, at: str, keep_graphs: int = 8, **settings: Any) -> splitfed.SplitClient:
    """A client of a split in this process."""
    half, body = splitfed.split(model, at)
    server = splitfed.SplitServer(
        body, splitfed.GradientStore(f"memory://{uuid.uuid4().hex}"), keep_graphs=keep_graphs, **settings
    )
    return splitfed.SplitClient(half, server, client_id="a")


def first(outputs: Any) -> Tensor:
    """The first tensor of what a part returned."""
    found: Any = outputs
    while not isinstance(found, Tensor):
        found = next(iter(found.values())) if isinstance(found, dict) else found[0]
    return found


def put(h: Tensor, other: Any) -> Tensor:
    """Put it into the container, and return it alone."""
    if isinstance(other, Box):
        other.items = [*other.items, h]
    elif isinstance(other, list):
        other.append(h)
    else:
        other["new"] = h
    return h


def put_deep(h: Tensor, other: Any) -> Tensor:
    """As `put`, into what is in the container."""
    return put(h, other["inner"])


def exchange(h: Tensor, other: Any) -> Tensor:
    """Put it in place of what was there."""
    other[0] = h
    return h


def put_foreign(h: Tensor, other: Any) -> Tensor:
    """Put in something that can't cross."""
    other["new"] = object()
    return h


@pytest.mark.parametrize("keep_graphs", [8, 0])
@pytest.mark.parametrize(
    ("use", "make", "place"),
    [
        (put, lambda x: [x], r"list at \['kwargs'\]\['other'\]"),
        (put, lambda x: {"x": x}, r"dict at \['kwargs'\]\['other'\]"),
        (put, lambda x: Box([x]), r"Box at \['kwargs'\]\['other'\]"),
        (put_deep, lambda x: {"x": x, "inner": []}, r"list at \['kwargs'\]\['other'\]\['inner'\]"),
        (exchange, lambda x: [x, 1.0], "list at"),
        (put_foreign, lambda x: {"x": x}, "dict at"),
    ],
    ids=["list", "dict", "registered", "deep", "exchanged", "foreign"],
)
def test_what_a_body_adds_to_an_argument_is_refused(
    use: Use, make: Callable[[Tensor], Any], place: str, keep_graphs: int
) -> None:
    """The caller would wait for it in vain; the message names the place, and says to return it."""
    with pytest.raises(ContainerError, match=f"the body changes the {place}.*Return what it adds"):
        client(Model(use, make), "part", keep_graphs)(torch.randn(2, 4))


@pytest.mark.parametrize(
    ("use", "make"),
    [
        (lambda h, other: (put(h, other), other)[::-1], lambda x: [x]),
        (lambda h, other: (put(h, other), other)[1], lambda x: {"x": x}),
        (lambda h, other: h + other.pop("x"), lambda x: {"x": x, "n": 1}),
        (lambda h, other: h + other.pop(0), lambda x: [x, None, [x], float("nan")]),
        (lambda h, other: h + other.pop(), lambda x: [1, x]),
        (lambda h, other: h + other[0], lambda x: [x, float("nan"), "text"]),
        (lambda h, other: h + other.items[0], lambda x: Box([x])),
        (lambda h, other: h + other[1]["x"], lambda x: (1, {"x": x})),
    ],
    ids=["returned list", "returned dict", "taken", "first", "last", "read", "read box", "read deep"],
)
def test_what_a_body_reads_takes_out_or_returns_is_its_own_affair(use: Use, make: Callable[[Tensor], Any]) -> None:
    """Nothing is lost then: the same outputs and gradients as the unsplit model."""
    model, x = Model(use, make), torch.randn(2, 4)
    expected = first(model(x))
    expected.sum().backward()
    for keep_graphs in (8, 0):
        split = client(model, "part", keep_graphs)
        found = first(split(x))
        assert torch.equal(found, expected)
        found.sum().backward()
        assert torch.equal(split.layer.weight.grad, model.layer.weight.grad)


REFUSED: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "sparse": (lambda x: x.detach().to_sparse(), r"sparse_coo.*\.to_dense\(\)"),
    "in a list": (lambda x: [1, x.detach().to_sparse_csr()], r"\['other'\]\[1\] can't.*sparse_csr.*\.to_dense\(\)"),
    "quantized": (lambda x: torch.quantize_per_tensor(x.detach(), 0.1, 0, torch.qint8), r"\.dequantize\(\)"),
    "nested": (lambda x: torch.nested.nested_tensor([torch.ones(2)]), r"\.to_dense\(\)"),
    "masked": (lambda x: masked_tensor(torch.ones(2), torch.tensor([True, False])), "a MaskedTensor.*take its values"),
    "meta": (lambda x: torch.ones(2, device="meta"), "load its values"),
    "registered": (lambda x: Box([x.detach().to_sparse()]), "within another container can't.*to_dense"),
    "array": (lambda x: np.ones(2), r"numpy.ndarray.*torch.from_numpy\(x\)"),
    "number": (lambda x: np.float32(1), r"numpy.float32.*x.item\(\)"),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of (nested|Masked).*:UserWarning")
@pytest.mark.filterwarnings("ignore:.*quantize:UserWarning")
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")
@pytest.mark.parametrize("kind", REFUSED)
def test_an_argument_without_a_place_is_named(kind: str) -> None:
    """By its place among the arguments, before anything is sent, with what to do instead."""
    make, message = REFUSED[kind]
    place = r"\['kwargs'\]\['other'\]" if kind in ("sparse", "quantized", "nested", "meta") else ""
    with pytest.raises(ContainerError, match=place + ".*" + message):
        client(Model(lambda h, other: h, make), "part")(torch.randn(2, 4))


def test_an_output_without_a_place_is_named() -> None:
    """By its place in what the body returns."""
    model = Model(lambda h, other: {"h": h, "s": h.to_sparse()}, lambda x: None)
    with pytest.raises(ContainerError, match=r"the body's output at \['s'\] can't.*to_dense"):
        client(model, "part")(torch.randn(2, 4))


def test_a_target_without_a_place_is_named() -> None:
    """As an argument is."""
    split = client(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), "1", loss_fn=lambda y, target: y.sum())
    with pytest.raises(ContainerError, match=r"the target at \['mask'\] can't.*to_dense"):
        split.loss(torch.randn(2, 4), {"mask": torch.eye(2).to_sparse()})


def test_a_sparse_gradient_of_an_output_is_named() -> None:
    """What comes after the cut looks rows up in an output: its gradient would be sparse."""
    split = client(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), "1")
    rows = nn.functional.embedding(torch.tensor([1, 1]), split(torch.randn(3, 4)), sparse=True)
    with pytest.raises(UnsupportedError, match=r"gradient of output 0 .*sparse_coo.*sparse=False"):
        rows.sum().backward()


def test_a_tensor_subclass_enters_as_a_plain_tensor() -> None:
    """In a first run and in a replay alike; the client says so once, and not if that was said."""
    kinds = []
    model = Model(lambda h, other: (kinds.append(type(other)), h + other)[1], lambda x: x.detach().as_subclass(Tagged))
    split = client(model, "part", 0)
    with pytest.warns(UserWarning, match=r"is a Tagged.*as_subclass\(torch.Tensor\)") as said:
        (split(torch.randn(2, 4)) + split(torch.randn(2, 4))).sum().backward()
    assert len(said) == 1
    assert set(kinds) == {Tensor}
    plain = client(Model(lambda h, other: h + other, lambda x: x.as_subclass(Tagged).as_subclass(Tensor)), "part")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain(torch.randn(2, 4)).sum().backward()


def test_a_container_that_is_flattened_anew_is_not_taken_for_a_changed_one() -> None:
    """Its tensors are others each time; their values tell."""

    class Graph:
        def __init__(self, links: Tensor) -> None:
            self.links = links

    register_container(Graph, lambda graph: graph.links.to_dense(), lambda dense: Graph(dense.to_sparse()))
    model = Model(lambda h, other: torch.sparse.mm(other.links, h), lambda x: Graph(torch.eye(2).to_sparse()))
    client(model, "part", 0)(torch.randn(2, 4)).sum().backward()


class Kept(Tensor):
    """A tensor subclass that is registered."""


@pytest.mark.parametrize("keep_graphs", [8, 0])
def test_a_registered_tensor_subclass_keeps_its_class(keep_graphs: int) -> None:
    """In the body and in what it returns, with its gradient, without a warning."""
    register_container(Kept, lambda kept: kept.as_subclass(Tensor), lambda plain: plain.as_subclass(Kept))
    kinds = []
    model = Model(
        lambda h, other: (kinds.append(type(other)), (other * 2).as_subclass(Kept))[1], lambda x: x.as_subclass(Kept)
    )
    split, x = client(model, "part", keep_graphs), torch.randn(2, 4)
    found = split(x)
    assert type(found) is Kept
    found.as_subclass(Tensor).sum().backward()
    assert set(kinds) == {Kept}
    expected = torch.autograd.grad(model(x).as_subclass(Tensor).sum(), model.layer.weight)
    assert torch.equal(split.layer.weight.grad, expected[0])


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        (
            torch.randn(2, 4).double(),
            InputError,
            r"argument 0 is float64 \(2, 4\): expected float32.*\.to\(torch.float32",
        ),
        (np.ones((2, 4), np.float32), ContainerError, r"argument 0 is a numpy.ndarray.*torch.from_numpy\(x\)"),
    ],
)
def test_input_that_the_half_cannot_take_is_named(given: Any, kind: type[SplitFedError], message: str) -> None:
    """Its own first layer raised torch's words; an argument by name likewise."""
    split = client(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)), "1")
    with pytest.raises(kind, match=message) as caught:
        split(given)
    assert caught.value.__cause__ is not None
    with pytest.raises(kind, match=message.replace("argument 0", "argument 'input'")):
        split(input=given)


def test_other_errors_of_the_half_are_its_own() -> None:
    """They are the unsplit model's, class and all."""
    split = client(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)), "1")
    for given, kind in (
        (torch.randn(2, 5), RuntimeError),
        ("text", TypeError),
        (torch.ones(2, 4).long(), RuntimeError),
    ):
        with pytest.raises(kind) as caught:
            split(given)
        assert not isinstance(caught.value, SplitFedError)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.randn(2, 4).double(), r"given float64 \(2, 4\); its first weights are '0.weight', float32 \(4, 4\)"),
        (torch.randn(2, 6), r"given float32 \(2, 6\); its first weights are '0.weight', float32 \(4, 4\)"),
        ("text", "given no tensor; its first weights"),
    ],
)
def test_what_the_body_cannot_take_is_told_beside_its_weights(given: Any, message: str) -> None:
    """Torch's own words say neither which side has which."""
    split = client(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), "0:2")
    with pytest.raises(BodyError, match=message):
        split(given)


def test_a_half_of_another_width_is_told() -> None:
    """Its activations don't fit the body that is served."""
    half, _ = splitfed.split(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 6)), "1")
    server = client(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), "1")._connection.transport
    with pytest.raises(SplitFedError, match=r"was cut at '1'.*other shapes"):
        splitfed.SplitClient(half, server, client_id="b")(torch.randn(2, 4))
