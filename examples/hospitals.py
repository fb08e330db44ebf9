"""Two hospitals learn to tell malignant from benign tumours; records and diagnoses are not sent.

One is a referral centre with mostly malignant cases, the other screens and sees mostly benign ones. In each round both
train their halves through the server, then the halves are averaged by number of patients (FedAvg). The joint model is
compared with training at each hospital alone, and with training on all records in one place. What is sent can reveal
both: see docs/privacy.md. Run it:

    python examples/hospitals.py

Needs scikit-learn, which includes the Wisconsin breast cancer records: 569 patients, 30 measurements each.
"""

from __future__ import annotations

import argparse
import copy
import functools
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from sklearn.datasets import load_breast_cancer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import splitfed

Records = tuple[Tensor, Tensor]


def make_model() -> nn.Module:
    """Bottom (0, 1) and head (4) stay in the hospital; the body (2, 3) runs on the server."""
    return nn.Sequential(nn.Linear(30, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))


def load_data() -> tuple[list[Records], Records]:
    """The records of each hospital, 30 and 60 of them, and 479 for testing."""
    cancer = load_breast_cancer()
    x, y = torch.tensor(cancer.data, dtype=torch.float32), torch.tensor(cancer.target)
    # Mean and deviation of all records. Real hospitals would agree on them by sharing sums, not records.
    x = (x - x.mean(0)) / x.std(0)
    rest, test = torch.randperm(len(y)).split([90, 479])
    rest = rest[(y[rest] + 0.4 * torch.randn(90)).argsort()]  # malignant is 0: mostly in front
    return [(x[part], y[part]) for part in rest.split([30, 60])], (x[test], y[test])


def sgd(parameters: Any) -> torch.optim.Optimizer:
    """The one optimizer of all trainings here."""
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def one_pass(model: nn.Module, optimizer: torch.optim.Optimizer, records: Records, after: Callable[[], Any]) -> None:
    """An ordinary training loop; `model` is a whole model, or a `SplitClient`."""
    x, y = records
    for batch in torch.randperm(len(y)).split(10):
        optimizer.zero_grad()
        cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
        after()


def train_alone(model: nn.Module, records: Records, rounds: int) -> nn.Module:
    """The whole model on one set of records, without splitfed."""
    model = copy.deepcopy(model)
    optimizer = sgd(model.parameters())
    for _ in range(rounds):
        one_pass(model, optimizer, records, after=lambda: None)
    return model


def train_together(model: nn.Module, hospitals: list[Records], rounds: int, store_url: str) -> nn.Module:
    """The split model over all hospitals: they send activations, gradients and updates of halves, nothing else."""
    half, body = splitfed.split(model, "2:4")
    store = splitfed.GradientStore(store_url, sync="process")
    server = splitfed.SplitServer(body, store)
    bodies = splitfed.Accumulator(body, store, optimizer=sgd)
    # FedAvg is the same kind of commit on the lineage "client": SGD with rate 1 applies the mean of the updates.
    average = functools.partial(torch.optim.SGD, lr=1.0)
    halves = splitfed.Accumulator(half, store, optimizer=average, lineage="client", min_batches=len(hospitals))
    names = ("referral-centre", "screening")
    clients = [splitfed.SplitClient(copy.deepcopy(half), server, client_id=name) for name in names]
    for _ in range(rounds):
        for client, records in zip(clients, hospitals, strict=True):
            client.pull()  # the newest averaged half
            one_pass(client, sgd(client.parameters()), records, after=bodies.step)  # one commit per batch
            client.push()  # the update since the pull, weighted by its patients
        halves.step()
    clients[0].pull()
    print(f"body at version {store.latest_version()}, halves at version {store.latest_version('client')}")
    return splitfed.join(clients[0], store.load_weights())


def main() -> None:
    """Train alone, together and pooled, and compare on patients that nobody trained on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", help="an empty folder for the files (default: a temporary one)")
    parser.add_argument("--seed", type=int, default=0, help="of all chance (default: 0)")
    parser.add_argument("--rounds", type=int, default=8, help="passes over the records (default: 8)")
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    hospitals, test = load_data()
    model = make_model()
    pooled = torch.cat([x for x, _ in hospitals]), torch.cat([y for _, y in hospitals])
    with tempfile.TemporaryDirectory() as folder:
        models = {
            "referral centre alone": train_alone(model, hospitals[0], arguments.rounds),
            "screening alone": train_alone(model, hospitals[1], arguments.rounds),
            "together, split": train_together(model, hospitals, arguments.rounds, arguments.store or folder),
            "pooled, in one place": train_alone(model, pooled, arguments.rounds),
        }
    for name, trained in models.items():
        right = (trained.eval()(test[0]).argmax(1) == test[1]).double().mean().item()
        print(f"accuracy {name}: {right:.3f}")


if __name__ == "__main__":
    main()
