"""Bytes that cross, by hand; and how long batches waited."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import toy
from harness import Wire, sgd
from torch import Tensor, nn

from splitfed.accumulator.accumulator import Accumulator
from splitfed.client.client import SplitClient
from splitfed.model.cut import split
from splitfed.protocol.ids import BatchId
from splitfed.protocol.transport import Transport
from splitfed.server.server import SplitServer
from splitfed.simulation.traffic import Arrivals, Crossed, Meter, num_bytes
from splitfed.store.store import GradientStore


@dataclass(frozen=True)
class Message:
    """Tensors in every place where a message may have them."""

    one: Tensor
    many: dict[str, list[Tensor]]
    words: str = "none"


def test_a_message_counts_each_of_its_tensors_once() -> None:
    """Six float32, four float64 and eight bool are 24 + 32 + 8 bytes, however often one of them is named."""
    six = torch.zeros(2, 3)
    message = Message(six, {"a": [torch.zeros(4, dtype=torch.float64), six], "b": [torch.zeros(8, dtype=torch.bool)]})
    assert num_bytes(message) == 64
    assert num_bytes("words") == 0


def test_a_step_costs_what_crosses_at_the_cut() -> None:
    """A batch of 5: activations (5, 3) go up and outputs (5, 2) come down, then their gradients the other way."""
    half, body = split(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2), nn.Linear(2, 1)), "1")
    store = GradientStore("memory://metering")
    meter = Meter(SplitServer(body, store))
    assert isinstance(meter, Transport)
    client = SplitClient(half, meter, client_id="a")
    client.pull()
    whole = 4 * (4 * 3 + 3 + 2 * 1 + 1)
    assert meter.take() == {"a": (whole, whole, 3)}  # a pull, the push that publishes, a pull
    client(torch.ones(5, 4)).sum().backward()
    assert meter.take() == {"a": (4 * (15 + 10), 4 * (10 + 15), 2)}
    client.push()
    assert meter.take() == {"a": (whole, 0, 1)}
    assert meter.take() == {}
    assert meter.totals() == {"a": (2 * whole + 100, whole + 100, 6)}


def test_a_loss_in_one_trip_sends_the_labels_too() -> None:
    """Activations (5, 3) and five int64 go up; the loss and gradients (5, 3) come down."""
    half, body = split(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), "1")
    server = SplitServer(body, GradientStore("memory://metering-loss"), loss_fn=nn.functional.cross_entropy)
    now = [7.0]
    arrivals = Arrivals(lambda: now[0])
    meter = Meter(server, arrivals)
    SplitClient(half, meter, client_id="a").loss(torch.ones(5, 4), torch.zeros(5, dtype=torch.int64)).backward()
    assert meter.totals() == {"a": (4 * 15 + 8 * 5, 4 + 4 * 15, 1)}
    assert arrivals.take() == {("body", BatchId("a", 1, 0)): 7.0}


def test_another_meters_count_can_be_added() -> None:
    """As of a worker process, into the total and into what is taken next."""
    meter = Meter(Wire())
    meter.add({"a": Crossed(1, 2, 3), "b": Crossed(3, 4, 5)})
    meter.add({"a": Crossed(10, 20, 30)})
    assert meter.totals() == meter.take() == {"a": (11, 22, 33), "b": (3, 4, 5)}


def test_a_commit_tells_how_long_its_batches_waited() -> None:
    """Two batches that came at 1 and 4 and were folded at 6 waited 3.5 seconds on average."""
    half, body = split(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 1)), "1")
    store = GradientStore("memory://metering-arrivals")
    now = [0.0]
    arrivals = Arrivals(lambda: now[0])
    client = SplitClient(half, Meter(SplitServer(body, store), arrivals), client_id="a")
    accumulator = Accumulator(body, store, sgd)
    for now[0] in (1.0, 4.0):
        client(torch.ones(3, 2)).sum().backward()
    commit = accumulator.step()
    assert commit is not None
    assert arrivals.delay("body", commit, 6.0) == pytest.approx(3.5)
    assert arrivals.delay("body", commit, 6.0) is None
    assert arrivals.take() == {}


def test_batches_that_count_nowhere_are_forgotten_too() -> None:
    """A rejected batch has no delay, and leaves nothing behind; nor do lineages that nobody asks for."""
    half, body = split(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 1)), "1")
    store = GradientStore("memory://metering-rejected")
    arrivals = Arrivals(lambda: 1.0, ("body",))
    client = SplitClient(half, Meter(SplitServer(body, store), arrivals), client_id="a")
    client.pull()
    accumulator = Accumulator(body, store, sgd)
    with pytest.warns(UserWarning, match="isn't finite"):
        (client(torch.ones(3, 2)).sum() * float("nan")).backward()
    client(torch.ones(3, 2)).sum().backward()
    client.push()
    commit = accumulator.step()
    assert commit is not None
    assert commit.num_rejected == 1
    assert arrivals.delay("body", commit, 3.0) == 2.0
    assert arrivals.take() == {}


def test_what_is_added_doesnt_move_what_was_noted() -> None:
    """The first time of a batch is the one that counts."""
    arrivals = Arrivals(lambda: 1.0)
    batch = BatchId("a", 1, 0)
    arrivals.note("body", batch)
    arrivals.note("body", batch)
    arrivals.add({("body", batch): 5.0, ("client", batch): 6.0})
    assert arrivals.take() == {("body", batch): 1.0, ("client", batch): 6.0}


def test_an_eval_batch_isnt_an_arrival() -> None:
    """It is answered and counts nowhere."""
    half, body = split(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), "1")
    arrivals = Arrivals(lambda: 1.0)
    server = SplitServer(body, GradientStore("memory://metering-eval"), loss_fn=nn.functional.mse_loss)
    client = SplitClient(half, Meter(server, arrivals), client_id="a").eval()
    client(torch.ones(1, 2)).sum().backward()
    client.loss(torch.ones(1, 2), torch.ones(1, 2)).backward()
    assert arrivals.take() == {}


def test_compressed_traffic_is_counted_as_it_travels_and_its_error_is_in_the_row() -> None:
    """Of each client and of the round: two clients, two batches each, four tensors of 16 KiB a batch."""
    settings = {"model": wide(), "batch_size": 64, "clients": toy.clients(2, 128)}
    errors = {f"{flow}_error" for flow in ("activations", "outputs", "grad_outputs", "grad_activations")}
    for exact, coded in zip(toy.run(**settings), toy.run(**settings, compression="int8"), strict=True):
        assert not errors & exact.keys()
        assert all(0.0 < coded[name] < 0.02 for name in errors)
        assert all(errors <= entry.keys() for entry in coded["clients"].values())
        saved = exact["bytes_up"] + exact["bytes_down"] - coded["bytes_up"] - coded["bytes_down"]
        assert saved == 2 * 2 * 4 * (64 * 64 * 4 - (64 * 64 + 64 * 4))


def test_what_error_feedback_has_still_to_send_outlives_a_round() -> None:
    """Each round has a new client in each owner's place, which goes on from its residuals."""
    found = []
    for rounds in (1, 2):
        run = toy.run(clients=toy.clients(1, 64), batch_size=64, rounds=rounds, compression="topk:0.1", model=wide())
        found.append([row["activations_error"] for row in run][-1])
    assert 0.1 < found[0] != found[1]


def wide() -> nn.Module:
    """A model whose activations are worth compressing."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 64), nn.Linear(64, 64), nn.Dropout(0.0), nn.Linear(64, 3))
