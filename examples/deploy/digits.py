"""The model that all processes agree on: `digits:body` is the APP of the commands, `half` is for the owners.

They must agree only on the architecture and the cut. Weights come from the store: the first process stores its own as
version 0, from the seed here.
"""

from __future__ import annotations

import torch
from torch import nn

import splitfed

AT = "2:6"


def model() -> nn.Module:
    """An ordinary model, with the same weights in every process."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(64, 64),  # 0 and 1: the bottom, at the owner
            nn.ReLU(),
            nn.Linear(64, 128),  # 2 to 5: the body, on the server
            nn.BatchNorm1d(128),
            nn.ReLU(),
            nn.Dropout(0.2),
            nn.Linear(128, 10),  # 6: the head, at the owner
        )


def half() -> nn.Module:
    """What an owner keeps."""
    return splitfed.split(model(), AT)[0]


def body() -> nn.Module:
    """What the server runs."""
    return splitfed.split(model(), AT)[1]
