"""Compression of what crosses: the server computes on decoded values, whichever way they came, and repeats them."""

from __future__ import annotations

import uuid
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from coders import codecs
from harness_http import running
from harness_store import adam, again, bits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

import splitfed
from splitfed.diagnostics.forgetting import forget
from splitfed.errors import FormatError, IdError, InputError, StoreError
from splitfed.protocol.coding import Codec, decode, encode
from splitfed.protocol.compression import FLOWS, Codecs, Compression
from splitfed.protocol.messages import BackwardRequest, ForwardRequest
from splitfed.protocol.packing import pack, unpack
from splitfed.protocol.transport import Middleware, RoundRobin
from splitfed.service.http.app import make_app
from splitfed.service.mailbox.worker import Worker
from splitfed.store.quota import Ledger, Quota

WIDTH = 32
LOSSY = ["bfloat16", "int8", "topk:0.25"]


def cut() -> tuple[nn.Module, nn.Module]:
    """Halves whose activations take a few kilobytes."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        body = [nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Dropout(0.2)]
        model = nn.Sequential(nn.Linear(6, WIDTH), nn.Tanh(), *body, nn.Linear(WIDTH, 3))
    return splitfed.split(model, "2:5")


def batch(number: int, size: int = 64) -> tuple[Tensor, Tensor]:
    """The same for the same number."""
    generator = torch.Generator().manual_seed(number)
    return torch.randn(size, 6, generator=generator), torch.randint(0, 3, (size,), generator=generator)


class Tap(Middleware):
    """Keeps what passes."""

    def __init__(self, inner: Any) -> None:
        super().__init__(inner)
        self.requests: list[Any] = []
        self.answers: list[Any] = []
        self.fails_at = -1
        self.delivers = True

    def send(self, verb: str, request: Any, /) -> Any:
        """Keep it, and its answer; lose one of these if asked to."""
        self.requests.append(request)
        fails = len(self.requests) - 1 == self.fails_at
        if fails and not self.delivers:
            raise StoreError("lost on the way there")
        answer = super().send(verb, request)
        self.answers.append(answer)
        if fails:
            raise StoreError("lost on the way back")
        return answer


class Site:
    """A store with a server, and a client whose transport is tapped below its compression."""

    def __init__(self, compression: Any = None, url: str | None = None, **settings: Any) -> None:
        half, self.body = cut()
        self.store = splitfed.GradientStore(url or f"memory://{uuid.uuid4()}", sync="process")
        self.server = splitfed.SplitServer(self.body, self.store, loss_fn=cross_entropy, **settings)
        self.tap = Tap(self.server)
        self.client = splitfed.SplitClient(half, self.tap, "a", compression=compression)
        torch.manual_seed(7)

    def train(self, steps: int = 3, size: int = 64) -> None:
        """A few batches, with steps of the half."""
        optimizer = torch.optim.SGD(self.client.parameters(), lr=0.1)
        for number in range(steps):
            x, y = batch(number, size)
            optimizer.zero_grad()
            cross_entropy(self.client(x), y).backward()
            optimizer.step()

    def end(self) -> Any:
        """What is stored, and the half."""
        records = [self.store.pile().read(one) for one in self.store.waiting()]
        stored = [(record.digest, bits(record.gradients)) for record in records if record is not None]
        splitfed.Accumulator(self.body, self.store, adam).step()
        return stored, bits(self.store.load_weights()), bits(self.client.state_dict())

    def flows(self) -> dict[str, Any]:
        """What compression has done."""
        assert self.client.compression is not None
        return self.client.compression.flows


class ByHand(Middleware):
    """Rounds what passes to what a codec makes of it, and sends plain tensors: what compression has to equal."""

    def __init__(self, inner: Any, name: str) -> None:
        super().__init__(inner)
        self.codec = Codec.of(name)

    def rounded(self, tensor: Tensor | None) -> Tensor | None:
        """A tensor as the other end sees it."""
        made = None if tensor is None else encode(tensor, self.codec, 0)
        return tensor if made is None else decode(*made)

    def send(self, verb: str, request: Any, /) -> Any:
        """In both directions."""
        if verb == "forward":
            ((x,), kwargs) = request.inputs
            answer = super().send(verb, replace(request, inputs=((self.rounded(x),), kwargs)))
            return replace(answer, outputs=self.rounded(answer.outputs))
        if verb == "backward":
            grads = tuple(map(self.rounded, request.grad_outputs))
            answer = super().send(verb, replace(request, grad_outputs=grads))
            return replace(answer, grad_inputs=tuple(map(self.rounded, answer.grad_inputs)))
        return super().send(verb, request)


# ------------------------------------------------------------------------------------- what is computed


def test_exact_is_the_default() -> None:
    """Nothing is coded, and messages have the bytes that they had."""
    site = Site()
    site.train(1)
    assert site.client.compression is None
    assert all(request.coding == () for request in site.tap.requests)
    assert b"coding" not in b"".join(map(bytes, pack(site.tap.requests[0])))


@pytest.mark.parametrize("name", codecs("bfloat16", "int8", "zstd", "int8+zstd"))
@pytest.mark.parametrize("durability", ["gradient", "log"])
def test_the_server_computes_and_stores_on_decoded_values(name: str, durability: str) -> None:
    """Records, digests and gradients are as if the rounded values had come plain; recomputed, in both modes."""
    one, other = (Site(name if coded else None, keep_graphs=0, durability=durability) for coded in (True, False))
    other.client._connection.transport = ByHand(other.server, name)
    for site in (one, other):
        torch.manual_seed(7)
        site.train()
    assert one.end() == other.end()


@contextmanager
def through(site: Site, way: str) -> Iterator[Any]:
    """A way to the site's server from another process, or what stands for one."""
    with ExitStack() as stack:
        if way == "direct":
            yield site.server
        elif way == "http":
            yield stack.enter_context(running(make_app(site.server))).url
        else:
            worker = Worker(site.server, site.store)
            thread = Thread(target=worker.run, kwargs={"poll": 0.01})
            thread.start()
            stack.callback(thread.join)
            stack.callback(worker.stop)
            yield site.store.url


