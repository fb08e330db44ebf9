"""Whole runs: by definition, by seed, by store, and in bounded memory."""

from __future__ import annotations

import copy
import functools
import gc
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.data import IterableDataset

import splitfed
from splitfed import History, VirtualTime
from splitfed.accumulator import policies
from splitfed.blobs.memory import _REGISTRY
from splitfed.errors import CutError, InputError
from splitfed.simulation.data import batches, order
from splitfed.simulation.engines.turns import Turns
from splitfed.simulation.rng import Stream
from splitfed.store.store import GradientStore

GROUPED = policies.mode("grouped", group=2)
MODES = ("round", "buffered", "sflv2", "sflv1", "synchronous", GROUPED)


def linear() -> nn.Module:
    """3 | 2 | 1 without biases, in float64: bottom, body and head."""
    torch.manual_seed(0)
    layers = nn.Linear(3, 2, bias=False), nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False)
    return nn.Sequential(*layers).double()


def halves(number: int = 2, each: int = 5) -> dict[str, Any]:
    """Clients of unlike sizes, each with as many examples as make one batch; in float64."""
    generator = torch.Generator().manual_seed(2)
    return {
        f"c{i}": (
            torch.randn(each + i, 3, generator=generator, dtype=torch.float64),
            torch.randn(each + i, 1, generator=generator, dtype=torch.float64),
        )
        for i in range(number)
    }


def test_a_round_is_fedavg_of_the_halves_and_one_step_of_the_body() -> None:
    """By hand: w ← w − lr · Σ nᵢgᵢ/Σ nᵢ for the body; for the halves the mean of the clients' ends is the same."""
    whole, clients = linear(), halves()
    simulation = toy.run(
        model=whole,
        at="1",
        clients=clients,
        loss_fn=mse_loss,
        server_optimizer=toy.sgd,
        rounds=3,
        batch_size=100,
    )
    list(simulation)
    expected = copy.deepcopy(whole)
    for _ in range(3):
        total = sum(len(x) for x, _ in clients.values())
        gradients = {name: torch.zeros_like(p) for name, p in expected.named_parameters()}
        for x, y in clients.values():
            expected.zero_grad()
            mse_loss(expected(x), y).backward()
            for name, parameter in expected.named_parameters():
                gradients[name] += len(x) / total * parameter.grad  # type: ignore[operator]
        with torch.no_grad():
            for name, parameter in expected.named_parameters():
                parameter -= 0.5 * gradients[name]
    for name, tensor in simulation.whole().state_dict().items():
        torch.testing.assert_close(tensor, expected.state_dict()[name], rtol=0, atol=1e-12)


@pytest.mark.parametrize("mode", ["synchronous", policies.mode("grouped", group=3)], ids=["synchronous", "grouped"])
def test_a_step_over_all_is_centralised_training_on_all_batches(mode: Any) -> None:
    """With Adam on both lineages, fifty steps, clients of unlike sizes: to 1e-12, and in both modes the same bits."""
    whole, clients = linear(), halves(3)
    simulation = toy.run(
        model=whole,
        at="1",
        clients=clients,
        loss_fn=mse_loss,
        server_optimizer=toy.adam,
        mode=mode,
        rounds=50,
        batch_size=100,
    )
    rows = list(simulation)
    expected = copy.deepcopy(whole)
    optimizer = toy.adam(expected.parameters())
    inputs, targets = (torch.cat(parts) for parts in zip(*clients.values(), strict=True))
    for _ in range(50):
        optimizer.zero_grad()
        mse_loss(expected(inputs), targets).backward()
        optimizer.step()
    assert [row["commits"] for row in rows] == [1] * 50
    for name, tensor in simulation.whole().state_dict().items():
        torch.testing.assert_close(tensor, expected.state_dict()[name], rtol=0, atol=1e-12)


