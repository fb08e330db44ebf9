"""A pipelined loop: the plain loop's bits where no step comes between, and a fixed delay where one does."""

from __future__ import annotations

import copy
import itertools
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import pytest
import torch
from harness_http import running
from harness_store import Crash, adam, bits, commits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

import splitfed
from splitfed.client import BatchResult
from splitfed.client.transports import open_transport
from splitfed.errors import InputError, StoreError, UnsupportedError
from splitfed.model.rng import compute_lock
from splitfed.protocol.transport import Middleware
from splitfed.service.http.app import make_app

AT = "3:6"
Open = Callable[[Any], Any]


def cut(*, frozen: bool = False, draws: bool = True) -> tuple[nn.Module, nn.Module]:
    """Halves that draw and keep statistics on both sides of both cuts."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        rate = 0.3 if draws else 0.0
        model = nn.Sequential(
            *(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(rate)),
            *(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(rate)),
            *(nn.Linear(8, 8), nn.Tanh(), nn.Dropout(rate), nn.Linear(8, 3)),
        )
    half, body = splitfed.split(model, AT)
    return half.requires_grad_(not frozen), body


def batches(number: int = 6) -> list[tuple[Tensor, Tensor]]:
    """Batches of different sizes, so that a weight tells its batch."""
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(4 + n, 6, generator=generator), torch.randint(0, 3, (4 + n,), generator=generator))
        for n in range(number)
    ]


def augmented(number: int = 6) -> Iterator[tuple[Tensor, Tensor]]:
    """The same, by a loader that draws from torch's generator itself."""
    return ((x + 0.1 * torch.randn_like(x), y) for x, y in batches(number))


class Site:
    """A store, its server, a client of it, and an accumulator."""

    def __init__(self, between: Open = lambda server: server, *, keep_graphs: int = 8, **settings: Any) -> None:
        half, self.body = cut(**settings)
        self.store = splitfed.GradientStore(f"memory://{uuid.uuid4()}", sync="process")
        self.server = splitfed.SplitServer(self.body, self.store, keep_graphs=keep_graphs)
        self.client = splitfed.SplitClient(half, between(self.server), "a")
        self.accumulator = splitfed.Accumulator(self.body, self.store, adam)
        self.optimizer = torch.optim.SGD(self.client.parameters(), lr=0.1, momentum=0.9)
        torch.manual_seed(7)

    def ids(self) -> list[int]:
        """The numbers of the batches that wait."""
        return [batch.seq for batch in self.store.waiting()]

    def end(self) -> dict[str, Any]:
        """All that a run ends with: what each batch has stored, both halves after a commit, and the generator."""
        records = [self.store.pile().read(batch) for batch in self.store.waiting()]
        stored = [
            {
                "digest": record.digest,
                "samples": record.num_samples,
                "gradient": bits(record.gradients),
                "buffers": [bits(update.values) for update in record.buffers],
            }
            for record in records
            if record is not None
        ]
        self.accumulator.step()
        return {
            "stored": stored,
            "body": bits(self.store.load_weights()),
            "half": bits(self.client.state_dict()),
            "gradients": bits({n: p.grad for n, p in self.client.named_parameters() if p.grad is not None}),
            "generator": torch.get_rng_state().tolist(),
        }


def piped(site: Site, items: Any, optimizer: Any = None, in_flight: int = 2, **settings: Any) -> list[BatchResult]:
    """All results of a pipeline."""
    torch.manual_seed(7)
    return list(site.client.pipeline(items, cross_entropy, optimizer, in_flight, **settings))


def plain(site: Site, items: Any, optimizer: Any = None) -> list[float]:
    """The loop that everybody writes."""
    torch.manual_seed(7)
    losses = []
    for x, y in items:
        if optimizer is not None:
            optimizer.zero_grad()
        loss = cross_entropy(site.client(x), y)
        loss.backward()
        if optimizer is not None:
            optimizer.step()
        losses.append(loss.item())
    return losses


@contextmanager
def over_http(site: Site) -> Iterator[None]:
    """The site's client asks a service, in a thread of this process."""
    with running(make_app(site.server)) as service:
        site.client._connection.transport = open_transport(service.url, client_id="a")
        yield


