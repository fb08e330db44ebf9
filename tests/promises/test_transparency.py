"""The split model is the unsplit one, bit for bit: many architectures, several steps, every way to serve a backward."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import harness
import pytest
import torch
from cases import BY_NAME, CASES, Case, parameters
from harness import Apart, Split, Step, Wire, assert_equal, assert_same, assert_step, fresh, replay_rng, scalar, step
from processes import CONTEXT
from torch import nn

import splitfed
from splitfed.protocol import messages, packing, pytree

STEPS = 3
CASE = pytest.mark.parametrize("case", parameters())
MODES: dict[str, dict[str, Any]] = {
    "graph_kept": {},
    "recomputed": {"keep_graphs": 0},
    "two_replicas": {"wire": Apart, "replicas": 2},
}


class Unsplit:
    """The reference and one optimizer for each side of the cut."""

    def __init__(self, case: Case, client: nn.Module) -> None:
        self.module = splitfed.reference(case.model(), case.at)
        own = {name for name, _ in client.named_parameters()}
        sides = ([], [])
        for name, parameter in self.module.named_parameters():
            if parameter.requires_grad:
                sides[name in own].append(parameter)
        self.optimizers = [harness.adam(side) for side in sides if side]

    def update(self) -> None:
        """One step of both."""
        for optimizer in self.optimizers:
            optimizer.step()


@CASE
@pytest.mark.parametrize("mode", MODES)
def test_training_has_the_bits_of_the_reference(case: Case, mode: str, tmp_path: Path) -> None:
    """Outputs, gradients, buffers, weights and the generator are the reference's after each of three steps."""
    split = Split(case.model(), case.at, tmp_path, **MODES[mode])
    unsplit = Unsplit(case, split.client)
    trainable = [p for p in split.client.parameters() if p.requires_grad]
    local = harness.adam(trainable) if trainable else None
    for number in range(STEPS):
        inputs = case.inputs()
        before = torch.get_rng_state()
        assert_step(split, unsplit.module, inputs)
        assert torch.equal(before, torch.get_rng_state()) is not case.draws
        if local is not None:
            local.step()
        commit = split.accumulator.step()
        assert commit is not None
        assert (commit.version, commit.num_batches) == (number + 1, 1)
        unsplit.update()
        assert_same(split.state(), unsplit.module.state_dict(), "state")


@pytest.mark.parametrize("case", parameters(case for case in CASES if case.raw))
def test_the_reference_is_the_raw_model(case: Case) -> None:
    """Where the body draws nothing and the cut groups no sum, the reference has the bits of the raw model."""
    raw, reference = case.model(), splitfed.reference(case.model(), case.at)
    assert list(raw.state_dict()) == list(reference.state_dict())
    inputs = case.inputs()
    before = torch.get_rng_state()
    assert_equal(step(reference, inputs), step(raw, inputs))
    assert_same(reference.state_dict(), raw.state_dict(), "state")
    assert torch.equal(before, torch.get_rng_state())


@CASE
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_evaluation_has_the_bits_of_the_raw_model(case: Case, grad: bool, tmp_path: Path) -> None:
    """In eval mode nothing is drawn, so the outputs are the raw model's, under `no_grad` and without."""
    split = Split(case.model(), case.at, tmp_path)
    raw = case.model().eval()
    split.client.eval()
    args, kwargs = case.inputs()
    with torch.set_grad_enabled(grad):
        got, expected = split.client(*args, **kwargs), raw(*args, **kwargs)
    same = [dict(enumerate(pytree.flatten(tree)[1])) for tree in (got, expected)]
    assert_same(same[0], same[1], "outputs")
    assert [t.requires_grad for t in same[0].values()] == [t.requires_grad for t in same[1].values()]


@CASE
def test_split_then_join_is_the_identity(case: Case) -> None:
    """Joining what was split gives back every key, in order, and every bit; the model itself isn't changed."""
    model = case.model()
    half, body = splitfed.split(model, case.at)
    joined = splitfed.join(half, body)
    assert list(joined.state_dict()) == list(model.state_dict()) == list(case.model().state_dict())
    assert_same(joined.state_dict(), model.state_dict())
    assert_same(model.state_dict(), case.model().state_dict())


