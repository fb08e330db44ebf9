"""Dealing out one data set to many owners, as federated learning is studied: evenly, with skew, or as it came.

Each way of dealing returns one sorted tensor of int64 indices per client. Every example goes to exactly one client, and
the same arguments give the same parts: all draws come from a generator of their own, so the caller's random numbers
(and with them the weights and dropout masks that follow) don't depend on how the data was dealt out. `counts` and
`chart` show what came of it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from splitfed.errors import InputError
from splitfed.tracking import plots

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Labels = Tensor | Sequence[int]


def iid(num_examples: int, num_clients: int, *, seed: int) -> list[Tensor]:
    """Deal out shuffled examples evenly; the numbers of two clients differ by one at most.

    Args:
        num_examples: How many examples there are.
        num_clients: How many clients share them.
        seed: Seeds the shuffle.

    Raises:
        InputError: no client, or fewer examples than clients.
    """
    _check_count("num_examples", num_examples)
    _check_enough(num_examples, num_clients, 1)
    shuffled = torch.randperm(num_examples, generator=_generator(seed), device="cpu")
    return [part.sort().values for part in shuffled.tensor_split(num_clients)]


def dirichlet(
    labels: Labels, num_clients: int, *, alpha: float, seed: int, min_examples: int = 1
) -> list[Tensor]:
    """Deal out each class in proportions drawn from a symmetric Dirichlet distribution: label skew.

    The smaller `alpha`, the fewer classes a client holds; a large one comes near `iid`. The skew is that of Hsu et al.
    2019 (arXiv 1909.06335), drawn class by class as in Yurochkin et al. 2019 (arXiv 1905.12022), so that no example is
    left over and clients differ in size too. A client that the draw leaves with fewer than `min_examples` gets the
    rest from whoever has the most.

    Args:
        labels: The class of each example, integers of shape (N,).
        num_clients: How many clients share them.
        alpha: The concentration, above 0.
        seed: Seeds the proportions and the shuffles.
        min_examples: What each client gets at least, in examples.

    Raises:
        InputError: labels that aren't integers of shape (N,), an `alpha` that isn't positive and finite, few examples.
    """
    _check_count("min_examples", min_examples, least=0)
    labels = _checked(labels)
    _check_alpha(alpha)
    _check_enough(len(labels), num_clients, min_examples)
    generator = _generator(seed)
    dealt: list[list[Tensor]] = [[] for _ in range(num_clients)]
    for label in labels.unique().tolist():
        members = (labels == label).nonzero().flatten()
        members = members[torch.randperm(len(members), generator=generator, device="cpu")]
        bounds = (
            (_proportions(num_clients, alpha, generator).cumsum(0) * len(members)).round().long()
        )
        for client, share in enumerate(members.tensor_split(bounds[:-1])):
            dealt[client].append(share)
    parts = [
        torch.cat(shares) if shares else torch.empty(0, dtype=torch.int64, device="cpu")
        for shares in dealt
    ]
    _level(parts, min_examples, generator)
    return [part.sort().values for part in parts]


def quantity(
    num_examples: int, num_clients: int, *, alpha: float, seed: int, min_examples: int = 1
) -> list[Tensor]:
    """Deal out shuffled examples in sizes drawn from a symmetric Dirichlet distribution: quantity skew.

    Labels stay as they are mixed; how many examples a client has differs (Li et al. 2022, arXiv 2102.02079, section
    3.3). A client that the draw leaves with fewer than `min_examples` gets the rest from whoever has the most.

    Args:
        num_examples: How many examples there are.
        num_clients: How many clients share them.
        alpha: The concentration, above 0; the smaller, the more the sizes differ.
        seed: Seeds the sizes and the shuffle.
        min_examples: What each client gets at least, in examples.

    Raises:
        InputError: an `alpha` that isn't positive and finite, or too few examples.
    """
    _check_count("num_examples", num_examples)
    _check_count("min_examples", min_examples, least=0)
    _check_alpha(alpha)
    _check_enough(num_examples, num_clients, min_examples)
    generator = _generator(seed)
    bounds = (_proportions(num_clients, alpha, generator).cumsum(0) * num_examples).round().long()
    parts = list(
        torch.randperm(num_examples, generator=generator, device="cpu").tensor_split(bounds[:-1])
    )
    _level(parts, min_examples, generator)
    return [part.sort().values for part in parts]


def shards(labels: Labels, num_clients: int, *, per_client: int = 2, seed: int) -> list[Tensor]:
    """Sort by label, cut into equal shards, and give each client the same number of them: few classes each.

    The pathological deal of McMahan et al. 2017 (arXiv 1602.05629, section 3): two shards are two classes, or a few
    more where a shard holds the border of two.

    Args:
        labels: The class of each example, integers of shape (N,).
        num_clients: How many clients share them.
        per_client: How many shards each gets.
        seed: Seeds who gets which, and the order within a class.

    Raises:
        InputError: labels that aren't integers of shape (N,), or fewer examples than shards.
    """
    _check_count("per_client", per_client)
    labels = _checked(labels)
    _check_enough(len(labels), num_clients, per_client)
    generator = _generator(seed)
    order = torch.randperm(len(labels), generator=generator, device="cpu")
    cut = order[labels[order].argsort(stable=True)].tensor_split(num_clients * per_client)
    hands = (
        torch.randperm(len(cut), generator=generator, device="cpu")
        .view(num_clients, per_client)
        .tolist()
    )
    return [torch.cat([cut[shard] for shard in hand]).sort().values for hand in hands]


def natural(ids: Tensor | Sequence[int] | Sequence[str]) -> list[Tensor]:
    """Give each owner what is its own: by writer, patient, site or device.

    Args:
        ids: Whose each example is, of shape (N,): all integers, or all strings.

    Returns:
        The parts in the order of `sorted(set(ids))`.

    Raises:
        InputError: no example, or ids that can't be sorted.
    """
    owners: list[int | str] = getattr(
        ids, "tolist", lambda: list(ids)
    )()  # of an array or column too
    whole = all(isinstance(owner, int) for owner in owners) or all(
        isinstance(owner, str) for owner in owners
    )
    if not owners or not whole:
        raise InputError(
            f"ids {str(owners)[:60]} can't be owners: expected integers or strings of shape (N,)"
        )
    held: dict[int | str, list[int]] = {}
    for index, owner in enumerate(owners):
        held.setdefault(owner, []).append(index)
    return [torch.tensor(held[owner], device="cpu") for owner in sorted(held)]


def counts(parts: Sequence[Tensor], labels: Labels) -> list[dict[str, int]]:
    """How many examples of each class each client has; classes that it has none of are left out.

    Args:
        parts: The indices of each client.
        labels: The class of each example, integers of shape (N,).

    Raises:
        InputError: labels that aren't integers of shape (N,).
    """
    labels, found = _checked(labels), []
    for part in parts:
        classes, numbers = labels[part.cpu()].unique(return_counts=True)
        found.append(
            {
                str(int(label)): number
                for label, number in zip(classes, numbers.tolist(), strict=True)
            }
        )
    return found


def chart(
    parts: Sequence[Tensor],
    labels: Labels,
    where: str | os.PathLike[str] | Axes,
    *,
    names: Sequence[str] | None = None,
    title: str | None = None,
) -> None:
    """Draw how many examples of each class each client has, as stacked bars.

    Args:
        parts: The indices of each client.
        labels: The class of each example, integers of shape (N,).
        where: The picture's path, ending in `.png`, `.svg` or `.pdf`; or the matplotlib axes to draw on.
        names: What the clients are called; their numbers if it isn't given.
        title: What stands above it.

    Raises:
        InputError: matplotlib isn't installed, or names or labels don't fit.
    """
    if names is not None and len(names) != len(parts):
        raise InputError(f"{len(names)} names for {len(parts)} clients: expected one each")
    shown = [str(number) for number in range(len(parts))] if names is None else list(names)
    plots.class_bars(dict(zip(shown, counts(parts, labels), strict=True)), where, title=title)


def _proportions(num_clients: int, alpha: float, generator: torch.Generator) -> Tensor:
    """One draw from Dir(alpha, …, alpha), of shape (num_clients,) and sum 1.

    Normalised gamma variates; as logarithms, by Γ(a) = Γ(a + 1)·U^(1/a) (Marsaglia and Tsang 2000), since for a small
    `alpha` the variates themselves are all zero in float64.
    """
    alpha = min(max(alpha, 1e-9), 1e9)  # beyond these nothing changes but that logarithms overflow
    shape = torch.full((num_clients,), alpha + 1.0, dtype=torch.float64, device="cpu")
    drawn = torch.rand(num_clients, generator=generator, dtype=torch.float64, device="cpu")
    uniform = 1.0 - drawn  # in (0, 1]: has a logarithm
    return (
        torch._standard_gamma(shape, generator=generator).log() + uniform.log() / alpha
    ).softmax(0)


def _level(parts: list[Tensor], least: int, generator: torch.Generator) -> None:
    """Move examples at random from the largest part to each that has fewer than `least`."""
    for client in range(len(parts)):
        while len(parts[client]) < least:
            donor = max(range(len(parts)), key=lambda i: len(parts[i]))
            shuffled = parts[donor][
                torch.randperm(len(parts[donor]), generator=generator, device="cpu")
            ]
            gift = min(least - len(parts[client]), len(shuffled) - least)
            parts[client] = torch.cat([parts[client], shuffled[:gift]])
            parts[donor] = shuffled[gift:]


def _generator(seed: int) -> torch.Generator:
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**64:
        raise InputError(f"seed {seed!r} isn't allowed: expected an integer from 0 to 2**64 - 1")
    return torch.Generator().manual_seed(seed)


def _checked(labels: Labels) -> Tensor:
    try:
        found = torch.as_tensor(labels, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"labels can't be a tensor ({error}): expected integers of shape (N,)"
        ) from error
    if found.dim() != 1 or found.is_floating_point() or found.is_complex():
        raise InputError(
            f"labels are {found.dtype} of shape {tuple(found.shape)}: expected integers of shape (N,)"
        )
    return found


def _check_alpha(alpha: float) -> None:
    if not (math.isfinite(alpha) and alpha > 0):
        raise InputError(
            f"alpha {alpha} isn't allowed: expected a finite number above 0, such as 0.5"
        )


def _check_enough(num_examples: int, num_clients: int, least: int) -> None:
    _check_count("num_clients", num_clients)
    if num_examples < num_clients * least:
        raise InputError(
            f"{num_examples} examples are too few for {num_clients} clients with {least} at least"
        )


def _check_count(name: str, value: int, least: int = 1) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise InputError(f"{name} {value!r} isn't allowed: expected an integer of at least {least}")