# ------------------------------------------------------------------------------- the plain loop's bits


def test_one_in_flight_is_the_plain_loop() -> None:
    """Steps in between and all."""
    one, other = Site(), Site()
    losses = [done.loss.item() for done in piped(one, batches(), one.optimizer, 1)]
    assert losses == plain(other, batches(), other.optimizer)
    assert one.end() == other.end()


@pytest.mark.parametrize("in_flight", [2, 3, 9])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("keep_graphs", [8, 0])
def test_without_a_step_in_between_all_bits_are_the_plain_loop_s(
    in_flight: int, frozen: bool, keep_graphs: int
) -> None:
    """Of gradients, statistics on both sides, ids, weights and torch's generator, with dropout and a drawing loader."""
    one, other = Site(frozen=frozen, keep_graphs=keep_graphs), Site(frozen=frozen)
    found = piped(one, augmented(), in_flight=in_flight)
    assert [done.number for done in found] == [*range(6)]
    assert [done.loss.item() for done in found] == plain(other, augmented())
    assert one.ids() == other.ids() == [*range(6)]
    assert one.end() == other.end()


@pytest.mark.parametrize("keep_graphs", [8, 0])
def test_a_server_in_a_thread_of_this_process_gets_the_same_bits(keep_graphs: int) -> None:
    """Its body draws from the generator that the half draws from, and never at the same time."""
    one, other = Site(keep_graphs=keep_graphs), Site()
    with over_http(one):
        for _ in range(3):
            piped(one, augmented())
            plain(other, augmented())
    assert one.end() == other.end()


def test_a_call_before_it_is_continued_as_in_the_plain_loop() -> None:
    """Statistics of an earlier call without a backward are handed on to the first batch, and to no other."""
    one, other = Site(), Site()
    for site in (one, other):
        torch.manual_seed(3)
        site.client(torch.ones(5, 6)).detach()
    piped(one, batches(), in_flight=3)
    plain(other, batches())
    assert one.end() == other.end()


def test_a_held_block_sums_its_batches() -> None:
    """`with client.batch():` around a pipeline makes one batch of it."""
    one, other = Site(), Site()
    with one.client.batch():
        piped(one, batches())
    with other.client.batch():
        plain(other, batches())
    assert one.end() == other.end()


def test_many_threads_compute_with_as_many_threads_as_the_caller() -> None:
    """The thread of the backward takes torch's number."""
    before, seen = torch.get_num_threads(), []
    torch.set_num_threads(1)
    try:
        site = Site()
        site.client[0].weight.register_hook(lambda gradient: seen.append(torch.get_num_threads()))
        list(site.client.pipeline(batches(3), cross_entropy))
    finally:
        torch.set_num_threads(before)
    assert seen == [1, 1, 1]


# ------------------------------------------------------------------------------------------- overlap


class Meeting(Middleware):
    """Lets a backward go on only once a forward is under way too, and the other way round."""

    def __init__(self, inner: Any, alone: set[tuple[str, int]]) -> None:
        super().__init__(inner)
        self.alone = alone
        self.barrier = threading.Barrier(2, timeout=30)
        self.made = {"forward": 0, "backward": 0}

    def send(self, verb: str, request: Any, /) -> Any:
        """Wait for the other, but for those that have none."""
        number = self.made[verb]
        self.made[verb] += 1
        if (verb, number) not in self.alone:
            self.barrier.wait()
        return super().send(verb, request)


@pytest.mark.parametrize("in_flight", [2, 3])
def test_each_backward_meets_a_forward(in_flight: int) -> None:
    """A barrier that both must reach would stop any other loop for ever."""
    first = {("forward", n) for n in range(in_flight - 1)}
    last = {("backward", 5 - n) for n in range(in_flight - 1)}
    site = Site(lambda server: Meeting(server, first | last))
    assert len(list(site.client.pipeline(batches(), cross_entropy, site.optimizer, in_flight))) == 6


