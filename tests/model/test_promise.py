"""Runs of layers that a model calls in a loop: one request, bits of the reference, and errors where it can't be."""

from __future__ import annotations

import copy
import pickle
import uuid
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import Apart, Split, Wire, assert_equal, assert_step, step
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import splitfed
from splitfed.errors import ContainerError, CutError, InPlaceError, SplitFedError, UnknownCutError, UnsupportedError
from splitfed.model.cutpoint import CutPoint
from splitfed.model.promise import Promise
from splitfed.protocol.packing import pack, unpack

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
Loop = Callable[[Any, Tensor, Tensor, Any], Any]


class Layer(nn.Module):
    """A layer with a mask and a pair of positions as arguments of its own.

    Args:
        kind: What it returns: a tensor, a tuple of one, or one with a `None` in it.
    """

    def __init__(self, kind: str = "tensor", p: float = 0.0) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.dropout = nn.Dropout(p)
        self.norm = nn.BatchNorm1d(6)
        self.kind = kind

    def forward(self, h: Tensor, mask: Tensor | None = None, *, pos: tuple[Tensor, ...] = (), cache: Any = None) -> Any:
        """`(N, 6)`, or that in a tuple."""
        out = torch.tanh(self.norm(self.dropout(self.linear(h))) * mask + pos[0])
        return {"tensor": out, "tuple": (out,), "nothing": (out, None), "more": (out, out.mean(0))}[self.kind]


class Decoder(nn.Module):
    """Embedding, layers in a list, and a head; `loop` calls the layers."""

    def __init__(self, loop: Loop, *, layers: list[nn.Module]) -> None:
        super().__init__()
        self.embedding = nn.Linear(6, 6)
        self.layers = nn.ModuleList(layers)
        self.head = nn.Linear(6, 3)
        self.loop = loop

    def forward(self, x: Tensor) -> Any:
        """`(N, 3)`, or what the loop makes of it."""
        h = self.loop(self, self.embedding(x), (x > 0).float(), (x.detach() * 2,))
        return self.head(h) if isinstance(h, Tensor) else h