@pytest.mark.parametrize("name", codecs(*LOSSY, "int8+zstd"))
def test_each_way_carries_it(name: str, tmp_path: Path) -> None:
    """In process, over HTTP and through the store: the same bits, for a codec in all four flows."""
    ends = []
    for way in ("direct", "http", "mailbox"):
        site = Site(name, f"file://{tmp_path}/{way}")
        with through(site, way) as server:
            site.client = splitfed.SplitClient(cut()[0], server, "a", compression=name)
            torch.manual_seed(7)
            site.train()
            ends.append((site.end(), site.flows()))
    assert ends[0] == ends[1] == ends[2]


@pytest.mark.parametrize("flow", FLOWS)
def test_each_flow_has_a_codec_of_its_own(flow: str) -> None:
    """The other three stay exact, and are counted as such."""
    site = Site({flow: "int8"})
    site.train()
    found = site.flows()
    assert {name for name in FLOWS if found[name].coded} == {flow}
    assert all(found[name].ratio == 1.0 and found[name].relative_error == 0.0 for name in FLOWS if name != flow)
    assert found[flow].tensors == found[flow].coded == 3
    assert found[flow].exact_bytes == 3 * 64 * WIDTH * 4
    assert 0.25 < found[flow].ratio <= 0.27
    assert 0.001 < found[flow].relative_error < 0.02


def test_a_loss_on_the_server_is_of_decoded_activations() -> None:
    """Its target stays exact; the gradients come down coded."""
    half, body = splitfed.split(nn.Sequential(nn.Linear(6, WIDTH), nn.Linear(WIDTH, 3)), "1")
    store = splitfed.GradientStore(f"memory://{uuid.uuid4()}", sync="process")
    server = splitfed.SplitServer(body, store, loss_fn=cross_entropy)
    client = splitfed.SplitClient(half, server, "a", compression="int8")
    x, y = batch(0)
    loss = client.loss(x, y)
    loss.backward()
    sent = encode(half[0](x).detach(), Codec.of("int8"), 0)
    assert sent is not None
    assert torch.equal(loss.detach(), cross_entropy(body(decode(*sent)), y).detach())
    assert client.compression is not None
    coded = {flow: found.coded for flow, found in client.compression.flows.items()}
    assert coded == {"activations": 1, "outputs": 0, "grad_outputs": 0, "grad_activations": 1}
    assert len(store.waiting()) == 1


