"""The accumulator: what waits becomes the next version, by hand-worked numbers and by every setting."""

from __future__ import annotations

import copy
import threading
import uuid
from pathlib import Path
from typing import Any

import harness_store as h
import pytest
import torch
from harness_store import Point, adam, again, batch, bits, drain, plant, record, sgd
from torch import nn

from splitfed.accumulator.accumulator import Accumulator
from splitfed.accumulator.policies import inverse_sqrt
from splitfed.client.client import SplitClient
from splitfed.errors import InputError, UnsupportedError
from splitfed.model.cutpoint import CutPoint
from splitfed.server.server import SplitServer
from splitfed.store.batchset import BatchSet, Verdict
from splitfed.store.store import GradientStore


@pytest.fixture
def store(store_url: str) -> GradientStore:
    """An empty store."""
    return GradientStore(store_url, sync="process")


def w(store: GradientStore, name: str = "w") -> list[float]:
    """A parameter of the newest version, as another process reads it."""
    return again(store).load_weights()[name].tolist()


def test_the_mean_is_weighted_by_samples(store: GradientStore) -> None:
    """W − (1·[1, 2] + 3·[5, 10])/4 = −[4, 8] at rate 1."""
    accumulator = Accumulator(Point(), store, sgd())
    store.pile().create(batch(0), record([1.0, 2.0], num_samples=1))
    store.pile().create(batch(0, "b"), record([5.0, 10.0], num_samples=3))
    commit = accumulator.step()
    assert commit is not None
    assert (commit.version, commit.kind, commit.num_batches, commit.num_samples) == (1, "fold", 2, 4.0)
    assert w(store) == [-4.0, -8.0]


def test_the_loss_scale_is_divided_out(store: GradientStore) -> None:
    """A loss that was multiplied by 1024 moves the weights as if it hadn't been."""
    accumulator = Accumulator(Point(), store, sgd())
    store.pile().create(batch(0), record([1024.0, -512.0], loss_scale=1024.0))
    accumulator.step()
    assert w(store) == [-1.0, 0.5]


def test_a_commit_comes_about_when_min_batches_wait_and_folds_all(store: GradientStore) -> None:
    """Nothing at two of three; four at once when a fourth is there too."""
    accumulator = Accumulator(Point(), store, sgd(), min_batches=3)
    for seq in range(2):
        store.pile().create(batch(seq), record())
        assert accumulator.step() is None
    assert store.latest_version() == 0
    for seq in range(2, 4):
        store.pile().create(batch(seq), record())
    commit = accumulator.step()
    assert commit is not None
    assert commit.num_batches == 4
    assert accumulator.step() is None


def test_a_commit_folds_the_oldest_up_to_a_number(store: GradientStore) -> None:
    """Older versions first; of one version each client's first, then anybody's second: all by ids alone."""
    accumulator = Accumulator(Point(), store, sgd(), min_batches=2, max_batches=3)
    for seq in range(4):
        store.pile().create(batch(seq), record([1.0 + seq] * 2))
    store.pile().create(batch(0, "b"), record([8.0, 8.0]))
    commit = accumulator.step()
    assert commit is not None
    assert list(commit.folded) == [batch(0), batch(1), batch(0, "b")]
    assert w(store) == pytest.approx([-(1 + 2 + 8) / 3] * 2)
    # Two of version 0 are left; they go before four of version 1, though these are another's.
    for seq in range(1, 5):
        store.pile().create(batch(seq, "b"), record([0.0, 0.0], base_version=1))
    found = [list(commit.folded) for commit in iter(accumulator.step, None)]
    assert found == [[batch(2), batch(3), batch(1, "b")], [batch(seq, "b") for seq in (2, 3, 4)]]
    made = again(store).lineage("body").commit(2)
    assert dict(made.staleness) == {0: 1, 1: 2}
    assert [made.base_of(one) for one in made.folded] == [0, 0, 1]


