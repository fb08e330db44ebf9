"""The baselines of split federated training: the same model, unsplit, with the same batches and optimizer.

Each baseline yields a row per round, that is per pass over the training digits: loss and accuracy on the test digits,
seconds since the start, and the bytes and round trips of the round. `falls` says whether its rate falls over the run.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LRScheduler

from mnist_study import recipe
from mnist_study.recipe import Deal, Rate

Row = dict[str, Any]


def centralised(deal: Deal, rounds: int, seed: int, rate: Rate = recipe.WHOLE, *, falls: bool = True) -> Iterator[Row]:
    """All digits in one place. They travel once, a byte per pixel and label."""
    generator, start = torch.Generator().manual_seed(seed), time.perf_counter()
    model = recipe.make_model(seed)
    optimizer = rate(model.parameters())
    everything = torch.arange(len(deal.labels))
    scheduler = recipe.falling(optimizer, rounds * -(-len(everything) // recipe.BATCH)) if falls else None
    for number in range(1, rounds + 1):
        _one_pass(model, optimizer, deal, everything, generator, scheduler)
        figures = judge(model, deal.test)
        yield row(number, *figures, start, up=len(deal.labels) * (deal.images.shape[1] + 1) if number == 1 else 0)


def fedavg(deal: Deal, rounds: int, seed: int, rate: Rate = recipe.WHOLE, *, falls: bool = True) -> Iterator[Row]:
    """Federated averaging of the whole model (McMahan et al. 2017, arXiv 1602.05629): every owner, one pass a round.

    The whole model travels to each owner and back. An owner's optimizer starts again each round, as in the split modes;
    its rate falls on.
    """
    generator, start = torch.Generator().manual_seed(seed), time.perf_counter()
    model = recipe.make_model(seed)
    for number in range(1, rounds + 1):
        mean = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in model.state_dict().items()}
        for part, count in zip(deal.parts, deal.batches, strict=True):
            own = copy.deepcopy(model)
            optimizer = rate(own.parameters())
            scheduler = recipe.falling(optimizer, rounds * count, (number - 1) * count) if falls else None
            _one_pass(own, optimizer, deal, part, generator, scheduler)
            for name, tensor in own.state_dict().items():
                mean[name] += tensor.double() * (len(part) / len(deal.labels))
        model.load_state_dict(mean)
        figures = judge(model, deal.test)
        sent = len(deal.parts) * recipe.size_in_bytes()
        yield row(number, *figures, start, up=sent, down=sent, round_trips=2 * len(deal.parts))


def local(deal: Deal, rounds: int, seed: int, rate: Rate = recipe.WHOLE, *, falls: bool = True) -> Iterator[Row]:
    """Every owner alone with its own digits; the metrics are the mean over the owners. Nothing travels."""
    generator, start = torch.Generator().manual_seed(seed), time.perf_counter()
    models = [recipe.make_model(seed) for _ in deal.parts]
    optimizers = [rate(model.parameters()) for model in models]
    schedulers: list[Any] = [None] * len(models)
    if falls:
        steps = zip(optimizers, deal.batches, strict=True)
        schedulers = [recipe.falling(optimizer, rounds * count) for optimizer, count in steps]
    for number in range(1, rounds + 1):
        figures = []
        for model, optimizer, scheduler, part in zip(models, optimizers, schedulers, deal.parts, strict=True):
            _one_pass(model, optimizer, deal, part, generator, scheduler)
            figures.append(judge(model, deal.test))
        loss, accuracy = (sum(column) / len(figures) for column in zip(*figures, strict=True))
        spread = {"lowest": min(right for _, right in figures), "highest": max(right for _, right in figures)}
        yield row(number, loss, accuracy, start) | spread


BASELINES: dict[str, Callable[..., Iterator[Row]]] = {
    "centralised": centralised,
    "fedavg": fedavg,
    "local": local,
}


@torch.no_grad()
def judge(model: nn.Module, test: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """The mean loss and the accuracy on the test digits."""
    logits = model.eval()(test[0])
    return cross_entropy(logits, test[1]).item(), (logits.argmax(1) == test[1]).double().mean().item()


def row(
    number: int, loss: float, accuracy: float, start: float, up: int = 0, down: int = 0, round_trips: int = 0
) -> Row:
    """The metrics of a round: seconds are since the start, traffic is that of the round."""
    traffic = {"bytes_up": up, "bytes_down": down, "round_trips": round_trips}
    return {"round": number, "loss": loss, "accuracy": accuracy, "seconds": time.perf_counter() - start, **traffic}


def shuffled(part: Tensor, generator: torch.Generator) -> Sequence[Tensor]:
    """One pass over these digits: batches of their indices, in a new order."""
    return part[torch.randperm(len(part), generator=generator)].split(recipe.BATCH)


def _one_pass(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    deal: Deal,
    part: Tensor,
    generator: torch.Generator,
    scheduler: LRScheduler | None = None,
) -> None:
    model.train()
    for batch in shuffled(part, generator):
        optimizer.zero_grad()
        cross_entropy(model(deal.images[batch]), deal.labels[batch]).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