def test_a_half_of_several_cuts_overlaps_too() -> None:
    """Three requests forward and three backward, and the plain loop's bits."""
    ends = []
    for pipelined in (True, False):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = nn.Sequential(*[nn.Linear(6, 6) for _ in range(7)], nn.Dropout(0.2))
        half, body = splitfed.split(model, ["1", "3", "5"])
        store = splitfed.GradientStore(f"memory://{uuid.uuid4()}", sync="process")
        client = splitfed.SplitClient(half, splitfed.SplitServer(body, store), "a")
        torch.manual_seed(7)
        items = batches()
        if pipelined:
            list(client.pipeline(items, cross_entropy))
        else:
            for x, y in items:
                cross_entropy(client(x), y).backward()
        splitfed.Accumulator(body, store, adam).step()
        ends.append((bits(store.load_weights()), bits({n: p.grad for n, p in client.named_parameters()})))
    assert ends[0] == ends[1]


# --------------------------------------------------------------------------------------------- steps


@pytest.mark.parametrize("in_flight", [1, 2, 4])
def test_the_half_is_older_by_the_batches_in_flight_but_one(in_flight: int) -> None:
    """A forward sees the half after the step in_flight batches before it, and its gradient is of just those weights."""
    site = Site(draws=False)
    whole = splitfed.join(*cut(draws=False))
    names = {n: p for n, p in whole.named_parameters() if n.partition(".")[0] not in {"3", "4", "5"}}
    history = [{n: p.detach().clone() for n, p in names.items()}]
    for number, (x, y) in enumerate(batches()):
        before = history[max(0, number - in_flight + 1)]
        used = {n: tensor.clone().requires_grad_() for n, tensor in before.items()}
        outputs = torch.func.functional_call(whole, used, (x,))
        gradients = torch.autograd.grad(cross_entropy(outputs, y), list(used.values()))
        newest = history[-1]
        history.append({n: newest[n] - 0.25 * g for n, g in zip(used, gradients, strict=True)})
    optimizer = torch.optim.SGD(site.client.parameters(), lr=0.25)
    for number, done in enumerate(site.client.pipeline(batches(), cross_entropy, optimizer, in_flight)):
        assert done.number == number
        for name, parameter in site.client.named_parameters():
            torch.testing.assert_close(parameter.detach(), history[number + 1][name], rtol=1e-5, atol=1e-6)


def test_a_run_with_steps_is_the_same_twice() -> None:
    """What each forward sees follows from numbers: with another transport, other times and a server elsewhere."""
    ends = []
    for http in (False, True):
        site = Site()
        with over_http(site) if http else nullcontext():
            piped(site, augmented(), site.optimizer)
        ends.append(site.end())
    assert ends[0] == ends[1]


def test_a_step_of_one_s_own_clips_and_accumulates() -> None:
    """It is called once for each result, in place of the optimizer, and may read the gradients."""
    one, other = Site(), Site()
    norms: list[float] = []

    def clipped(site: Site, number: int) -> None:
        if number % 3 == 2:
            norms.append(float(nn.utils.clip_grad_norm_(site.client.parameters(), 0.1)))
            site.optimizer.step()
            site.optimizer.zero_grad()

    def step(done: BatchResult) -> None:
        clipped(one, done.number)

    with one.client.batch():
        piped(one, batches(3), step=step)
    with other.client.batch():
        plain(other, batches(3))
    clipped(other, 2)
    assert norms[0] == norms[1] > 0.1
    assert one.end() == other.end()


def test_a_backward_of_one_s_own_scales_the_loss() -> None:
    """As a GradScaler does: the scale is read at the backward, by both."""
    one, other = Site(), Site()
    for site in (one, other):
        site.client._connection.loss_scale = 4.0
    piped(one, batches(), backward=lambda loss: (4 * loss).backward())
    torch.manual_seed(7)
    for x, y in batches():
        (4 * cross_entropy(other.client(x), y)).backward()
    assert one.end() == other.end()


def test_autocast_around_it_holds_for_both_directions() -> None:
    """And casts of weights don't outlive their forward."""
    ends = []
    for in_flight in (1, 2):
        site = Site()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            piped(site, batches(), in_flight=in_flight)
        ends.append(site.end())
    assert ends[0] == ends[1]
    site = Site()
    torch.manual_seed(7)
    for x, y in batches():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = cross_entropy(site.client(x), y)
        loss.backward()
    assert site.end()["stored"] == ends[0]["stored"]