class Masked(nn.Module):
    """Tokens of which a mask says which count: bottom, body and head, 3 words to 2 classes."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.bottom, self.body, self.head = nn.Embedding(4, 5), nn.Linear(5, 5), nn.Linear(5, 2)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """(N, T) and (N, T) to logits (N, 2)."""
        found: torch.Tensor = self.head((self.body(self.bottom(ids)) * mask[..., None]).sum(1))
        return found


def sentences(seed: int) -> list[torch.Tensor]:
    """Nine of one to three words; its class is whether the first word is an even one."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 4, (9,), generator=generator).tolist()
    return [torch.randint(1, 4, (length,), generator=generator) for length in lengths]


def padded(words: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """A batch by name."""
    ids = nn.utils.rnn.pad_sequence(words, batch_first=True)
    return {"ids": ids, "mask": (ids > 0).float(), "labels": torch.stack([word[0] % 2 for word in words])}


def listed(words: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """The same by place."""
    return tuple(padded(words).values())


class Sentences(IterableDataset[torch.Tensor]):
    """They come in an order that is drawn anew each time, by torch's own generator."""

    def __init__(self, seed: int) -> None:
        self.words = sentences(seed)

    def __iter__(self) -> Any:
        return (self.words[i] for i in torch.randperm(9).tolist())


MASKED: dict[str, Any] = {"model": Masked(), "at": "body", "batch_size": 2, "local_passes": 2, "drop_last": True}


@pytest.mark.parametrize("name", ["samples", "a stream"])
def test_samples_with_masks_train_by_name_and_by_place(name: str) -> None:
    """A list of sentences or a stream of them, collated to a dict or a tuple: four batches of two, the same bits."""
    make = {"samples": sentences, "a stream": Sentences}[name]
    clients = {f"c{seed}": make(seed) for seed in range(2)}
    ends = []
    for collate in (padded, listed):
        run = toy.run(**MASKED, clients=clients, collate_fn=collate, evaluate=sentences(7), mode="sflv2")
        rows = list(run)
        assert [row["clients"]["c1"]["num_samples"] for row in rows] == [16, 16]
        assert [row["batches"] for row in rows] == [16, 16]
        assert {"loss", "accuracy"} <= rows[0].keys()
        ends.append(run.whole())
        entry = run.history.run["clients"]["c1"]  # type: ignore[index]
        assert entry == ({} if name == "a stream" else {"num_samples": 9})
    assert toy.same(*ends)
    assert not toy.same(ends[0], Masked())


def test_a_killed_run_goes_on_with_streams_as_with_data_sets() -> None:
    """To the bits of one go, in virtual time too: what a stream draws is its client's own, and begins anew."""
    settings = {**MASKED, "clients": {f"c{seed}": Sentences(seed) for seed in range(2)}, "collate_fn": padded}
    whole, store = toy.run(**settings, virtual=VirtualTime()), GradientStore("memory://killed-stream")
    list(whole)
    with pytest.raises(toy.Killed):
        list(toy.run(**settings, store=store, loss_fn=toy.dying(8)))
    run = toy.run(**settings, store=store)
    assert [row["round"] for row in run] == [1, 2]
    assert toy.same(run.whole(), whole.whole())


def test_a_device_and_loaders_change_no_bits_where_it_is_the_same() -> None:
    """With all that a client keeps: personal parts, its optimizer, what error feedback has still to send."""
    settings: dict[str, Any] = {"personal": ("3.bias",), "keep_optimizers": True, "compression": "topk:0.5"}
    plain = toy.run(**settings)
    losses = [row["train_loss"] for row in plain]
    clients = {name: functools.partial(toy.clients().get, name) for name in toy.clients()}
    moved = toy.run(**settings, device="cpu", clients=clients)
    assert [row["train_loss"] for row in moved] == losses
    assert toy.same(plain.whole(), moved.whole())
    assert moved.history.run["clients"] == {name: {} for name in clients}  # type: ignore[index]


def test_clients_are_sampled_in_proportion_to_their_examples() -> None:
    """One of nine in ten examples is drawn nearly always; in the other way, half the time."""
    clients = {"large": toy.examples(36), "small": toy.examples(4)}
    drawn = {}
    for sampling in ("uniform", "data"):
        run = toy.run(clients=clients, clients_per_round=1, rounds=16, batch_size=40, sampling=sampling)
        drawn[sampling] = [row["sampled"] for row in run].count(["large"])
    assert drawn["uniform"] < 13 <= drawn["data"]


@pytest.mark.parametrize(
    "engine", [{}, {"workers": 1}, {"virtual": splitfed.VirtualTime()}], ids=lambda one: "".join(one)
)
def test_batches_of_each_client_have_a_size_of_their_own(engine: dict[str, Any]) -> None:
    """In turns, in a worker and by a clock; equal sizes are the one size, to the bit."""
    sizes = {"client-0": 1, "client-1": 4, "client-2": 3}
    run = toy.run(rounds=1, batch_size=(given := dict(sizes)), **engine)
    given["client-0"] = 8  # the run has its own
    (row,) = list(run)
    assert {name: one["batches"] for name, one in row["clients"].items()} == {
        "client-0": 8,
        "client-1": 2,
        "client-2": 3,
    }
    assert run.history.run["settings"]["batch_size"] == sizes  # type: ignore[index]
    if not engine:
        same = [toy.run(batch_size=size) for size in (3, dict.fromkeys(sizes, 3))]
        for one in same:
            list(one)
        assert toy.same(same[0].whole(), same[1].whole())


def test_turns_by_data_know_whose_batches_are_small() -> None:
    """Pacing, sampling and falling rates count a client's own batches."""
    sizes = {"client-0": 1, "client-1": 4, "client-2": 3}
    run = toy.run(mode=policies.mode("grouped", group=2), batch_size=sizes, pacing="data", final_rate=0.1)
    rows = list(run)
    assert [row["clients"]["client-0"]["batches"] for row in rows] == [8, 8]


def test_a_callback_needs_no_list(capsys: pytest.CaptureFixture[str]) -> None:
    """`print` shows each row; a history alone keeps them."""
    list(toy.run(rounds=1, callbacks=print))
    assert "'kind': 'round'" in capsys.readouterr().out
    history = History()
    assert toy.run(rounds=1, callbacks=history).history is history
    with pytest.raises(InputError, match="callbacks is 7"):
        toy.run(callbacks=7)


def test_a_group_of_all_is_synchronous_and_both_are_what_the_parts_make_by_hand() -> None:
    """The same bits, with dropout and uneven batches; groups of 4 by clients, store and accumulators."""
    data = toy.clients(5, each=7)
    settings: dict[str, Any] = {"clients": data, "model": toy.model(0.5), "rounds": 2, "batch_size": 3}
    runs = [toy.run(**settings, mode=mode) for mode in ("synchronous", policies.mode("grouped", group=5), "grouped")]
    rows = [[row["commits"] for row in run] for run in runs]
    assert rows == [[3, 3], [3, 3], [4, 4]]
    assert toy.same(runs[0].whole(), runs[1].whole())
    assert toy.same(runs[2].whole(), by_hand(data, settings["model"], rounds=2, size=3))
    assert not toy.same(runs[0].whole(), runs[2].whole())


def by_hand(data: dict[str, Any], whole: nn.Module, *, rounds: int, size: int) -> nn.Module:
    """Mode `grouped` with the parts of a federation: clients in turns, one batch each, a commit when 4 wait."""
    store = GradientStore(f"memory://{uuid.uuid4()}")
    half, body = splitfed.split(whole, toy.AT)
    mode = policies.mode("grouped", group=4)
    updates = splitfed.Accumulator(half, store, toy.adam, lineage="client", **mode.settings())
    both = splitfed.Accumulator(body, store, toy.adam, halves=updates, **mode.settings())
    server = splitfed.SplitServer(body, store)
    for number in range(1, rounds + 1):
        clients = {name: splitfed.SplitClient(copy.deepcopy(half), server, name) for name in data}
        streams = {name: Stream(0, name, number, 0) for name in data}
        orders = {name: order(own, streams[name].generator) for name, own in data.items()}
        loaders = {
            name: iter(batches(own, splitfed.simulation.LocalTraining(batch_size=size), orders[name]))
            for name, own in data.items()
        }
        while loaders:
            for name in sorted(loaders):
                batch = next(loaders[name], None)
                if batch is None:
                    del loaders[name]
                    continue
                with streams[name].active():
                    client = clients[name]
                    client.pull()
                    client.zero_grad()
                    cross_entropy(batch.outputs(client), batch.target).backward()
                    client.push(gradient=True)
                both.step()
        both.step(1)
    clients["client-0"].pull()
    return splitfed.join(clients["client-0"], store.load_weights())


def test_personal_heads_step_locally_in_a_group() -> None:
    """What is shared takes no local step; a head that stays does, and each client has its own."""
    simulation = toy.run(mode=GROUPED, personal=("3.*",), keep_optimizers=True)
    rows = list(simulation)
    assert [row["commits"] for row in rows] == [3, 3]
    assert sorted(simulation.store.load_weights(lineage="client")) == ["0.bias", "0.weight"]
    driver = simulation._driver
    assert isinstance(driver, Turns)
    heads = [driver.state(name).personal["3.weight"] for name in toy.clients()]
    assert not any(torch.equal(head, toy.model().state_dict()["3.weight"]) for head in heads)
    assert not torch.equal(heads[0], heads[1])


def test_a_rate_that_falls_reaches_both_sides() -> None:
    """By default the halves step as the body does; a rate of zero leaves them where they are."""
    still = toy.run(mode=GROUPED, half_optimizer=functools.partial(torch.optim.SGD, lr=0.0))
    list(still)
    moved = toy.run(mode=GROUPED)
    list(moved)
    begun = toy.model().state_dict()["0.weight"]
    assert torch.equal(still.whole().state_dict()["0.weight"], begun)
    assert not torch.equal(moved.whole().state_dict()["0.weight"], begun)


@pytest.mark.filterwarnings("ignore:a gradient of client 'client-1' isn't finite")
@pytest.mark.parametrize("mode", MODES)
def test_a_client_with_nan_in_all_its_data_is_reported_and_the_others_train(mode: Any) -> None:
    """Each of its batches is rejected, and its update; the run goes on as without it."""
    clients = toy.clients()
    inputs, labels = toy.examples(8)
    rows = list(
        toy.run(mode=mode, clients={**clients, "client-1": (inputs * float("nan"), labels)}, evaluate=toy.examples())
    )
    for row in rows:
        assert (row["participants"], row["missing"]) == (["client-0", "client-2"], [])
        assert row["clients"]["client-1"]["status"] == "dropped"
        assert "finite" in row["dropped"]["client-1"]
    assert rows[1]["loss"] < rows[0]["loss"]


@pytest.mark.parametrize("mode", MODES)
def test_the_same_seed_gives_the_same_bits_and_another_one_others(mode: Any) -> None:
    """Whatever the caller drew before; dropout in the body draws too."""
    ends, losses = [], []
    for number, seed in enumerate((0, 0, 1)):
        torch.manual_seed(number)
        before = torch.get_rng_state()
        simulation = toy.run(mode=mode, model=toy.model(dropout=0.5), seed=seed, clients_per_round=2)
        losses.append([row["train_loss"] for row in simulation])
        assert torch.equal(torch.get_rng_state(), before)
        ends.append(simulation.whole())
    assert toy.same(ends[0], ends[1])
    assert losses[0] == losses[1] != losses[2]
    assert not toy.same(ends[0], ends[2])


def test_virtual_time_changes_no_bits_of_a_round() -> None:
    """Nothing that one client does is seen by another before the round ends."""
    ends = [toy.run(model=toy.model(dropout=0.5), virtual=virtual) for virtual in (None, VirtualTime(latency=0.1))]
    for one in ends:
        list(one)
    assert toy.same(ends[0].whole(), ends[1].whole())


def test_rows_tell_of_the_run_its_commits_and_its_rounds() -> None:
    """In the history as they were yielded; figures of the clients add up to those of the round."""
    seen: list[dict[str, Any]] = []
    inputs, labels = toy.examples(30)
    simulation = toy.run(evaluate=(inputs, labels), callbacks=[seen.append], name="mine", clients_per_round=2)
    rows = list(simulation)
    assert [row["kind"] for row in seen] == ["run", "commit", "commit", "round", "commit", "commit", "round"]
    assert simulation.history.rows == seen
    assert simulation.history.rounds() == rows
    run = seen[0]
    assert (run["name"], run["mode"], run["seed"], run["settings"]["rounds"]) == ("mine", "round", 0, 2)
    assert run["clients"]["client-0"]["num_samples"] == sum(run["clients"]["client-0"]["classes"].values()) == 8
    for row in rows:
        assert len(row["sampled"]) == 2
        assert row["sampled"] == row["participants"] == list(row["clients"])
        for figure in ("bytes_up", "bytes_down"):
            assert row[figure] == sum(entry[figure] for entry in row["clients"].values()) > 0
        mean = sum(e["train_loss"] * e["num_samples"] for e in row["clients"].values()) / 16
        assert row["train_loss"] == pytest.approx(mean)
        assert 0 <= row["accuracy"] <= 1
        assert 0 < row["time"] == row["seconds"]
    whole = simulation.whole()
    assert rows[-1]["loss"] == pytest.approx(cross_entropy(whole(inputs), labels).item())
    assert not whole.training
    assert list(whole.state_dict()) == list(toy.model().state_dict())


def test_nothing_trains_before_the_first_row_is_asked_for_and_nothing_after_the_last() -> None:
    """A run may be left where it is; what is in the store stays."""
    store = GradientStore("memory://lazy")
    simulation = toy.run(store=store)
    assert simulation.history.rows == []
    assert store.waiting() == []
    next(simulation)
    simulation.close()
    assert list(simulation) == []
    assert store.latest_version() == 1


def test_a_run_goes_on_where_its_store_is() -> None:
    """Two rounds and then the other two end in the same bits as four, with one history."""
    whole = toy.run(model=toy.model(0.5), rounds=4)
    list(whole)
    store = GradientStore("memory://resumed")
    for rounds in (2, 4):
        simulation = toy.run(model=toy.model(0.5), rounds=rounds, store=store, history=History(store))
        list(simulation)
    assert [row["round"] for row in History.load(store).rounds()] == [1, 2, 3, 4]
    assert toy.same(whole.whole(), simulation.whole())
    assert list(toy.run(rounds=4, store=store)) == []


def test_personal_parts_never_leave_a_client() -> None:
    """They aren't in the lineage, cost no bytes, and each client's own are trained on from round to round."""
    shared, personal = toy.run(), toy.run(personal=("3.*",))
    sizes = [next(iter(simulation))["bytes_up"] for simulation in (shared, personal)]
    head = 4 * (6 * 3 + 3)
    assert sizes[0] - sizes[1] == 3 * head
    list(personal)
    assert "3.weight" not in personal.store.load_weights(lineage="client")
    assert torch.equal(personal.whole().state_dict()["3.weight"], toy.model().state_dict()["3.weight"])


def test_replicas_and_schedulers_are_the_real_ones() -> None:
    """Two servers in turn give the same bits as one; a rate of zero after the first commit leaves the body there."""
    ends = [toy.run(model=toy.model(0.5), replicas=replicas) for replicas in (1, 2)]
    for one in ends:
        list(one)
    assert toy.same(ends[0].whole(), ends[1].whole())
    still = toy.run(
        server_optimizer=toy.sgd,
        server_scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.0),
        rounds=2,
    )
    list(still)
    assert torch.equal(still.store.load_weights(1)["1.weight"], still.store.load_weights(2)["1.weight"])
    assert not torch.equal(still.store.load_weights(0)["1.weight"], still.store.load_weights(1)["1.weight"])


def test_a_store_that_was_not_given_goes_with_its_run() -> None:
    """Nothing of it stays in memory."""
    simulation = toy.run()
    list(simulation)
    name = simulation.store.url.removeprefix("memory://")
    assert _REGISTRY[name].objects
    del simulation
    gc.collect()
    assert not _REGISTRY[name].objects


@pytest.mark.parametrize(
    ("settings", "error", "said"),
    [
        ({"rounds": 0}, InputError, "rounds is 0"),
        ({"batch_size": 0}, InputError, "batch_size is 0"),
        ({"local_passes": 0}, InputError, "local_passes is 0"),
        ({"workers": -1}, InputError, "workers is -1"),
        ({"replicas": 0}, InputError, "replicas is 0"),
        ({"min_updates": 0}, InputError, "min_updates is 0"),
        ({"clients_per_round": 0}, InputError, "clients_per_round"),
        ({"clients_per_round": 4}, InputError, "clients_per_round is 4, but there are 3 clients: expected at most 3"),
        ({"mode": "rounds"}, InputError, "mode 'rounds' isn't known"),
        ({"deadline": 3.0}, InputError, "deadline=3.0 needs a clock"),
        ({"workers": 2, "barrier": False}, InputError, "workers train in rounds: leave barrier=False out"),
        ({"mode": "synchronous", "barrier": False}, InputError, "leave barrier=False out"),
        ({"mode": "grouped"}, InputError, "groups of 4 batches, and 3 clients train: expected group=3 at most"),
        ({"mode": GROUPED, "clients_per_round": 1}, InputError, "expected group=1 at most"),
        (
            {"mode": GROUPED, "clients": {**toy.clients(), "none": toy.examples(0)}},
            InputError,
            "'none' has no examples",
        ),
        ({"personal": ("tail.*",)}, InputError, "fits no parameter"),
        ({"at": "7"}, CutError, "7"),
        ({"clients": {}}, InputError, "expected a mapping"),
        ({"virtual": True}, InputError, "engine is True: expected a VirtualTime"),
        ({"virtual": VirtualTime}, InputError, "expected a VirtualTime"),
        ({"optimizer": toy.sgd([nn.Parameter(torch.ones(1))])}, InputError, "optimizer is SGD: expected a function"),
        ({"loss_fn": "mse"}, InputError, "loss_fn is str: expected a function"),
        ({"scheduler": 0.1}, InputError, "scheduler is float: expected a function"),
        ({"local_steps": 2}, InputError, "local_steps is 2, but clients wait .*: give RoundSchedule.barrier=False"),
        ({"local_steps": 2, "mode": "synchronous"}, InputError, "in mode 'synchronous' clients push the gradient of"),
        ({"pacing": "data"}, InputError, "in mode 'round' there are none: leave it out, or take such as 'buffered'"),
        ({"pacing": "data", "mode": "synchronous"}, InputError, "in mode 'synchronous' there are none"),
        (
            {"pacing": "data", "mode": "sflv2", "clients": {"a": Sentences(0)}},
            InputError,
            r"RoundSchedule\(pacing='data'\) needs to know",
        ),
        ({"sampling": "data", "clients": {"a": Sentences(0)}}, InputError, r"sampling='data'\) needs to know"),
        ({"drop_last": True, "batch_size": 9}, InputError, "client 'client-0' has 8 examples, which drop_last"),
        ({"batch_size": {"client-0": 4}}, InputError, "batch_size has no number for client 'client-1'"),
        ({"batch_size": dict.fromkeys(("client-0", "client-1", "client-2", "you"), 4)}, InputError, "number for 'you'"),
        (
            {"clients": {"a": Sentences(0)}, "virtual": VirtualTime(dropout=0.1)},
            InputError,
            r"VirtualTime\(dropout=...\) needs to know how many examples each client has, and the Sentences of 'a'",
        ),
    ],
)
def test_a_setting_out_of_its_range_is_refused_at_once(
    settings: dict[str, Any], error: type[Exception], said: str
) -> None:
    """Before anything trains."""
    with pytest.raises(error, match=said):
        toy.run(**settings)


def test_a_store_with_clients_that_have_no_data_is_refused() -> None:
    """As one that is left of a run over more of them: its rounds would sample them."""
    store = GradientStore("memory://strangers")
    next(toy.run(store=store, clients=toy.clients(3)))
    with pytest.raises(InputError, match="has clients that weren't given, 'client-2' for one"):
        toy.run(store=store, clients=toy.clients(2))
    assert [row["round"] for row in toy.run(store=store, clients=toy.clients(4))] == [2]


def test_fewer_clients_than_a_round_needs_is_an_error() -> None:
    """No round could ever begin."""
    with pytest.raises(InputError, match="min_clients"):
        list(toy.run(min_clients=4))


def test_a_barrier_can_be_set_by_hand() -> None:
    """Buffered mode waits without virtual time, and doesn't with it; either can be had otherwise."""
    mode, found = policies.mode("buffered", min_batches=2), []
    for virtual in (None, VirtualTime()):
        for barrier in (None, True, False):
            simulation = toy.run(mode=mode, virtual=virtual, barrier=barrier)
            next(simulation)
            assert simulation.history.run is not None
            found.append(simulation.history.run["settings"]["barrier"])
    assert found == [True, True, False, False, True, False]
    assert splitfed.simulate is splitfed.simulation.simulate


def test_global_steps_are_a_barrier_whatever_the_mode_says_of_staleness() -> None:
    """In virtual time too."""
    mode = policies.mode("synchronous", max_staleness=4)
    rows = list(toy.run(mode=mode, virtual=VirtualTime()))
    assert [(row["status"], row["commits"]) for row in rows] == [("complete", 2)] * 2


MEASURE = """
import functools, resource, sys, torch
from torch import nn
from torch.nn.functional import cross_entropy
from splitfed import simulate
from splitfed.simulation import LocalTraining, RoundSchedule

torch.set_num_threads(1)
number = int(sys.argv[1])
generator = torch.Generator().manual_seed(0)
inputs = torch.randn(number, 4, 8, generator=generator)
clients = {f"c{i:04d}": (inputs[i], inputs[i, :, :3].argmax(1)) for i in range(number)}
model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 3))
sgd = functools.partial(torch.optim.SGD, lr=0.1)

def resident():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize() / 2**20

def run(clients, rounds):
    return simulate(
        model, "1", clients, loss_fn=cross_entropy, optimizer=sgd, server_optimizer=sgd, rounds=rounds,
        local=LocalTraining(batch_size=4), schedule=RoundSchedule(clients_per_round=10),
    )

list(run(dict(list(clients.items())[:10]), 1))  # imports and pools are no part of it
before = resident()
simulation = run(clients, 50)
assert sum(len(row["participants"]) for row in simulation) == 500
print(resident() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from /proc")
@pytest.mark.soak
def test_a_thousand_clients_need_the_memory_of_the_active_ones() -> None:
    """Fifty rounds of 10 clients sampled of 1,000 grow the process by at most 10 MB more than of 20."""
    grown = {}
    for number in (20, 1000):
        command = [sys.executable, "-W", "error", "-c", MEASURE, str(number)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
        assert done.returncode == 0, done.stderr
        grown[number] = float(done.stdout)
    assert grown[1000] - grown[20] <= 10, grown
