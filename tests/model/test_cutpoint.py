"""What a client half may still ask of the part that was cut out, and what it may not."""

from __future__ import annotations

import copy
import uuid
from pathlib import Path
from typing import Any

import pytest
import torch
from bodies import Calls, sandwich
from harness import Split, assert_step
from torch import Tensor, nn

import splitfed
from splitfed.errors import AbsentError, CutError
from splitfed.model.cutpoint import CutPoint


class Layer(nn.Module):
    """A layer with things to ask for."""

    def __init__(self) -> None:
        super().__init__()
        self.kind, self.sizes, self.rate = "full", [2, 3], None
        self.linear = nn.Linear(8, 8)
        self.steps = nn.ModuleList([nn.ReLU(), nn.LeakyReLU(0.2)])
        self.pair = (self.linear, 3)
        self.register_buffer("scale", torch.ones(2), persistent=False)

    @property
    def broken(self) -> int:
        """Fails."""
        raise KeyError("no key")

    def forward(self, x: Tensor) -> Tensor:
        """`(N, 8)` -> `(N, 8)`."""
        return self.linear(x)


@pytest.fixture
def point() -> Any:
    """The cut point in place of a layer."""
    return splitfed.split(sandwich(Layer()), "body")[0].body


def test_settings_shapes_and_dtypes(point: Any) -> None:
    """At any depth: they are structure, which the client may know."""
    assert (point.kind, point.sizes, point.rate) == ("full", [2, 3], None)
    assert point.linear.in_features == 8
    assert point.linear.weight.dtype is torch.float32
    assert point.linear.weight.shape == (8, 8)
    assert point.linear.weight.size(0) == 8
    assert point.scale.ndim == 1
    assert point.steps[1].negative_slope == 0.2
    assert len(point.steps) == 2
    assert point.pair[1] == 3
    assert "Linear on the other side" in repr(point.linear)
    assert point.linear.extra_repr() == "in_features=8, out_features=8, bias=True"


@pytest.mark.parametrize(
    ("use", "said"),
    [
        (lambda point: point.linear(torch.ones(1, 8)), "'linear'"),
        (lambda point: point.pair[0](torch.ones(1, 8)), "'linear'"),
        (lambda point: point.linear.weight.norm(), "'linear.weight.norm'"),
        (lambda point: point.linear.weight.to("cpu"), "'linear.weight.to'"),
        (lambda point: torch.ones(1, 8) * point.linear.weight, "'linear.weight'"),
        (lambda point: nn.functional.linear(torch.ones(1, 8), point.linear.weight), "'linear.weight'"),
        (lambda point: nn.functional.linear(torch.ones(1, 8), weight=point.linear.weight), "'linear.weight'"),
        (lambda point: torch.ones(2) + point.scale, "'scale'"),
        (lambda point: point.linear.forward(torch.ones(1, 8)), "'linear'"),
        (lambda point: point.nowhere, "no 'nowhere'"),
        (lambda point: CutPoint().kind, "'kind'.*by hand"),
    ],
)
def test_values_and_methods_are_the_servers(point: Any, use: Any, said: str) -> None:
    """Torch would compute garbage from a weight on the meta device: the error names what was asked for."""
    with pytest.raises(AbsentError, match=said):
        use(point)


def test_a_property_raises_what_it_raises(point: Any) -> None:
    """As in the unsplit model."""
    with pytest.raises(KeyError, match="no key"):
        _ = point.broken


def test_it_is_an_attribute_error(point: Any) -> None:
    """So hasattr and getattr with a default work, copies too, and what Python itself looks for is left alone."""
    assert hasattr(point, "kind")
    assert not hasattr(point, "nowhere")
    assert getattr(point, "nowhere", 3) == 3
    assert copy.deepcopy(point).kind == "full"
    with pytest.raises(AttributeError, match="'CutPoint' object has no attribute '_hidden'"):
        _ = point._hidden


@pytest.mark.parametrize("at", ["te.layers.0", "te.layers.0.self_attn", ["te.layers.0", "te.layers.1"]])
def test_a_transformer_encoder_is_cut_at_its_first_layer(at: Any, tmp_path: Path) -> None:
    """nn.TransformerEncoder asks its first layer for `self_attn.batch_first`."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.1, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    net = Calls(lambda m, x: m.head(m.te(m.bottom(x))), bottom=nn.Linear(6, 8), te=encoder, head=nn.Linear(8, 3))
    assert_step(Split(net, at, tmp_path), splitfed.reference(net, at), ((torch.randn(2, 5, 6),), {}))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: nn.ModuleList([nn.Linear(8, 8)]), r"a ModuleList.*\['body.0'\]"),
        (lambda: nn.ModuleDict({"a": nn.Linear(8, 8)}), r"a ModuleDict.*\['body.a'\]"),
        (lambda: nn.ParameterList([torch.ones(1)]), "a ParameterList.*the module that uses it"),
    ],
)
def test_a_container_that_isnt_called_is_no_cut(make: Any, said: str) -> None:
    """There would be no call to send to a server: `split` names its members."""
    with pytest.raises(CutError, match=said):
        splitfed.split(sandwich(make()), "body")


# The warning comes from torch's own tracing.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_a_compiled_half_asks_too(tmp_path: Path) -> None:
    """A trace makes an `Absent` of its own before it fills it."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
    net = Calls(lambda m, x: m.head(m.te(m.bottom(x))), bottom=nn.Linear(6, 8), te=encoder, head=nn.Linear(8, 3))
    compiled = torch.compile(Split(net, "te.layers.0", tmp_path).client, backend="eager")
    given = torch.randn(2, 5, 6)
    assert torch.equal(compiled(given), splitfed.reference(net, "te.layers.0")(given))
    torch.compiler.reset()  # what it has learned of shapes would show in other tests' graphs


def test_a_penalty_on_the_bodys_weights_is_refused() -> None:
    """In the client half it would be computed from nothing: the error comes from client(...)."""
    net = sandwich(Layer())
    net.run = lambda m, x: m.head(m.body(m.bottom(x))) + m.body.linear.weight.norm()
    split = Split(net, "body", f"memory://{uuid.uuid4().hex}")
    with pytest.raises(AbsentError, match=r"linear.weight.norm.*the server's"):
        split.client(torch.randn(4, 6))