def test_what_a_round_decided_is_folded_whole_and_a_number_of_ones_own_counts_once(store: GradientStore) -> None:
    """`only` has named the batches; `min_batches=1` folds what is left, up to as many as ever."""
    accumulator = Accumulator(Point(), store, sgd(), min_batches=2, max_batches=2)
    for seq in range(7):
        store.pile().create(batch(seq), record())
    commit = accumulator.step(1, only=Verdict(folded=BatchSet(batch(seq) for seq in range(4))))
    assert commit is not None
    assert commit.num_batches == 4
    assert [commit.num_batches for commit in iter(lambda: accumulator.step(1), None)] == [2, 1]


def test_a_log_folds_the_oldest_to_the_same_bits() -> None:
    """Servers' sums over more batches don't fit a commit: the gradients are computed again."""
    ends = []
    for durability in ("gradient", "log"):
        store = GradientStore(f"memory://{uuid.uuid4()}")
        server = SplitServer(h.net(), store, durability=durability)
        accumulator = Accumulator(h.net(), store, adam, max_batches=3, durability=durability)
        for name in ("a", "b"):
            client = SplitClient(nn.Sequential(CutPoint(), nn.Tanh()), server, name)
            for number in range(4):
                client(torch.eye(3) * (1 + number)).sum().backward()
        made = [commit.num_batches for commit in iter(accumulator.step, None)]
        assert made == [3, 3, 2]
        ends.append(bits(store.load_weights()))
    assert ends[0] == ends[1]


def test_what_is_too_old_is_counted_as_stale_and_isnt_folded(store: GradientStore) -> None:
    """At head 3 with max_staleness 1, bases 3 and 2 are folded, 1 and 0 are stale; all are closed."""
    accumulator = Accumulator(Point(), store, sgd(), max_staleness=1)
    for seq in range(3):
        store.pile().create(batch(seq), record([0.0, 0.0], base_version=seq))
        accumulator.step()
    for base in range(4):
        store.pile().create(batch(base, "b"), record([1.0 + base] * 2, base_version=base))
    commit = accumulator.step()
    assert commit is not None
    assert list(commit.folded) == [batch(2, "b"), batch(3, "b")]
    assert list(commit.stale) == [batch(0, "b"), batch(1, "b")]
    assert (commit.num_stale, dict(commit.staleness)) == (2, {0: 1, 1: 1})
    assert w(store) == [-3.5, -3.5]
    h.check_counted_once(store, [*map(batch, range(3)), *(batch(seq, "b") for seq in range(4))])


def test_a_stale_gradient_weighs_less_in_the_numerator_only(store: GradientStore) -> None:
    """At head 3: −(1·6·1 + 1·6·½)/(1 + 1) = −4.5, with s(3) = 1/√4 for the base of 0."""
    accumulator = Accumulator(Point(), store, sgd(), staleness_weight=inverse_sqrt)
    for seq in range(3):
        store.pile().create(batch(seq), record([0.0, 0.0], base_version=seq))
        accumulator.step()
    store.pile().create(batch(3), record([6.0, 6.0], base_version=3))
    store.pile().create(batch(4), record([6.0, 6.0], base_version=0))
    accumulator.step()
    assert w(store) == [-4.5, -4.5]


def test_the_mean_is_clipped_to_a_global_norm(store: GradientStore) -> None:
    """[3, 4] has norm 5; clipped to 1 it is [0.6, 0.8]. What is below the norm isn't touched."""
    accumulator = Accumulator(Point(), store, sgd(), clip_norm=1.0)
    store.pile().create(batch(0), record([3.0, 4.0]))
    accumulator.step()
    assert w(store) == pytest.approx([-0.6, -0.8], rel=1e-5)
    store.pile().create(batch(1), record([0.25, 0.25]))
    accumulator.step()
    assert w(store) == pytest.approx([-0.85, -1.05], rel=1e-5)


def test_param_groups_have_rates_of_their_own(store: GradientStore) -> None:
    """`w` at rate 1, `slow` at 0.125."""

    def groups(body: nn.Module) -> list[dict[str, Any]]:
        return [{"params": [body.w]}, {"params": [body.slow], "lr": 0.125}]

    accumulator = Accumulator(Point(slow=torch.zeros(2)), store, sgd(), param_groups=groups)
    for seq in range(2):
        store.pile().create(batch(seq), record(gradients={"w": torch.ones(2), "slow": torch.ones(2)}))
        accumulator.step()
    assert (w(store), w(store, "slow")) == ([-2.0, -2.0], [-0.25, -0.25])


