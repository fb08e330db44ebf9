"""The half and the body behave as the one model, at edges that were found by attack."""

from __future__ import annotations

import uuid
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import splitfed
from splitfed import AbsentError

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


def sgd(parameters: Any) -> torch.optim.Optimizer:
    """Plain steps."""
    return torch.optim.SGD(parameters, lr=0.1)


def around(part: nn.Module) -> nn.Module:
    """A part between two layers."""
    return nn.Sequential(nn.Linear(8, 8), part, nn.Linear(8, 2))


def client_of(model: nn.Module, at: str = "1") -> Any:
    """A client of a server in memory."""
    half, body = splitfed.split(model, at)
    store = splitfed.GradientStore(f"memory://{uuid.uuid4().hex}", sync="process")
    return splitfed.SplitClient(half, splitfed.SplitServer(body, store), "a")


@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.spectral_norm], ids=["weight", "spectral"])
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_a_tensor_that_each_forward_makes_anew_is_no_setting(norm: Any) -> None:
    """Old reparametrizations keep it as an attribute: a second call is as good as the first."""
    client = client_of(around(norm(nn.Linear(8, 8))))
    for _ in range(3):
        client(X).sum().backward()


class Scored(nn.Linear):
    """Keeps a term of the loss."""

    aux: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Its outputs."""
        y = super().forward(x)
        self.aux = y.pow(2).mean()
        return y


@pytest.mark.parametrize(
    "ask",
    [
        lambda part: getattr(part, "aux", None),
        lambda part: hasattr(part, "aux"),
    ],
    ids=["getattr", "hasattr"],
)
def test_a_value_of_the_forward_that_is_asked_for_with_a_default_is_told(ask: Any) -> None:
    """Python takes an AttributeError for "there is none": a warning says that there is one."""
    client = client_of(around(Scored(8, 8)))
    client(X)
    with pytest.warns(UserWarning, match=r"'aux' is set by the forward.*return it"):
        ask(client[1])
    with pytest.raises(AbsentError, match="'aux' is set by the forward"):
        client[1].aux  # noqa: B018


class Nested(nn.Linear):
    """Has settings within settings."""

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.table = {"sub": {"b": 2.0}}
        self.rows = [[1.0]]
        self.pair = ([1.0],)

    def forward(self, x: Tensor) -> Tensor:
        """Scaled by all of them."""
        return super().forward(x) * self.table["sub"]["b"] * self.rows[0][0] * self.pair[0][0]


@pytest.mark.parametrize("called_before", [False, True])
def test_settings_within_settings_travel(called_before: bool) -> None:
    """However deep in lists, dicts and tuples what is changed lies."""
    model = around(Nested())
    client = client_of(model)
    if called_before:
        client(X)
    for net in (client, model):
        net[1].table["sub"]["b"] = 9.0
        net[1].rows[0][0] = 3.0
        net[1].pair[0][0] = 2.0
    assert torch.equal(client(X), model(X))


class Reader(nn.Linear):
    """Reads a dict that others write."""

    def __init__(self, shared: dict[str, Any], *, writes: bool) -> None:
        super().__init__(8, 8)
        self.shared = shared
        self.writes = writes

    def forward(self, x: Tensor) -> Tensor:
        """Scaled by what is there."""
        y = super().forward(x) * self.shared.get("scale", 1.0)
        if self.writes:
            self.shared["loss"] = y.mean()
        return y


class Sharing(nn.Module):
    """Hands a scale to a layer by a dict that both hold."""

    def __init__(self, *, writes: bool) -> None:
        super().__init__()
        self.shared: dict[str, Any] = {}
        self.low, self.part = nn.Linear(8, 8), Reader(self.shared, writes=writes)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's outputs."""
        if not self.part.writes:
            self.shared["scale"] = 7.0
        return self.part(self.low(x))


def test_a_dict_that_half_and_part_hold_is_one() -> None:
    """What the half puts there travels with the call."""
    model = Sharing(writes=False)
    assert torch.equal(client_of(model, "part")(X), model(X))


def test_what_the_part_puts_into_a_shared_dict_is_told() -> None:
    """It stays on the server, and the half would go on without it."""
    client = client_of(Sharing(writes=True), "part")
    with pytest.warns(UserWarning, match="'shared', which the client half holds too"):
        client(X)


def test_a_hook_that_keeps_outside_is_told() -> None:
    """In the body it keeps what nobody at the client sees, and no gradient comes back from there."""
    kept: list[Tensor] = []
    model = around(nn.Linear(8, 8))
    model.get_submodule("1").register_forward_hook(lambda module, given, out: kept.append(out))
    with pytest.warns(UserWarning, match="a hook on .*keeps what it sees in 'kept'"):
        splitfed.split(model, "1")


