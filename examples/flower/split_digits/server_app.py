"""Flower's server: it samples owners and averages their halves. Activations and gradients pass it by."""

from __future__ import annotations

from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

import splitfed
from split_digits.task import accuracy, half

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the rounds, and say after each how good the averaged half is with the newest body."""

    def evaluate(number: int, arrays: ArrayRecord) -> MetricRecord:
        averaged = half()
        averaged.load_state_dict(arrays.to_torch_state_dict())
        client = splitfed.SplitClient(averaged, str(context.run_config["server"]), client_id="flower")
        found = accuracy(client)  # under no_grad: nothing is stored
        print(f"round {number}: accuracy {found:.3f}", flush=True)
        return MetricRecord({"accuracy": found})

    strategy = FedAvg(fraction_train=float(context.run_config["fraction-train"]), fraction_evaluate=0.0)
    strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(half().state_dict()),
        num_rounds=int(context.run_config["num-server-rounds"]),
        evaluate_fn=evaluate,
    )