def test_the_schedule_steps_once_per_commit_in_whatever_process(store: GradientStore) -> None:
    """StepLR(2, ½) from rate 1: steps of 1, 1, ½, ½, ¼, each by an accumulator built anew."""
    seen = []
    for seq in range(5):
        accumulator = Accumulator(Point(), again(store), sgd(), lr_scheduler=h.halving)
        store.pile().create(batch(seq), record([1.0, 1.0], base_version=seq))
        accumulator.step()
        seen.append(w(store)[0])
    assert seen == [-1.0, -2.0, -2.5, -3.0, -3.25]


def test_a_parameter_that_no_batch_reached_keeps_no_gradient(store: GradientStore) -> None:
    """Adam with weight decay would move it on a gradient of zero: it stays, and Adam has no state for it."""
    factory = lambda params: torch.optim.AdamW(params, lr=0.1, weight_decay=0.5)  # noqa: E731
    accumulator = Accumulator(Point(unused=torch.ones(2)), store, factory)
    for seq in range(3):
        store.pile().create(batch(seq), record())
        accumulator.step()
    assert w(store, "unused") == [1.0, 1.0]
    assert w(store) != [0.0, 0.0]
    assert sorted(again(store).lineage().optimizer(3)["optimizer"]["state"]["state"]) == [0]


def test_a_parameter_that_some_batches_reached_counts_zero_for_the_others(store: GradientStore) -> None:
    """(1·4 + 3·0)/4 = 1."""
    accumulator = Accumulator(Point(some=torch.zeros(1)), store, sgd())
    store.pile().create(batch(0), record(gradients={"w": torch.ones(2), "some": torch.tensor([4.0])}, num_samples=1))
    store.pile().create(batch(1), record(gradients={"w": torch.ones(2)}, num_samples=3))
    accumulator.step()
    assert w(store, "some") == [-1.0]


def test_frozen_parameters_are_never_changed_nor_expected(store: GradientStore) -> None:
    """They are in every version, bit for bit, and a gradient of one is refused."""
    frozen = torch.tensor([0.1, 0.2])
    accumulator = Accumulator(Point(frozen=frozen), store, h.adam)
    store.pile().create(batch(0), record())
    store.pile().create(batch(1), record(gradients={"frozen": torch.ones(2)}))
    with pytest.warns(UserWarning, match="a/1/1 is rejected.*frozen"):
        accumulator.step()
    assert torch.equal(again(store).load_weights(1)["frozen"], frozen)


def test_another_optimizer_on_an_existing_store_is_refused(store: GradientStore) -> None:
    """Its state isn't the stored one: the error says what was and what is; no version is made."""
    accumulator = Accumulator(Point(), store, h.adam)
    store.pile().create(batch(0), record())
    accumulator.step()
    store.pile().create(batch(1), record())
    with pytest.raises(InputError, match=r"Adam.*expected SGD"):
        Accumulator(Point(), again(store), sgd()).step()
    assert store.latest_version() == 1


def test_run_commits_until_it_is_told_to_stop(store: GradientStore) -> None:
    """It waits for batches, reports each commit, and ends by its event or by `stop()`."""
    accumulator, made, twice = Accumulator(Point(), store, sgd()), [], threading.Event()

    def report(commit: Any) -> None:
        made.append(commit.version)
        store.pile().create(batch(len(made)), record()) if len(made) < 3 else twice.set()

    store.pile().create(batch(0), record())
    thread = threading.Thread(target=lambda: made.append(-accumulator.run(poll=0.001, on_commit=report)))
    thread.start()
    assert twice.wait(60)
    accumulator.stop()
    thread.join(60)
    assert made == [1, 2, 3, -3]
    store.pile().create(batch(9), record())
    assert accumulator.run() == 0, "a stop holds for a run that begins later"
    twice.set()
    assert Accumulator(Point(), store, sgd()).run(twice) == 0


