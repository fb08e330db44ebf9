"""A split model with everything around it, and how to compare a step of it with one of the unsplit model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from cases import Inputs
from torch import Tensor, nn

import splitfed
from splitfed.accumulator.derive import Deriver
from splitfed.model.skeleton import Template
from splitfed.protocol import messages, pytree

Optimizer = Callable[[Any], torch.optim.Optimizer]


def adam(params: Any) -> torch.optim.Optimizer:
    """The optimizer of most tests."""
    return torch.optim.Adam(params, lr=1e-2)


def sgd(params: Any) -> torch.optim.Optimizer:
    """Plain SGD with a rate that is a power of two."""
    return torch.optim.SGD(params, lr=0.5)


class Wire:
    """A transport that passes everything on to `route(request)`; tests override what they are about."""

    def __init__(self, *servers: Any) -> None:
        self.servers = servers

    def route(self, request: object) -> Any:
        """Who answers this request."""
        return self.servers[0]

    def forward(self, request: messages.ForwardRequest, /) -> messages.ForwardAnswer:
        """Pass it on."""
        return self.send("forward", request)

    def backward(self, request: messages.BackwardRequest, /) -> messages.BackwardAnswer:
        """Pass it on."""
        return self.send("backward", request)

    def loss(self, request: messages.LossRequest, /) -> messages.LossAnswer:
        """Pass it on."""
        return self.send("loss", request)

    def push(self, request: messages.PushRequest, /) -> messages.PushAnswer:
        """Pass it on."""
        return self.send("push", request)

    def pull(self, request: messages.PullRequest, /) -> messages.PullAnswer:
        """Pass it on."""
        return self.send("pull", request)

    def send(self, method: str, request: Any) -> Any:
        """Let whoever is chosen answer."""
        return getattr(self.route(request), method)(request)


class Apart(Wire):
    """Forwards go to the first replica, everything else to the second."""

    def route(self, request: object) -> Any:
        """By the kind of the request."""
        return self.servers[0 if isinstance(request, messages.ForwardRequest) else 1]


class Split:
    """A model that is cut, with a store, replicas, a client and an accumulator."""

    def __init__(
        self,
        model: nn.Module,
        at: str | list[str],
        url: str | Path,
        *,
        wire: type[Wire] = Wire,
        replicas: int = 1,
        keep_graphs: int = 8,
        optimizer: Optimizer = adam,
        client_id: str = "a",
        loss_scale: Any = 1.0,
        loss_fn: Any = None,
        durability: str | None = None,
        **settings: Any,
    ) -> None:
        self.at = at
        self.half, self.body = splitfed.split(model, at)
        self.store = splitfed.GradientStore(str(url), sync="process")
        self.servers = [
            splitfed.SplitServer(self.body, self.store, keep_graphs=keep_graphs, loss_fn=loss_fn, durability=durability)
            for _ in range(replicas)
        ]
        self.wire = wire(*self.servers)
        self.client = splitfed.SplitClient(self.half, self.wire, client_id, loss_scale=loss_scale)
        self.accumulator = splitfed.Accumulator(self.body, self.store, optimizer=optimizer, **settings)

    def waiting(self) -> list[messages.GradientRecord]:
        """The gradients that wait for a commit; in a log they are computed again from what is on file of them."""
        return pending(self.store, self.body)

    def body_gradients(self) -> dict[str, Tensor]:
        """The body's parameter gradients of the one batch that waits, by their names in the whole model."""
        (record,) = self.waiting()
        return {prefix(self.at) + name: gradient for name, gradient in record.gradients.items()}

    def gradients(self) -> dict[str, Tensor]:
        """All parameter gradients of one step, by their names in the whole model."""
        return gradients(self.client) | self.body_gradients()

    def state(self) -> dict[str, Tensor]:
        """The whole model's `state_dict()`, with the newest committed body."""
        return splitfed.join(self.client, self.store.load_weights()).state_dict()

    def stored(self, kind: str) -> list[str]:
        """Keys of the body's lineage of one kind, such as 'forward'."""
        return self.store.blobs.list(f"body/{kind}")


def pending(store: splitfed.GradientStore, body: nn.Module) -> list[messages.GradientRecord]:
    """The gradients of a body that wait for a commit, on file or computed again."""
    place = torch.device("cpu")
    deriver = Deriver(Template(body), store.lineage().state, place, store.begin(place))
    found = [store.pile().read(batch) for batch in store.waiting()]
    return [deriver.gradient(record) for record in found if record is not None]


