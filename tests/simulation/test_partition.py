"""Partitioners deal out every example once, by seed alone, with the skew that was asked for."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from splitfed.errors import InputError
from splitfed.simulation.partition import chart, counts, dirichlet, iid, natural, quantity, shards
from splitfed.tracking import plots

LABELS = torch.arange(1000) % 10


def table(parts: list[Tensor], labels: Tensor = LABELS) -> Tensor:
    """How many examples of each class each client has, of shape (clients, classes)."""
    return torch.stack([labels[part].bincount(minlength=10) for part in parts])


def test_iid_deals_out_each_example_once_and_evenly() -> None:
    """Ten examples on three clients are 4, 3 and 3, shuffled over the clients and sorted within each."""
    parts = iid(10, 3, seed=0)
    assert [len(part) for part in parts] == [4, 3, 3]
    assert torch.cat(parts).sort().values.tolist() == list(range(10))
    assert all(part.dtype == torch.int64 and (part.diff() > 0).all() for part in parts)
    assert parts[0].tolist() != [0, 1, 2, 3]


@pytest.mark.parametrize("alpha", [5e-324, 1e-3, 0.1, 1.0, 100.0, 1e308])
@pytest.mark.parametrize("num_clients", [1, 2, 7, 30])
def test_dirichlet_deals_out_each_example_once(alpha: float, num_clients: int) -> None:
    """Nothing is lost or doubled and nobody is left without, from extreme skew to none."""
    parts = dirichlet(LABELS, num_clients, alpha=alpha, seed=3, min_examples=5)
    assert len(parts) == num_clients
    assert torch.cat(parts).sort().values.tolist() == list(range(1000))
    assert min(len(part) for part in parts) >= 5


def test_the_same_seed_gives_the_same_parts() -> None:
    """Parts are a function of the arguments; another seed gives others."""
    for deal in (lambda seed: iid(1000, 5, seed=seed), lambda seed: dirichlet(LABELS, 5, alpha=0.5, seed=seed)):
        first, again, other = deal(1), deal(1), deal(2)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_the_callers_random_numbers_are_left_alone() -> None:
    """Neither function reads or moves torch's default generator."""
    torch.manual_seed(7)
    before = torch.get_rng_state()
    parts = dirichlet(LABELS, 5, alpha=0.5, seed=1) + iid(1000, 5, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(8)
    again = dirichlet(LABELS, 5, alpha=0.5, seed=1) + iid(1000, 5, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(parts, again, strict=True))


def test_alpha_sets_the_skew() -> None:
    """A share of a class has variance (1/n)(1 − 1/n)/(nα + 1), the Dirichlet distribution's; here n = 4."""
    labels = torch.arange(40_000) % 10
    for alpha in (0.2, 1.0, 5.0):
        shares = torch.cat([table(dirichlet(labels, 4, alpha=alpha, seed=s), labels) / 4000.0 for s in range(60)], 1)
        assert shares.mean(1).allclose(torch.tensor(0.25), atol=0.03)
        assert shares.var(1).mean().item() == pytest.approx(0.25 * 0.75 / (4 * alpha + 1), rel=0.1)


def test_no_skew_is_left_for_a_large_alpha() -> None:
    """At α = 10⁶ each of 4 clients has 25 of the 100 examples of each class."""
    assert (table(dirichlet(LABELS, 4, alpha=1e6, seed=0)) - 25).abs().max() <= 1


def test_a_tiny_alpha_gives_each_class_to_one_client() -> None:
    """At α = 10⁻⁴, where gamma variates are zero in float64, one client holds all of a class."""
    parts = table(dirichlet(LABELS, 4, alpha=1e-4, seed=0, min_examples=0))
    assert (parts.max(0).values == 100).all()


def test_min_examples_can_use_all_there_is() -> None:
    """Eight examples on four clients with two at least: each has two, whatever the draw."""
    parts = dirichlet(torch.zeros(8, dtype=torch.int64), 4, alpha=0.01, seed=0, min_examples=2)
    assert [len(part) for part in parts] == [2, 2, 2, 2]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.bool])
