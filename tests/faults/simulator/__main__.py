"""The command: run seeds, print what is wrong, shrink it."""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
import time

import torch
from tests.faults.simulator.mutants import MUTANTS, RARE, installed
from tests.faults.simulator.shrink import Shrinker, told
from tests.faults.simulator.world import run


def main() -> int:
    """Run what the command line says; 1 if anything was wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.simulator", description="Runs under faults.")
    parser.add_argument("seeds", help="one, as 17, or a range, as 0-999")
    parser.add_argument("--mutant", choices=[*MUTANTS, *RARE], help="with one thing wrong in the library")
    parser.add_argument("--shrink", action="store_true", help="look for the fewest faults that show it")
    parser.add_argument("--trace", action="store_true", help="print all operations")
    asked = parser.parse_args()
    first, _, last = asked.seeds.partition("-")
    seeds = range(int(first), int(last or first) + 1)
    torch.set_num_threads(1)
    logging.getLogger("splitfed").setLevel(logging.ERROR)  # each process that is started again says where it goes on
    began, wrong, faults, commits, weak = time.monotonic(), [], 0, 0, []
    with installed(asked.mutant) if asked.mutant else contextlib.nullcontext():
        for seed in seeds:
            outcome = run(seed)
            faults, commits = faults + len(outcome.faults), commits + outcome.commits
            if asked.trace:
                print("\n".join(outcome.trace))
            if outcome.wrong:
                wrong.append(seed)
                print(told(Shrinker().shrink(outcome) if asked.shrink else outcome), flush=True)
            elif outcome.commits < outcome.plan.commits or len(outcome.faults) < outcome.plan.faults:
                weak.append(seed)
    seconds = time.monotonic() - began
    print(f"{len(seeds)} seeds, {faults} faults, {commits} commits, {seconds:.1f} s; wrong: {wrong}; weak: {weak}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