class Masked(nn.Module):
    """A half, or a body, of an activation and a mask."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: Tensor, mask: Tensor) -> Any:
        """(N, C) each."""
        return self.part(x, mask)


class Product(nn.Module):
    """What a mask leaves of an activation."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """(N, C) each."""
        return x * mask


@pytest.mark.parametrize(("needs_grad", "coded"), [(True, [0]), (False, [0, 1])])
def test_a_mask_beside_an_activation_stays_exact(needs_grad: bool, coded: list[int]) -> None:
    """What needs no gradient is no activation; in a frozen half, where nothing does, all floats are coded."""
    half, body = splitfed.split(Masked(Product()), "part")
    tap = Tap(splitfed.SplitServer(body, splitfed.GradientStore(f"memory://{uuid.uuid4()}", sync="process")))
    client = splitfed.SplitClient(half, tap, "a", compression="int8")
    client(torch.ones(64, 64, requires_grad=needs_grad), torch.ones(64, 64))
    assert [one.place for one in tap.requests[0].coding] == coded


# --------------------------------------------------------------------------------------- repetitions


@pytest.mark.parametrize("name", codecs("int8", "topk:0.25", "zstd"))
@pytest.mark.parametrize("delivers", [False, True])
def test_a_lost_request_comes_again_with_the_same_bytes(name: str, delivers: bool) -> None:
    """A transport repeats what it was given; error feedback moves on only once an answer is there."""

    class Again(Middleware):
        def send(self, verb: str, request: Any, /) -> Any:
            try:
                return super().send(verb, request)
            except StoreError:
                return super().send(verb, request)

    one, other = Site(name), Site(name)
    one.tap.fails_at, one.tap.delivers = 3, delivers
    compression = one.client.compression
    assert compression is not None
    compression.inner = Again(one.tap)
    for site in (one, other):
        torch.manual_seed(7)
        site.train()
    lost, again = one.tap.requests[3:5]
    assert lost.digest() == again.digest()
    assert one.end() == other.end()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["int8", "topk:0.25"])
def test_a_checkpoint_repeats_what_its_call_was_sent(name: str, reentrant: bool) -> None:
    """The server compares the outputs of both, so an error that is fed back must be the same again."""
    site = Site(name)
    for number in range(4):
        x, y = batch(number)
        x.requires_grad_(reentrant)
        outputs = checkpoint(site.client, x, use_reentrant=reentrant)
        cross_entropy(outputs, y).backward()
    assert len(site.store.waiting()) == 4


# ------------------------------------------------------------------------------------ error feedback


def test_what_topk_leaves_out_is_sent_later() -> None:
    """Over many requests of the same gradient the sum of what was sent comes close to the sum of what is."""
    x = torch.randn(8, 512, generator=torch.Generator().manual_seed(0))
    arrived: list[Tensor] = []

    class Server:
        def forward(self, request: ForwardRequest) -> Any:
            arrived.append(request.decoded().inputs[0][0])
            return type("Answer", (), {"outputs": (), "coding": (), "decoded": lambda self: self})()

        backward = loss = push = pull = forward

    compression = Compression(Server(), {"activations": "topk:0.05"})  # type: ignore[arg-type]
    for call in range(60):
        compression.forward(ahead(x, call))
    assert float((sum(arrived) / 60 - x).norm() / x.norm()) < 0.2
    assert float((arrived[0] - x).norm() / x.norm()) > 0.7
    torch.testing.assert_close(sum(arrived) + residual(compression), 60 * x, rtol=1e-4, atol=1e-3)


def residual(compression: Compression) -> Tensor:
    """The one that there is."""
    (found,) = compression.state_dict().values()
    return found


def ahead(x: Tensor, call: int) -> ForwardRequest:
    """A request for a forward that is recorded."""
    return ForwardRequest("a", 1, "test", call, "", ((x,), {}), (True,), True, True, call, None, None, 0, None)


def test_a_smaller_batch_leaves_the_rest_of_the_residual() -> None:
    """Its rows take theirs along; the others wait."""
    site = Site({"activations": "topk:0.25"})
    site.train(1)
    compression = site.client.compression
    assert compression is not None
    before = residual(compression)
    site.train(1, size=40)
    after = residual(compression)
    assert torch.equal(before[40:], after[40:])
    assert not torch.equal(before[:40], after[:40])


def test_a_look_without_grad_feeds_nothing_back() -> None:
    """An evaluation isn't the training's next request."""
    site = Site("topk:0.25")
    site.train(1)
    compression = site.client.compression
    assert compression is not None
    before = compression.state_dict()
    with torch.no_grad():
        site.client(batch(9)[0])
    site.client.eval()
    site.client(batch(9)[0])
    after = compression.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_restart_loads_its_residuals_or_says_that_they_are_lost() -> None:
    """With them it ends with the bits of a run that wasn't restarted."""
    whole = Site("topk:0.25")
    whole.train(4)
    ends = []
    for loads in (True, False):
        site = Site("topk:0.25")
        optimizer = torch.optim.SGD(site.client.parameters(), lr=0.1)
        for number in range(2):
            x, y = batch(number)
            optimizer.zero_grad()
            cross_entropy(site.client(x), y).backward()
            optimizer.step()
        assert site.client.compression is not None
        saved = {
            "half": {name: tensor.clone() for name, tensor in site.client.state_dict().items()},
            "position": site.client.position(),
            "random": torch.get_rng_state(),
            "compression": site.client.compression.state_dict(),
        }
        client = splitfed.SplitClient(cut()[0], site.tap, "a", compression="topk:0.25")
        client.load_state_dict(saved["half"])
        client.resume(saved["position"])
        torch.set_rng_state(saved["random"])
        assert client.compression is not None
        if loads:
            client.compression.load_state_dict(saved["compression"])
        site.client = client
        optimizer = torch.optim.SGD(client.parameters(), lr=0.1)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for number in range(2, 4):
                x, y = batch(number)
                optimizer.zero_grad()
                cross_entropy(client(x), y).backward()
                optimizer.step()
        assert len([one for one in said if "error feedback" in str(one.message)]) == (not loads)
        ends.append(bits(client.state_dict()))
    assert ends[0] == bits(whole.client.state_dict()) != ends[1]


