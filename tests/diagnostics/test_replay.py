"""`replay`: every version of a run again, from the record alone, with the same bits; and what differs is told."""

from __future__ import annotations

import contextlib
import json
import uuid
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import programs
import pytest
import torch
from harness_store import Point, again, batch, sgd
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from toy import model as toy_model
from toy import run as simulate_toy

from splitfed.accumulator import policies
from splitfed.accumulator.accumulator import Accumulator
from splitfed.cli.command import main
from splitfed.client.client import SplitClient
from splitfed.diagnostics.replay import replay
from splitfed.errors import ArchitectureError, CorruptedError, InputError, MissingError
from splitfed.model.cut import split
from splitfed.server.server import SplitServer
from splitfed.store.store import GradientStore

X = torch.randn(4, 3, generator=torch.Generator().manual_seed(3))


class Body(nn.Module):
    """Draws, counts and normalises; its first layer doesn't train."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(3, 3)
        self.frozen.requires_grad_(False)
        self.norm = nn.BatchNorm1d(3)
        self.out = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Two features."""
        return self.out(nn.functional.dropout(self.norm(self.frozen(x)), 0.3, self.training))


def whole() -> nn.Sequential:
    """Half and body, the same each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 3), Body(), nn.Linear(2, 1))


def kept(**settings: Any) -> GradientStore:
    """A store that keeps what its gradients follow from."""
    return GradientStore(f"memory://{uuid.uuid4()}", keep_forwards=True, **settings)


def body() -> nn.Module:
    """As another process builds it."""
    return split(whole(), "1")[1]


def train(
    store: GradientStore,
    steps: int = 4,
    optimizer: Callable[[Any], Any] = torch.optim.SGD,
    loss: Callable[[SplitClient, Tensor], Any] | None = None,
    **settings: Any,
) -> tuple[SplitClient, Accumulator]:
    """Some batches of one client, with a commit after each."""
    half, part = split(whole(), "1")
    server = SplitServer(part, store, loss_fn=lambda outputs, target: mse_loss(outputs, target))
    client = SplitClient(half, server, "a")
    accumulator = Accumulator(part, store, optimizer, **settings)
    torch.manual_seed(5)
    for _ in range(steps):
        if loss is None:
            client(X).square().mean().backward()
        else:
            loss(client, X)
        accumulator.step()
    return client, accumulator


def adam(params: Any) -> torch.optim.Optimizer:
    """Two groups, with rates of their own."""
    params = list(params)
    return torch.optim.AdamW([{"params": params[:1]}, {"params": params[1:], "lr": 0.05}], lr=0.01)


def steps_down(optimizer: torch.optim.Optimizer) -> Any:
    """A scheduler of numbers alone."""
    return torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 3], gamma=0.5)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"optimizer": partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True)},
        {"optimizer": adam, "lr_scheduler": steps_down, "clip_norm": 0.1},
        {"optimizer": torch.optim.Adadelta, "min_batches": 2},
        {"optimizer": torch.optim.Adam, "lr_scheduler": partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=5)},
        {"lr_scheduler": partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=0.2, total_steps=9)},
        {"buffer_rules": {"norm.running_*": "mean"}, "keep_versions": 2},
    ],
)
def test_every_version_has_the_bits_on_record(settings: dict[str, Any]) -> None:
    """Optimizers, schedulers, clipping, groups, rules: all come from the record; old files aren't needed."""
    store = kept()
    train(store, 6, **settings)
    found = replay(body(), again(store))
    assert found.ok, found
    assert len(found.versions) == store.latest_version() + 1 >= 4


def test_a_model_that_is_built_with_other_weights_is_only_a_structure() -> None:
    """Weights come from version 0, gradients from what was kept."""
    store = kept()
    train(store)
    assert replay(split(nn.Sequential(nn.Linear(3, 3), Body(), nn.Linear(2, 1)), "1")[1], store).ok


def several(client: SplitClient, x: Tensor) -> None:
    """Two calls in one loss, whose buffers follow each other."""
    (client(x).square().mean() + client(x * 2).mean()).backward()


