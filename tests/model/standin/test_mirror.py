"""What is changed of the part that was cut out: it travels with each call, or is refused."""

from __future__ import annotations

import copy
import uuid
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from bodies import Calls, sandwich
from harness import Split, Wire, sgd
from torch import Tensor, nn

import splitfed
from splitfed.errors import AbsentError, InputError
from splitfed.model.cutpoint import hole_of
from splitfed.protocol.messages import ForwardAnswer, ForwardRequest


class Scaled(nn.Module):
    """A part with settings of many kinds, read by its forward."""

    limit = 2.0
    kl = 0.0

    def __init__(self, config: Any = None) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.drop = nn.Dropout(0.5)
        self.beta, self.sizes, self.table, self._active = 1.0, [1, 2], {"a": 1}, ("x",)
        self.kl = 0.0
        self.config = SimpleNamespace(scale=1.0, note="", inner=[1]) if config is None else config

    def forward(self, x: Tensor) -> Tensor:
        """`(N, 8)` -> `(N, 8)`."""
        y = self.drop(self.linear(x)) * self.beta * self.config.scale * self.limit
        return y * sum(self.sizes) * len(self._active)


class Noted(Wire):
    """Keeps the settings of each call; answers as if the forward had set some attributes."""

    def __init__(self, *servers: Any) -> None:
        super().__init__(*servers)
        self.settings: list[dict[str, Any]] = []
        self.written: tuple[str, ...] = ()

    def forward(self, request: ForwardRequest, /) -> ForwardAnswer:
        """Note, and pass it on."""
        self.settings.append(dict(request.settings))
        answer = super().forward(request)
        object.__setattr__(answer, "written", self.written)
        return answer


def split(part: nn.Module | None = None, at: Any = "body", **settings: Any) -> Split:
    """A split model in memory."""
    net = sandwich(part or Scaled())
    return Split(net, at, f"memory://{uuid.uuid4().hex}", wire=Noted, optimizer=sgd, **settings)


def settings_of(point: Any, training: bool = True) -> dict[str, Any]:
    """What would travel with a call."""
    return dict(hole_of(point).mirror.settings(training))


def change(part: Any) -> None:
    """Set what can be set of a `Scaled`."""
    part.beta = 0.5
    part.limit = 3
    part.drop.p = 0.25
    part._active = ("x", "y")
    part.sizes = [2, 3]


def test_what_is_set_travels_and_gives_the_unsplit_outputs() -> None:
    """Instance and class attributes, private ones, those of submodules; set back, they are gone."""
    made = split()
    whole = sandwich(Scaled())
    whole.load_state_dict({**made.half.state_dict(), **{f"body.{n}": t for n, t in made.body.state_dict().items()}})
    reference = splitfed.reference(whole, "body")
    x = torch.randn(4, 6)
    for net in (made.client, reference):
        change(net.body)
    state = torch.get_rng_state()
    got = made.client(x)
    torch.set_rng_state(state)
    assert torch.equal(got, reference(x))
    got.sum().backward()
    expected = {"beta": 0.5, "limit": 3, "drop.p": 0.25, "_active": ("x", "y"), "sizes": [2, 3]}
    assert made.wire.settings == [expected]
    part: Any = made.client.body
    part.beta, part.limit, part.drop.p, part._active, part.sizes = 1.0, 2.0, 0.5, ("x",), [1, 2]
    made.client(x)
    assert made.wire.settings[1:] == [{}]
    joined: Any = splitfed.join(made.client, made.body).body
    assert (joined.beta, joined.drop.p) == (1.0, 0.5)


def test_a_loop_over_the_modules_sets_them() -> None:
    """By class, as tools do."""
    made = split()
    for module in made.client.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    made.client.apply(lambda m: setattr(m, "beta", 2.0) if isinstance(m, Scaled) else None)
    made.client(torch.randn(4, 6))
    assert made.wire.settings == [{"drop.p": 0.0, "beta": 2.0}]
    joined: Any = splitfed.join(made.half, made.body).body
    assert (joined.beta, joined.drop.p) == (2.0, 0.0)


@pytest.mark.parametrize(
    ("value", "travels"),
    [(3, 3), (np.float64(0.5), 0.5), (None, None), ("text", "text"), (True, True), ((1, (2.0, "x")), (1, (2.0, "x")))],
)
def test_plain_values(value: Any, travels: Any) -> None:
    """As they are, a float of NumPy as a float; 1 and True are not the same as 1.0."""
    half = split().half
    half.body.beta = value
    found = settings_of(half.body)["beta"]
    assert (found, type(found)) == (travels, type(travels))


