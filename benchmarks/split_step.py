"""How much a split step costs over the unsplit one, taken alternately in one run.

Variants, for each model, all with the same input, loss and client optimizer (SGD with momentum):

    unsplit      forward, loss, backward, optimizer step of the whole model
    in memory    the same split with both halves in one process and nothing stored: a detach at each cut
    no files     split over a store on memory://; the server still has the graph at the backward
    kept         split over a store on file://, sync="process"; the server still has the graph at the backward
    no spares    as kept, but each file is made when it is written and not ahead (`splitfed.blobs.files.Spares`)
    log          as kept, with durability="log": what is on file is what the gradient follows from
    power        as log, with sync="power": it survives a power cut
    recomputed   as kept with keep_graphs=0: every backward runs the forward again from its file
    commit       what the accumulator needs to fold the last four such gradients into the next version (not in the step)

A split step ends when the gradient is on file and the client's optimizer has stepped.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

import splitfed
from benchmarks.models import resnet18, tiny, transformer
from splitfed.blobs import files
from splitfed.blobs.local import LocalBlobs

EVERY = 4
"""A commit every so many steps folds them all; the step after it loads the new version."""
Step = Callable[[], Any]


LARGE = ("unsplit", "kept", "log", "power", "recomputed")
"""The variants of a body of hundreds of megabytes."""
CASES: dict[str, Callable[[int], tuple[nn.Module, str, Tensor, int, tuple[str, ...]]]] = {
    "tiny": lambda rounds: (tiny(), "2", torch.randn(64, 784), 20 * rounds, ()),
    "resnet18": lambda rounds: (resnet18(), "2:7", torch.randn(32, 3, 32, 32), rounds, ()),
    "transformer 3.2 M": lambda rounds: (transformer(256, 4, 0.1), "1:5", _tokens(16, 64), rounds, ()),
    "transformer 75.6 M, 4×32": lambda rounds: (transformer(1024, 6, 0.0), "1:7", _tokens(4, 32), rounds // 2, LARGE),
    "transformer 75.6 M, 8×128": lambda rounds: (transformer(1024, 6, 0.0), "1:7", _tokens(8, 128), rounds // 4, LARGE),
}


def run(rounds: int, only: str = "") -> dict[str, dict[str, dict[str, float]]]:
    """Milliseconds and ratios of each model, by model and variant.

    Args:
        rounds: Timed rounds of ResNet-18; tiny takes 20 times as many, large bodies fewer.
        only: Only the cases whose name has this in it.
    """
    return {name: time_case(*made(rounds)) for name, made in CASES.items() if only in name}


def _tokens(batch: int, length: int) -> Tensor:
    return torch.randint(0, 64, (batch, length))


def time_case(
    model: nn.Module, at: str, x: Tensor, rounds: int, only: tuple[str, ...] = ()
) -> dict[str, dict[str, float]]:
    """Minimum and median of each variant, in milliseconds, and its median ratio to unsplit, round by round."""
    with torch.no_grad():
        y = torch.randint(0, 10, (model(x).shape[0],))
    folder = Path(tempfile.mkdtemp())
    try:
        steps = variants(model, at, x, y, folder, only)
        times: dict[str, list[float]] = {name: [] for name in steps}
        for warm in range(rounds + 3):
            for name, step in steps.items():
                if name.startswith("commit") and warm % EVERY != 0:
                    continue
                begun = time.perf_counter()
                step()
                if warm >= 3 or name.startswith("commit"):
                    times[name].append(1e3 * (time.perf_counter() - begun))
    finally:
        shutil.rmtree(folder)
    base = times["unsplit"]
    return {
        name: {
            "min": min(taken),
            "median": statistics.median(taken),
            "ratio": statistics.median(taken) / statistics.median(base)
            if name.startswith("commit")
            else statistics.median(t / b for t, b in zip(taken, base, strict=True)),
        }
        for name, taken in times.items()
    }


def variants(
    model: nn.Module, at: str, x: Tensor, y: Tensor, folder: Path, only: tuple[str, ...] = ()
) -> dict[str, Step]:
    """One function per variant, or of some; each call is one step."""
    optimizer = lambda params: torch.optim.SGD(params, lr=1e-3, momentum=0.9)  # noqa: E731
    steps = {"unsplit": training(model, model, x, y)}
    if not only:
        inner = InMemory(*splitfed.split(model, at))
        steps["in memory"] = training(nn.ModuleList([inner.half, inner.body]), inner, x, y)
    for name in only or ("no files", "kept", "no spares", "log", "power", "recomputed"):
        if name == "unsplit":
            continue
        place = f"memory:/{folder}" if name == "no files" else str(folder / name.replace(" ", "-"))
        half, body = splitfed.split(model, at)
        store = splitfed.GradientStore(place, sync="power" if name == "power" else "process")
        if name == "no spares":
            without_spares(store)
        graphs = 0 if name == "recomputed" else 8
        durability = "log" if name in ("log", "power") else "gradient"
        server = splitfed.SplitServer(body, store, keep_graphs=graphs, durability=durability)
        client = splitfed.SplitClient(half, server, "a")
        accumulator = splitfed.Accumulator(body, store, optimizer, keep_versions=2)
        steps[name] = training(client, client, x, y)
        steps[f"commit after {name}"] = accumulator.step
    return steps


def without_spares(store: splitfed.GradientStore) -> None:
    """Let a local store make each file when it is written."""
    publisher = cast(LocalBlobs, store.blobs.raw)._publisher
    publisher._spares = _NoSpares(publisher._root, publisher.modes().file)


class _NoSpares(files.Spares):
    """Makes nothing ahead."""

    def take(self) -> int:
        """Open an unnamed file."""
        return files._open_unnamed(self._directory, self._mode)


class InMemory:
    """Both halves in one process, the body's graph held between forward and backward."""

    def __init__(self, half: nn.Module, body: nn.Module) -> None:
        layers = list(half.children())
        hole = next(i for i, module in enumerate(layers) if isinstance(module, splitfed.CutPoint))
        self.half, self.body = half, body
        self.bottom, self.head = nn.Sequential(*layers[:hole]), nn.Sequential(*layers[hole + 1 :])
        self.inputs = self.outputs = torch.empty(0)

    def __call__(self, x: Tensor) -> Tensor:
        """The whole model's outputs, with a cut graph."""
        activations = self.bottom(x)
        self.inputs = activations.detach().requires_grad_()
        self.outputs = self.body(self.inputs)
        received = self.outputs.detach().requires_grad_()
        received.register_hook(lambda grad: self._back(activations, grad))
        return self.head(received)

    def _back(self, activations: Tensor, grad: Tensor) -> None:
        torch.autograd.backward(self.outputs, grad)
        torch.autograd.backward(activations, self.inputs.grad)


def training(module: nn.Module, call: Any, x: Tensor, y: Tensor) -> Step:
    """A training step of `module`, called through `call`."""
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-3, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(call(x), y).backward()
        optimizer.step()

    return step


def as_table(found: dict[str, dict[str, dict[str, float]]]) -> str:
    """The figures as a Markdown table."""
    lines = ["| model | variant | min (ms) | median (ms) | ratio to unsplit |", "|---|---|---|---|---|"]
    for model, rows in found.items():
        for name, row in rows.items():
            lines.append(f"| {model} | {name} | {row['min']:.2f} | {row['median']:.2f} | {row['ratio']:.2f} |")
    return "\n".join(lines)