def test_an_activation_that_is_changed_in_place_raises_as_in_torch() -> None:
    """Copies of weights don't switch autograd's own check off."""
    site = Site()

    def loss(outputs: Tensor, y: Tensor) -> Tensor:
        hidden = outputs.exp()
        found = hidden.sum()
        hidden.add_(1)
        return found

    for in_flight in (1, 2):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            list(site.client.pipeline(batches(), loss, site.optimizer, in_flight))


class Checkpointed(nn.Module):
    """A part that is run again at the backward."""

    def __init__(self, *, reentrant: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Any:
        """(N, 6) to (N, 6)."""
        return checkpoint(self.layer, x.requires_grad_(), use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_in_the_half_is_refused_before_anything_is_sent(reentrant: bool) -> None:
    """It would run again on newer weights; where nothing steps it may stay."""
    half, body = splitfed.split(nn.Sequential(Checkpointed(reentrant=reentrant), nn.Linear(6, 3)), "1")
    store = splitfed.GradientStore(f"memory://{uuid.uuid4()}", sync="process")
    client = splitfed.SplitClient(half, splitfed.SplitServer(body, store), "a")
    optimizer = torch.optim.SGD(client.parameters(), lr=0.1)
    with pytest.raises(UnsupportedError, match="in_flight=1"):
        list(client.pipeline(batches(), cross_entropy, optimizer))
    assert store.waiting() == []
    list(client.pipeline(batches(), cross_entropy, optimizer, 1))
    list(client.pipeline(batches(), cross_entropy))
    assert len(store.waiting()) == 12


# --------------------------------------------------------------------------------------------- items


class Named(nn.Module):
    """A half-to-be whose arguments have names, among which `y` isn't."""

    def __init__(self) -> None:
        super().__init__()
        self.bottom, self.body = nn.Linear(6, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        """(N, 6) to (N, 3)."""
        out: Tensor = self.body(self.bottom(x) * scale)
        return out


def test_dicts_give_the_half_what_it_names_and_the_loss_all() -> None:
    """As trainers choose the columns of a data set."""
    half, body = splitfed.split(Named(), "body")
    store = splitfed.GradientStore(f"memory://{uuid.uuid4()}", sync="process")
    client = splitfed.SplitClient(half, splitfed.SplitServer(body, store), "a")
    items = [{"x": x, "scale": 2.0, "y": y} for x, y in batches()]
    found = list(client.pipeline(items, lambda outputs, batch: cross_entropy(outputs, batch["y"])))
    with torch.no_grad():
        losses = [cross_entropy(client(item["x"], 2.0), item["y"]).item() for item in items]
    assert [done.loss.item() for done in found] == losses
    assert found[3].batch is items[3]
    assert found[3].outputs.shape == (7, 3)
    assert not found[3].loss.requires_grad
    with pytest.raises(InputError, match=r"takes none of them: expected \['scale', 'x'\]"):
        next(client.pipeline([{"y": 1}], cross_entropy))


def test_several_inputs_come_before_the_target() -> None:
    """`(x, scale, y)` calls `client(x, scale)`; what it counts may be said."""
    half, body = splitfed.split(Named(), "body")
    store = splitfed.GradientStore(f"memory://{uuid.uuid4()}", sync="process")
    client = splitfed.SplitClient(half, splitfed.SplitServer(body, store), "a")
    items = [(x, 0.5, y) for x, y in batches()]
    list(client.pipeline(items, cross_entropy, num_samples=lambda item: 10.0 * len(item[0])))
    weights = [store.pile().read(batch).num_samples for batch in store.waiting()]  # type: ignore[union-attr]
    assert weights == [40.0, 50.0, 60.0, 70.0, 80.0, 90.0]


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"in_flight": 0}, "in_flight is 0: expected an integer of at least 1"),
        ({"in_flight": 2.0}, r"in_flight is 2\.0: expected an integer"),
        ({"in_flight": True}, "in_flight is True: expected an integer"),
        ({"in_flight": "2"}, "in_flight is '2': expected an integer"),
        ({"loss_fn": None}, "loss_fn is None: expected a function"),
        ({"optimizer": 0.1}, r"optimizer is 0\.1: expected one of torch\.optim"),
        ({"step": 3}, "step is 3: expected a function"),
        ({"loader": 3}, "loader is a int: expected an iterable of batches"),
    ],
)
def test_what_doesn_t_fit_is_refused_at_once(arguments: dict[str, Any], match: str) -> None:
    """Before anything is loaded."""
    given: dict[str, Any] = {"loader": batches(), "loss_fn": cross_entropy, **arguments}
    with pytest.raises(InputError, match=match):
        Site().client.pipeline(**given)