@pytest.mark.parametrize("value", [torch.tensor(1.0), print, object(), {1: 2}, torch.float32, np.ones(2), [object()]])
def test_other_values_are_refused(value: Any) -> None:
    """At the assignment."""
    with pytest.raises(AbsentError, match=r"sets 'beta' of the part.*plain values.*before split"):
        split().half.body.beta = value


def test_an_attribute_that_the_part_lacks_and_reads() -> None:
    """It can't be given one: its server's part has none."""

    class Optional(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * getattr(self, "factor", 1.0)

    part: Any = split(Optional(8, 8)).half.body
    with pytest.raises(AbsentError, match="sets 'factor'"):
        part.factor = 2.0
    part.comment = "nobody reads it"
    assert settings_of(part) == {}


def test_what_is_handed_out_and_changed() -> None:
    """A list of plain values travels as it has become; put back, it is gone."""
    part: Any = split().half.body
    part.sizes.append(3)
    part.table["b"] = 2
    assert settings_of(part) == {"sizes": [1, 2, 3], "table": {"a": 1, "b": 2}}
    part.sizes.pop()
    del part.table["b"]
    assert settings_of(part) == {}
    part.sizes.append(torch.ones(1))
    with pytest.raises(AbsentError, match="sets 'sizes'"):
        settings_of(part)


def test_a_list_that_was_assigned_is_watched_too() -> None:
    """And what travelled isn't changed with it."""
    part: Any = split().half.body
    part.sizes = [5]
    first = settings_of(part)
    part.sizes.append(6)
    assert settings_of(part) == {"sizes": [5, 6]}
    assert first == {"sizes": [5]}


@pytest.mark.parametrize(
    "alter",
    [
        lambda config: setattr(config, "scale", 2.0),
        lambda config: delattr(config, "scale"),
        lambda config: setattr(config, "scale", torch.ones(2)),
    ],
)
def test_an_object_that_the_part_reads_cant_change(alter: Any) -> None:
    """It is the half's own object where the half has it, so changing it there counts."""
    config = SimpleNamespace(scale=1.0, note="")
    net = sandwich(Scaled(config))
    net.config = config
    half: Any = splitfed.split(net, "body")[0]
    assert half.config is half.body.config
    half.config.note = "which no code of the part reads"
    assert settings_of(half.body) == {}
    alter(half.config)
    with pytest.raises(AbsentError, match=r"'config.scale' has changed since split"):
        settings_of(half.body)


def test_an_insert_past_any_assignment() -> None:
    """nn.Sequential writes to its table itself."""
    part: Any = split(nn.Sequential(nn.Linear(8, 8), nn.ReLU())).half.body
    part.insert(1, nn.Tanh())
    with pytest.raises(AbsentError, match="sets '_modules'"):
        settings_of(part)


@pytest.mark.filterwarnings("ignore:.* is set by the forward of the part")
def test_values_that_the_forward_sets_are_the_servers() -> None:
    """From the first call on; one that is set again is kept until the next."""
    made = split()
    part: Any = made.client.body
    assert part.kl == 0.0
    made.wire.written = ("kl", "linear.seen", "elsewhere.kl")
    made.client(torch.randn(4, 6))
    for twin in (part, copy.deepcopy(made.half).body):
        with pytest.raises(AbsentError, match=r"'kl' is set by the forward.*return it"):
            _ = twin.kl
        with pytest.raises(AbsentError, match=r"'linear.seen' is set by the forward"):
            _ = twin.linear.seen
    part.kl = 1.0
    assert part.kl == 1.0
    made.client(torch.randn(4, 6))
    assert made.wire.settings == [{}, {"kl": 1.0}]
    with pytest.raises(AbsentError, match="'kl' is set by the forward"):
        _ = part.kl
    other: Any = split().half.body
    assert other.kl == Scaled.kl == 0.0


class Frozen(nn.Module):
    """A model whose `train()` keeps BatchNorm in eval mode, wherever it is."""

    def __init__(self, at: str = "model") -> None:
        super().__init__()
        part = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))
        self.stem, self.body, self.head = nn.Linear(6, 8), part, nn.Linear(8, 3)

    def train(self, mode: bool = True) -> Any:
        """Train, but for BatchNorm."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        """`(N, 6)` -> `(N, 3)`."""
        return self.head(self.body(self.stem(x)))


class FreezesItself(nn.Sequential):
    """A part with a `train()` of its own."""

    def train(self, mode: bool = True) -> Any:
        """Train, but for the first."""
        super().train(mode)
        self[1].eval()
        return self


@pytest.mark.parametrize("training", [True, False], ids=["split in train", "split in eval"])
@pytest.mark.parametrize("own", ["model", "part", "by hand"])
def test_modes_are_those_of_the_unsplit_model(own: str, training: bool) -> None:
    """After each train() and eval(), whichever mode it was split in; on the server, too, and joined again."""
    layers = [nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5)]
    model: nn.Module = Frozen() if own == "model" else sandwich(nn.Sequential(*layers))
    if own == "part":
        model = sandwich(FreezesItself(*layers))
    model.train(training)
    if own == "by hand":
        model.body[1].eval()
    made = Split(model, "body", f"memory://{uuid.uuid4().hex}", wire=Noted)
    steps = [lambda m: m, lambda m: m.train(), lambda m: m.eval(), lambda m: m.train(), lambda m: m.body[1].train()]
    for step in steps:
        step(model)
        step(made.client)
        assert [m.training for m in made.half.modules()] == [m.training for m in model.modules()]
        joined = splitfed.join(made.half, made.body)
        assert [m.training for m in joined.modules()] == [m.training for m in model.modules()]
        state = torch.get_rng_state()
        x = torch.randn(4, 6)
        got = made.client(x)
        torch.set_rng_state(state)
        torch.randn(4, 6)
        assert torch.equal(got, splitfed.reference(model, "body")(x))


def test_the_ordinary_request_says_nothing() -> None:
    """Modes by train() and eval() alone, of any part, travel as they always have."""
    made = split(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)))
    for mode in (True, False, True):
        made.client.train(mode)(torch.randn(4, 6))
    assert made.wire.settings == [{}, {}, {}]


def test_each_of_several_cuts_names_its_own_part() -> None:
    """By the names in the body, which are the model's."""
    parts = {name: nn.Sequential(nn.Dropout(0.5), nn.Linear(8, 8)) for name in ("low", "high")}
    net = Calls(lambda m, x: m.high(m.low(m.bottom(x))), bottom=nn.Linear(6, 8), **parts)
    made = Split(net, ["low", "high"], f"memory://{uuid.uuid4().hex}", wire=Noted)
    made.half.low[0].p = 0.1
    made.half.high[0].eval()
    made.client(torch.randn(4, 6))
    assert made.wire.settings == [{"low.0.p": 0.1}, {"high.0.training": False}]