def test_labels_may_be_of_any_integer_dtype(dtype: torch.dtype) -> None:
    """The parts don't depend on how labels are stored."""
    labels = LABELS % 2
    parts = dirichlet(labels.to(dtype), 3, alpha=1.0, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(parts, dirichlet(labels, 3, alpha=1.0, seed=0), strict=True))


@pytest.mark.parametrize("form", [Tensor.tolist, Tensor.numpy])
def test_labels_and_owners_may_be_lists_and_arrays(form: Callable[[Tensor], Any]) -> None:
    """As `dataset.targets` or a column of a table come; they are dealt out as a tensor is."""
    for deal in (
        lambda labels: dirichlet(labels, 3, alpha=1.0, seed=0),
        lambda labels: shards(labels, 3, seed=0),
        natural,
    ):
        parts = deal(form(LABELS))
        assert all(torch.equal(a, b) for a, b in zip(parts, deal(LABELS), strict=True))
        assert counts(parts, form(LABELS)) == counts(parts, LABELS)


@pytest.mark.parametrize("alpha", [1e-3, 1.0, 1e6])
@pytest.mark.parametrize("num_clients", [1, 7, 30])
def test_quantity_skew_deals_out_each_example_once(alpha: float, num_clients: int) -> None:
    """Sizes differ, nothing is lost or doubled, and nobody has fewer than was asked for."""
    parts = quantity(1000, num_clients, alpha=alpha, seed=3, min_examples=5)
    assert torch.cat(parts).sort().values.tolist() == list(range(1000))
    assert min(len(part) for part in parts) >= 5
    assert all((part.diff() > 0).all() for part in parts)


def test_quantity_skew_follows_alpha_and_leaves_labels_mixed() -> None:
    """A size has the Dirichlet variance (1/n)(1 − 1/n)/(nα + 1) in shares, and each client has all classes alike."""
    for alpha in (0.5, 5.0):
        sizes = torch.tensor([[len(p) for p in quantity(4000, 4, alpha=alpha, seed=s)] for s in range(200)]) / 4000.0
        assert sizes.var(0).mean().item() == pytest.approx(0.25 * 0.75 / (4 * alpha + 1), rel=0.15)
    shares = table(quantity(40_000, 2, alpha=100.0, seed=0), torch.arange(40_000) % 10).double()
    assert (shares / shares.sum(1, keepdim=True) - 0.1).abs().max() < 0.02
    assert {len(part) for part in quantity(1000, 4, alpha=1e8, seed=0)} == {250}


def test_shards_give_each_client_few_classes() -> None:
    """1,000 examples of 10 classes make 20 shards of 50, each of one class: two shards are two classes at most."""
    parts = shards(LABELS, 10, per_client=2, seed=0)
    assert torch.cat(parts).sort().values.tolist() == list(range(1000))
    held = table(parts)
    assert (held.sum(1) == 100).all()
    assert ((held > 0).sum(1) <= 2).all()
    assert set(held.unique().tolist()) <= {0, 50, 100}
    assert [part.tolist() for part in shards(LABELS, 10, seed=0)] == [part.tolist() for part in parts]
    assert [part.tolist() for part in shards(LABELS, 10, seed=1)] != [part.tolist() for part in parts]


def test_natural_ids_keep_each_owners_examples() -> None:
    """Part i is the one of `sorted(set(ids))[i]`, whether ids are numbers or names."""
    assert [part.tolist() for part in natural(["bo", "al", "bo", "cy"])] == [[1], [0, 2], [3]]
    assert [part.tolist() for part in natural(torch.tensor([7, 3, 7]))] == [[1], [0, 2]]


def test_counts_tell_classes_by_client() -> None:
    """Classes that a client has none of are left out."""
    labels = torch.tensor([0, 1, 1, 9])
    assert counts([torch.tensor([0, 1, 2]), torch.tensor([3])], labels) == [{"0": 1, "1": 2}, {"9": 1}]
    assert counts([torch.tensor([], dtype=torch.int64)], labels) == [{}]