def test_an_optimizer_and_a_step_are_one_too_many() -> None:
    """Nothing that was given is left unused."""
    site = Site()
    with pytest.raises(InputError, match="pass None as the optimizer"):
        site.client.pipeline(batches(), cross_entropy, site.optimizer, step=print)


@pytest.mark.parametrize("item", [torch.ones(4, 6), (torch.ones(4, 6),), 3])
def test_an_item_without_a_target_is_refused(item: Any) -> None:
    """And the message has the way out."""
    with pytest.raises(InputError, match=r"\(\(x, x\) for x in loader\)"):
        next(Site().client.pipeline([item], cross_entropy))


# -------------------------------------------------------------------------------------------- errors


class Failing(Middleware):
    """Fails at some requests."""

    def __init__(self, inner: Any, verb: str, number: int, error: BaseException) -> None:
        super().__init__(inner)
        self.verb, self.number, self.error = verb, number, error
        self.made = 0

    def send(self, verb: str, request: Any, /) -> Any:
        """Pass it on, unless it is the one."""
        if verb == self.verb:
            self.made += 1
            if self.made == self.number + 1:
                raise self.error
        return super().send(verb, request)


def taken(pipeline: Any, error: type[BaseException]) -> tuple[list[int], list[str]]:
    """The numbers of all results, over errors; and for each error its batch and note."""
    numbers, errors = [], []
    while True:
        try:
            numbers.append(next(pipeline).number)
        except StopIteration:
            return numbers, errors
        except error as found:
            note = "".join(getattr(found, "__notes__", [f"batch {pipeline.number}"]))
            assert f"batch {pipeline.number}" in note
            errors.append(f"{pipeline.number}: {found}")


@pytest.mark.parametrize("in_flight", [1, 2, 3])
@pytest.mark.parametrize("verb", ["forward", "backward"])
def test_a_failed_request_is_raised_at_its_batch_and_the_rest_counts_once(in_flight: int, verb: str) -> None:
    """All before it are done; the next `next()` goes on after it."""
    site = Site(lambda server: Failing(server, verb, 2, StoreError("no space")))
    pipeline = site.client.pipeline(batches(), cross_entropy, site.optimizer, in_flight)
    assert taken(pipeline, StoreError) == ([0, 1, 3, 4, 5], ["2: no space"])
    commit = site.accumulator.step()
    assert commit is not None
    assert commit.num_batches == 5
    assert commit.num_samples == 4 + 5 + 7 + 8 + 9
    assert site.store.waiting() == []


@pytest.mark.parametrize("in_flight", [1, 2, 3])
def test_an_error_of_the_loss_or_the_loader_comes_after_what_was_before(in_flight: int) -> None:
    """And so does one of the step, which leaves the others as they are."""
    site, seen = Site(), []

    def loss(outputs: Tensor, y: Tensor) -> Tensor:
        seen.append(len(y))
        if len(y) == 6:
            raise KeyError("no such class")
        return cross_entropy(outputs, y)

    pipeline = site.client.pipeline(batches(), loss, None, in_flight)
    assert taken(pipeline, KeyError) == ([0, 1, 3, 4, 5], ["2: 'no such class'"])
    assert seen == [4, 5, 6, 7, 8, 9]

    def loader() -> Iterator[Any]:
        yield from batches(2)
        raise OSError("unreadable")

    assert taken(site.client.pipeline(loader(), cross_entropy, None, in_flight), OSError) == ([0, 1], ["2: unreadable"])

    def step(done: BatchResult) -> None:
        if done.number == 1:
            raise ZeroDivisionError

    own = site.client.pipeline(batches(4), cross_entropy, None, in_flight, step=step)
    assert taken(own, ZeroDivisionError) == ([0, 2, 3], ["1: "])
    assert len(site.ids()) == 5 + 2 + 4