# ----------------------------------------------------------------------------------- temporal deltas


def epochs(site: Site, client: Any, count: int = 3, orders: int = 0, **around: Any) -> Tap:
    """Train on 96 examples, shuffled, with steps of the half; returns a tap of what the server was asked."""
    optimizer = torch.optim.SGD([p for p in client.parameters() if p.requires_grad], lr=0.05)
    x, y = batch(3, 96)
    for epoch in range(count):
        order = torch.randperm(96, generator=torch.Generator().manual_seed(orders + epoch))
        for ids in order.split(32):
            optimizer.zero_grad()
            with client.compression.examples(ids):
                outputs = client(x[ids])
            cross_entropy(outputs, y[ids]).backward()
            optimizer.step()
            for call in around.values():
                call()
    return site.tap


DELTAS = ["delta", "delta+int8", "delta+topk:0.1", *codecs("delta+zstd")]


@pytest.mark.parametrize("name", DELTAS)
def test_deltas_are_the_same_each_way_and_from_any_replica(name: str, tmp_path: Path) -> None:
    """Replicas that share nothing but the store decode the same bits: in process, over HTTP, through the store."""
    ends = []
    for way in ("direct", "replicas", "http", "mailbox"):
        site = Site(name, f"file://{tmp_path}/{way}", keep_graphs=0)
        replicas = RoundRobin([splitfed.SplitServer(site.body, again(site.store)) for _ in range(3)])
        with through(site, "direct" if way == "replicas" else way) as server:
            half = cut()[0]
            client = splitfed.SplitClient(half, replicas if way == "replicas" else server, "a", compression=name)
            site.client = client
            torch.manual_seed(7)
            epochs(site, client)
            ends.append((site.end(), site.flows()))
    assert ends[0] == ends[1] == ends[2] == ends[3]
    if name == "delta+topk:0.1":
        assert ends[0][1]["activations"].ratio < 0.55  # the first of three epochs is whole


def test_deltas_without_a_codec_lose_nothing() -> None:
    """They end with the bits of a run without compression; a frozen half sends each example once."""
    exact, deltas = Site(), Site({"activations": "delta"})
    for site in (exact, deltas):
        torch.manual_seed(7)
        if site is exact:
            plain(site)
        else:
            epochs(site, site.client)
    assert exact.end() == deltas.end()
    frozen = Site({"activations": "delta"})
    frozen.client.client_half[0].requires_grad_(False)
    epochs(frozen, frozen.client, count=4)
    flow = frozen.flows()["activations"]
    assert flow.relative_error == 0.0
    assert 0.25 < flow.ratio < 0.32  # once of four epochs, and which rows
    assert len(references(frozen)) == 3


