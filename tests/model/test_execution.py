"""Running a body again: nothing but what is written down decides its bits, and what can't be pinned is loud."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from harness_replay import X, body, call, linear, model
from torch import Tensor, nn

from splitfed.errors import BodyError, InputError, ReplayError, SplitFedError, UnsupportedError
from splitfed.model import execution


def test_a_run_gives_outputs_gradients_and_their_graph() -> None:
    """Of 2x: ∂(Σ y)/∂x = 2 and ∂(Σ y)/∂w = the sums of the columns of x, in every row."""
    done = execution.run(model(linear()), call(), grad=True)
    assert done.outputs.tolist() == (2 * X).tolist()
    inputs, gradients = execution.backward(done, [torch.ones(2, 2)])
    assert inputs[0] is not None
    assert inputs[0].tolist() == [[2, 2], [2, 2]]
    assert gradients["weight"].tolist() == [[4, 2], [4, 2]]


def test_a_run_writes_no_grad() -> None:
    """Gradients are answered, never left in the version's own parameters."""
    made = model(linear())
    execution.backward(execution.run(made, call(), grad=True), [torch.ones(2, 2)])
    assert all(p.grad is None for p in made.module.parameters())


def test_a_body_may_begin_in_place() -> None:
    """It gets a copy that is no leaf; the change is reported, and the client's tensor stays."""
    x, mask = X.clone(), torch.tensor([True, False])

    def forward(m: Any, x: Tensor, mask: Tensor) -> Tensor:
        return m.layer(x.relu_()) * mask.logical_not_()

    done = execution.run(model(body(forward, layer=linear())), call(x, mask), grad=True)
    assert done.outputs.tolist() == [[0, 0], [0, 8]]
    assert list(done.changed) == [0, 1]
    assert torch.equal(x, X)
    assert mask.tolist() == [True, False]
    assert execution.run(model(linear()), call(), grad=True).changed == {}


@pytest.mark.parametrize("grad", [True, False])
def test_the_grad_mode_is_the_clients(grad: bool) -> None:
    """Whatever mode the server itself is in, inference mode included."""
    seen = []
    made = model(body(lambda m, x: seen.append(torch.is_grad_enabled()) or x * 1))
    with torch.inference_mode():
        done = execution.run(made, call(), grad=grad)
    assert seen == [grad]
    assert done.outputs.requires_grad is grad
    assert not done.outputs.is_inference()


def test_dropout_is_a_function_of_the_seed() -> None:
    """The same seed, the same mask, on any replica and after any other draws; the process's stream isn't touched."""
    dropout = nn.Dropout(0.5)
    before = torch.get_rng_state()
    first = execution.run(model(dropout), call(torch.ones(9, 9)), grad=True)
    torch.rand(3)
    again = execution.run(model(dropout), call(torch.ones(9, 9)), grad=True)
    other = execution.run(model(dropout), call(torch.ones(9, 9), seed=8), grad=True)
    assert first.drew
    assert first.crcs == again.crcs != other.crcs
    torch.set_rng_state(before)
    quiet = execution.run(model(dropout), call(torch.ones(9, 9), training=False), grad=True)
    assert not quiet.drew
    assert torch.equal(torch.get_rng_state(), before)


def test_state_of_a_class_shows_at_a_recompute() -> None:
    """A counter that all bodies of a class share: the recompute has other bits, and says which outputs."""
    calls = itertools.count()
    first, second = [model(body(lambda m, x: (x * 1, x + next(calls)))) for _ in range(2)]
    done = execution.run(first, call(), grad=True)
    record = call(crcs=done.crcs)
    execution.check_replay(record, done, record.numerics)
    again = execution.run(second, record, grad=True)
    with pytest.raises(ReplayError, match=r"numbers \[1\] of 2\): .* the same numerics.*must not keep state in Python"):
        execution.check_replay(record, again, record.numerics)