def test_what_a_server_takes() -> None:
    """Everything, some by pattern, or modes alone; refused under its name with the option."""
    made = split()
    part: Any = made.client.body
    part.drop.p, part.beta = 0.1, 2.0
    part.linear.eval()

    def client(settings: Any) -> splitfed.SplitClient:
        server = splitfed.SplitServer(made.body, made.store, settings=settings)
        return splitfed.SplitClient(made.half, server, "b")

    x = torch.randn(4, 6)
    client(True)(x)
    client(["*.p", "beta"])(x)
    for settings, refused in ((False, "beta"), ("*.p", "beta"), (["beta"], "drop.p")):
        with pytest.raises(InputError, match=rf"set '{refused}' of the body.*settings=.*--settings '{refused}'"):
            client(settings)(x)
    part.drop.p, part.beta = 0.5, 1.0
    client(False)(x)


def test_a_part_within_a_part_of_tiers() -> None:
    """A body that holds a client of its own: what that holds stays its own affair."""
    store = splitfed.GradientStore(f"memory://{uuid.uuid4().hex}", sync="process")
    half, body = splitfed.split(sandwich(nn.Linear(8, 8)), "body")
    cloud = splitfed.SplitClient(half, splitfed.SplitServer(body, store), "edge")
    edge = Calls(lambda m, x: m.cloud(m.low(x)), low=nn.Linear(6, 6), cloud=cloud)
    whole = Calls(lambda m, x: m.edge(m.bottom(x)), bottom=nn.Linear(6, 6), edge=edge)
    with pytest.warns(UserWarning, match="copies the half alone"):
        device: Any = splitfed.split(whole, "edge")[0]
    assert not isinstance(device.edge.cloud, splitfed.SplitClient)
    assert settings_of(device.edge) == {}
    assert [name for name, _ in device.edge.low.named_parameters()] == ["weight", "bias"]
