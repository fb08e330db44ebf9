"""Tools that record a model refuse one with a cut, and name the way out: the whole model, joined."""

from __future__ import annotations

import io
import uuid
from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import Split
from torch import Tensor, nn
from torch.ao.quantization import get_default_qat_qconfig, prepare, prepare_qat, quantize_dynamic
from torch.fx.experimental.proxy_tensor import make_fx

import splitfed
from splitfed.errors import UnsupportedError
from splitfed.model.tracing import refuse_tracing

X = torch.ones(3, 6)
JOIN = r"splitfed\.join\(client, store\.load_weights\(version\)\)"
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*legacy TorchScript:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The feature will be removed:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning"),
    pytest.mark.filterwarnings("ignore:Please use quant_min:UserWarning"),
]


def made() -> Split:
    """A split model in memory."""
    model = nn.Sequential(nn.Linear(6, 8), nn.Sequential(nn.Linear(8, 8), nn.Tanh()), nn.Linear(8, 3))
    return Split(model, "1", f"memory://{uuid.uuid4()}")


def fake(model: nn.Module) -> None:
    """Run without values."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        model(mode.from_tensor(X))


def prepared(model: nn.Module) -> Any:
    """Quantization-aware, by the ways of torch.ao."""
    model.qconfig = get_default_qat_qconfig("x86")
    return prepare_qat(model.train())


TOOLS: dict[str, Callable[[nn.Module], Any]] = {
    "torch.jit.trace": lambda model: torch.jit.trace(model, X),
    "torch.jit.script": torch.jit.script,
    "torch.export": lambda model: torch.export.export(model, (X,)),
    "torch.onnx.export": lambda model: torch.onnx.export(model, (X,), io.BytesIO(), dynamo=False),
    "torch.fx.symbolic_trace": torch.fx.symbolic_trace,
    "make_fx": lambda model: make_fx(lambda x: model(x))(X),
    "FakeTensorMode": fake,
    "a run on the meta device": lambda model: model.to("meta")(X.to("meta")),
}


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("where", ["client", "within"])
def test_a_tool_is_told_to_take_the_whole_model(tool: str, where: str) -> None:
    """It gets the client, alone or within a larger model; nothing is stored and no batch counted."""
    split = made()
    model = split.client if where == "client" else nn.Sequential(split.client, nn.Linear(3, 2))
    with pytest.raises(UnsupportedError, match=rf"^{tool} needs the whole model.*{JOIN}"):
        TOOLS[tool](model)
    assert split.stored("forward") == split.store.waiting() == []


@pytest.mark.parametrize("tool", ["torch.jit.trace", "torch.jit.script", "torch.export", "torch.fx.symbolic_trace"])
def test_the_half_by_itself_is_refused_too(tool: str) -> None:
    """The half has a hole where the body was, whoever holds it."""
    with pytest.raises(UnsupportedError, match=f"{tool} needs the whole model.*{JOIN}"):
        TOOLS[tool](made().half)


@pytest.mark.parametrize(
    "quantize",
    [prepared, lambda model: prepare(model.eval()), lambda model: quantize_dynamic(model, {nn.Linear})],
    ids=["prepare_qat", "prepare", "quantize_dynamic"],
)
@pytest.mark.filterwarnings("ignore:client 'a'. a copy of it:UserWarning")
def test_quantization_is_told_to_take_the_whole_model(quantize: Callable[[Any], Any]) -> None:
    """Else it would observe and convert the half alone."""
    with pytest.raises(UnsupportedError, match=rf"torch\.ao\.quantization.*{JOIN}; .*prepare before split"):
        quantize(made().client)


@pytest.mark.parametrize("compiled", ["client", "half", "export"])
def test_a_compiler_that_may_not_end_its_graph_says_why(compiled: str) -> None:
    """torch.compile(fullgraph=True) and a strict export raise torch's own error, with our reason in it."""
    split = made()
    runs: dict[str, Callable[[], Any]] = {
        "client": lambda: torch.compile(split.client, fullgraph=True, backend="eager")(X),
        "half": lambda: torch.compile(split.half, fullgraph=True, backend="eager")(X),
        "export": lambda: torch.export.export(split.client, (X,), strict=True),
    }
    with pytest.raises(torch._dynamo.exc.Unsupported, match=f"runs on a server.*without fullgraph=True.*{JOIN}"):
        runs[compiled]()


@pytest.mark.parametrize("tool", ["torch.jit.trace", "torch.export", "torch.fx.symbolic_trace", "make_fx"])
def test_the_joined_model_is_taken(tool: str) -> None:
    """The way out that the errors name works, and computes what the client does."""
    split = made()
    whole = splitfed.join(split.client, split.store.load_weights(0))
    found = TOOLS[tool](whole)
    run = found.module() if tool == "torch.export" else found
    with torch.no_grad():
        assert torch.equal(run(X), split.client(X))


def test_nothing_is_refused_without_a_tool() -> None:
    """Neither in an ordinary call nor under functional_call with the half's own tensors, which is one."""
    refuse_tracing()
    split = made()
    doubled: dict[str, Tensor] = {name: tensor * 2 for name, tensor in split.client.named_parameters()}
    expected = splitfed.join(split.client, split.store.load_weights(0))
    with torch.no_grad():
        for name, parameter in expected.named_parameters():
            parameter.copy_(doubled.get(name, parameter))
        assert torch.equal(torch.func.functional_call(split.client, doubled, (X,)), expected(X))