def on_the_server(client: SplitClient, x: Tensor) -> None:
    """The loss is computed by the server, which keeps no label."""
    client.loss(x, torch.ones(4, 2)).backward()


def accumulated(client: SplitClient, x: Tensor) -> None:
    """One batch of three passes."""
    with client.batch():
        for part in (x[:2], x[1:], x):
            client(part).square().mean().backward()


@pytest.mark.parametrize("loss", [several, accumulated])
def test_batches_of_several_calls(loss: Callable[[SplitClient, Tensor], Any]) -> None:
    """Parts are added in the order of autograd, and buffers go on from call to call."""
    store = kept()
    train(store, loss=loss)
    assert replay(body(), store).ok


def test_a_loss_on_the_server() -> None:
    """What was kept is the gradient of the outputs: one pass and two give the same bits."""
    store = kept()
    half, part = split(nn.Sequential(nn.Linear(3, 3), Body()), "1")
    server = SplitServer(part, store, loss_fn=mse_loss)
    client, accumulator = SplitClient(half, server, "a"), Accumulator(part, store, adam)
    for _ in range(4):
        client.loss(X, torch.ones(4, 2)).backward()
        accumulator.step()
    assert replay(Body(), store).ok
    assert store.archive() is not None
    assert b"target" not in bytes(store.blobs.get(store.lineage().keys.kept(batch(1))) or b"")


def test_stale_gradients_are_damped_as_they_were() -> None:
    """The weights that were applied are on record, whatever function gave them."""
    store = kept()
    client, accumulator = train(store, 2, staleness_weight=lambda age: 1 / (2 + age), max_staleness=3)
    waiting = client(X)
    for _ in range(2):
        client(X).mean().backward()
        accumulator.step()
    waiting.mean().backward()
    client(X).mean().backward()
    accumulator.step()
    assert dict(again(store).lineage().commit(5).staleness) == {0: 1, 2: 1}
    assert replay(body(), store).ok


def test_a_rollback_and_what_follows() -> None:
    """The state of the older version with its optimizer, though its files are long gone."""
    store = kept()
    _, accumulator = train(store, 3, optimizer=adam, keep_versions=3)
    store.rollback(1)
    half, part = split(whole(), "1")
    client = SplitClient(half, SplitServer(part, store), "a")
    for _ in range(5):
        client(X).mean().backward()
        accumulator.step()
    found = replay(body(), store)
    assert found.ok, found
    assert [version.kind for version in found.versions].count("rollback") == 1


@pytest.mark.parametrize("mode", policies.MODES)
def test_every_mode_on_every_lineage(mode: str) -> None:
    """Rounds, buffered, synchronous, grouped, SFLV2 and SFLV1: body, halves, and each client's own body."""
    store = kept()
    settings = {"group": 2} if mode == "grouped" else {}
    simulate_toy(store=store, mode=policies.mode(mode, **settings), model=toy_model(0.3))
    half, part = split(toy_model(0.3), "1:3")
    assert replay(part, store).ok
    assert replay(half, store, lineage="client").ok
    lines = [f"body@{name}" for name in store.clients()] if mode == "sflv1" else []
    for name in lines:
        assert replay(part, store, lineage=name).ok, name


def test_what_differs_is_told_and_the_next_goes_on_from_the_file() -> None:
    """A body that computes otherwise, and an activation that was exchanged."""
    store = kept()
    train(store)
    other = body()
    other.norm.eps = 1e-3
    found = replay(other, store)
    assert [version.ok for version in found.versions] == [True, False, False, False, False]
    assert "other outputs" in found.versions[1].what
    key = store.lineage().keys.kept(batch(1))
    data = store.blobs.raw.get(store.lineage().keys.kept(batch(0)))
    assert data is not None
    store.blobs.put(key, [data])
    found = replay(body(), again(store))
    assert [version.ok for version in found.versions] == [True, True, False, True, True]