def test_what_a_body_raises_is_a_body_error() -> None:
    """With its kind, its message, and itself as the cause: forward and backward."""

    def explode(grad: Tensor) -> None:
        raise KeyError("in a hook")

    def forward(m: Any, x: Tensor, late: bool) -> Tensor:
        y = x * 1
        return y if late and y.register_hook(explode) else {}["now"]

    made = model(body(forward))
    with pytest.raises(BodyError, match="the body raised KeyError: 'now'") as caught:
        execution.run(made, call(X, False, requires_grad=(True,)), grad=True)
    assert isinstance(caught.value.__cause__, KeyError)
    done = execution.run(made, call(X, True, requires_grad=(True,)), grad=True)
    with pytest.raises(BodyError, match="the body raised KeyError: 'in a hook'"):
        execution.backward(done, [torch.ones(2, 2)])


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"autocast": "int8"}, InputError, "autocast dtype 'int8' isn't known: expected one of"),
        ({"cut": "0.there"}, InputError, r"no part '0.there'.*it has \['0'\]"),
        ({"requires_grad": ()}, InputError, "a requires_grad flag for each of 1 input tensors, got 0"),
        ({"inputs": ((X, X + 1), {}), "requires_grad": (True, True)}, BodyError, "TypeError"),
        ({"inputs": ((X[:, :1],), {})}, BodyError, "RuntimeError: mat1 and mat2"),
        ({"inputs": ((X.long(),), {})}, InputError, "require a gradient and is torch.int64: expected a floating dtype"),
    ],
    ids=["autocast", "part", "flags", "arguments", "shape", "integers"],
)
def test_a_call_that_doesnt_fit_is_refused(changes: dict[str, Any], error: type[Exception], said: str) -> None:
    """By what it says wrong."""
    with pytest.raises(error, match=said):
        execution.run(model(nn.Sequential(linear())), call(**changes), grad=True)


def test_outputs_without_a_gradient_give_none() -> None:
    """Neither inputs nor parameters are reached by a gradient that isn't there."""
    done = execution.run(model(body(lambda m, x: (m.layer(x), x.argmax()), layer=linear())), call(), grad=True)
    assert execution.backward(done, [None, None]) == ([None], {})


@pytest.mark.parametrize("how", ["in_place", "assigned"])
def test_each_run_begins_with_the_versions_buffers(how: str) -> None:
    """A recompute counts nothing again, and runs of one version don't see each other."""

    def forward(m: Any, x: Tensor) -> Tensor:
        if how == "in_place":
            m.count += 1
        else:
            m.count = m.count + 1
        return x + m.count

    holder = body(forward)
    holder.register_buffer("count", torch.tensor(10.0))
    made = model(holder)
    runs = [execution.run(made, call(), grad=True) for _ in range(2)]
    assert [float(done.buffers["count"]) for done in runs] == [11, 11]
    assert [float(done.bases["count"]) for done in runs] == [10, 10]
    handed_on = execution.run(made, call(buffers={"count": torch.tensor(11.0)}), grad=True)
    assert float(handed_on.buffers["count"]) == 12
    assert handed_on.outputs.tolist() == (X + 12).tolist()


@pytest.mark.parametrize("how", ["in_place", "assigned", "removed"])
def test_buffers_that_arent_kept_begin_anew_each_time(how: str) -> None:
    """A scratch buffer holds nothing over from one run to the next."""

    def forward(m: Any, x: Tensor) -> Tensor:
        out = x + m.scratch
        if how == "in_place":
            m.scratch += 1
        else:
            m.scratch = m.scratch + 1 if how == "assigned" else None
        return out

    scratching = body(forward)
    scratching.register_buffer("scratch", torch.zeros(1), persistent=False)
    made = model(scratching)
    assert [execution.run(made, call(), grad=False).outputs.tolist() for _ in range(3)] == [X.tolist()] * 3


def test_a_buffer_that_is_taken_away_is_refused() -> None:
    """It belongs to the version, so it must have a value when the run ends."""

    def forward(m: Any, x: Tensor) -> Tensor:
        m.count = None
        return x

    losing = body(forward)
    losing.register_buffer("count", torch.zeros(1))
    with pytest.raises(SplitFedError, match="count"):
        execution.run(model(losing), call(), grad=True)


@pytest.mark.parametrize("how", ["in_place", "assigned", "data"])
def test_a_body_that_writes_to_its_parameters_is_refused(how: str) -> None:
    """What changes in forward belongs in buffers: the message says so."""

    def forward(m: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            if how == "data":
                m.layer.weight.data.mul_(0.5)
            elif how == "in_place":
                m.layer.weight.mul_(0.5)
            else:
                m.layer.weight = nn.Parameter(m.layer.weight * 0.5)
        return m.layer(x)

    made = model(body(forward, layer=linear()))
    with pytest.raises(
        UnsupportedError, match="changes its own parameters in forward: keep what it changes in buffers"
    ):
        execution.run(made, call(), grad=True)
