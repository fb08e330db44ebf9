"""A Hugging Face BERT whose middle layer runs on the server; embeddings and head are the owner's.

The model is made from a config with random weights: nothing is downloaded. Its class, loss, masks and dropout aren't
changed. The task is synthetic: which of two marker tokens comes first? Run it:

    python examples/bert.py
    python examples/bert.py --at bert.encoder.layer.0 bert.encoder.layer.2    # two cuts, one body

Needs transformers.
"""

from __future__ import annotations

import argparse
import tempfile

import torch
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

import splitfed

PAD, MARKERS, WORDS, LENGTH = 0, (1, 2), (3, 32), 12


def make_model() -> BertForSequenceClassification:
    """A small BERT with three layers. Its dropout is on, 0.1 as BERT has it."""
    config = BertConfig(
        vocab_size=WORDS[1],
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=LENGTH,
        num_labels=2,
    )
    return BertForSequenceClassification(config)


def make_sentences(num: int) -> dict[str, Tensor]:
    """Random words with both markers among them, padded: input_ids and attention_mask (N, L), labels (N,)."""
    words = torch.randint(*WORDS, (num, LENGTH))
    lengths = torch.randint(6, LENGTH + 1, (num,))
    labels = torch.randint(2, (num,))
    places = torch.stack([torch.randperm(int(length))[:2].sort().values for length in lengths])
    words.scatter_(1, places, torch.tensor([MARKERS, MARKERS[::-1]])[labels])
    mask = (torch.arange(LENGTH) < lengths[:, None]).long()
    return {"input_ids": words.where(mask.bool(), PAD), "attention_mask": mask, "labels": labels}


def main() -> None:
    """Cut the model, show that the cut is exact, train, evaluate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", help="an empty folder for the files (default: a temporary one)")
    parser.add_argument("--seed", type=int, default=0, help="of all chance (default: 0)")
    parser.add_argument("--at", nargs="+", default=["bert.encoder.layer.1"], help="what runs on the server")
    parser.add_argument("--steps", type=int, default=120, help="batches of 32 sentences (default: 120)")
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    at = arguments.at if len(arguments.at) > 1 else arguments.at[0]

    model = make_model()
    sentences = make_sentences(4)
    print(splitfed.check(model, at, **sentences))  # the second column is the promise

    with tempfile.TemporaryDirectory() as folder:
        half, body = splitfed.split(model, at)
        store = splitfed.GradientStore(arguments.store or folder, sync="process")
        client = splitfed.SplitClient(half, splitfed.SplitServer(body, store), client_id="owner-a")
        accumulator = splitfed.Accumulator(body, store, optimizer=lambda params: torch.optim.AdamW(params, lr=2e-3))
        optimizer = torch.optim.AdamW(client.parameters(), lr=2e-3)
        kept = sum(p.numel() for p in client.parameters())
        print(f"{kept} parameters at the owner, {sum(p.numel() for p in body.parameters())} on the server")

        client.train()
        for step in range(1, arguments.steps + 1):
            optimizer.zero_grad()
            loss = client(**make_sentences(32)).loss  # attention masks cross the cut, labels don't
            loss.backward()
            optimizer.step()
            accumulator.step()
            if step % 40 == 0:
                print(f"step {step}: loss {loss.item():.3f}, body at version {store.latest_version()}")

        client.eval()
        test = make_sentences(500)
        labels = test.pop("labels")
        with torch.no_grad():
            right = (client(**test).logits.argmax(1) == labels).double().mean().item()
        print(f"accuracy: {right:.3f} on 500 new sentences; guessing gives 0.5")


if __name__ == "__main__":
    main()
