"""The SplitClient's surface: the half shows through, and what can't work says what to do instead."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import uuid
from collections import UserDict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bodies import sandwich
from harness import Split, sgd
from torch import Tensor, nn

import splitfed
from splitfed.client.client import SplitClient
from splitfed.errors import CutError, IdError, InputError, MissingError, SupersededError, UnsupportedError
from splitfed.model.cutpoint import CutPoint


def split(model: nn.Module | None = None, at: str = "body", **settings: Any) -> Split:
    """A split model in memory, whose body has BatchNorm."""
    net = model or sandwich(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)))
    return Split(net, at, f"memory://{uuid.uuid4()}", optimizer=sgd, **settings)


def x(count: int = 4) -> Tensor:
    """A batch `(N, 6)`."""
    return torch.randn(count, 6)


class Half(nn.Module):
    """A half with an attribute, a method, a buffer and a signature of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 8)
        self.cut = CutPoint()
        self.config = {"width": 8}
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, pixels: Tensor, *, scale: float = 1.0) -> Tensor:
        """Scaled."""
        return self.cut(self.layer(pixels) * scale)

    def count(self) -> int:
        """Something of its own."""
        return self.config["width"]


@pytest.fixture
def client() -> SplitClient:
    """A client around `Half`, whose body is a Linear."""
    store = splitfed.GradientStore(f"memory://{uuid.uuid4()}")
    return SplitClient(Half(), splitfed.SplitServer(nn.Linear(8, 3), store), "a")


def test_the_half_shows_through(client: SplitClient) -> None:
    """Its attributes, methods, parameters, buffers and submodules, under its own names; what is nowhere is an error."""
    half = client.client_half
    assert client.config is half.config
    assert client.count() == 8
    assert client.layer is half.layer
    assert dict(client.named_parameters()).keys() == {"layer.weight", "layer.bias"}
    assert [id(p) for p in client.parameters()] == [id(p) for p in half.parameters()]
    assert list(client.state_dict()) == list(half.state_dict()) == ["seen", "layer.weight", "layer.bias"]
    assert [name for name, _ in client.named_modules()] == ["", "layer", "cut"]
    assert (client.client_id, client.version) == ("a", None)
    with pytest.raises(AttributeError, match="'Half' object has no attribute 'nothing'"):
        _ = client.nothing


def test_what_is_set_reaches_the_half() -> None:
    """A coefficient that a loop moves on, a tensor and a new head: forward reads them from the half."""
    net = sandwich(nn.Linear(8, 8))
    net.run = lambda m, x: m.head(m.body(m.bottom(x))) * m.beta + m.shift
    net.beta, net.shift = 1.0, torch.zeros(3)
    client, given = split(net).client, x()
    before = client(given)
    client.beta, client.shift = 2.0, torch.ones(3)
    assert client.client_half.beta == client.beta == 2.0
    assert torch.equal(client(given), before * 2 + 1)
    client.head = nn.Linear(8, 3, bias=False)
    assert client(given).shape == (4, 3)
    assert [name for name, _ in client.named_parameters()] == ["bottom.weight", "bottom.bias", "head.weight"]


def test_another_method_of_the_half_is_a_call_too() -> None:
    """`client.encode(x)` runs across the cut as `client(x)` does, with its own signature, and trains."""

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(6, 4)

        def encode(self, pixels: Tensor, *, scale: float = 1.0) -> Tensor:
            return self.body(pixels) * scale

        def forward(self, pixels: Tensor) -> Tensor:
            return self.encode(pixels).relu()

    net = Encoder()
    made, given = split(net), x()
    assert torch.equal(made.client.encode(given, scale=2.0), net.encode(given, scale=2.0))
    assert list(inspect.signature(made.client.encode).parameters) == ["pixels", "scale"]
    made.client.encode(given).sum().backward()
    (waits,) = made.waiting()
    assert waits.num_samples == 4


@pytest.mark.parametrize("kind", [dict, UserDict])
def test_samples_are_counted_in_any_mapping(kind: Any) -> None:
    """Tokenizers return dictionaries of their own kind; a batch of 5 in one isn't a batch of 1."""
    net = sandwich(nn.Linear(8, 8))
    net.run = lambda m, batch: m.head(m.body(m.bottom(batch["x"])))
    made = split(net)
    made.client(kind(x=x(5))).sum().backward()
    assert made.waiting()[0].num_samples == 5


