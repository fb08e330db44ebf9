"""The model that all processes agree on, and whose digits are whose.

`split_digits.task:body` is the APP of `splitfed serve` and `splitfed accumulate`.
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import splitfed

NUM_TRAIN = 1400


def model() -> nn.Module:
    """An ordinary model, with the same weights in every process."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(64, 64),  # 0 and 1: the bottom, at the owner
            nn.ReLU(),
            nn.Linear(64, 128),  # 2 to 4: the body, on the server
            nn.ReLU(),
            nn.Linear(128, 64),
            nn.Linear(64, 10),  # 5: the head, at the owner
        )


def half() -> nn.Module:
    """What an owner keeps, and Flower averages."""
    return splitfed.split(model(), "2:5")[0]


def body() -> nn.Module:
    """What the server runs."""
    return splitfed.split(model(), "2:5")[1]


def digits() -> tuple[Tensor, Tensor]:
    """All 1,797 digits and their labels; the last 397 are for testing."""
    found = load_digits()
    return torch.tensor(found.data, dtype=torch.float32) / 16, torch.tensor(found.target)


def train_loader(owner: int, num_owners: int, batch_size: int) -> DataLoader[tuple[Tensor, ...]]:
    """The digits of one owner."""
    images, labels = digits()
    own = slice(owner, NUM_TRAIN, num_owners)
    return DataLoader(TensorDataset(images[own], labels[own]), batch_size=batch_size, shuffle=True)


def accuracy(client: nn.Module) -> float:
    """The share of the digits that nobody trains on which a client gets right."""
    images, labels = digits()
    client.eval()
    with torch.no_grad():
        return (client(images[NUM_TRAIN:]).argmax(1) == labels[NUM_TRAIN:]).double().mean().item()
