"""The log: a batch is acknowledged on what its gradient follows from; versions have the bits that gradients give."""

from __future__ import annotations

import uuid
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness_store import again, batch, bits, sgd
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from splitfed.accumulator import policies
from splitfed.accumulator.accumulator import Accumulator
from splitfed.accumulator.derive import Deriver
from splitfed.client.client import SplitClient
from splitfed.diagnostics.integrity import verify
from splitfed.diagnostics.replay import replay
from splitfed.errors import InputError
from splitfed.model.cut import split
from splitfed.server.server import SplitServer
from splitfed.store.store import GradientStore

X = torch.randn(4, 3, generator=torch.Generator().manual_seed(3))


class Body(nn.Module):
    """Draws, counts and normalises."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.out = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Two features."""
        return self.out(nn.functional.dropout(self.norm(x), 0.3, self.training))


def parts() -> tuple[nn.Module, nn.Module]:
    """Half and body, the same each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return split(nn.Sequential(nn.Linear(3, 3), Body()), "1")


def one(client: SplitClient, x: Tensor) -> None:
    """A call, its loss at the owner."""
    client(x).square().mean().backward()


def two(client: SplitClient, x: Tensor) -> None:
    """Two calls in one loss, whose buffers follow each other."""
    (client(x).square().mean() + client(x * 2).mean()).backward()


def three(client: SplitClient, x: Tensor) -> None:
    """One batch of three passes."""
    with client.batch():
        for part in (x[:2], x[1:], x):
            client(part).square().mean().backward()


def scored(client: SplitClient, x: Tensor) -> None:
    """The loss is the server's."""
    client.loss(x, torch.ones(4, 2)).backward()


LOOPS = [one, two, three, scored]


def lose_sums(store: GradientStore) -> None:
    """Let what a server holds in memory be lost."""
    store.holder().collect()


def train(
    durability: str, loop: Callable[[SplitClient, Tensor], None] = one, steps: int = 5, **settings: Any
) -> GradientStore:
    """Two clients, a commit of both batches a step; each step on an accumulator that begins from the store."""
    store = GradientStore(f"memory://{uuid.uuid4()}", keep_forwards=settings.pop("keep_forwards", False))
    keep_graphs = settings.pop("keep_graphs", 8)
    half, body = parts()
    server = SplitServer(body, store, loss_fn=mse_loss, durability=durability, keep_graphs=keep_graphs)
    torch.manual_seed(5)
    clients = [SplitClient(parts()[0], server, name) for name in "ab"]
    for step in range(steps):
        for client in clients[: 1 + step % 2]:
            loop(client, X + step)
        Accumulator(parts()[1], again(store), torch.optim.Adam, **settings).step()
    del half
    return store


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("keep_graphs", [0, 8])
def test_both_modes_have_the_same_bits(loop: Callable[[SplitClient, Tensor], None], keep_graphs: int) -> None:
    """Weights, buffers and optimizer state, from kept graphs and from recomputes."""
    log, gradient = (train(mode, loop, keep_graphs=keep_graphs) for mode in ("log", "gradient"))
    assert log.latest_version() == gradient.latest_version() == 5
    assert bits(log.load_weights()) == bits(gradient.load_weights())
    newest, other = (store.lineage().commit(5) for store in (log, gradient))
    assert newest.files["optimizer"] == other.files["optimizer"]
    assert newest.files["weights"] == other.files["weights"]