def plain(site: Site) -> None:
    """The same training without compression."""
    optimizer = torch.optim.SGD(site.client.parameters(), lr=0.05)
    x, y = batch(3, 96)
    for epoch in range(3):
        for ids in torch.randperm(96, generator=torch.Generator().manual_seed(epoch)).split(32):
            optimizer.zero_grad()
            cross_entropy(site.client(x[ids]), y[ids]).backward()
            optimizer.step()


def references(site: Site) -> list[str]:
    """The files that deltas refer to."""
    return site.store.blobs.list("body/reference")


@pytest.mark.parametrize("way", ["direct", "http", "mailbox"])
@pytest.mark.parametrize("name", ["delta", "delta+int8"])
def test_references_that_are_lost_change_no_bit(name: str, way: str, tmp_path: Path) -> None:
    """The client is told and sends its own values whole: records and gradients are those of a run without loss."""
    one, other = Site(name), Site(name, f"file://{tmp_path}")
    ends, calls = [], iter(range(1, 100))

    def lose() -> None:
        if next(calls) % 3 == 0:
            other.server._references = type(other.server._references)(other.store.pile())
            for key in references(other):
                other.store.blobs.delete(key)

    with through(other, way) as server:
        for site, tapped, around in ((one, one.server, {}), (other, server, {"each": lose})):
            site.tap = Tap(splitfed.SplitClient(cut()[0], tapped, "a")._connection.transport)
            site.client = splitfed.SplitClient(cut()[0], site.tap, "a", compression=name)
            torch.manual_seed(7)
            epochs(site, site.client, **around)
            ends.append(site.end())
    assert ends[0] == ends[1]
    assert len(other.tap.requests) > len(one.tap.requests)
    if name == "delta+int8":
        assert other.flows()["activations"].sent_bytes > one.flows()["activations"].sent_bytes


@pytest.mark.parametrize("delivers", [False, True])
def test_a_lost_delta_comes_again_with_the_same_bytes(delivers: bool) -> None:
    """The user's loop repeats the batch after an error: nothing has moved, and nothing counts twice."""
    site = Site("delta+int8")
    epochs(site, site.client, count=1)
    site.tap.fails_at, site.tap.delivers = len(site.tap.requests), delivers
    x, _ = batch(3, 96)
    with site.client.compression.examples(range(32)):  # type: ignore[union-attr]
        with pytest.raises(StoreError):
            site.client(x[:32])
        site.client(x[:32])
    lost, again_sent = site.tap.requests[-2:]
    assert lost.deltas[0].references == again_sent.deltas[0].references
    assert torch.equal(lost.inputs[0][0], again_sent.inputs[0][0])


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["delta", "delta+int8"])
def test_a_checkpoint_repeats_the_value_of_a_delta(name: str, reentrant: bool) -> None:
    """The server compares the outputs of both."""
    site = Site(name)
    for _ in range(3):
        x, y = batch(0)
        x.requires_grad_(reentrant)
        with site.client.compression.examples(range(64)):  # type: ignore[union-attr]
            outputs = checkpoint(site.client, x, use_reentrant=reentrant)
        cross_entropy(outputs, y).backward()
        with torch.no_grad():
            site.client.client_half[0].weight.add_(0.01)
    assert len(site.store.waiting()) == 3


def test_references_go_with_their_examples_their_process_and_the_client() -> None:
    """As many files as hold a newest row; a newer process clears those of the older, `forget` all."""
    site = Site("delta+int8")
    epochs(site, site.client, count=4)
    assert len(references(site)) <= 7
    client = splitfed.SplitClient(cut()[0], site.server, "a", compression="delta+int8")
    epochs(site, client, count=1)
    assert len(references(site)) == 3
    forget(site.store, "a")
    assert references(site) == []


def test_references_go_with_the_open_calls_at_the_end_of_a_run() -> None:
    """Nothing of a client's activations stays on file then; it would send each example whole again."""
    site = Site("delta+int8")
    epochs(site, site.client, count=1)
    pile = site.store.pile()
    assert {*references(site)} < {*pile.open_calls()}
    pile.drop_calls(pile.open_calls())
    site.server._references = type(site.server._references)(pile)
    epochs(site, site.client, count=1)
    assert len(references(site)) == 3


