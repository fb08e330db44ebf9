"""What a body keeps in Python: named when a run has changed it, and as it was built when the next one begins."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bodies import Calls
from harness_replay import X, call, linear, model
from torch import Tensor, nn

from splitfed.errors import BodyError
from splitfed.model import execution


def holder(change: Callable[[Any], object]) -> nn.Module:
    """A body that shows in its output what it holds, and then changes it."""

    def forward(m: Any, x: Tensor) -> Tensor:
        held = [m.number, sum(m.numbers), len(m.table), len(m.some), m.queue[-1], m.counts["a"], len(m.deep["a"])]
        held += [
            float(m.tensor),
            float(m.inner.scale),
            len(m._buffers),
            len(m._modules),
            len(m.many),
            "late" in m.__dict__,
        ]
        change(m)
        return x + torch.tensor(held).sum()

    made = Calls(forward, inner=linear())
    made.inner.scale = 2.0
    plain = {"number": 1, "numbers": [1, 2], "table": {"a": 1}, "some": {1, 2}, "queue": deque([1, 2])}
    nested = {"counts": Counter(a=1), "deep": defaultdict(list, a=[1]), "many": list(range(2000))}
    for name, value in {**plain, **nested, "tensor": torch.tensor(1.0)}.items():
        setattr(made, name, value)
    return made


CHANGES: dict[str, Callable[[Any], object]] = {
    "number": lambda m: setattr(m, "number", m.number + 1),
    "late": lambda m: setattr(m, "late", 1),
    "numbers": lambda m: m.numbers.append(3),
    "numbers ": lambda m: m.numbers.__setitem__(0, 7),
    "table": lambda m: m.table.update(b=2),
    "some": lambda m: m.some.add(3),
    "queue": lambda m: m.queue.append(9),
    "counts": lambda m: m.counts.update("aa"),
    "deep": lambda m: m.deep["a"].append(2),
    "many": lambda m: m.many.pop(),
    "tensor": lambda m: m.tensor.add_(1),
    "inner.scale": lambda m: setattr(m.inner, "scale", m.inner.scale * 2),
    "buffer": lambda m: m.register_buffer("buffer", torch.ones(1)),
    "module": lambda m: m.add_module("module", nn.Identity()),
}


@pytest.mark.parametrize("name", CHANGES)
def test_each_run_begins_as_the_body_was_built(name: str) -> None:
    """The same outputs each time, whatever a run has changed; and it says what."""
    made = model(holder(CHANGES[name]))
    runs = [execution.run(made, call(), grad=True) for _ in range(3)]
    assert [done.written for done in runs] == [(name.strip(),)] * 3
    assert len({done.crcs for done in runs}) == 1
    assert made.habits.written == {name.strip()}
    assert made.habits.within == set()


def test_an_attribute_that_is_taken_away_is_there_again() -> None:
    """And in its place, so that the next look finds nothing changed."""
    made = model(holder(lambda m: delattr(m, "number")))
    assert execution.run(made, call(), grad=True).written == ("number",)
    assert made.attributes.changed() == []
    assert made.module.number == 1


def test_a_body_that_sets_nothing_leaves_nothing() -> None:
    """In either mode, and with either mode set before."""
    made = model(nn.Sequential(linear(), nn.BatchNorm1d(2), nn.Dropout(0.5)))
    for training in (True, False, False, True):
        assert execution.run(made, call(training=training), grad=True).written == ()
        assert made.attributes.changed() == []
    assert made.habits.written == set()


def test_what_a_failed_run_left_is_put_back() -> None:
    """The next begins as the body was built."""

    def forward(m: Any, x: Tensor) -> Tensor:
        m.calls += 1
        m.inner.register_buffer("late", torch.ones(1))
        return x * m.calls if float(x.sum()) else {}["now"]

    made = Calls(forward, inner=linear())
    made.calls = 0
    ready = model(made)
    for _ in range(2):
        with pytest.raises(BodyError):
            execution.run(ready, call(torch.zeros(2, 2)), grad=True)
    assert execution.run(ready, call(), grad=True).outputs.tolist() == X.tolist()


def test_a_graph_outlives_what_is_put_back() -> None:
    """What a run wrote in place may be saved for its backward: the next run gets a copy of its own."""

    def forward(m: Any, x: Tensor) -> Tensor:
        m.tensor.add_(1)
        return x * m.tensor

    made = Calls(forward)
    made.tensor = torch.ones(1)
    ready = model(made)
    first = execution.run(ready, call(), grad=True)
    execution.run(ready, call(), grad=True)
    inputs, _ = execution.backward(first, [torch.ones(2, 2)])
    assert inputs[0] is not None
    assert inputs[0].tolist() == [[2.0, 2.0], [2.0, 2.0]]


def test_a_model_that_is_built_anew_has_gradients_of_its_parameters() -> None:
    """Those of the module that ran, also where the run itself had it built anew."""

    def forward(m: Any, x: Tensor) -> Tensor:
        m.tensor.add_(1)
        return m.layer(x)

    made = Calls(forward, layer=linear())
    made.tensor = torch.ones(1)
    ready = model(made)
    for _ in range(3):
        done = execution.run(ready, call(), grad=True)
        assert execution.backward(done, [torch.ones(2, 2)])[1]["layer.weight"].tolist() == [[4, 2], [4, 2]]