@pytest.mark.parametrize("loop", LOOPS)
def test_what_one_server_has_computed_isnt_computed_again(
    loop: Callable[[SplitClient, Tensor], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of several calls and passes too."""
    monkeypatch.setattr(Deriver, "gradient", None)
    assert train("log", loop).latest_version() == 5


@pytest.mark.parametrize("loop", LOOPS)
def test_a_log_can_be_replayed(loop: Callable[[SplitClient, Tensor], None]) -> None:
    """What was acknowledged is what is kept."""
    store = train("log", loop, keep_forwards=True)
    assert replay(parts()[1], store).ok
    assert verify(store).ok


def test_an_acknowledged_batch_has_as_many_bytes_as_cross_the_cut() -> None:
    """Whatever the body's size."""
    sizes = []
    for width in (8, 512):
        store = GradientStore(f"memory://{uuid.uuid4()}")
        wide = nn.Sequential(nn.Linear(3, 64), nn.Sequential(nn.Linear(64, width), nn.Linear(width, 64)))
        half, body = split(wide, "1")
        SplitClient(half, SplitServer(body, store, durability="log"), "a")(X).sum().backward()
        sizes.append(sum(store.blobs.sizes("body/grad").values()))
    assert sizes[0] == sizes[1]
    assert sizes[0] <= 2 * 4 * 64 * 4 + 4096


@pytest.mark.filterwarnings("ignore:a gradient of client 'a' isn't finite")
def test_a_gradient_that_isnt_finite_is_rejected_and_answered() -> None:
    """Of one call, and of one part of a batch."""
    store = GradientStore(f"memory://{uuid.uuid4()}")
    half, body = parts()
    client = SplitClient(half, SplitServer(body, store, durability="log"), "a")
    accumulator = Accumulator(body, store, sgd())
    (client(X).sum() * torch.inf).backward()
    with client.batch():
        (client(X).sum() * torch.nan).backward()
        client(X).sum().backward()
    client(X).sum().backward()
    commit = accumulator.step()
    assert commit is not None
    assert (commit.num_batches, commit.num_rejected) == (1, 2)


def test_a_batch_that_comes_out_otherwise_here_waits_for_who_can_compute_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The accumulator's body has another epsilon: what was acknowledged is committed by one that has the servers'."""
    monkeypatch.setattr("splitfed.accumulator.gather.WAIT", 0.1)
    store = GradientStore(f"memory://{uuid.uuid4()}")
    half, body = parts()
    client = SplitClient(half, SplitServer(body, store, durability="log"), "a")
    client(X).sum().backward()
    wrong = parts()[1]
    wrong.norm.eps = 0.1
    accumulator = Accumulator(wrong, again(store), sgd())
    lose_sums(store)
    with pytest.warns(UserWarning, match="recomputing a forward at version 0 gave other outputs"):
        assert accumulator.step() is None
    assert accumulator.step() is None
    assert store.waiting() == [batch(0)]
    client(X).sum().backward()
    commit = accumulator.step()  # of what the server has computed
    assert commit is not None
    assert list(commit.folded) == [batch(1)]
    commit = Accumulator(body, again(store), sgd()).step()
    assert commit is not None
    assert list(commit.folded) == [batch(0)]


def test_nothing_is_committed_where_no_batch_can_be_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that nobody holds, as its calls went to several servers: it waits, and no empty version is made."""
    monkeypatch.setattr("splitfed.store.holder.Holder.put_part", lambda *given: None)
    store = GradientStore(f"memory://{uuid.uuid4()}")
    half, body = parts()
    two(SplitClient(half, SplitServer(body, store, durability="log"), "a"), X)
    wrong = parts()[1]
    wrong.norm.eps = 0.1
    accumulator = Accumulator(wrong, again(store), sgd())
    with pytest.warns(UserWarning, match="stay pending"):
        assert accumulator.step() is None
    assert accumulator.step() is None
    assert store.latest_version() == 0
    commit = Accumulator(body, again(store), sgd()).step()
    assert commit is not None
    assert list(commit.folded) == [batch(0)]


def test_a_batch_whose_weights_were_deleted_blocks_no_other() -> None:
    """Nobody can compute it any more: it is closed as rejected, and said."""
    store = GradientStore(f"memory://{uuid.uuid4()}")
    half, body = parts()
    server = SplitServer(body, store, durability="log")
    client, other = SplitClient(half, server, "a"), SplitClient(parts()[0], server, "b")
    late = client(X)
    other(X).sum().backward()
    Accumulator(body, store, sgd()).step()
    late.sum().backward()
    other(X).sum().backward()
    lose_sums(store)
    (key,) = [key for key in store.blobs.list("body/weights") if "/0000000000-" in key]
    store.blobs.delete(key)
    with pytest.warns(UserWarning, match="batch a/1/0 is rejected: .* deleted from outside"):
        commit = Accumulator(body, again(store), sgd()).step()
    assert commit is not None
    assert (list(commit.folded), list(commit.rejected)) == ([batch(1, "b")], [batch(0)])


def test_a_mode_without_a_bound_on_staleness_goes_with_a_log() -> None:
    """The log has one of its own, which is no setting of the user's."""
    for name in policies.MODES:
        mode = policies.mode(name)
        store = GradientStore(f"memory://{uuid.uuid4()}")
        accumulator = Accumulator(parts()[1], store, sgd(), durability="log", **mode.settings())
        accumulator.settings.check_mode(mode)
        assert accumulator.max_staleness == (14 if mode.max_staleness is None else mode.max_staleness)


def test_what_nobody_could_compute_is_stale_in_the_end() -> None:
    """It is closed when it leaves the window, and reported."""
    store = GradientStore(f"memory://{uuid.uuid4()}")
    half, body = parts()
    client = SplitClient(half, SplitServer(body, store, durability="log"), "a")
    client(X).sum().backward()
    lose_sums(store)
    wrong = parts()[1]
    wrong.norm.eps = 0.1
    accumulator = Accumulator(wrong, store, sgd(), keep_versions=3)
    with pytest.warns(UserWarning, match="stay pending"):
        accumulator.step()
    for _ in range(3):
        client(X).sum().backward()
        commit = accumulator.step()
    assert commit is not None
    assert (commit.num_batches, list(commit.stale)) == (1, [batch(0)])


def test_another_numerics_class_derives_it_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    """An acknowledged batch mustn't hang on a machine that is gone."""
    store = GradientStore(f"memory://{uuid.uuid4()}")
    half, body = parts()
    SplitClient(half, SplitServer(body, store, durability="log"), "a")(X).sum().backward()
    lose_sums(store)
    body.norm.eps = 0.1  # stands for a kernel that rounds otherwise
    monkeypatch.setattr("splitfed.store.store.class_id", lambda numerics: "another")
    with pytest.warns(UserWarning, match="than in the numerics class that it was first"):
        commit = Accumulator(body, store, sgd()).step()
    assert commit is not None
    assert (commit.num_batches, commit.num_foreign) == (1, 1)


def test_what_is_older_than_the_window_is_stale_and_never_derived() -> None:
    """Staleness is bounded by what stays readable; the bound is the lineage's."""
    store = GradientStore(f"memory://{uuid.uuid4()}")
    half, body = parts()
    client = SplitClient(half, SplitServer(body, store, durability="log"), "a")
    accumulator = Accumulator(body, store, sgd(), keep_versions=4)
    assert accumulator.max_staleness == 2
    late = client(X)
    for _ in range(3):
        client(X).sum().backward()
        accumulator.step()
    late.sum().backward()
    client(X).sum().backward()
    commit = accumulator.step()
    assert commit is not None
    assert (commit.num_batches, commit.num_stale) == (1, 1)
    with pytest.raises(InputError, match=r"max_staleness is 3: expected at most 2.*keep 4 versions"):
        Accumulator(body, store, sgd(), max_staleness=3)
    others = [{"keep_versions": 9}, {"keep_versions": 2}, {"max_staleness": 0}]
    found = [Accumulator(body, store, sgd(), **settings) for settings in others]
    assert [(one.max_staleness, one.keep_versions) for one in found] == [(2, 9), (0, 4), (0, 16)]


def test_all_processes_agree() -> None:
    """Another mode than the store's is refused with both names, and an unknown one before anything is written."""
    store = GradientStore(f"memory://{uuid.uuid4()}")
    half, body = parts()
    with pytest.raises(InputError, match="'power' isn't known"):
        SplitServer(body, store, durability="power")
    with pytest.raises(InputError, match="isn't known"):
        Accumulator(body, store, sgd(), durability="")
    assert store.blobs.list("") == []
    SplitServer(body, store, durability="log")
    for made in (SplitServer, lambda *given, **named: Accumulator(*given, sgd(), **named)):
        with pytest.raises(InputError, match=r"durability='log'.*durability='gradient'"):
            made(body, store, durability="gradient")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Accumulator(body, store, sgd()).step() is None
    del half


def test_two_calls_with_one_gradient_and_other_inputs_are_told_apart() -> None:
    """As the gradients are, where these are on file: copies of a running process bear one incarnation."""
    store = GradientStore(f"memory://{uuid.uuid4()}")
    half, body = parts()
    server = SplitServer(body, store, durability="log")
    client = SplitClient(half, server, "a")
    client(X).sum().backward()
    found = store.pile().read(batch(0))
    assert found is not None
    (recipe,) = found.recipes
    assert recipe.forward.inputs[0][0].shape == (4, 3)


def test_a_gradient_in_memory_is_nobody_elses() -> None:
    """Autograd hands a bias the gradient of the output itself, which the client may write to."""

    class Shift(nn.Module):
        """Its gradient is the output's."""

        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.zeros(4, 3))

        def forward(self, x: Tensor) -> Tensor:
            """A shift."""
            return x + self.shift

    store = GradientStore(f"memory://{uuid.uuid4()}")
    half, body = split(nn.Sequential(nn.Linear(3, 3), Shift()), "1")
    client = SplitClient(half, SplitServer(body, store, durability="log"), "a")
    accumulator = Accumulator(body, store, sgd())
    outputs = client(X)
    sent = torch.ones(4, 3)
    outputs.register_hook(lambda grad: None)
    outputs.backward(sent)
    sent.zero_()
    accumulator.step()
    assert torch.equal(store.load_weights()["shift"], -torch.ones(4, 3))