def test_run_looks_again_at_once_while_batches_come(store: GradientStore) -> None:
    """The poll is the longest pause, of an hour here: a batch that follows soon is seen soon."""
    accumulator, stop, committed = Accumulator(Point(), store, sgd(), min_batches=2), threading.Event(), []
    looked = threading.Event()
    step = accumulator.step

    def watched() -> Any:
        found = step()
        looked.set()
        return found

    accumulator.step = watched  # type: ignore[method-assign]
    store.pile().create(batch(0), record())
    settings: dict[str, Any] = {"poll": 3600.0, "on_commit": lambda commit: (committed.append(commit), stop.set())}
    thread = threading.Thread(target=accumulator.run, args=(stop,), kwargs=settings, daemon=True)
    thread.start()
    assert looked.wait(60), "one of two waits"
    store.pile().create(batch(1), record())
    thread.join(60)
    assert [commit.num_batches for commit in committed] == [2]


def test_the_lock_of_another_accumulator_is_waited_for_but_not_relied_on(store: GradientStore) -> None:
    """Who holds it for ever costs `lock_seconds`, no more."""
    accumulator = Accumulator(Point(), store, sgd(), lock_seconds=0.01)
    store.pile().create(batch(0), record())
    with again(store).blobs.lock("body/commit", 10) as held:
        assert held
        assert accumulator.step() is not None


SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"min_batches": 0}, "min_batches is 0"),
    ({"min_batches": 1.5}, "min_batches is 1.5"),
    ({"min_batches": True}, "min_batches is True"),
    ({"max_staleness": -1}, "max_staleness is -1"),
    ({"keep_versions": 1}, "keep_versions is 1: expected an integer of at least 2"),
    ({"keep_versions": 5, "max_staleness": 4}, "keep_versions is 5: expected an integer of at least 6"),
    ({"clip_norm": 0.0}, "clip_norm"),
    ({"clip_norm": float("nan")}, "clip_norm"),
    ({"lineage": "../body"}, "lineage"),
    ({"buffer_rules": {"nothing": "mean"}}, "fits no buffer"),
]


@pytest.mark.parametrize(("setting", "message"), SETTINGS)
def test_settings_out_of_range_are_refused_before_anything_is_written(
    store: GradientStore, setting: dict[str, Any], message: str
) -> None:
    """The error says what was given and what is expected; the store stays empty."""
    with pytest.raises(InputError, match=message):
        Accumulator(Point(), store, sgd(), **setting)
    assert store.blobs.list("") == []


def test_the_window_is_wide_enough_for_the_staleness_that_is_allowed(store: GradientStore) -> None:
    """16 versions by default, more if max_staleness needs them."""
    assert Accumulator(Point(), store, sgd()).keep_versions == 16
    assert Accumulator(Point(), store, sgd(), max_staleness=30).keep_versions == 32


def test_what_isnt_a_store_or_an_optimizer_is_refused(store: GradientStore) -> None:
    """Each has its own error, at construction."""
    with pytest.raises(InputError, match="GradientStore"):
        Accumulator(Point(), "runs/demo", sgd())  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match="LBFGS"):
        Accumulator(Point(), store, torch.optim.LBFGS)
    assert store.blobs.list("") == []


def test_the_body_that_was_given_isnt_changed(store: GradientStore) -> None:
    """Neither its weights nor its gradients; it may go on living elsewhere."""
    body = h.net()
    before = bits(body.state_dict())
    accumulator = Accumulator(body, store, h.adam)
    store.pile().create(batch(0), h.noisy(body, batch(0), 0))
    assert len(drain(accumulator)) == 1
    assert bits(body.state_dict()) == before != bits(again(store).load_weights())
    assert all(parameter.grad is None for parameter in body.parameters())