def test_dropout_on_ones_shows_its_mask_in_the_gradient(tmp_path: Path) -> None:
    """Identities around the dropout, ones for input: the gradient is the output, as forward and backward drop alike."""
    body = nn.Sequential(nn.Dropout(0.5), nn.Linear(64, 64, bias=False))
    model = nn.Sequential(nn.Identity(), body)
    with torch.no_grad():
        body[1].weight.copy_(torch.eye(64))
    split = Split(model, "1", tmp_path, keep_graphs=0)
    x = torch.ones(16, 64, requires_grad=True)
    y = split.client(x)
    y.sum().backward()
    assert torch.equal(x.grad, y)
    assert 0.4 < float((y == 0).float().mean()) < 0.6


class OtherProcess(Wire):
    """Forwards are answered here; backwards by a process that is started later and gets requests as files."""

    folder: Path
    name: str
    child: Connection

    def backward(self, request: messages.BackwardRequest, /) -> messages.BackwardAnswer:
        """Through a file, and the answer from another."""
        path = self.folder / f"{self.name}.request"
        path.write_bytes(b"".join(packing.pack(request)))
        self.child.send((self.name, str(self.folder / self.name), path))
        assert self.child.recv() == self.name
        return packing.unpack(messages.BackwardAnswer, path.with_suffix(".answer").read_bytes())


def serve(asked: Connection) -> None:
    """The other process: for each case, store and file of a request, answer the request with no graph kept."""
    torch.set_num_threads(1)
    # Not for the process: what measures its coverage may warn behind its end.
    with asked, suppress(EOFError), warnings.catch_warnings():
        warnings.simplefilter("error")
        while True:
            name, url, path = asked.recv()
            case = BY_NAME[name]
            _, body = splitfed.split(case.model(), case.at)
            server = splitfed.SplitServer(body, splitfed.GradientStore(url, sync="process"), keep_graphs=0)
            answer = server.backward(packing.unpack(messages.BackwardRequest, path.read_bytes()))
            path.with_suffix(".answer").write_bytes(b"".join(packing.pack(answer)))
            asked.send(name)


@pytest.fixture
def child() -> Iterator[Any]:
    """Starts the other process when it is called, and ends it after the test."""
    started = []

    def start() -> Connection:
        here, there = CONTEXT.Pipe()
        process = CONTEXT.Process(target=serve, args=(there,), daemon=True)
        process.start()
        there.close()
        started.append((process, here))
        return here

    yield start
    for process, pipe in started:
        pipe.close()
        process.join(60)
        assert process.exitcode == 0


@pytest.mark.parametrize("library", ["", pytest.param("monai", marks=pytest.mark.integration)])
def test_a_process_started_after_the_forward_serves_the_backward(library: str, child: Any, tmp_path: Path) -> None:
    """Every body's backward has the reference's bits in a process that never saw the forward and keeps no graphs."""
    forwards = []
    for case in (case for case in CASES if case.library == library):
        split = Split(case.model(), case.at, tmp_path / case.name, wire=OtherProcess)
        inputs = case.inputs()
        rewind = replay_rng()
        (args, kwargs), wanted = fresh(inputs)
        forwards.append((case, split, inputs, rewind, split.client(*args, **kwargs), wanted))
    process = child()
    for case, split, inputs, rewind, outputs, wanted in forwards:
        wire = split.wire
        wire.folder, wire.name, wire.child = tmp_path, case.name, process
        scalar(outputs).backward()
        flat = [t.detach() for t in pytree.flatten(outputs)[1]]
        got = Step(flat, [t.grad for t in wanted], split.gradients())
        split.accumulator.step()
        rewind()
        reference = splitfed.reference(case.model(), case.at)
        assert_equal(got, step(reference, inputs))
        buffers = dict(reference.named_buffers())
        assert_same(
            {name: tensor for name, tensor in split.state().items() if name in buffers},
            {name: tensor for name, tensor in reference.state_dict().items() if name in buffers},
        )