def test_the_chart_draws_each_class_at_each_client(tmp_path: Path) -> None:
    """Bars are as high as the counts and stand on one another; the path's ending says which picture it is."""
    axes = plots.figure(4, 3)[1][0]
    parts = [torch.tensor([0, 1, 2]), torch.tensor([3])]
    chart(parts, torch.tensor([0, 1, 1, 9]), axes, names=["al", "bo"], title="Skew")
    bars = [(bar.get_y(), bar.get_height()) for bar in axes.patches]
    assert bars == [(0, 1), (0, 0), (1, 2), (0, 0), (3, 0), (0, 1)]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["al", "bo"]
    assert axes.get_title(loc="left") == "Skew"
    chart(dirichlet(LABELS, 5, alpha=0.5, seed=0), LABELS, tmp_path / "few.png")
    chart(dirichlet(LABELS, 60, alpha=0.5, seed=0), LABELS, str(tmp_path / "many.svg"))
    assert (tmp_path / "few.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "many.svg").read_text()


def test_the_chart_says_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names that don't fit, an unknown kind of picture, and a matplotlib that isn't there."""
    with pytest.raises(InputError, match="1 names for 2 clients: expected one each"):
        chart(iid(4, 2, seed=0), LABELS, tmp_path / "a.png", names=["al"])
    with pytest.raises(InputError, match=r"no picture can be written to .*a\.doc"):
        chart(iid(4, 2, seed=0), LABELS, tmp_path / "a.doc")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match=r'pip install "\.\[plots\]" in a clone'):
        chart(iid(4, 2, seed=0), LABELS, tmp_path / "a.png")


def test_nonsense_is_refused() -> None:
    """Each argument out of range has a message that names it and what was expected."""
    cases = [
        (lambda: iid(10, 0, seed=0), "num_clients 0"),
        (lambda: iid(-1, 2, seed=0), "num_examples -1"),
        (lambda: iid(3, 4, seed=0), "3 examples are too few for 4 clients"),
        (lambda: iid(3, 2, seed=-1), "seed -1"),
        (lambda: iid(3, True, seed=0), "num_clients True"),
        (lambda: dirichlet(LABELS, 2, alpha=0.0, seed=0), "alpha 0.0"),
        (lambda: dirichlet(LABELS, 2, alpha=float("nan"), seed=0), "alpha nan"),
        (lambda: dirichlet(LABELS, 2, alpha=float("inf"), seed=0), "alpha inf"),
        (lambda: dirichlet(LABELS.float(), 2, alpha=1.0, seed=0), r"labels are torch.float32 of shape \(1000,\)"),
        (lambda: dirichlet(LABELS[:, None], 2, alpha=1.0, seed=0), r"shape \(1000, 1\)"),
        (lambda: dirichlet(LABELS[:5], 2, alpha=1.0, seed=0, min_examples=3), "5 examples are too few"),
        (lambda: dirichlet(LABELS, 2, alpha=1.0, seed=0, min_examples=-1), "min_examples -1"),
        (lambda: quantity(10, 2, alpha=-1.0, seed=0), "alpha -1.0"),
        (lambda: quantity(3, 2, alpha=1.0, seed=0, min_examples=2), "3 examples are too few for 2 clients"),
        (lambda: shards(LABELS, 2, per_client=0, seed=0), "per_client 0"),
        (lambda: shards(LABELS[:3], 2, per_client=2, seed=0), "3 examples are too few for 2 clients with 2"),
        (lambda: dirichlet(["cat", "dog"], 2, alpha=1.0, seed=0), "labels can't be a tensor .*: expected integers"),  # type: ignore[list-item]
        (lambda: natural([]), "can't be owners"),
        (lambda: natural([1, "a"]), "can't be owners: expected integers or strings"),
        (lambda: natural(torch.ones(3)), "can't be owners"),
    ]
    for call, message in cases:
        with pytest.raises(InputError, match=message):
            call()


def test_a_default_device_of_the_users_own_changes_nothing() -> None:
    """Indices are dealt on the CPU, from a generator of the CPU, whatever torch.set_default_device says."""
    labels = torch.arange(40) % 4

    def deals() -> list[list[torch.Tensor]]:
        return [
            iid(40, 4, seed=0),
            dirichlet(labels, 4, alpha=0.5, seed=0, min_examples=3),
            quantity(40, 4, alpha=0.5, seed=0),
            shards(labels, 4, seed=0),
            natural(["a", "b"] * 20),
        ]

    expected = deals()
    torch.set_default_device("meta")
    try:
        found = deals()
    finally:
        torch.set_default_device(None)
    for got, wanted in zip(found, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