def test_references_count_for_the_quota_of_a_client() -> None:
    """In bytes; not as calls, which go with their backwards."""
    site = Site("delta+int8")
    epochs(site, site.client, count=1)
    ledger = Ledger(site.store.pile(), Quota())
    calls, num_bytes = ledger.look("a")
    assert calls < 3
    assert num_bytes > sum(site.store.blobs.sizes("body/reference").values()) > 96 * WIDTH * 4


def test_a_loss_on_the_server_is_of_the_decoded_delta() -> None:
    """Each loss is that of a request which carries the same activations plain."""
    half, body = splitfed.split(nn.Sequential(nn.Linear(6, WIDTH), nn.Linear(WIDTH, 3)), "1")
    store = splitfed.GradientStore(f"memory://{uuid.uuid4()}", sync="process")
    tap = Tap(splitfed.SplitServer(body, store, loss_fn=cross_entropy))
    client: Any = splitfed.SplitClient(half, tap, "a", compression="delta+int8")
    x, y = batch(0)
    errors = []
    for _ in range(2):
        with client.compression.examples(range(64)):
            loss = client.loss(x, y)
        loss.backward()
        record = tap.requests[-1].forward
        sent = client.compression._examples.made_of("a|activations||0", half[0](x))
        assert torch.equal(loss.detach(), cross_entropy(body(sent), y).detach())
        errors.append(float((sent - half[0](x)).detach().norm()))
        assert record.deltas[0].num_bytes == sent.nbytes
    assert errors[1] < errors[0] / 50
    assert {name: flow.coded for name, flow in client.compression.flows.items()}["activations"] == 2


def test_a_restart_goes_on_with_the_references_of_a_checkpoint() -> None:
    """With the bits of a run that wasn't restarted; without them it says so."""
    whole = Site("delta+int8")
    epochs(whole, whole.client)
    for loads in (True, False):
        site = Site("delta+int8")
        epochs(site, site.client, count=2)
        old = site.client
        client = splitfed.SplitClient(cut()[0], site.tap, "a", compression="delta+int8")
        client.load_state_dict(old.state_dict())
        client.resume(old.position())
        if loads:
            client.compression.load_state_dict(old.compression.state_dict())  # type: ignore[union-attr]
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            epochs(site, client, count=1, orders=2)
        assert any("error feedback" in str(one.message) for one in said) == (not loads)
        site.client = client
        assert (bits(client.state_dict()) == bits(whole.client.state_dict())) == loads


def test_a_call_whose_examples_are_unnamed_travels_whole_and_says_so() -> None:
    """Training without names warns once; an evaluation has none."""
    site = Site("delta+int8")
    with torch.no_grad():
        site.client.eval()(batch(0)[0])
    site.client.train()
    with pytest.warns(UserWarning, match=r"call the client within client.compression.examples\(numbers\)"):
        site.train(1)
    site.train(1)
    assert all(not request.deltas for request in site.tap.requests if isinstance(request, ForwardRequest))
    assert site.flows()["activations"].ratio < 0.27
    assert references(site) == []


def test_examples_that_don_t_fit_the_batch_are_refused() -> None:
    """By number, and by kind."""
    site = Site("delta")
    compression: Any = site.client.compression
    with compression.examples([1, 2, 3]), pytest.raises(InputError, match=r"names 3 examples.*\(64, 32\)"):
        site.client(batch(0)[0])
    for ids in ([1.5], ["a"], torch.zeros(2), torch.tensor(3), [True]):
        with pytest.raises(InputError, match="expected a whole number for each example"), compression.examples(ids):
            pass


def test_a_name_that_isn_t_one_is_refused() -> None:
    """It would become part of a key."""
    site = Site("delta")
    epochs(site, site.client, count=2)
    request = next(one for one in reversed(site.tap.requests) if getattr(one, "deltas", ()))
    for name in ("../../format.json", "", "A" * 16):
        hostile = replace(request, deltas=(replace(request.deltas[0], references=(name,)),))
        with pytest.raises(IdError):
            site.server.forward(hostile)
        notes = replace(request.housekeeping, references=(name,))
        with pytest.raises(IdError):
            site.server.forward(replace(request, housekeeping=notes, deltas=(), coding=()))


