"""check(): the proof on the user's own model, and what it says of a model that can't be split."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bodies import Calls, sandwich, two_cuts
from torch import Tensor, nn

import splitfed
from splitfed.blobs import memory
from splitfed.diagnostics import comparison
from splitfed.errors import InputError, ReplayError, UnknownCutError, UnsupportedError

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))


def check(model: nn.Module, at: Any = "body", *args: Any, **kwargs: Any) -> comparison.Check:
    """What it finds on four samples."""
    return splitfed.check(model, at, *(args or (X,)), **kwargs)


@pytest.mark.parametrize(
    ("model", "at"),
    [
        (lambda: sandwich(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(inplace=True))), "body"),
        (lambda: sandwich(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Tanh())), "body.1:3"),
        (lambda: two_cuts().eval().train(), ["low", "high"]),
    ],
    ids=["submodule", "slice", "two_cuts"],
)
def test_a_model_that_splits_is_ok(model: Callable[[], nn.Module], at: Any) -> None:
    """Every row says 'equal', for outputs, both kinds of gradients and buffers."""
    found = check(model(), at)
    assert found.ok
    assert [row for row, *_ in found.rows] == ["outputs", "input gradients", "parameter gradients", "buffers"]
    assert {split for _, _, split in found.rows} == {"equal"}


def test_the_table_is_for_reading() -> None:
    """A line for each row, and aligned columns."""
    head, *lines = str(check(sandwich(nn.Linear(8, 8)))).splitlines()
    assert head.split("  ")[-1].strip() == "split = reference"
    assert "reference = raw model" in head
    assert len(lines) == 4
    assert len({line.rindex("equal") for line in [*lines]}) == 1
    assert head.index("split = reference") == lines[0].rindex("equal")


def test_dropout_differs_from_the_raw_model_only() -> None:
    """Its masks come from another seed, which the first column shows; the second is the promise and holds."""
    found = check(sandwich(nn.Dropout(0.5)))
    assert found.ok
    assert found.rows[0][1].startswith("up to ")


@pytest.mark.parametrize("kwargs", [{}, {"scale": 2.0}], ids=["args", "kwargs"])
def test_arguments_are_the_models_own(kwargs: dict[str, Any]) -> None:
    """Positional and by keyword, integers and trees among them; they aren't changed."""
    embedding = nn.Embedding(5, 8)

    def forward(m: Any, ids: Tensor, more: Any, scale: float = 1.0) -> Tensor:
        return m.head(m.body(m.embedding(ids) * scale + more["x"][0]))

    model = Calls(forward, embedding=embedding, body=nn.Linear(8, 8), head=nn.Linear(8, 3))
    more = {"x": [torch.ones(8)]}
    assert check(model, "body", torch.tensor([1, 3]), more, **kwargs).ok
    assert more["x"][0].grad is None
    assert not more["x"][0].requires_grad


def test_it_leaves_no_trace() -> None:
    """Neither in the model and its gradients, nor in the generator, nor in memory."""
    model = sandwich(nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(8)))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    assert check(model).ok
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    left = {n: c.objects for n, c in memory._REGISTRY.items() if n.startswith("splitfed-check")}
    assert not any(left.values())


def test_a_model_that_changes_its_input_in_place() -> None:
    """Each of the compared steps gets inputs of its own, and so does the caller."""

    def forward(m: Any, ids: Tensor) -> Tensor:
        return m.body(m.embedding(ids.add_(1)))

    ids = torch.tensor([0, 1])
    assert check(Calls(forward, embedding=nn.Embedding(5, 8), body=nn.Linear(8, 8)), "body", ids).ok
    assert ids.tolist() == [0, 1]


def test_a_model_in_eval_mode_is_checked_as_one_that_trains() -> None:
    """In eval mode a server stores no gradient, which is as promised and no difference."""
    assert check(sandwich(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))).eval()).ok


def own_generator() -> nn.Module:
    """A body that draws from a generator of its own."""
    generator = torch.Generator().manual_seed(3)
    return Calls(lambda m, x: m.layer(x) + torch.rand(8, generator=generator), layer=nn.Linear(8, 8))


def counter() -> nn.Module:
    """A body that counts its calls in Python."""

    def forward(m: Any, x: Tensor) -> Tensor:
        m.calls = getattr(m, "calls", 0) + 1
        return m.layer(x) * m.calls

    return Calls(forward, layer=nn.Linear(8, 8))


def numpy_noise() -> nn.Module:
    """A body that draws from numpy, which nobody seeds."""
    import numpy as np

    return Calls(lambda m, x: m.layer(x) + float(np.random.default_rng().random()), layer=nn.Linear(8, 8))


