"""Two owners train one digit classifier; neither images nor labels are sent.

The model is cut in U-shape: each owner keeps the first and the last layer, the server runs the layers between. What
they send can reveal both all the same: see docs/privacy.md. Run it:

    python examples/quickstart.py
    python examples/quickstart.py --store runs/quickstart    # keep the files

Needs scikit-learn, which includes 1,797 real handwritten digits of 8×8 pixels.
"""

from __future__ import annotations

import argparse
import copy
import tempfile

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import splitfed


def make_model() -> nn.Module:
    """A plain PyTorch model, with no code for splitfed in it."""
    return nn.Sequential(
        nn.Linear(64, 64),  # 0: the bottom, at the owner
        nn.ReLU(),
        nn.Linear(64, 128),  # 2 to 5: the body, on the server, with BatchNorm and dropout in it
        nn.BatchNorm1d(128),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Linear(128, 10),  # 6: the head, at the owner, who computes the loss: labels are not sent
    )


def load_data() -> tuple[TensorDataset, TensorDataset, tuple[Tensor, Tensor]]:
    """The digits of owner A, those of owner B, and a test set that nobody trains on."""
    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32) / 16
    labels = torch.tensor(digits.target)
    a, b, test = torch.randperm(len(labels)).split([700, 700, 397])
    return TensorDataset(images[a], labels[a]), TensorDataset(images[b], labels[b]), (images[test], labels[test])


def train(store_url: str, epochs: int) -> None:
    """Cut the model, train it over both owners, and say how well each of them does."""
    data_a, data_b, (test_images, test_labels) = load_data()

    # `split` makes copies: the client half with a cut point, and the body that was there.
    half, body = splitfed.split(make_model(), "2:6")

    # The server side. All state is in the store: this server, or any other on the same store, can answer any request.
    store = splitfed.GradientStore(store_url, sync="process")
    server = splitfed.SplitServer(body, store)
    # One commit per two pending batches: the mean of both owners' gradients, and one step of Adam.
    accumulator = splitfed.Accumulator(
        body, store, optimizer=lambda params: torch.optim.Adam(params, lr=5e-3), min_batches=2
    )

    # The owners' side. Each owner has its own half, optimizer and digits.
    clients = [splitfed.SplitClient(copy.deepcopy(half), server, client_id=name) for name in ("owner-a", "owner-b")]
    optimizers = [torch.optim.Adam(client.parameters(), lr=5e-3) for client in clients]
    loaders = [DataLoader(data, batch_size=50, shuffle=True) for data in (data_a, data_b)]

    for epoch in range(1, epochs + 1):
        total = 0.0
        for batches in zip(*loaders, strict=True):  # the owners take turns, so that every run is the same
            for client, optimizer, (images, labels) in zip(clients, optimizers, batches, strict=True):
                optimizer.zero_grad()
                loss = cross_entropy(client(images), labels)  # activations go to the server, outputs come back
                loss.backward()  # gradients cross too; those of the body become a file in the store
                optimizer.step()
                total += loss.item() * len(labels)
            accumulator.step()
        print(f"epoch {epoch}: mean loss {total / 1400:.4f}, body at version {store.latest_version()}")

    # `join` combines an owner's half and the newest body: a plain model again, with the original names.
    for client in clients:
        whole = splitfed.join(client, store.load_weights()).eval()
        with torch.no_grad():
            right = (whole(test_images).argmax(1) == test_labels).double().mean().item()
        print(f"accuracy of {client.client_id}: {right:.3f} on {len(test_labels)} digits that nobody trained on")


def main() -> None:
    """Read the arguments and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", help="an empty folder for the files (default: a temporary one)")
    parser.add_argument("--seed", type=int, default=0, help="of all chance (default: 0)")
    parser.add_argument("--epochs", type=int, default=6, help="passes over the digits (default: 6)")
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        train(arguments.store or folder, arguments.epochs)


if __name__ == "__main__":
    main()