class Recurrent(nn.Module):
    """Uses a recurrent layer."""

    def __init__(self, layer: type[nn.Module]) -> None:
        super().__init__()
        self.low, self.part = nn.Linear(8, 8), layer(8, 8, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """Its outputs at all steps."""
        return self.part(self.low(x))[0]


@pytest.mark.parametrize("layer", [nn.RNN, nn.GRU])
def test_a_recurrent_layer_that_is_called_twice(layer: type[nn.Module]) -> None:
    """Its weights are used at each step, so the order of their gradients' sum is that of the cut."""
    model = Recurrent(layer)
    half, body = splitfed.split(model, "part")
    store = splitfed.GradientStore(f"memory://{uuid.uuid4().hex}", sync="process")
    client = splitfed.SplitClient(half, splitfed.SplitServer(body, store), "a")
    reference = splitfed.reference(model, "part")
    first, second = torch.randn(3, 6, 8), torch.randn(3, 5, 8)
    for net in (client, reference):
        (net(first).pow(2).mean() + net(second).pow(2).mean()).backward()
    record = store.pile().read(store.waiting()[0])
    assert record is not None
    for name, gradient in record.gradients.items():
        assert torch.equal(gradient, reference.get_submodule("part").get_parameter(name).grad), name


class Special(nn.Linear):
    """A class of its own."""


class ByType(nn.Module):
    """Looks layers up by their type."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8), Special(8, 8)])

    def forward(self, x: Tensor) -> Tensor:
        """Each layer weighted by its kind."""
        for layer in self.layers:
            x = layer(x) * {Special: 2.0, nn.Linear: 0.5}[type(layer)]
        return x


def test_a_table_by_type_finds_the_part() -> None:
    """In the half, and in the reference."""
    assert splitfed.check(ByType(), "layers.1", X).ok


def test_cuts_of_a_list_may_come_in_any_order() -> None:
    """The layers that are cut out are the same."""
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    half, _ = splitfed.split(model, ["1", "2"])
    _, body = splitfed.split(model, ["2", "1"])
    store = splitfed.GradientStore(f"memory://{uuid.uuid4().hex}", sync="process")
    assert torch.equal(splitfed.SplitClient(half, splitfed.SplitServer(body, store), "a")(X), model(X))


class Loop:
    """A client with what steps it."""

    def __init__(self, **settings: Any) -> None:
        half, body = splitfed.split(around(nn.Linear(8, 8)), "1")
        self.store = splitfed.GradientStore(f"memory://{uuid.uuid4().hex}", sync="process")
        self.client = splitfed.SplitClient(half, splitfed.SplitServer(body, self.store), "a", **settings)
        self.optimizer = sgd(self.client.parameters())

    def loss(self) -> Tensor:
        """Of one batch."""
        return self.client(X).pow(2).mean()

    def step(self) -> None:
        """One step of the usual loop."""
        self.optimizer.zero_grad()
        self.loss().backward()
        self.optimizer.step()


def test_a_client_that_trains_in_eval_mode_is_told() -> None:
    """As after an evaluation without train(): the half would train alone."""
    loop = Loop()
    loop.client.eval()
    with pytest.warns(UserWarning, match=r"eval mode.*client.train\(\)"):
        loop.step()
    assert loop.store.waiting() == []


def test_a_head_that_trains_again_leaves_the_rest_frozen() -> None:
    """Freezing all and then unfreezing the last layer, as in transfer learning."""
    loop = Loop()
    loop.client.requires_grad_(False)
    loop.client.get_submodule("2").requires_grad_(True)
    loop.loss().backward()
    assert loop.store.waiting() == []
    for parameter in loop.client.parameters():
        parameter.requires_grad = True
    loop.loss().backward()
    assert len(loop.store.waiting()) == 1


@pytest.mark.parametrize("said", [False, True])
def test_a_scaler_whose_scale_is_not_said_is_told(said: bool) -> None:
    """The body would get the scaled gradient."""
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    loop = Loop(**({"loss_scale": scaler.get_scale} if said else {}))
    scaler.scale(loop.loss()).backward()
    if said:
        scaler.step(loop.optimizer)
    else:
        with pytest.warns(UserWarning, match="loss_scale=scaler.get_scale"):
            scaler.step(loop.optimizer)


@pytest.mark.parametrize("zeroed", [False, True])
def test_a_step_by_what_a_block_has_dropped_is_told(zeroed: bool) -> None:
    """The exception was caught, and the half's gradients are still there."""
    loop = Loop()

    def block() -> None:
        with loop.client.batch():
            loop.loss().backward()
            raise StopIteration

    with pytest.raises(StopIteration):
        block()
    if zeroed:
        loop.step()
        return
    with pytest.warns(UserWarning, match="an exception in client.batch"):
        loop.optimizer.step()


def test_a_state_of_the_whole_model_is_not_loaded_in_part() -> None:
    """The part's weights are the store's: refused, or with strict=False told."""
    loop = Loop()
    whole = around(nn.Linear(8, 8)).state_dict()
    with pytest.raises(splitfed.UnsupportedError, match=r"'1.weight' and 1 more.*before split"):
        loop.client.load_state_dict(whole)
    with pytest.warns(UserWarning, match="'1.weight' and 1 more"):
        loop.client.load_state_dict(whole, strict=False)
    assert torch.equal(loop.client.get_parameter("0.weight"), whole["0.weight"])
    loop.client.load_state_dict(loop.client.state_dict())