@pytest.mark.parametrize("in_flight", [1, 2])
def test_a_stop_iteration_of_the_loss_doesn_t_end_the_loop(in_flight: int) -> None:
    """It would look as if all batches were done."""

    def loss(outputs: Tensor, y: Tensor) -> Tensor:
        raise StopIteration

    with pytest.raises(RuntimeError, match="batch 0 of a pipeline raised StopIteration"):
        list(Site().client.pipeline(batches(), loss, None, in_flight))


def test_a_loop_that_breaks_off_gives_up_what_is_ahead() -> None:
    """The client trains on; forwards without a backward leave no record behind, and nothing of them counts."""
    site = Site()
    for done in site.client.pipeline(batches(), cross_entropy, site.optimizer, 3):
        if done.number == 1:
            break
    list(site.client.pipeline(batches(2), cross_entropy, site.optimizer))
    site.client.eval()
    with torch.no_grad():
        site.client(torch.ones(2, 6))  # confirms what is gone
    assert site.ids() == [0, 1, 2, 3]
    assert site.store.blobs.list("body/forward") == []
    commit = site.accumulator.step()
    assert commit is not None
    assert commit.num_samples == 4 + 5 + 4 + 5


@pytest.mark.filterwarnings("ignore:.*move the statistics of the unsplit model")
@pytest.mark.parametrize("where", ["loss", "forward", "backward"])
def test_an_interrupt_leaves_the_client_usable(where: str) -> None:
    """Ctrl-C in the forward waits for the backward beside it; what was ahead is given up."""

    def loss(outputs: Tensor, y: Tensor) -> Tensor:
        if where == "loss" and len(y) == 6:
            raise KeyboardInterrupt
        return cross_entropy(outputs, y)

    site = Site(lambda server: Failing(server, where, 2, KeyboardInterrupt()))
    pipeline = site.client.pipeline(batches(), loss, site.optimizer)
    with pytest.raises(KeyboardInterrupt):
        list(pipeline)
    assert list(pipeline) == []
    assert not torch._C._autograd._top_saved_tensors_default_hooks(True)
    assert site.client.position()["batch"] == (3 if where == "backward" else 2)
    list(site.client.pipeline(batches(2), cross_entropy, site.optimizer))
    commit = site.accumulator.step()
    assert commit is not None
    assert commit.num_batches == 4  # batch 1 was in its backward while 2 was in its forward
    assert commit.num_samples == 4 + 5 + 4 + 5


def test_between_two_results_the_client_is_free() -> None:
    """An evaluation, another loop and a schedule in the loop's body find nothing under way."""
    one, other = Site(), Site()
    for site, in_flight in ((one, 2), (other, 1)):
        rates = torch.optim.lr_scheduler.StepLR(site.optimizer, 2)
        for done in site.client.pipeline(batches(), cross_entropy, site.optimizer, in_flight):
            rates.step()
            site.client.eval()
            with torch.no_grad():
                assert site.client(done.batch[0]).shape == done.outputs.shape
            site.client.train()
    assert one.optimizer.param_groups[0]["lr"] == other.optimizer.param_groups[0]["lr"] == pytest.approx(1e-4)
    assert one.ids() == other.ids() == [*range(6)]


def test_two_pipelines_aren_t_ahead_at_once() -> None:
    """The second says so, until the first is closed."""
    site = Site()
    first = site.client.pipeline(batches(), cross_entropy)
    next(first)
    second = site.client.pipeline(batches(), cross_entropy)
    with pytest.raises(InputError, match=r"is 1 batches ahead: exhaust it, or close\(\) it"):
        next(second)
    with first:
        pass
    assert list(first) == []
    assert len(list(second)) == 6