def test_loading_and_casting_reach_the_half(client: SplitClient) -> None:
    """load_state_dict, to(), requires_grad_ and apply act upon the half's own tensors."""
    half = client.client_half
    state = {name: torch.ones_like(tensor) for name, tensor in half.state_dict().items()}
    assert client.load_state_dict(state).missing_keys == []
    assert float(half.layer.bias.detach().sum()) == 8
    assert client.to(torch.float64) is client
    assert half.layer.weight.dtype == half.seen.dtype == torch.float64
    client.requires_grad_(False)
    assert not half.layer.weight.requires_grad
    client.apply(lambda m: m.__dict__.update(visited=True))
    assert half.layer.visited


def test_modes_are_the_halfs(client: SplitClient) -> None:
    """train() and eval() of either set both, the cut point's mode among them: it is the body's."""
    half = client.client_half
    assert client.eval() is client
    assert not any(m.training for m in half.modules())
    half.train()
    assert client.training
    client.train(False)
    assert (half.training, half.cut.training) == (False, False)


def test_one_half_may_serve_many_clients() -> None:
    """The binding lives in the call: each client counts its own batches."""
    made = split()
    other = SplitClient(made.half, made.wire, "b")
    for client, count in ((made.client, 2), (other, 3), (made.client, 4)):
        client(x(count)).sum().backward()
    assert [str(batch) for batch in made.store.waiting()] == ["a/1/0", "a/1/1", "b/1/0"]
    assert [record.num_samples for record in made.waiting()] == [2, 4, 3]


def test_a_copy_is_another_process_of_the_same_client() -> None:
    """Its half is its own, and once it trains, the older one is superseded."""
    made = split(loss_scale=2.0)
    with pytest.warns(UserWarning, match="client 'a': a copy of it copies the half alone"):
        other = copy.deepcopy(made.client)
    copy.deepcopy(made.client)  # said once
    assert other.client_half is not made.client.client_half
    assert other.client_id == "a"
    made.client(x()).sum().backward()
    other(x()).sum().backward()
    loss = made.client(x()).sum()
    with pytest.raises(SupersededError, match="same client_id"):
        loss.backward()
    assert [record.loss_scale for record in made.waiting()] == [2, 2]


@pytest.mark.filterwarnings("ignore:client 'a'. a copy of it:UserWarning")
def test_a_copy_that_evaluates_is_no_newer_process() -> None:
    """In eval mode a copy, or a copy of a copy, answers in any grad mode, and the original trains on."""
    made = split()
    copied = copy.deepcopy(copy.deepcopy(made.client)).eval()
    given = x()
    for client in (made.client, copied, made.client):
        output = client(given)
        output.sum().backward()
    assert [str(batch) for batch in made.store.waiting()] == ["a/1/0", "a/1/1"]
    with made.client.at(0), torch.no_grad():
        assert torch.equal(copied(given), made.client.eval()(given))


@pytest.mark.filterwarnings("ignore:client 'a'. a copy of it:UserWarning")
def test_a_copy_keeps_what_was_set_on_the_client() -> None:
    """Hooks on the client itself and a forward that was replaced go along, and belong to the copy."""
    made = split()
    seen: list[nn.Module] = []
    made.client.register_forward_hook(lambda module, args, output: seen.append(module))
    forward = made.client.forward
    made.client.forward = lambda given: forward(given) + 1
    copied = copy.deepcopy(made.client)
    copied.eval()(x())
    assert len(seen) == 1
    assert seen[0] is copied
    assert type(copied) is type(made.client)


@pytest.mark.parametrize(
    ("make", "error", "said"),
    [
        (lambda h, s: SplitClient(h, s, "../a"), IdError, "client id '../a' isn't allowed"),
        (lambda h, s: SplitClient(h, s, None), IdError, "client id 'None'"),
        (
            lambda h, s: SplitClient(nn.Linear(2, 2), s, "a"),
            CutError,
            r"Linear has no CutPoint: take the first of split",
        ),
        (lambda h, s: SplitClient(SplitClient(h, s, "a"), s, "b"), InputError, "pass the half that it wraps"),
        (lambda h, s: SplitClient(h, "nowhere", "a"), InputError, "server is 'nowhere': expected a SplitServer"),
        (lambda h, s: SplitClient(h, None, "a"), InputError, "server is None"),
        (lambda h, s: SplitClient(h, SimpleNamespace(forward=1, backward=2), "a"), InputError, "splitfed.Transport"),
        (lambda h, s: SplitClient("half", s, "a"), InputError, "client_half"),
    ],
    ids="bad_id no_id no_cut wrapped text_server no_server not_callable no_module".split(),
)
def test_what_makes_no_client_is_refused(make: Any, error: type[Exception], said: str) -> None:
    """At construction, with what was expected."""
    made = split()
    with pytest.raises(error, match=said):
        make(made.half, made.servers[0])