@pytest.mark.parametrize("body", [own_generator, numpy_noise, counter], ids=lambda f: f.__name__)
def test_a_body_that_cant_be_replayed_is_loud(body: Callable[[], nn.Module]) -> None:
    """An error that says why, or a table that shows it; never one that looks well."""
    try:
        found = check(sandwich(body()))
    except (ReplayError, UnsupportedError) as error:
        said = "must not keep state in Python, use generators other than torch's|earlier call left in 'calls'"
        assert re.search(said, str(error))  # noqa: PT017
    else:
        assert not found.ok


def test_a_difference_is_shown_with_its_size_and_place() -> None:
    """What differs by how much and where, and `ok` says no."""
    from splitfed.diagnostics.comparison import Check, _compare

    a, b = {"w": torch.zeros(2), "v": torch.ones(1)}, {"w": torch.tensor([0.0, 0.25]), "v": torch.ones(1)}
    assert _compare(a, b) == "up to 2.5e-01 at w"
    assert _compare(a, {**a, "w": None}) == "differ in kind at w"
    assert _compare({"w": torch.tensor(float("nan"))}, {"w": torch.tensor(float("nan"))}) == "equal"
    imaginary = {"w": torch.tensor([0.5j])}
    assert _compare(imaginary, {"w": torch.tensor([0j])}) == "up to 5.0e-01 at w"
    assert not Check((("outputs", "equal", _compare(a, b)),)).ok


def test_ok_is_never_true_of_other_outputs_than_the_raw_models() -> None:
    """Unless the body drew: then its masks are others."""
    same, off = ("inputs", "equal", "equal"), ("outputs", "up to 1.0e-01 at 0", "equal")
    assert comparison.Check((same,)).ok
    assert not comparison.Check((same, off)).ok
    assert comparison.Check((same, off), drew=True).ok
    assert check(sandwich(nn.Dropout(0.5))).drew
    assert not check(sandwich(nn.Linear(8, 8))).drew


def test_values_besides_tensors_are_compared_too() -> None:
    """A class that a layer is asked for, and what the model says then."""
    found = Calls(lambda m, x: {"out": m.body(x), "calls": state.append(0) or len(state)}, body=nn.Linear(6, 6))
    state: list[int] = []
    shown = check(found)
    assert not shown.ok
    assert "values besides tensors" in shown.rows[0][1]


class FirstSeen(nn.Module):
    """Keeps the first input that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.first: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Adds it."""
        self.first = x.detach() if self.first is None else self.first
        return self.layer(x) + self.first


def test_a_body_that_keeps_what_it_first_saw_is_found_out() -> None:
    """Another client's input differs from this one's."""
    with pytest.raises((ReplayError, UnsupportedError)):
        assert check(sandwich(FirstSeen())).ok


def test_a_clients_own_embedding_may_have_sparse_gradients() -> None:
    """They never cross the cut, and are compared like any other."""
    embedded = Calls(
        lambda m, x: m.head(m.body(m.words(x))),
        words=nn.Embedding(5, 8, sparse=True),
        body=nn.Linear(8, 8),
        head=nn.Tanh(),
    )
    assert {split for _, *both in check(embedded, "body", torch.tensor([1, 3, 3])).rows for split in both} == {"equal"}


def test_a_body_that_writes_to_its_parameters_is_refused() -> None:
    """By the error that a server answers with, which says what to do."""
    renormed = Calls(lambda m, x: m.head(m.body(x)), body=nn.Embedding(5, 8, max_norm=0.1), head=nn.Linear(8, 3))
    with pytest.raises(UnsupportedError, match="changes its own parameters in forward: keep"):
        check(renormed, "body", torch.tensor([1, 3, 3]))


def test_nothing_to_check_says_so() -> None:
    """A model that is frozen altogether, on inputs that need no gradient; an unknown cut as split has it."""
    model = Calls(lambda m, x: m.body(x), body=nn.Embedding(3, 2)).requires_grad_(False)
    with pytest.raises(InputError, match="is all of it frozen"):
        check(model, "body", torch.tensor([1, 2]))
    with pytest.raises(UnknownCutError, match="nearest"):
        check(sandwich(nn.Linear(8, 8)), "bodi")


def test_a_buffer_of_the_half_may_change_its_shape() -> None:
    """As an observer's does when it first sees data; the body's own may not."""

    def observe(m: Any, x: Tensor) -> Tensor:
        m.low = x.detach().amin(0)
        return x

    observer = Calls(observe)
    observer.register_buffer("low", torch.zeros(0))
    found = check(nn.Sequential(observer, nn.Linear(6, 8), nn.Linear(8, 3)), "1")
    assert found.ok
