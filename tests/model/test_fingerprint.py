"""Fingerprints: what differs is named. Personal parts of a half: in none, never pushed and never pulled."""

from __future__ import annotations

import copy
import uuid
from typing import Any

import pytest
import torch
from bodies import with_buffers
from torch import Tensor, nn

import splitfed
from splitfed.errors import ArchitectureError, InputError, UnsupportedError
from splitfed.model.fingerprint import check_tensors, compare, personal_names
from splitfed.model.skeleton import Template
from splitfed.protocol.messages import PushRequest

FINGERPRINT = Template(with_buffers()).fingerprint()
DIFFERENT = {
    "shape": (
        nn.Linear(2, 3),
        "'?weight: the store has trainable float32 \\(2, 2\\), got trainable float32 \\(3, 2\\)",
    ),
    "dtype": (nn.Linear(2, 2).double(), "weight: the store has trainable float32 .*got trainable float64"),
    "missing": (nn.Linear(2, 2, bias=False), "bias: the store has trainable float32 .*got nothing"),
    "frozen": (nn.Linear(2, 2).requires_grad_(False), "weight: the store has trainable .*got frozen"),
    "other": (nn.Embedding(2, 2), "1 of 2 tensors differ: bias: .*got nothing"),
}


@pytest.mark.parametrize(("module", "said"), DIFFERENT.values(), ids=DIFFERENT)
def test_compare_names_the_tensors_that_differ(module: nn.Module, said: str) -> None:
    """With what the store has and what was given."""
    with pytest.raises(ArchitectureError, match=said):
        compare(Template(nn.Linear(2, 2)).fingerprint(), Template(module).fingerprint(), "the body")


def test_compare_of_much_names_the_first_few() -> None:
    """And counts the rest; the same architecture passes."""
    deep, deeper = (Template(nn.Sequential(*[nn.Linear(n, n) for _ in range(6)])).fingerprint() for n in (2, 3))
    compare(deep, deep, "the body")
    with pytest.raises(ArchitectureError, match=r"the body isn't the one.*12 of 12.*and 4 more"):
        compare(deep, deeper, "the body")


@pytest.mark.parametrize(
    ("name", "tensor", "role"),
    [
        ("layer.weight", torch.zeros(2, 3), "trainable"),
        ("layer.weight", torch.zeros(2, 2, dtype=torch.float64), "trainable"),
        ("layer.weight", torch.zeros(2, 2), "buffer"),
        ("kept", torch.zeros(2), "trainable"),
        ("unknown" * 50, torch.zeros(2), "trainable"),
    ],
    ids=["shape", "dtype", "no_buffer", "no_parameter", "unknown"],
)
def test_tensors_must_be_those_of_the_fingerprint(name: str, tensor: Tensor, role: str) -> None:
    """By name, role, shape and dtype; the message says what the store has."""
    check_tensors(FINGERPRINT, {"layer.weight": torch.zeros(2, 2)}, "trainable")
    check_tensors(FINGERPRINT, {"kept": torch.zeros(2)}, "buffer")
    with pytest.raises(ArchitectureError, match=f"{name[:60]}.*doesn't fit the store: it has"):
        check_tensors(FINGERPRINT, {name: tensor}, role)


def half(*, tied: bool = False) -> nn.Module:
    """A bottom, a cut, and a head with statistics of its own."""
    parts = {"bottom": nn.Linear(2, 2, bias=False), "cut": splitfed.CutPoint()}
    parts |= {"norm": nn.BatchNorm1d(2), "head": nn.Linear(2, 2)}
    made = nn.Sequential()
    for name, part in parts.items():
        made.add_module(name, part)
    if tied:
        made.head.weight = made.bottom.weight
    return made


PERSONAL = ("head.*", "norm.running_*")
SHARED = ["bottom.weight", "norm.weight", "norm.bias", "norm.num_batches_tracked"]


class Company:
    """Two clients with personal heads, and whoever averages the rest."""

    def __init__(self, personal: tuple[str, ...] = PERSONAL) -> None:
        self.store = splitfed.GradientStore(f"memory://{uuid.uuid4()}")
        self.server = splitfed.SplitServer(nn.Linear(2, 2), self.store)
        self.clients = [splitfed.SplitClient(half(), self.server, name, personal=personal) for name in ("a", "b")]

    def average(self, optimizer: Any = None, **settings: Any) -> splitfed.Commit | None:
        """One commit of the halves' lineage."""
        fedavg = optimizer or (lambda params: torch.optim.SGD(params, lr=1.0))
        return splitfed.Accumulator(half(), self.store, fedavg, lineage="client", personal=PERSONAL, **settings).step()


def train(client: splitfed.SplitClient) -> None:
    """One step."""
    optimizer = torch.optim.SGD(client.parameters(), lr=0.5)
    client(torch.randn(4, 2)).pow(2).sum().backward()
    optimizer.step()


def test_names_that_fit() -> None:
    """Parameters and buffers alike, by fnmatch over the names of state_dict."""
    found = personal_names(half(), PERSONAL)
    assert found == {"head.weight", "head.bias", "norm.running_mean", "norm.running_var"}
    assert personal_names(half(), ()) == frozenset()


