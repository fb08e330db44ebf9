"""What a commit of eight batches costs, beside an unsplit step of the same model, in turns in one process.

    gradient    durability="gradient", sync="process": eight gradient files become the next version
    power       the same with sync="power": what is written is on the disk before the commit is
    log         durability="log", sync="process": server and accumulator are one process

The accumulator steps SGD with momentum. A commit takes its time from the first look at what is pending until the files
of its batches are deleted. Its CPU time is that of the whole process, so of all threads. Memory is what is anonymous
(no page of a file) at the worst moment of one more commit, above what was there before, as a multiple of the bytes of
what trains. "first" is the first split step after a commit, which loads the new version.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

import splitfed
from benchmarks.split_step import CASES, training

BATCHES = 8
LEAST = 3
"""Timed commits of a variant, however long they take."""
SHARES = {"tiny": 0.1, "resnet18": 0.25, "transformer 3.2 M": 0.2, "transformer 75.6 M, 4×32": 0.45}
"""The cases of `split_step`, and the share of the time that each gets."""
VARIANTS: dict[str, tuple[Literal["power", "process"], str]] = {
    "gradient": ("process", "gradient"),
    "power": ("power", "gradient"),
    "log": ("process", "log"),
}


def run(minutes: float, only: str = "") -> dict[str, dict[str, dict[str, float]]]:
    """The figures of each model, by model and variant.

    Args:
        minutes: For all cases.
        only: Only the cases whose name has this in it: "commit" and the name of the model.
    """
    found = {}
    for name, share in SHARES.items():
        if only in f"commit {name}":
            model, at, x, _ = CASES[name][0]()
            found[name] = time_case(model, at, x, seconds=60 * minutes * share)
    return found


def time_case(model: nn.Module, at: str, x: Tensor, *, seconds: float) -> dict[str, dict[str, float]]:
    """Figures of the unsplit step and of each variant's commit."""
    with torch.no_grad():
        y = torch.randint(0, 10, (model(x).shape[0],))
    folder = Path(tempfile.mkdtemp())
    found: dict[str, dict[str, float]] = {}
    try:
        for variant, (sync, durability) in VARIANTS.items():
            store = splitfed.GradientStore(str(folder / variant), sync=sync)
            half, body = splitfed.split(model, at)
            server = splitfed.SplitServer(body, store, durability=durability)
            client = splitfed.SplitClient(half, server, "a")
            accumulator = splitfed.Accumulator(body, store, _momentum, keep_versions=2)
            step, unsplit = training(client, client, x, y), training(model, model, x, y)
            taken: dict[str, list[float]] = {"wall": [], "cpu": [], "unsplit": [], "first": []}
            ends = time.perf_counter() + seconds / len(VARIANTS)
            warm = True
            while warm or len(taken["wall"]) < LEAST or time.perf_counter() < ends:
                for number in range(BATCHES):
                    began = time.perf_counter()
                    step()
                    if not (number or warm):
                        taken["first"].append(1e3 * (time.perf_counter() - began))
                began = time.perf_counter()
                unsplit()
                once = time.perf_counter() - began
                wall, cpu = time.perf_counter(), time.process_time()
                accumulator.step()
                if not warm:
                    taken["wall"].append(1e3 * (time.perf_counter() - wall))
                    taken["cpu"].append(1e3 * (time.process_time() - cpu))
                    taken["unsplit"].append(1e3 * once)
                warm = False
            for _ in range(BATCHES):
                step()
            with peak() as top:
                accumulator.step()
            trainable = sum(parameter.nbytes for parameter in body.parameters() if parameter.requires_grad)
            found[variant] = {
                "min": min(taken["wall"]),
                "median": statistics.median(taken["wall"]),
                "cpu": statistics.median(taken["cpu"]),
                "unsplit": statistics.median(taken["unsplit"]),
                "first": statistics.median(taken["first"]),
                "ratio": statistics.median(taken["wall"]) / statistics.median(taken["unsplit"]),
                "memory": top[0] / trainable,
            }
            del store, server, client, accumulator, step, unsplit
            shutil.rmtree(folder / variant)
    finally:
        shutil.rmtree(folder)
    return found


def _momentum(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=1e-3, momentum=0.9)


@contextmanager
def peak() -> Iterator[list[int]]:
    """The most anonymous memory of the process in the block, in bytes above what it had before; 0 if nothing tells."""
    before, top = _anonymous(), [0]
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.001):
            top[0] = max(top[0], _anonymous() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield top
    finally:
        over.set()
        watcher.join()


def _anonymous() -> int:
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    lines = (line.split() for line in status.read_text().splitlines() if line.startswith("RssAnon"))
    return next((1024 * int(words[1]) for words in lines), 0)


def as_table(found: dict[str, dict[str, dict[str, float]]]) -> str:
    """The figures as a Markdown table."""
    lines = [
        f"| a commit of {BATCHES} batches | variant | min (ms) | median (ms) | CPU (ms) | ratio to unsplit | memory "
        "| first step after it (ms) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for model, rows in found.items():
        for name, row in rows.items():
            lines.append(
                f"| {model} | {name} | {row['min']:.1f} | {row['median']:.1f} | {row['cpu']:.1f} "
                f"| {row['ratio']:.2f} | {row['memory']:.1f} × | {row['first']:.1f} |"
            )
    return "\n".join(lines)
