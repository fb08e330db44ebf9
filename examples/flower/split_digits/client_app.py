"""A data owner: Flower brings the averaged half and takes the trained one; batches go to splitfed's server directly."""

from __future__ import annotations

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch.nn.functional import cross_entropy

import splitfed
from split_digits.task import half, train_loader

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train for a round: an ordinary loop, in which each batch counts at splitfed's server exactly once."""
    settings, owner = context.run_config, int(context.node_config["partition-id"])
    own = half()
    own.load_state_dict(message.content["arrays"].to_torch_state_dict())
    client = splitfed.SplitClient(own, str(settings["server"]), client_id=f"owner-{owner}")
    optimizer = torch.optim.Adam(client.parameters(), lr=float(settings["lr"]))
    torch.manual_seed(1000 * int(message.content["config"]["server-round"]) + owner)
    loader = train_loader(owner, int(context.node_config["num-partitions"]), int(settings["batch-size"]))
    total, epochs = 0.0, int(settings["local-epochs"])
    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            loss = cross_entropy(client(x), y)
            loss.backward()
            optimizer.step()
            total += loss.item() * len(y)
    num_examples = len(loader.dataset)
    metrics = {"loss": total / num_examples / epochs, "num-examples": num_examples}
    content = RecordDict({"arrays": ArrayRecord(client.state_dict()), "metrics": MetricRecord(metrics)})
    return Message(content=content, reply_to=message)