def test_what_is_lost_or_damaged_is_told() -> None:
    """A kept file that is gone, one with a flipped bit, and settings that are gone."""
    store = kept()
    train(store)
    keys = store.lineage().keys
    data = bytearray(store.blobs.raw.get(keys.kept(batch(1))) or b"")
    data[-3] ^= 4
    store.blobs.raw.put(keys.kept(batch(1)), [bytes(data)])
    store.blobs.delete(keys.kept(batch(2)))
    found = replay(body(), again(store))
    assert [version.ok for version in found.versions] == [True, True, False, False, True]
    assert "damaged" in found.versions[2].what
    assert "nothing is kept" in found.versions[3].what
    store.blobs.delete(keys.settings(store.lineage().commit(1).settings))
    with pytest.raises(CorruptedError, match="settings"):
        replay(body(), again(store))


def test_functions_of_ones_own_have_to_be_given() -> None:
    """A lambda is no data, and neither is a class of one's own."""

    class Mine(torch.optim.SGD):
        """Not torch's."""

    store = kept()
    rate = partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=lambda step: 0.9**step)
    train(store, optimizer=partial(Mine, lr=0.1), lr_scheduler=rate, buffer_rules={"norm.running_mean": _first})
    with pytest.raises(InputError, match=r"optimizer on record is .*Mine"):
        replay(body(), store)
    with pytest.raises(InputError, match="on record is the function"):
        replay(body(), store, optimizer=partial(Mine, lr=0.1), lr_scheduler=rate)
    rules = {"norm.running_mean": _first}
    assert replay(body(), store, optimizer=partial(Mine, lr=0.1), lr_scheduler=rate, buffer_rules=rules).ok
    store = kept()
    train(store, lr_scheduler=rate)
    with pytest.raises(InputError, match=r"lr_scheduler on record is .*LambdaLR"):
        replay(body(), store)
    assert replay(body(), store, lr_scheduler=rate).ok


def _first(head: Tensor, values: list[Tensor], bases: list[Tensor], samples: list[float]) -> Tensor:
    return values[0]


def test_a_run_that_cant_be_replayed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Begun without it, never begun, another module, asked for too late."""
    plain = GradientStore(str(tmp_path / "plain"))
    Accumulator(Point(), plain, sgd())
    with pytest.raises(MissingError, match="begun without keep_forwards"):
        replay(Point(), plain)
    with pytest.raises(InputError, match="begun without keep_forwards"):
        Accumulator(Point(), GradientStore(str(tmp_path / "plain"), keep_forwards=True), sgd())
    assert main(["replay", "torch.nn:Identity", "--store", str(tmp_path / "none")]) == 2
    store = kept()
    train(store)
    with pytest.raises(ArchitectureError):
        replay(Point(), store)
    assert "can't tell" in capsys.readouterr().out


def test_another_accumulator_with_other_settings_is_told_of_and_replayed() -> None:
    """Both are on record; the warning names what is otherwise, once."""
    store = kept()
    client, first = train(store, 2, optimizer=adam)
    second = Accumulator(body(), store, adam, clip_norm=0.01)
    for accumulator, warned in ((second, True), (first, True), (second, False), (first, False)):
        client(X).mean().backward()
        with pytest.warns(UserWarning, match="clip_norm") if warned else _quiet():
            accumulator.step()
    assert replay(body(), store).ok


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_in_another_process_by_the_command(tmp_path: Path) -> None:
    """From the store alone: `splitfed replay APP`."""
    store = GradientStore(str(tmp_path / "run"), keep_forwards=True)
    train(store, 3, optimizer=adam, lr_scheduler=steps_down)
    words = ["replay", "test_replay:body", "--store", tmp_path / "run", "--threads", torch.get_num_threads(), "--json"]
    done = programs.run(programs.command, *words, folder=Path(__file__).parent)
    assert done.returncode == 0, done.stderr + done.stdout
    assert json.loads(done.stdout)["ok"] is True


def test_a_lost_header_doesnt_end_the_keeping() -> None:
    """Whoever begins the store again finds what was kept."""
    store = kept()
    train(store, 2)
    store.blobs.delete("format.json")
    late = GradientStore(store.url)
    Accumulator(body(), late, torch.optim.SGD)
    assert late.keeps_forwards
    assert replay(body(), late).ok
