"""Partitions of one data set over many owners: even, skewed or natural.

Each partitioner returns one sorted tensor of int64 indices per client. Every example goes to
exactly one client, and the same arguments give the same parts: all draws come from a generator of
their own, so the caller's random numbers (and with them the weights and dropout masks that follow)
don't depend on the partition. `counts` and `chart` show the classes that each client got.
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
    shuffled = _permutation(num_examples, _generator(seed))
    return [part.sort().values for part in shuffled.tensor_split(num_clients)]


def dirichlet(
    labels: Labels, num_clients: int, *, alpha: float, seed: int, min_examples: int = 1
) -> list[Tensor]:
    """Deal out each class in proportions drawn from a symmetric Dirichlet distribution: label skew.

    The smaller `alpha`, the fewer classes a client holds; a large one comes near `iid`. The skew is
    that of Hsu et al. 2019 (arXiv 1909.06335), drawn class by class as in Yurochkin et al. 2019
    (arXiv 1905.12022), so that no example is left over and clients differ in size too. A client
    with fewer than `min_examples` after the draw gets the rest from the client that has the most.

    Args:
        labels: The class of each example, integers of shape (N,).
        num_clients: How many clients share them.
        alpha: The concentration, above 0.
        seed: Seeds the proportions and the shuffles.
        min_examples: How many examples each client gets at least.

    Raises:
        InputError: labels that aren't integers of shape (N,), an `alpha` that isn't positive and
            finite, or too few examples.
    """
    _check_count("min_examples", min_examples, least=0)
    labels = _label_tensor(labels)
    _check_alpha(alpha)
    _check_enough(len(labels), num_clients, min_examples)
    generator = _generator(seed)
    shares: list[list[Tensor]] = [[] for _ in range(num_clients)]
    for label in labels.unique().tolist():
        members = (labels == label).nonzero().flatten()
        members = members[_permutation(len(members), generator)]
        dealt = members.tensor_split(_cuts(len(members), num_clients, alpha, generator))
        for client, share in enumerate(dealt):
            shares[client].append(share)
    # Without any example there is no class, so no share to concatenate.
    nothing = torch.empty(0, dtype=torch.int64, device="cpu")
    parts = [torch.cat([nothing, *mine]) for mine in shares]
    _fill_up(parts, min_examples, generator)
    return [part.sort().values for part in parts]


def quantity(
    num_examples: int, num_clients: int, *, alpha: float, seed: int, min_examples: int = 1
) -> list[Tensor]:
    """Deal out shuffled examples in sizes from a symmetric Dirichlet distribution: quantity skew.

    The mix of labels is the same for all clients; how many examples a client has differs (Li et al.
    2022, arXiv 2102.02079, section 3.3). A client with fewer than `min_examples` after the draw
    gets the rest from the client that has the most.

    Args:
        num_examples: How many examples there are.
        num_clients: How many clients share them.
        alpha: The concentration, above 0; the smaller, the more the sizes differ.
        seed: Seeds the sizes and the shuffle.
        min_examples: How many examples each client gets at least.

    Raises:
        InputError: an `alpha` that isn't positive and finite, or too few examples.
    """
    _check_count("num_examples", num_examples)
    _check_count("min_examples", min_examples, least=0)
    _check_alpha(alpha)
    _check_enough(num_examples, num_clients, min_examples)
    generator = _generator(seed)
    # Sizes are drawn before the shuffle: the other way round, a seed would give other parts.
    cuts = _cuts(num_examples, num_clients, alpha, generator)
    parts = list(_permutation(num_examples, generator).tensor_split(cuts))
    _fill_up(parts, min_examples, generator)
    return [part.sort().values for part in parts]


def shards(labels: Labels, num_clients: int, *, per_client: int = 2, seed: int) -> list[Tensor]:
    """Sort by label, cut into equal shards, and give each client the same number: few classes each.

    The pathological partition of McMahan et al. 2017 (arXiv 1602.05629, section 3): two shards are
    two classes, or a few more where a shard holds the border of two.

    Args:
        labels: The class of each example, integers of shape (N,).
        num_clients: How many clients share them.
        per_client: How many shards each gets.
        seed: Seeds who gets which, and the order within a class.

    Raises:
        InputError: labels that aren't integers of shape (N,), or fewer examples than shards.
    """
    _check_count("per_client", per_client)
    labels = _label_tensor(labels)
    _check_enough(len(labels), num_clients, per_client)
    generator = _generator(seed)
    shuffled = _permutation(len(labels), generator)
    # Stable, so that the order within a class stays that of the shuffle.
    by_label = shuffled[labels[shuffled].argsort(stable=True)]
    pieces = by_label.tensor_split(num_clients * per_client)
    hands = _permutation(len(pieces), generator).view(num_clients, per_client).tolist()
    return [torch.cat([pieces[number] for number in hand]).sort().values for hand in hands]


def natural(ids: Tensor | Sequence[int] | Sequence[str]) -> list[Tensor]:
    """Give each owner its own examples: by writer, patient, site or device.

    Args:
        ids: The owner of each example, of shape (N,): all integers, or all strings.

    Returns:
        The parts in the order of `sorted(set(ids))`.

    Raises:
        InputError: no example, or ids that can't be sorted.
    """
    # A tensor, an array and a table's column have `tolist`; a list has none.
    owners: list[int | str] = getattr(ids, "tolist", lambda: list(ids))()
    are_integers = all(isinstance(owner, int) for owner in owners)
    are_strings = all(isinstance(owner, str) for owner in owners)
    if not owners or not (are_integers or are_strings):
        raise InputError(
            f"ids {str(owners)[:60]} can't be owners: expected integers or strings of shape (N,)"
        )
    held: dict[int | str, list[int]] = {}
    for index, owner in enumerate(owners):
        held.setdefault(owner, []).append(index)
    return [torch.tensor(held[owner], device="cpu") for owner in sorted(held)]


def counts(parts: Sequence[Tensor], labels: Labels) -> list[dict[str, int]]:
    """How many examples of each class each client has; a class without any is left out.

    Args:
        parts: The indices of each client.
        labels: The class of each example, integers of shape (N,).

    Raises:
        InputError: labels that aren't integers of shape (N,).
    """
    labels = _label_tensor(labels)
    found = []
    for part in parts:
        classes, numbers = labels[part.cpu()].unique(return_counts=True)
        by_class = zip(classes, numbers.tolist(), strict=True)
        found.append({str(int(label)): number for label, number in by_class})
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
        where: The picture's path, ending in `.png`, `.svg` or `.pdf`; or the matplotlib axes to
            draw on.
        names: The clients' names; by default their numbers.
        title: The text above the picture.

    Raises:
        InputError: matplotlib isn't installed, or names or labels don't fit.
    """
    if names is not None and len(names) != len(parts):
        raise InputError(f"{len(names)} names for {len(parts)} clients: expected one each")
    shown = [str(number) for number in range(len(parts))] if names is None else list(names)
    plots.class_bars(dict(zip(shown, counts(parts, labels), strict=True)), where, title=title)