def test_a_simulation_s_lock_makes_it_wait_for_nothing() -> None:
    """Whoever has the compute lock already runs the same schedule in one thread."""
    one, other = Site(), Site()
    piped(one, augmented(), one.optimizer)
    with compute_lock:
        piped(other, augmented(), other.optimizer)
    assert one.end() == other.end()


# -------------------------------------------------------------------------------------------- resume


class Mortal(Middleware):
    """Dies at the n-th request: before it is delivered, or after it, when the answer is lost."""

    def __init__(self, inner: Any, at: int, *, delivered: bool) -> None:
        super().__init__(inner)
        self.left, self.delivered = at, delivered

    def send(self, verb: str, request: Any, /) -> Any:
        """Pass it on, unless it is the last one."""
        self.left -= 1
        if self.left >= 0:
            return super().send(verb, request)
        if self.left == -1 and self.delivered:
            super().send(verb, request)
        raise Crash(verb)


def trained(deaths: list[tuple[int, bool]], in_flight: int = 2) -> dict[str, Any]:
    """A run in parts of three batches, with a checkpoint after each and a commit, that dies and is started again."""
    site = Site()
    saved: dict[str, Any] | None = None
    reached = 0
    while True:
        at, delivered = deaths.pop(0) if deaths else (10**9, False)
        client = splitfed.SplitClient(cut()[0], Mortal(site.server, at, delivered=delivered), "a")
        optimizer = torch.optim.SGD(client.parameters(), lr=0.05, momentum=0.9)
        torch.manual_seed(7)
        if saved is None:
            saved = {"part": 0, "position": client.position(), "half": None}
        if saved["half"] is not None:
            client.load_state_dict(saved["half"])
            optimizer.load_state_dict(saved["optimizer"])
            torch.set_rng_state(saved["random"])
        client.resume(saved["position"])
        with suppress(Crash):
            for part in range(saved["part"], 3):
                items = itertools.islice(batches(9), 3 * part, 3 * part + 3)
                list(client.pipeline(items, cross_entropy, optimizer, in_flight))
                if part >= reached:
                    site.accumulator.step()
                    reached = part + 1
                half = {name: tensor.clone() for name, tensor in client.state_dict().items()}
                saved = {
                    "part": part + 1,
                    "half": half,
                    "optimizer": copy.deepcopy(optimizer.state_dict()),
                    "random": torch.get_rng_state(),
                    "position": client.position(),
                }
            folded = [str(batch) for commit in commits(site.store) for batch in commit.folded]
            assert folded == [f"a/1/{seq}" for seq in range(9)]
            assert site.store.waiting() == []
            return {"half": bits(client.state_dict()), "body": bits(site.store.load_weights())}


@pytest.mark.parametrize("delivered", [False, True])
def test_a_killed_pipeline_repeats_its_batches_under_their_numbers(delivered: bool) -> None:
    """From the last checkpoint, wherever it dies: each counts once, and no bit differs."""
    expected = trained([])
    for at in range(1, 18, 4):
        assert trained([(at, delivered)]) == expected


def test_a_position_isn_t_taken_while_forwards_are_ahead() -> None:
    """It would skip them; the message says how to save within an epoch."""
    site = Site()
    for done in site.client.pipeline(batches(3), cross_entropy):
        if done.number < 2:
            with pytest.raises(InputError, match=r"forwards are 1 batches ahead .*itertools\.islice"):
                site.client.position()
    assert site.client.position()["batch"] == 3
    for _ in site.client.pipeline(batches(2), cross_entropy, in_flight=1):
        site.client.position()


@pytest.mark.skipif(sys.version_info < (3, 11), reason="notes are of Python 3.11")
def test_an_error_has_its_batch_in_a_note() -> None:
    """A traceback shows it."""
    site = Site(lambda server: Failing(server, "backward", 1, StoreError("no space")))
    with pytest.raises(StoreError) as found:
        list(site.client.pipeline(batches(), cross_entropy))
    assert found.value.__notes__ == ["in batch 1 of a pipeline, counted from 0"]