# --------------------------------------------------------------------------------------- two ends


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ("int7", "'int7' isn't a codec: expected 'bfloat16', 'int8'"),
        (
            {"activation": "int8"},
            "expected the name of a codec, such as 'int8', or a dict of them by flow, of activations",
        ),
        ({"activations": "gzip"}, "'gzip' isn't a codec"),
        ("", "expected the name of a codec"),
        ({"outputs": "delta+int8"}, "compression of outputs is 'delta.int8': only activations come again"),
        ("int8+delta", "'int8.delta' isn't a codec"),
        (8, "compression is 8: expected the name of a codec"),
    ],
)
def test_an_unknown_compression_is_refused_when_the_client_is_made(given: Any, match: str) -> None:
    """Before anything is sent."""
    with pytest.raises(InputError, match=match):
        Site(given)


class Foreign(Middleware):
    """A client of another release, which codes by what this one hasn't."""

    def send(self, verb: str, request: Any, /) -> Any:
        """Say another version of what it codes by."""
        if verb == "forward":
            coding = tuple(replace(one, codec="int8/7") for one in request.coding)
            wanted = "fp4/1" if not coding else request.answer_codec
            return super().send(verb, replace(request, coding=coding, answer_codec=wanted))
        return super().send(verb, request)


@pytest.mark.parametrize(
    ("flow", "match"), [("activations", "a tensor is coded by 'int8/7', and this end has"), ("outputs", "'fp4/1'")]
)
@pytest.mark.parametrize("way", ["direct", "http"])
def test_a_server_that_lacks_a_codec_names_both_and_records_nothing(flow: str, match: str, way: str) -> None:
    """As an error of ours, over HTTP too."""
    site = Site()
    with through(site, way) as server:
        transport: Any = splitfed.SplitClient(cut()[0], server, "b")._connection.transport
        client = splitfed.SplitClient(cut()[0], Compression(Foreign(transport), {flow: "int8"}), "a")
        with pytest.raises(InputError, match=match):
            client(batch(0)[0])
    assert site.store.blobs.list("body/forward") == []


def test_an_older_server_refuses_what_it_doesn_t_know() -> None:
    """A field that a release doesn't have isn't ignored: its message would be computed on as it is."""
    site = Site("int8")
    site.train(1)
    packed = b"".join(map(bytes, pack(site.tap.requests[0])))
    with pytest.raises(FormatError, match="a ForwardRequest needs the fields"):
        unpack(ForwardRequest, packed.replace(b"coding", b"encode"))


def test_a_hostile_coding_is_an_error_of_ours() -> None:
    """Of a tensor that isn't there, or of one that is none."""
    site = Site("int8")
    site.train(1)
    forward, backward = site.tap.requests[:2]
    for request in (forward, backward):
        (one,) = request.coding
        for place in (-1, 1, 99):
            with pytest.raises(FormatError, match="has no tensor"):
                replace(request, coding=(replace(one, place=place),)).decoded()
        with pytest.raises(FormatError):
            replace(request, coding=(one, one)).decoded()
    assert isinstance(backward, BackwardRequest)


def test_limits_are_of_decoded_tensors() -> None:
    """Of their bytes, and of their leading dimension, which a payload may not have."""
    site = Site("topk:0.25")
    site.train(1)
    forward, backward = site.tap.requests[:2]
    assert forward.num_bytes() == backward.num_bytes() == 64 * WIDTH * 4
    assert forward.samples() == [64]


# ------------------------------------------------------------------------------------------- reports


def test_what_can_t_be_coded_is_said_once() -> None:
    """A tensor that is expanded, for one; not what isn't finite, nor what is small."""
    site = Site("int8")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            compression = site.client.compression
            assert compression is not None
            compression._tell_exact("activations", torch.ones(64, 1).expand(64, 64))
            compression._tell_exact("activations", torch.full((64, 64), torch.inf))
            compression._tell_exact("activations", torch.ones(3))
            compression._tell_exact("activations", torch.arange(4096))
    assert [str(one.message) for one in said] == [
        "compression of activations: a tensor (64, 64) travels as it is, since it is expanded, or has gaps: "
        "contiguous() makes it a plain one"
    ]


def test_codecs_are_read_from_a_name_a_dict_or_themselves() -> None:
    """One for all flows, or one each."""
    assert Codecs.of("int8") == Codecs("int8", "int8", "int8", "int8")
    assert Codecs.of({"outputs": "bfloat16"}) == Codecs(outputs="bfloat16")
    assert Codecs.of(Codecs("topk:0.5")).codec("activations") == Codec("topk", 0.5)
    assert Codecs().codec("outputs") is None