def test_a_batch_of_a_version_that_another_has_just_made_isnt_called_unfit(
    store: GradientStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The attempt begins again from there: no warning, and the batch counts."""
    one, other = (Accumulator(Point(), found, sgd()) for found in (store, again(store)))
    plant(store, batch(0), record())
    pending = one._pending

    def late(*given: Any) -> Any:
        monkeypatch.undo()
        assert other.step() is not None
        plant(store, batch(1), record(base_version=1))
        return pending(*given)

    monkeypatch.setattr(one, "_pending", late)
    commit = one.step()
    assert commit is not None
    assert (commit.version, list(commit.folded), one.num_conflicts) == (2, [batch(1)], 1)


def test_another_rate_at_a_restart_is_told_and_the_store_s_goes_on() -> None:
    """From 0 a step of rate 1 and, by an accumulator that was asked for ½, another: −2, and not −1.5."""
    store = GradientStore(f"memory://{uuid.uuid4()}")
    for seq, rate in enumerate((1.0, 0.5)):
        accumulator = Accumulator(Point(), store, sgd(rate))
        plant(store, batch(seq), record(base_version=seq))
        if rate == 1.0:
            accumulator.step()
            continue
        with pytest.warns(UserWarning, match=r"goes on with the store's .*'lr': 1.0.*, not with .*'lr': 0.5"):
            accumulator.step()
    assert store.load_weights()["w"].tolist() == [-2.0, -2.0]


def test_a_body_that_is_wholly_frozen_moves_its_buffers(store: GradientStore) -> None:
    """As the unsplit model's: the parameters stay, no optimizer is made, and a restart goes on."""
    body = h.net().requires_grad_(False)
    unsplit = copy.deepcopy(body)
    server = SplitServer(nn.Sequential(body), store)
    inputs = torch.randn(3, 4, 3)
    for number, x in enumerate(inputs):
        client = SplitClient(nn.Sequential(CutPoint(), nn.Linear(2, 2)), server, client_id="a")
        client(x.clone().requires_grad_()).sum().backward()
        unsplit(x)
        (commit,) = drain(Accumulator(nn.Sequential(body), store, refuse_to_optimize))
        assert (commit.version, commit.num_batches, set(commit.files)) == (number + 1, 1, {"weights"})
    assert bits(again(store).load_weights()) == bits(nn.Sequential(unsplit).state_dict())
    assert store.waiting() == []


def test_an_accumulator_goes_on_with_the_buffers_that_are_in_the_store(store: GradientStore, tmp_path: Path) -> None:
    """One that has committed before doesn't read them again; each file is the one that a new process writes."""
    body = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1))
    body.register_buffer("flat", torch.zeros(1).expand(4))
    body.register_buffer("turned", torch.arange(6.0).view(2, 3).t())
    other = GradientStore(tmp_path / "other", sync="process")
    kept, made = Accumulator(body, store, adam), []
    Accumulator(body, other, adam)
    for version in range(4):
        for here in (store, other):
            first = version * (version + 1) // 2
            for seq in range(first, first + version + 1):
                plant(here, batch(seq), h.noisy(body, batch(seq), version))
        made.append((kept.step(), Accumulator(body, other, adam).step()))
    files = [(one and dict(one.files), two and dict(two.files)) for one, two in made]
    assert all(one is not None and one == two for one, two in files)


def test_batches_of_a_frozen_body_without_buffers_are_closed(store: GradientStore) -> None:
    """There is nothing to change: each is counted, and none waits for ever."""
    body = nn.Linear(2, 2).requires_grad_(False)
    accumulator = Accumulator(body, store, refuse_to_optimize, clip_norm=1.0, lr_scheduler=h.halving)
    for seq in range(3):
        store.pile().create(batch(seq), record(gradients={}))
    commit = accumulator.step()
    assert commit is not None
    assert (commit.num_batches, store.waiting()) == (3, [])
    assert bits(again(store).load_weights()) == bits(body.state_dict())


def refuse_to_optimize(params: Any) -> torch.optim.Optimizer:
    """A factory that must not be called."""
    raise AssertionError(f"asked to optimize {params}")


@pytest.mark.filterwarnings("ignore:batch a/1/.* is rejected")
def test_a_standby_remembers_no_more_than_is_pending(store: GradientStore) -> None:
    """It looks at twelve hundred batches, some unreadable, and another accumulator closes them all."""
    begun = Accumulator(Point(), store, sgd())
    standby = Accumulator(Point(), again(store), sgd(), min_batches=301)
    for turn in range(4):
        for seq in range(turn * 300, (turn + 1) * 300):
            plant(store, batch(seq), b"no gradient" if seq % 100 == 7 else record(base_version=turn))
        assert standby.step() is None
        assert len(standby._headers) + len(standby._unfit) == 300
        assert begun.step() is not None
    assert standby.step() is None
    assert (standby._headers, standby._unfit) == ({}, set())
    assert len(again(store).lineage().counted()) == 1_200
