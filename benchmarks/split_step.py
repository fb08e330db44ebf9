"""How much a split step costs over the unsplit one, taken alternately in one run.

Variants, for each model, all with the same input, loss and client optimizer (SGD with momentum):

    unsplit      forward, loss, backward, optimizer step of the whole model
    forward      one forward of the body: unsplit and this together are the limit of "recomputed"
    in memory    the same split with both halves in one process and nothing stored: a detach at each cut
    no files     split over a store on memory://; the server still has the graph at the backward
    kept         split over a store on file://, sync="process", by defaults; the server still has the graph
    no spares    as kept, but each file is made when it is written and not ahead (`splitfed.blobs.files.Spares`)
    gradient     as kept, with durability="gradient": what is on file is the gradient; the default of small bodies
    log          as kept, with durability="log": what is on file is what the gradient follows from; that of large ones
    power        as kept, with sync="power": it survives a power cut
    recomputed   as kept with keep_graphs=0: every backward runs the forward again from its file
    commit       what the accumulator needs to fold the last four such gradients into the next version (not in the step)

A split step ends when the gradient is on file and the client's optimizer has stepped.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

import splitfed
from benchmarks import rounds
from benchmarks.models import lora, resnet18, tiny, transformer
from benchmarks.rounds import Step
from splitfed.blobs import files
from splitfed.blobs.local import LocalBlobs

EVERY = 4
"""A commit every so many steps folds them all; the step after it loads the new version."""
LARGE = ("unsplit", "forward", "kept", "power", "recomputed")
"""The variants of a large body. "gradient" isn't among them: the hundreds of megabytes that it writes at each step keep
the disk busy during the steps of the others.
"""
ALL = ("unsplit", "forward", "in memory", "no files", "kept", "no spares", "gradient", "log", "power", "recomputed")
Case = tuple[nn.Module, str, Tensor, tuple[str, ...]]
CASES: dict[str, tuple[Callable[[], Case], float]] = {
    "tiny": (lambda: (tiny(), "2", torch.randn(64, 784), ALL), 0.06),
    "resnet18": (lambda: (resnet18(), "2:7", torch.randn(32, 3, 32, 32), ALL), 0.18),
    "transformer 3.2 M": (lambda: (transformer(256, 4, 0.1), "1:5", _tokens(16, 64), ALL), 0.12),
    "LoRA on 15.8 M": (lambda: (lora(512, 5), "1:6", _tokens(8, 64), LARGE), 0.1),
    "transformer 75.6 M, 4×32": (lambda: (transformer(1024, 6, 0.0), "1:7", _tokens(4, 32), LARGE), 0.18),
    "transformer 75.6 M, 8×128": (lambda: (transformer(1024, 6, 0.0), "1:7", _tokens(8, 128), LARGE), 0.2),
    "transformer 75.6 M, 4×32, on file": (
        lambda: (transformer(1024, 6, 0.0), "1:7", _tokens(4, 32), ("unsplit", "gradient")),
        0.06,
    ),
    "transformer 100.8 M, 4×32": (lambda: (transformer(1024, 8, 0.0), "1:9", _tokens(4, 32), LARGE[:3]), 0.1),
}
"""Model, cut, input and variants; and the share of the time that it gets."""


def run(minutes: float, only: str = "") -> dict[str, dict[str, dict[str, float]]]:
    """Milliseconds and ratios of each model, by model and variant.

    Args:
        minutes: For all cases.
        only: Only the cases whose name has this in it.
    """
    return {
        name: time_case(*made(), seconds=60 * minutes * share) for name, (made, share) in CASES.items() if only in name
    }


def _tokens(batch: int, length: int) -> Tensor:
    return torch.randint(0, 64, (batch, length))


def time_case(
    model: nn.Module, at: str, x: Tensor, names: tuple[str, ...], *, seconds: float
) -> dict[str, dict[str, float]]:
    """Minimum and median of each variant, in milliseconds, and its median ratio to unsplit, round by round."""
    with torch.no_grad():
        y = torch.randint(0, 10, (model(x).shape[0],))
    folder = Path(tempfile.mkdtemp())
    try:
        steps = variants(model, at, x, y, folder, names)
        return rounds.ratios(rounds.in_turns(steps, seconds, every=EVERY, rare="commit"), "unsplit")
    finally:
        shutil.rmtree(folder)


def variants(model: nn.Module, at: str, x: Tensor, y: Tensor, folder: Path, names: tuple[str, ...]) -> dict[str, Step]:
    """One function per variant; each call is one step."""
    optimizer = lambda params: torch.optim.SGD(params, lr=1e-3, momentum=0.9)  # noqa: E731
    steps: dict[str, Step] = {}
    for name in names:
        if name == "unsplit":
            steps[name] = training(model, model, x, y)
            continue
        half, body = splitfed.split(model, at)
        if name in ("forward", "in memory"):
            inner = InMemory(half, body)
            whole = nn.ModuleList([inner.half, inner.body])
            steps[name] = inner.forward_of(x) if name == "forward" else training(whole, inner, x, y)
            continue
        place = f"memory:/{folder}" if name == "no files" else str(folder / name.replace(" ", "-"))
        store = splitfed.GradientStore(place, sync="power" if name == "power" else "process")
        if name == "no spares":
            without_spares(store)
        graphs = 0 if name == "recomputed" else 8
        durability = name if name in ("gradient", "log") else None
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
        # A slice leaves a cut point at each of its places.
        holes = [i for i, module in enumerate(layers) if isinstance(module, splitfed.CutPoint)]
        self.half, self.body = half, body
        self.bottom, self.head = nn.Sequential(*layers[: holes[0]]), nn.Sequential(*layers[holes[-1] + 1 :])
        self.inputs = self.outputs = torch.empty(0)

    def __call__(self, x: Tensor) -> Tensor:
        """The whole model's outputs, with a cut graph."""
        activations = self.bottom(x)
        self.inputs = activations.detach().requires_grad_()
        self.outputs = self.body(self.inputs)
        received = self.outputs.detach().requires_grad_()
        received.register_hook(lambda grad: self._back(activations, grad))
        return self.head(received)

    def forward_of(self, x: Tensor) -> Step:
        """A forward of the body alone, with its graph: what a recompute can't do without."""
        with torch.no_grad():
            activations = self.bottom(x)

        def step() -> None:
            self.body(activations.detach().requires_grad_())

        return step

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
