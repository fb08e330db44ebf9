"""What a body has learned since it began: the samples that count, and start − end."""

from __future__ import annotations

import uuid

import torch
from torch import nn

import splitfed
from splitfed.federation.per_client import change, since
from splitfed.protocol.messages import GradientRecord


def test_a_change_has_the_parameters_and_the_buffers_that_moved() -> None:
    """From 3 to 1 is 2; the statistic that stayed isn't sent, the one that moved is, with where it began."""
    fingerprint = {"w": {"role": "trainable"}, "kept": {"role": "buffer"}, "mean": {"role": "buffer"}}
    start = {"w": torch.tensor([3.0]), "kept": torch.tensor([1.0]), "mean": torch.tensor([0.0])}
    end = {"w": torch.tensor([1.0]), "kept": torch.tensor([1.0]), "mean": torch.tensor([0.5])}
    record = change(GradientRecord("gradient", 0, 4.0, 1.0, "", "", {}, []), fingerprint, start, end)
    assert {name: value.item() for name, value in record.gradients.items()} == {"w": 2.0}
    (update,) = record.buffers
    assert [list(getattr(update, name)) for name in ("values", "bases")] == [["mean"], ["mean"]]
    assert (update.values["mean"].item(), update.bases["mean"].item(), update.num_samples) == (0.5, 0.0, 4.0)


def test_samples_are_counted_back_to_the_beginning() -> None:
    """Two commits of 2 and 3 samples since version 0."""
    store = splitfed.GradientStore(f"memory://{uuid.uuid4()}")
    body = nn.Linear(1, 1)
    server = splitfed.SplitServer(body, store, per_client=True)
    bodies = splitfed.PerClient(body, store, lambda params: torch.optim.SGD(params, lr=0.5))
    half = nn.Sequential(nn.Linear(1, 1), splitfed.CutPoint())
    client = splitfed.SplitClient(half, server, "a")
    for samples in (2, 3):
        client(torch.ones(samples, 1)).mean().backward()
        bodies.step()
    line = store.lineage("body@a")
    commit, counted = since(line, line.head())
    assert (commit.kind, commit.source, counted) == ("initial", 0, 5.0)
