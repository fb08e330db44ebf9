"""Partitioners deal out every example once, by seed alone, with the skew that was asked for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from splitfed.errors import InputError
from splitfed.partition import dirichlet, iid

LABELS = torch.arange(1000) % 10


def counts(parts: list[Tensor], labels: Tensor = LABELS) -> Tensor:
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
        shares = torch.cat([counts(dirichlet(labels, 4, alpha=alpha, seed=s), labels) / 4000.0 for s in range(60)], 1)
        assert shares.mean(1).allclose(torch.tensor(0.25), atol=0.03)
        assert shares.var(1).mean().item() == pytest.approx(0.25 * 0.75 / (4 * alpha + 1), rel=0.1)


def test_no_skew_is_left_for_a_large_alpha() -> None:
    """At α = 10⁶ each of 4 clients has 25 of the 100 examples of each class."""
    assert (counts(dirichlet(LABELS, 4, alpha=1e6, seed=0)) - 25).abs().max() <= 1


def test_a_tiny_alpha_gives_each_class_to_one_client() -> None:
    """At α = 10⁻⁴, where gamma variates are zero in float64, one client holds all of a class."""
    parts = counts(dirichlet(LABELS, 4, alpha=1e-4, seed=0, min_examples=0))
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
    ]
    for call, message in cases:
        with pytest.raises(InputError, match=message):
            call()