def _cuts(total: int, num_clients: int, alpha: float, generator: torch.Generator) -> Tensor:
    """Where to cut `total` examples in proportions drawn from Dir(alpha, …, alpha).

    The clients' bounds but the last, int64 (num_clients - 1,): rounded sums, so that rounding loses
    no example.
    """
    proportions = _proportions(num_clients, alpha, generator)
    return (proportions.cumsum(0) * total).round().long()[:-1]


def _proportions(num_clients: int, alpha: float, generator: torch.Generator) -> Tensor:
    """One draw from Dir(alpha, …, alpha), of shape (num_clients,) and sum 1.

    Normalised gamma variates; as logarithms, by Γ(a) = Γ(a + 1)·U^(1/a) (Marsaglia and Tsang 2000),
    since for a small `alpha` the variates themselves are all zero in float64.
    """
    alpha = min(max(alpha, 1e-9), 1e9)  # beyond these nothing changes but that logarithms overflow
    shape = torch.full((num_clients,), alpha + 1.0, dtype=torch.float64, device="cpu")
    drawn = torch.rand(num_clients, generator=generator, dtype=torch.float64, device="cpu")
    uniform = 1.0 - drawn  # in (0, 1]: has a logarithm
    gamma = torch._standard_gamma(shape, generator=generator)
    return (gamma.log() + uniform.log() / alpha).softmax(0)


def _fill_up(parts: list[Tensor], least: int, generator: torch.Generator) -> None:
    """Move examples at random from the largest part to each that has fewer than `least`."""
    for client in range(len(parts)):
        # Again and again: the largest part may have less to spare than this one lacks.
        while len(parts[client]) < least:
            donor = max(range(len(parts)), key=lambda i: len(parts[i]))
            shuffled = parts[donor][_permutation(len(parts[donor]), generator)]
            gift = min(least - len(parts[client]), len(shuffled) - least)
            parts[client] = torch.cat([parts[client], shuffled[:gift]])
            parts[donor] = shuffled[gift:]


def _permutation(number: int, generator: torch.Generator) -> Tensor:
    """The numbers below `number`, shuffled; on the CPU, whatever the default device is."""
    return torch.randperm(number, generator=generator, device="cpu")


def _generator(seed: int) -> torch.Generator:
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**64:
        raise InputError(f"seed {seed!r} isn't allowed: expected an integer from 0 to 2**64 - 1")
    return torch.Generator().manual_seed(seed)


def _label_tensor(labels: Labels) -> Tensor:
    """The labels as a tensor of integers (N,) on the CPU."""
    try:
        found = torch.as_tensor(labels, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"labels can't be a tensor ({error}): expected integers of shape (N,)"
        ) from error
    if found.dim() != 1 or found.is_floating_point() or found.is_complex():
        shape = tuple(found.shape)
        raise InputError(
            f"labels are {found.dtype} of shape {shape}: expected integers of shape (N,)"
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