def pair(model: nn.Module, url: str | Path, **settings: Any) -> tuple[Split, nn.Module]:
    """A model that is cut at "body", and its reference."""
    return Split(model, "body", url, **settings), splitfed.reference(model, "body")


@dataclass(frozen=True)
class Step:
    """What a step computed, to compare: outputs, gradients of the inputs and of the parameters."""

    outputs: list[Tensor]
    inputs: list[Tensor | None]
    parameters: dict[str, Tensor]


def prefix(at: str | list[str]) -> str:
    """What the body's names begin with in the whole model."""
    if not isinstance(at, str):
        return ""
    owner = at.rpartition(".")[0] if ":" in at.rpartition(".")[2] else at
    return f"{owner}." if owner else ""


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """The `.grad` of each parameter that has one."""
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def fresh(inputs: Inputs) -> tuple[Inputs, list[Tensor]]:
    """Copies whose floating tensors require grad, and those tensors."""
    copies = copy.deepcopy(inputs)
    wanted = [tensor.requires_grad_() for tensor in pytree.flatten(copies)[1] if tensor.is_floating_point()]
    return copies, wanted


def scalar(outputs: Any) -> Tensor:
    """A loss that weights every element of the outputs differently."""
    tensors = [tensor for tensor in pytree.flatten(outputs)[1] if tensor.requires_grad]
    terms = [(t * torch.linspace(-1, 2, t.numel(), dtype=t.dtype).view(t.shape)).mean() for t in tensors]
    return torch.stack(terms).sum()


def step(module: nn.Module, inputs: Inputs, parameters: Callable[[], dict[str, Tensor]] | None = None) -> Step:
    """Forward and backward of one batch.

    Args:
        module: A client or a whole model.
        inputs: Its arguments.
        parameters: Where the parameter gradients are read; at the module's own parameters if it isn't given.
    """
    (args, kwargs), wanted = fresh(inputs)
    module.zero_grad()
    outputs = module(*args, **kwargs)
    scalar(outputs).backward()
    found = gradients(module) if parameters is None else parameters()
    return Step([t.detach().clone() for t in pytree.flatten(outputs)[1]], [t.grad for t in wanted], found)


def assert_step(split: Split, reference: nn.Module, inputs: Inputs) -> Step:
    """A step of the client has the bits of one of the reference, and leaves torch's generator where that does."""
    rewind = replay_rng()
    got = step(split.client, inputs, split.gradients)
    after = torch.get_rng_state()
    rewind()
    assert_equal(got, step(reference, inputs))
    assert torch.equal(after, torch.get_rng_state())
    return got


def assert_equal(got: Step, expected: Step) -> None:
    """Every bit of two steps is the same."""
    for what in ("outputs", "inputs"):
        own, other = getattr(got, what), getattr(expected, what)
        assert len(own) == len(other), what
        assert_same(dict(enumerate(own)), dict(enumerate(other)), what)
    assert_same(got.parameters, expected.parameters, "gradient of")


def assert_same(got: Mapping[Any, Tensor | None], expected: Mapping[Any, Tensor | None], what: str = "") -> None:
    """Two sets of named tensors are equal bit for bit; a `None` equals only itself."""
    assert got.keys() == expected.keys(), (what, got.keys() ^ expected.keys())
    wrong = []
    for name, tensor in got.items():
        other = expected[name]
        if tensor is None or other is None:
            wrong += [] if tensor is other else [name]
        elif tensor.dtype != other.dtype or not torch.equal(tensor, other):
            wrong.append(name)
    assert not wrong, f"{what} {wrong} of {len(got)} differ"


def assert_close(got: Mapping[str, Tensor], expected: Mapping[str, Tensor], atol: float) -> None:
    """Two sets of named tensors differ by at most `atol` anywhere."""
    assert got.keys() == expected.keys()
    far = {name: float((got[name] - expected[name]).abs().max()) for name in got if got[name].is_floating_point()}
    assert max(far.values()) <= atol, {name: value for name, value in far.items() if value > atol}


def replay_rng() -> Callable[[], None]:
    """Remember torch's generator; calling the result puts it back there."""
    state = torch.get_rng_state()
    return lambda: torch.set_rng_state(state)
