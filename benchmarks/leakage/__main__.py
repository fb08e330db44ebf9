"""What a server can learn, measured: `python -m benchmarks.leakage`.

Attacks on what crosses the cut of `splitfed demo`: how many labels and inputs a server finds, and what it costs to
hide them. Prints three tables; `--docs` writes them into a page, between its markers. Takes minutes; no download.
"""

from __future__ import annotations

import argparse
import secrets
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.leakage import inputs, labels, seeds
from benchmarks.leakage.setting import DEMO, HEAD, Run, Seen, Setting, digits, train

PROTECTIONS: dict[str, Setting] = {
    "none": Setting(),
    "label smoothing 0.1": Setting(smoothing=0.1),
    "one more convolution at the owner": Setting(cut="7:15"),
    "both further convolutions at the owner": Setting(cut="11:15"),
    "a head of two layers": Setting(cut="3:12"),
    "noise 0.3 on gradients": Setting(on_gradients=0.3),
    "noise 1 on gradients": Setting(on_gradients=1.0),
    "noise 3 on gradients": Setting(on_gradients=3.0),
    "noise 1 on activations": Setting(on_activations=1.0),
    "noise 2 on activations": Setting(on_activations=2.0),
    "noise 4 on activations": Setting(on_activations=4.0),
}


def attacks(rounds: int) -> list[list[str]]:
    """Rows of what a server finds in the first round and in the last."""
    averaged = train(Setting(rounds=rounds))
    personal = train(Setting(rounds=rounds, personal=(HEAD,)))
    pushed = train(Setting(rounds=rounds, gradients=True))
    known = digits()
    finds: dict[str, tuple[Run, Callable[[list[Seen]], float]]] = {
        "labels, head averaged": (averaged, lambda seen: labels.by_known_head(seen, DEMO)),
        "labels, by the model's own prediction": (averaged, lambda seen: labels.by_prediction(seen, DEMO)),
        "labels, head personal": (personal, labels.by_clusters),
        "counts of labels in a batch, gradient of the half pushed": (pushed, labels.by_histogram),
        "inputs, bottom averaged": (averaged, lambda seen: inputs.by_known_half(seen, known, DEMO)[0]),
        "inputs, bottom unknown, a tenth of the inputs known": (
            averaged,
            lambda seen: inputs.by_known_inputs(seen, known, 0.1)[0],
        ),
    }
    ends = (1, rounds)
    return [[what, *(f"{find(run.of_round(number)):.1%}" for number in ends)] for what, (run, find) in finds.items()]


def protections(rounds: int) -> list[list[str]]:
    """Rows of what protections leave to find, in the last round unless said otherwise, and of what they cost."""
    rows = []
    for name, setting in PROTECTIONS.items():
        run = train(replace(setting, rounds=rounds))
        seen = run.of_round(rounds)
        shares = [
            labels.by_known_head(seen, setting.cut),
            labels.by_clusters(run.of_round(1)),
            labels.by_clusters(seen),
            labels.by_prediction(seen, setting.cut),
            *inputs.by_known_half(seen, digits(), setting.cut, setting.on_activations),
            run.accuracy,
        ]
        rows.append([name, *(f"{share:.1%}" for share in shares)])
    return rows


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table in Markdown."""
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def filled(page: str, name: str, text: str) -> str:
    """A page with another table between the marks of that name."""
    head, rest = page.split(f"<!-- {name} -->\n")
    return f"{head}<!-- {name} -->\n{text}\n{rest[rest.index('<!-- end -->') :]}"


def main() -> None:
    """Attack, print, and fill in the page of the docs if asked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.leakage", description=__doc__)
    parser.add_argument("--docs", type=Path, help="write the tables into this page, between their markers")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of training before the last is attacked")
    args = parser.parse_args()
    torch.set_num_threads(1)
    search = seeds.demonstrate(secrets.randbelow(seeds.SPACE))
    tables = {
        "attacks": table(["what is found", "round 1", f"round {args.rounds}"], attacks(args.rounds)),
        "seeds": table(["the search for a seed", ""], search.rows()),
        "protections": table(
            [
                "protection",
                "labels",
                "clusters, round 1",
                f"clusters, round {args.rounds}",
                "prediction",
                "inputs",
                "pixels",
                "accuracy",
            ],
            protections(args.rounds),
        ),
    }
    for name, text in tables.items():
        print(f"{text}\n")
        if args.docs:
            args.docs.write_text(filled(args.docs.read_text("utf-8"), name, text), "utf-8")


if __name__ == "__main__":
    main()
