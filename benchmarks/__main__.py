"""`python -m benchmarks`: run the benchmarks, print the tables, write the figures."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from benchmarks import commit, http_step, pipeline, split_step

MARKS = ("<!-- table -->", "<!-- end -->")


def main() -> None:
    """Time, print a table, write `benchmark.json`, and fill in the page of the docs if asked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs/bench"), help="where benchmark.json goes")
    parser.add_argument("--docs", type=Path, help="write the table into this page, between its markers")
    parser.add_argument("--rounds", type=int, default=20, help="timed rounds of the large model")
    parser.add_argument("--only", default="", help="only the cases whose name has this in it, or `pipeline`")
    args = parser.parse_args()
    found = split_step.run(args.rounds, args.only)
    commits = commit.run(args.rounds, args.only)
    http = {} if args.only else http_step.run(20 * args.rounds)
    pipelined = pipeline.run(args.rounds // 2) if args.only in ("", "pipeline") else {}
    result = {"torch": torch.__version__, "threads": torch.get_num_threads(), "milliseconds": found, "http": http}
    result |= {"commits": commits, "pipeline": pipelined}
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "benchmark.json").write_text(json.dumps(result, indent=1))
    table = split_step.as_table(found)
    tables = [table] if found else []
    tables += [commit.as_table(commits)] if commits else []
    tables += [http_step.as_table(http)] if http else []
    tables += [pipeline.as_table(pipelined)] if pipelined else []
    print("\n\n".join(tables))
    if args.docs:
        head, _, rest = args.docs.read_text().partition(MARKS[0])
        args.docs.write_text(f"{head}{MARKS[0]}\n{table}\n{MARKS[1]}{rest.partition(MARKS[1])[2]}")


if __name__ == "__main__":
    main()