def test_a_transport_needs_only_forward_and_backward() -> None:
    """Anything with these two trains; what else is asked of it fails by name."""
    made = split()
    server = made.servers[0]
    client = SplitClient(made.half, SimpleNamespace(forward=server.forward, backward=server.backward), "a")
    client(x()).sum().backward()
    assert len(made.waiting()) == 1
    with pytest.raises((InputError, UnsupportedError, AttributeError), match="pull"):
        client.pull()


def test_at_evaluates_at_one_version() -> None:
    """Within, at any depth and also after an error; outside it is the newest again."""
    made = split(sandwich(nn.Linear(8, 8)))
    given = x()
    outputs = []
    for _ in range(3):
        with torch.no_grad():
            outputs.append(made.client(given))
        with torch.random.fork_rng():
            made.client(given).sum().backward()
        made.client.zero_grad()
        made.accumulator.step()
    with torch.no_grad():
        with made.client.at(0) as pinned:
            assert torch.equal(pinned(given), outputs[0])
            with made.client.at(2):
                assert torch.equal(made.client(given), outputs[2])
            assert torch.equal(made.client(given), outputs[0])
        with pytest.raises(MissingError, match="no version 9: the newest is 3"), made.client.at(9):
            made.client(given)
        assert not torch.equal(made.client(given), outputs[2])
    with pytest.raises(IdError, match="version '-1'"), made.client.at(-1):
        pass


def test_a_data_parallel_replica_is_refused() -> None:
    """What nn.DataParallel would make of the client can't be called."""
    made = split()
    with pytest.raises(UnsupportedError, match="DataParallel can't replicate a SplitClient"):
        made.client._replicate_for_data_parallel()(x())


def test_an_argument_that_cant_cross_is_refused() -> None:
    """Its place in the call is named."""
    made = split(sandwich(nn.Linear(8, 8)))
    made.half.run = lambda m, given: m.body(given, 1j)
    with pytest.raises(splitfed.ContainerError, match=r"\[0\]\[1\] is builtins.complex"):
        made.client(x())


class Compiled(nn.Module):
    """What torch.compile returns, as far as names go."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self._orig_mod = inner

    def forward(self, given: Tensor) -> Any:
        """What it wraps."""
        return self._orig_mod(given)


@pytest.mark.parametrize("where", ["whole", "part"])
def test_a_compiled_body_trains_under_its_plain_names(where: str) -> None:
    """Compiled as a whole or in parts: gradients, commits and weights carry no prefix."""
    layer = nn.Linear(8, 8)
    made = split(sandwich(Compiled(nn.Sequential(layer)) if where == "whole" else nn.Sequential(Compiled(layer))))
    made.client(x()).sum().backward()
    (record,) = made.waiting()
    assert record.gradients.keys() == {"0.weight", "0.bias"}
    assert made.accumulator.step() is not None
    moved = layer.weight.detach() - 0.5 * record.gradients["0.weight"]
    assert torch.equal(made.store.load_weights()["0.weight"], moved)


@pytest.mark.parametrize("save", [pickle.dumps, lambda what: torch.save(what, io.BytesIO())], ids=["pickle", "save"])
def test_what_belongs_to_this_process_isnt_pickled(save: Any) -> None:
    """The client says to save its state, the store and who is on it to open it again; the half itself can be saved."""
    made = split(nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3)), "1")
    with pytest.raises(UnsupportedError, match=r"save client.state_dict\(\), or pickle client.client_half"):
        save(made.client)
    for what in (made.store, made.servers[0], made.accumulator):
        with pytest.raises(UnsupportedError, match=r"open the store again where it is needed, GradientStore\('memory:"):
            save(what)
    save(made.half)
    assert copy.copy(made.client)(x()).shape == (4, 3)