def model(loop: Loop, count: int = 5, kind: str = "tensor", p: float = 0.0) -> Decoder:
    """A decoder, always with the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Decoder(loop, layers=[Layer(kind, p) for _ in range(count)])


class Counting(Wire):
    """Notes which layers each forward asks for, the tensors of the first, and how many requests there were."""

    def __init__(self, *servers: Any) -> None:
        super().__init__(*servers)
        self.cuts: list[str] = []
        self.tensors: list[Tensor] = []
        self.total = 0

    def send(self, method: str, request: Any) -> Any:
        """Note, then pass on."""
        self.total += 1
        if method == "forward":
            self.cuts.append(request.cut)
            self.tensors = self.tensors or request.tensors()
        return super().send(method, request)


class CountingApart(Counting, Apart):
    """The same, over two replicas."""


class Packed(Counting):
    """Requests and answers go through bytes, as over HTTP."""

    def send(self, method: str, request: Any) -> Any:
        """Pack and unpack both."""
        answer = super().send(method, unpack(type(request), b"".join(map(bytes, pack(request)))))
        return unpack(type(answer), b"".join(map(bytes, pack(answer))))


def split(net: nn.Module, at: Any = "layers.0:5", **settings: Any) -> Split:
    """It, over a store of its own."""
    return Split(net, at, f"memory://{uuid.uuid4().hex}", **{"wire": Counting, **settings})


# ------------------------------------------------------------------------------------------ loops


def plain(m: Any, h: Tensor, mask: Tensor, pos: Any) -> Tensor:
    """Takes a tuple apart, as older decoders do."""
    for layer in m.layers:
        out = layer(h, mask, pos=pos)
        h = out[0] if isinstance(out, tuple) else out
    return h


def sliced(m: Any, h: Tensor, mask: Tensor, pos: Any) -> Tensor:
    """Loops over a new list of them, with all arguments by keyword, and a mask of its own for each."""
    for layer in m.layers[:5]:
        h = layer(h=h, mask=mask.clone(), pos=pos)
    return h


def hidden_states(m: Any, h: Tensor, mask: Tensor, pos: Any) -> tuple[Tensor, ...]:
    """Keeps each hidden state, and looks at them at the end."""
    states: tuple[Tensor, ...] = ()
    for layer in m.layers:
        states += (h,)
        h = layer(h, mask, pos=pos)
    return (*states, m.head(h))


def one_late(m: Any, h: Tensor, mask: Tensor, pos: Any) -> Tensor:
    """Uses the output of an early layer after the loop."""
    for i, layer in enumerate(m.layers):
        h = layer(h, mask, pos=pos)
        if i == 1:
            early = h
    return h + early


def looks(m: Any, h: Tensor, mask: Tensor, pos: Any) -> Tensor:
    """Looks at one hidden state on the way."""
    for i, layer in enumerate(m.layers):
        h = layer(h, mask, pos=pos)
        if i == 2:
            seen = h.mean()
    return h * seen


def moved(m: Any, h: Tensor, mask: Tensor, pos: Any) -> Tensor:
    """Asks for the same dtype, which gives the same tensor."""
    for layer in m.layers:
        h = layer(h, mask, pos=pos)
        h = h.to(torch.float32) if h.device == mask.device else h
    return h


def skipping(m: Any, h: Tensor, mask: Tensor, pos: Any) -> Tensor:
    """Leaves layers out, the last too, as LayerDrop does."""
    for i, layer in enumerate(m.layers):
        if i not in (1, 4):
            h = layer(h, mask, pos=pos)
    return h


def repeated(m: Any, h: Tensor, mask: Tensor, pos: Any) -> Tensor:
    """Goes through them twice."""
    return plain(m, plain(m, h, mask, pos), mask, pos)


def twins(m: Any, h: Tensor, mask: Tensor, pos: Any) -> Tensor:
    """Two inputs in one loop."""
    a, b = h, h.flip(0)
    for layer in m.layers:
        a, b = layer(a, mask, pos=pos), layer(b, mask, pos=pos)
    return a + b


def half_frozen(m: Any, h: Tensor, mask: Tensor, pos: Any) -> Tensor:
    """The lower layers without a gradient."""
    for i, layer in enumerate(m.layers):
        with torch.set_grad_enabled(i >= 2):
            h = layer(h, mask, pos=pos)
    return h


def half_cast(m: Any, h: Tensor, mask: Tensor, pos: Any) -> Tensor:
    """One layer outside of autocast."""
    for i, layer in enumerate(m.layers):
        with torch.autocast("cpu", torch.bfloat16, enabled=i != 2):
            h = layer(h, mask, pos=pos)
    return h.float()


def checkpointed(m: Any, h: Tensor, mask: Tensor, pos: Any) -> Tensor:
    """A checkpoint around each layer."""
    for layer in m.layers:
        h = checkpoint(layer, h, mask, pos=pos, use_reentrant=False)
    return h


def reentrant(m: Any, h: Tensor, mask: Tensor, pos: Any) -> Tensor:
    """Another kind of checkpoint: it runs them without grad, and again in the backward."""
    for layer in m.layers:
        h = checkpoint(lambda h, layer=layer: layer(h, mask, pos=pos), h, use_reentrant=True)
    return h


def segments(m: Any, h: Tensor, mask: Tensor, pos: Any) -> Tensor:
    """Checkpoints around several layers, with something of the half's own before and after them."""

    def first(h: Tensor) -> Tensor:
        h = torch.sigmoid(h)
        for layer in m.layers[:2]:
            h = layer(h, mask, pos=pos)
        return h

    def last(h: Tensor) -> Tensor:
        for layer in m.layers[2:]:
            h = layer(h, mask, pos=pos)
        return torch.sigmoid(torch.sin(h))

    h = checkpoint(first, h, use_reentrant=False)
    return checkpoint(last, h, use_reentrant=False)


