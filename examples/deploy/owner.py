"""A data owner: trains on its own rows of scikit-learn's digits, through the server at a URL.

    python owner.py http://127.0.0.1:8000 --client-id site-a --rows 0:700
    python owner.py s3://bucket/run --client-id site-a --rows 0:700    # the same through a bucket

A token, if the server asks for one, is read from the environment variable SPLITFED_TOKEN.
"""

from __future__ import annotations

import argparse

import torch
from digits import half
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import splitfed


def main() -> None:
    """Read the arguments, train, and say how well it went."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("server", help="URL of the service, or of the store that its workers share")
    parser.add_argument("--client-id", required=True, help="whose data it is; each owner has its own")
    parser.add_argument("--rows", default="0:1400", help="which digits are its own (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=6, help="passes over them (default: %(default)s)")
    parser.add_argument("--compression", metavar="CODEC", help="of what crosses the cuts, such as int8 (default: none)")
    arguments = parser.parse_args()
    first, last = map(int, arguments.rows.split(":"))

    digits = load_digits()
    images, labels = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    torch.manual_seed(first)
    loader = DataLoader(TensorDataset(images[first:last], labels[first:last]), batch_size=50, shuffle=True)

    client = splitfed.SplitClient(half(), arguments.server, arguments.client_id, compression=arguments.compression)
    optimizer = torch.optim.Adam(client.parameters(), lr=5e-3)
    for epoch in range(1, arguments.epochs + 1):
        total = 0.0
        for x, y in loader:
            optimizer.zero_grad()
            loss = cross_entropy(client(x), y)
            loss.backward()
            optimizer.step()
            total += loss.item() * len(y)
        print(f"{arguments.client_id}: epoch {epoch}, mean loss {total / (last - first):.4f}", flush=True)

    client.eval()
    with torch.no_grad():
        right = (client(images[1400:]).argmax(1) == labels[1400:]).double().mean().item()
    print(f"{arguments.client_id}: accuracy {right:.3f} on 397 digits that nobody trained on")


if __name__ == "__main__":
    main()