def test_what_is_personal_never_leaves() -> None:
    """The lineage holds the rest alone, and after an average each has its own head and the common bottom."""
    made = Company()
    a, b = made.clients
    assert (a.pull(), b.pull()) == (0, 0)
    for client in made.clients:
        train(client)
    own = [copy.deepcopy(client.state_dict()) for client in made.clients]
    for client in made.clients:
        client.push()
    for batch in made.store.waiting("client"):
        record = made.store.pile("client").read(batch)
        assert record is not None
        assert set(record.gradients) | set(record.buffers[0].values) == set(SHARED)
    made.average()
    assert list(made.store.load_weights(lineage="client")) == SHARED
    for client, before in zip(made.clients, own, strict=True):
        client.pull()
        state = client.state_dict()
        for name in personal_names(half(), PERSONAL):
            assert torch.equal(state[name], before[name]), name
        mean = (own[0]["bottom.weight"] + own[1]["bottom.weight"]) / 2
        torch.testing.assert_close(state["bottom.weight"], mean)
        assert int(state["norm.num_batches_tracked"]) == 2
    assert not torch.equal(own[0]["head.weight"], own[1]["head.weight"])


def test_the_lineages_optimizer_never_sees_them() -> None:
    """Adam over the halves holds state for the three shared parameters, and nothing else."""
    made = Company()
    for client in made.clients:
        client.pull()
        train(client)
        client.push()
    seen: list[int] = []

    def adam(params: Any) -> torch.optim.Optimizer:
        seen.append(len(params))
        return torch.optim.Adam(params, lr=0.1)

    commit = made.average(adam, clip_norm=1.0)
    assert commit is not None
    assert set(seen) == {3}


def test_a_gradient_is_pushed_without_them() -> None:
    """The personal head may even step by itself: only what is shared must stay where it was pulled."""
    made = Company()
    client = made.clients[0]
    client.pull()
    client(torch.randn(4, 2)).pow(2).sum().backward()
    torch.optim.SGD(client.client_half.head.parameters(), lr=0.5).step()
    client.push(gradient=True)
    (batch,) = made.store.waiting("client")
    record = made.store.pile("client").read(batch)
    assert record is not None
    assert list(record.gradients) == SHARED[:3]


def test_a_client_with_other_patterns_is_refused() -> None:
    """Its half isn't the lineage's, and the message names what is too much."""
    made = Company()
    made.clients[0].pull()
    with pytest.raises(ArchitectureError, match=r"head.weight: the store has nothing, got trainable"):
        splitfed.SplitClient(half(), made.server, "c").pull()
    with pytest.raises(ArchitectureError, match=r"norm.running_mean"):
        splitfed.SplitClient(half(), made.server, "c", personal=("head.*",)).pull()
    with pytest.raises(ArchitectureError):
        splitfed.Accumulator(
            half(), made.store, lambda p: torch.optim.SGD(p, 1.0), lineage="client", personal=("bottom.*",)
        )


def test_a_server_refuses_a_personal_tensor() -> None:
    """A push that carries more than the lineage has is refused whole."""
    made = Company()
    made.clients[0].pull()
    with pytest.raises(ArchitectureError, match=r"head.bias"):
        made.server.push(PushRequest("b", None, "first", 0, 0, None, {"head.bias": torch.zeros(2)}, {}, {}, 1.0, 1.0))


@pytest.mark.parametrize(
    ("personal", "message"),
    [
        (("heads.*",), r"'heads.\*' fits no parameter or buffer of Sequential: expected .* such as 'head.*"),
        (("head.*", "nothing"), r"'nothing' fits no parameter"),
        (("*",), r"leaves nothing of Sequential to share: leave out personal, and call neither pull\(\) nor push"),
        ("head.*", r"personal is the string 'head.\*': expected patterns in a tuple, such as \('head.\*',\)"),
    ],
    ids=["near", "second", "all", "string"],
)
def test_patterns_that_cant_be_meant_are_refused(personal: Any, message: str) -> None:
    """At once, by client and accumulator; near names are offered."""
    made = Company()
    with pytest.raises(InputError, match=message):
        splitfed.SplitClient(half(), made.server, "c", personal=personal)
    with pytest.raises(InputError, match=message):
        splitfed.Accumulator(half(), made.store, lambda p: torch.optim.SGD(p, 1.0), lineage="client", personal=personal)


def test_a_half_without_state_has_no_near_name() -> None:
    """The message says so."""
    with pytest.raises(InputError, match="such as none, for it has no state"):
        personal_names(nn.Sequential(splitfed.CutPoint()), ("x",))


def test_a_tied_tensor_is_personal_under_all_its_names_or_none() -> None:
    """Else a pull would overwrite what was to stay."""
    with pytest.raises(
        InputError, match=r"'head.weight' would be personal and 'bottom.weight' shared.*one tied tensor"
    ):
        personal_names(half(tied=True), ("head.*",))
    assert "bottom.weight" in personal_names(half(tied=True), ("head.*", "bottom.*"))


def test_a_deep_copy_keeps_them() -> None:
    """The copy shares as little as the original."""
    with pytest.warns(UserWarning, match="copies the half alone"):
        client = copy.deepcopy(Company().clients[0])
    client.pull()
    assert list(client._sync._state()) == SHARED


def test_parameter_groups_of_personal_parameters_are_refused() -> None:
    """The accumulator has none of them to step on."""
    made = Company()
    with pytest.raises(UnsupportedError, match="isn't a trainable one"):
        made.average(param_groups=lambda module: [{"params": list(module.head.parameters())}])