def ending(m: Any, h: Tensor, mask: Tensor, pos: Any) -> Any:
    """The model returns what the last but one has returned."""
    for layer in m.layers[:-1]:
        h = layer(h, mask, pos=pos)
    return {"hidden": h}


ALL = "0,1,2,3,4"
EACH = ["0", "1", "2", "3", "4"]


@pytest.mark.parametrize(
    ("loop", "cuts"),
    [
        (plain, [ALL]),
        (sliced, [ALL]),
        (hidden_states, [ALL]),
        (one_late, [ALL]),
        (looks, ["0,1,2", "3,4"]),
        (moved, EACH),
        (skipping, ["0,2,3"]),
        (repeated, [ALL, ALL]),
        (twins, [ALL, ALL]),
        (half_frozen, ["0,1", "2,3,4"]),
        (half_cast, ["0,1", "2", "3,4"]),
        (checkpointed, [ALL]),
        (reentrant, [*EACH, *reversed(EACH)]),
        (segments, [ALL, ALL]),
        (ending, ["0,1,2,3"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_run_has_the_bits_of_the_reference(loop: Loop, cuts: list[str]) -> None:
    """With dropout and statistics, recomputed; and as few requests as the loop allows."""
    made = split(model(loop, p=0.2), keep_graphs=0)
    assert_step(made, splitfed.reference(model(loop, p=0.2), "layers.0:5"), ((X,), {}))
    assert made.wire.cuts == cuts


@pytest.mark.parametrize("loop", [plain, sliced, hidden_states, skipping], ids=lambda loop: loop.__name__)
def test_the_reference_of_a_run_is_the_raw_model(loop: Loop) -> None:
    """Where nothing is drawn: outputs and gradients."""
    assert_equal(step(splitfed.reference(model(loop), "layers.1:4"), ((X,), {})), step(model(loop), ((X,), {})))


@pytest.mark.parametrize("kind", ["tensor", "tuple", "nothing", "more"])
@pytest.mark.parametrize("at", ["layers.0:5", "layers.1:4", "layers.2:", ["layers.0:2", "layers.2:5", "head"]], ids=str)
def test_layers_may_return_tuples(kind: str, at: Any) -> None:
    """The loop takes them apart as it does in the unsplit model; one request for each cut."""
    made = split(model(plain, kind=kind), at)
    assert_step(made, splitfed.reference(model(plain, kind=kind), at), ((X,), {}))
    assert len(made.wire.cuts) == (1 if isinstance(at, str) else 3)


def test_each_argument_travels_once() -> None:
    """Hidden state, mask and positions, also if the model makes a mask for each layer anew."""
    for loop in (plain, sliced):
        made = split(model(loop))
        made.client(X)
        assert len(made.wire.tensors) == 3
        assert sum(tensor.nbytes for tensor in made.wire.tensors) == 3 * X.nbytes


def test_two_requests_a_batch_and_commits_on_two_replicas() -> None:
    """Whatever the number of layers; weights and statistics are the reference's after each commit."""
    net = model(plain, 12, p=0.1)
    made = split(net, "layers.0:12", wire=CountingApart, replicas=2)
    reference = splitfed.reference(net, "layers.0:12")
    trained = [p for name, p in reference.named_parameters() if name.startswith("layers.")]
    optimizer = torch.optim.Adam(trained, lr=1e-2)
    for number in range(3):
        assert_step(made, reference, ((X,), {}))
        assert made.wire.total == 2 * (number + 1)
        optimizer.step()
        assert made.accumulator.step() is not None
        state = reference.state_dict()
        for name, tensor in made.state().items():
            assert torch.equal(tensor, state[name]), name


def test_a_run_crosses_as_bytes() -> None:
    """With hidden states that come back besides the last."""
    made = split(model(hidden_states, p=0.2), wire=Packed)
    assert_step(made, splitfed.reference(model(hidden_states, p=0.2), "layers.0:5"), ((X,), {}))


def test_evaluation_is_one_request() -> None:
    """Without grad, in eval mode, and in inference mode."""
    made = split(model(plain, p=0.5))
    whole = model(plain).eval()
    made.client.eval()
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            assert torch.equal(made.client(X), whole(X))
    assert made.wire.cuts == [ALL, ALL]


def test_check_join_and_copies_know_a_run() -> None:
    """`join` gives the model back; a copy and a pickle of the half make one request, too."""
    net = model(plain)
    assert splitfed.check(net, "layers.1:4", X).ok
    half, body = splitfed.split(net, "layers.1:4")
    assert list(body.state_dict()) == [f"{i}.{n}" for i in (1, 2, 3) for n in net.layers[i].state_dict()]
    whole = splitfed.join(half, body.state_dict())
    assert torch.equal(whole(X), model(plain)(X))
    assert not any(isinstance(module, CutPoint) for module in whole.modules())
    vars(half)["loop"] = plain
    for twin in (copy.deepcopy(half), pickle.loads(pickle.dumps(half))):
        store = splitfed.GradientStore(f"memory://{uuid.uuid4().hex}")
        wire = Counting(splitfed.SplitServer(body, store))
        assert torch.equal(splitfed.SplitClient(twin, wire, "a")(X), model(plain)(X))
        assert wire.cuts == ["1,2,3"]


def test_the_loss_on_the_server_is_one_request() -> None:
    """For a model that ends with its run; one that keeps hidden states is refused."""

    def last(m: Any, h: Tensor, mask: Tensor, pos: Any) -> Any:
        return (plain(m, h, mask, pos),)

    class Ending(Decoder):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x)[0]

    with torch.random.fork_rng():
        nets = [Ending(loop, layers=[Layer() for _ in range(5)]) for loop in (last, hidden_states)]
    made = split(nets[0], loss_fn=lambda out, target: (out - target).pow(2).mean())
    loss = made.client.loss(X, X)
    loss.backward()
    assert torch.equal(loss, (nets[0](X) - X).pow(2).mean())
    assert made.wire.total == 1
    with pytest.raises(CutError, match=r"isn't a loss|ends at its cut"):
        split(nets[1], loss_fn=lambda out, target: out.sum()).client.loss(X, X)


def test_a_batch_without_examples_needs_no_request() -> None:
    """As Poisson sampling draws it."""
    made = split(model(plain).eval())
    out = made.client(X[:0])
    out.sum().backward()
    assert out.shape == (0, 3)
    assert made.wire.total == 0


def test_several_passes_are_one_batch() -> None:
    """In a `client.batch()` block, as for any cut."""
    made = split(model(plain))
    with made.client.batch():
        for rows in X.split(2):
            made.client(rows).sum().backward()
    (record,) = made.waiting()
    whole = model(plain)
    for rows in X.split(2):
        whole(rows).sum().backward()
    assert torch.allclose(record.gradients["3.linear.weight"], whole.layers[3].linear.weight.grad, atol=1e-6)


def test_hooks_on_the_half_see_each_layer() -> None:
    """Values as the unsplit model has them: such a layer is a call of its own."""
    made, whole = split(model(plain)), model(plain)
    seen: list[Tensor] = []
    for net in (made.half, whole):
        net.layers[2].register_forward_hook(lambda module, given, out: seen.extend((given[0], out)))
    assert torch.equal(made.client(X), whole(X))
    assert torch.equal(seen[0], seen[2])
    assert torch.equal(seen[1], seen[3])
    assert made.wire.cuts == ["0,1", "2", "3,4"]


def test_settings_travel_with_the_run() -> None:
    """What the half sets of a layer, each for its own."""
    made, whole = split(model(plain, p=0.5)), model(plain)
    for net in (made.half, whole):
        net.layers[1].norm.eval()
        net.layers[3].norm.eps = 0.1
    for layer in made.half.layers:
        layer.dropout.p = 0.0
    assert torch.equal(made.client(X), whole(X))
    assert made.wire.cuts == [ALL]


class ByValue(Layer):
    """A layer whose path depends on values, and for the zeros of a trial on what they can't be."""

    def forward(self, h: Tensor, mask: Tensor | None = None, **kwargs: Any) -> Any:
        """As `Layer`."""
        if self.kind == "zeros" and not self.linear.weight.any():
            raise ValueError("no weights")
        out = torch.tanh(self.linear(h)) if bool(mask.any()) else h
        return (out, h) if self.kind == "two" and self.linear.weight.any() else out


def by_value(kind: str) -> Decoder:
    """A decoder with such layers."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Decoder(plain, layers=[ByValue(kind) for _ in range(5)])


def test_a_layer_whose_path_depends_on_values_is_tried_on_zeros() -> None:
    """As mixtures of experts do; where that fails too, each layer is a request, which is said."""
    made = split(by_value(""))
    assert torch.equal(made.client(X), by_value("")(X))
    assert made.wire.cuts == [ALL]
    made = split(by_value("zeros"))
    with pytest.warns(UserWarning, match="each is a request of its own"):
        assert torch.equal(made.client(X), by_value("zeros")(X))
    assert made.wire.cuts == EACH


def test_a_layer_that_returns_something_else_than_in_its_trial_is_refused() -> None:
    """The client had gone on with a tensor."""
    with pytest.raises(UnsupportedError, match="what it returns depends on values"):
        split(by_value("two")).client(X)


# ----------------------------------------------------------------------------------------- errors


def residual(m: Any, h: Tensor, mask: Tensor, pos: Any) -> Tensor:
    """Adds up outside of the layers."""
    for layer in m.layers:
        h = h + layer(h, mask, pos=pos)
    return h


def parallel(m: Any, h: Tensor, mask: Tensor, pos: Any) -> Tensor:
    """Gives all of them the same."""
    return sum(layer(h, mask, pos=pos) for layer in m.layers)  # type: ignore[return-value]


def scaled(m: Any, h: Tensor, mask: Tensor, pos: Any) -> Tensor:
    """Computes between them."""
    for layer in m.layers:
        h = layer(h, mask, pos=pos) * 2
    return h


def fading(m: Any, h: Tensor, mask: Tensor, pos: Any) -> Tensor:
    """Changes the mask in place."""
    for layer in m.layers:
        h = layer(h, mask, pos=pos)
        mask.mul_(0.5)
    return h


def resetting(m: Any, h: Tensor, mask: Tensor, pos: Any) -> Tensor:
    """Changes a layer after its call."""
    for layer in m.layers:
        h = layer(h, mask, pos=pos)
        layer.norm.eps = 0.5
    return h


def late_by_one(m: Any, h: Tensor, mask: Tensor, pos: Any) -> Tensor:
    """Uses what the last layer was given besides."""
    for i, layer in enumerate(m.layers):
        h = layer(h, mask, pos=pos)
        if i == 3:
            before = h
    return h + before


def cached(m: Any, h: Tensor, mask: Tensor, pos: Any) -> Tensor:
    """Hands a cache on."""
    for layer in m.layers:
        h = layer(h, mask, pos=pos, cache=object())
    return h


@pytest.mark.parametrize(
    ("loop", "error", "said"),
    [
        (residual, CutError, r"'layers.1' isn't given what 'layers.0' returned.*\['layers.0', 'layers.1', ...\]"),
        (parallel, CutError, "'layers.1' isn't given what 'layers.0' returned"),
        (scaled, CutError, "'layers.1' isn't given what 'layers.0' returned"),
        (fading, InPlaceError, "an argument of 'layers.0' was changed in place"),
        (resetting, CutError, "a setting of 'layers.0' was changed after its call"),
        (late_by_one, CutError, "the output of 'layers.3' is used after 'layers.4' has been called"),
        (cached, ContainerError, "can't cross the cut"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_cant_be_one_run_is_refused(loop: Loop, error: type[SplitFedError], said: str) -> None:
    """By an error that says which layer it is, and what to do."""
    made = split(model(loop))
    with pytest.raises(error, match=said):
        made.client(X).sum().backward()
    assert made.store.waiting() == []


class Doubled(torch.autograd.Function):
    """A function of the user's own, which torch doesn't let a tensor class see."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Twice it."""
        return x * 2

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Twice its gradient."""
        return grads[0] * 2


def test_an_autograd_function_between_layers_is_never_wrong_in_silence() -> None:
    """It would cut the graph; its backward raises."""

    def loop(m: Any, h: Tensor, mask: Tensor, pos: Any) -> Any:
        for layer in m.layers[:-1]:
            h = layer(h, mask, pos=pos)
        return Doubled.apply(h)  # type: ignore[no-untyped-call]

    made = split(model(loop))
    with pytest.raises(RuntimeError, match="invalid gradient"):
        made.client(X).sum().backward()
    assert made.store.waiting() == []


@pytest.mark.parametrize(
    ("at", "error", "said"),
    [
        ("layers.2:9", UnknownCutError, "goes past the end: 'layers' has 5 positions"),
        ("layers.3:3", UnknownCutError, "is empty"),
        ("layers.0:4:2", UnknownCutError, "without gaps.*has a step"),
        ("layers.a:b", UnknownCutError, "isn't a slice"),
        ("head.0:1", UnknownCutError, "only an nn.Sequential has slices, and an nn.ModuleList runs"),
        (["layers.0:3", "layers.2:5"], CutError, "'layers.2' and 'layers.2' overlap"),
        (["layers.0:3", "layers.1.linear"], CutError, "overlap"),
        ("layers", CutError, r"a run of them such as 'layers.0:5'"),
        ("nested.0:2", CutError, "'nested.0' is a ModuleList, which isn't called itself"),
    ],
    ids=str,
)
def test_a_run_that_isnt_one_is_refused_by_split(at: Any, error: type[SplitFedError], said: str) -> None:
    """Past the end, with gaps, overlapping, or of what is never called."""
    net = model(plain)
    net.nested = nn.ModuleList([nn.ModuleList([nn.Linear(6, 6)]) for _ in range(2)])
    with pytest.raises(error, match=said):
        splitfed.split(net, at)


def test_a_promise_is_asked_for_its_device_alone() -> None:
    """All else is asked of the real tensor; nothing of it is left in the outputs."""
    found: list[Any] = []

    def loop(m: Any, h: Tensor, mask: Tensor, pos: Any) -> Any:
        for layer in m.layers[:-1]:
            h = layer(h, mask, pos=pos)
        found.extend([type(h), h.device, len(made.wire.cuts), h.shape, len(made.wire.cuts)])
        return [h]

    made = split(model(loop))
    (out,) = made.client(X)
    assert found == [Promise, torch.device("cpu"), 0, (4, 6), 1]
    assert type(out) is Tensor


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.integration  # loading the compiler takes seconds
def test_a_compiled_model_calls_each_layer() -> None:
    """The compiler would take a promise for a tensor."""
    made = split(model(plain, 2), "layers.0:2")
    assert torch.equal(torch.compile(made.client, backend="eager")(X), model(plain, 2)(X))
    torch.compiler.reset()


def test_a_trial_draws_nothing_and_says_nothing() -> None:
    """The generator and the warnings are those of the calls."""
    before = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        split(model(plain).eval()).client(X)
    assert torch.equal(torch.get_rng_state(), before)
