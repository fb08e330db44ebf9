"""Settings that come with a call: made on the module for one run, and nothing but settings."""

from __future__ import annotations

import uuid
from typing import Any

import pytest
import torch
from bodies import Calls
from harness_replay import X, call, linear, model
from harness_requests import ahead, back
from torch import Tensor, nn

from splitfed.errors import InputError
from splitfed.model import execution
from splitfed.server.server import SplitServer
from splitfed.store.store import GradientStore


class Scaled(nn.Linear):
    """A layer with settings of each kind: of the instance, of the class, and by way of a property."""

    shift = 0.0

    def __init__(self) -> None:
        super().__init__(2, 2, bias=False)
        self.beta = 1.0
        self.factors = (1.0,)
        self._gain = 1.0
        with torch.no_grad():
            self.weight.copy_(torch.eye(2))

    @property
    def gain(self) -> float:
        """A setting that is kept under another name."""
        return self._gain

    @gain.setter
    def gain(self, value: float) -> None:
        if value < 0:
            raise ValueError("below 0")
        self._gain = value

    @property
    def fixed(self) -> int:
        """Can't be set."""
        return 1

    def forward(self, x: Tensor) -> Tensor:
        """X · beta · gain · Σ factors + shift."""
        return super().forward(x) * self.beta * self.gain * sum(self.factors) + self.shift


def body() -> nn.Module:
    """It has a name for each of these."""
    return nn.Sequential(Scaled(), nn.Dropout(0.5), nn.BatchNorm1d(2).eval())


@pytest.mark.parametrize(
    ("settings", "factor"),
    [
        ({"0.beta": 0.5}, 0.5),
        ({"0.gain": 3.0}, 3.0),
        ({"0.factors": (1.0, 2.0)}, 3.0),
        ({"0.factors": [1.0, 1.0], "0.beta": 2}, 4.0),
    ],
)
def test_a_setting_holds_for_its_run_alone(settings: dict[str, Any], factor: float) -> None:
    """The next has what the body was built with; and it is no attribute that the forward set."""
    made = model(nn.Sequential(Scaled()))
    for _ in range(2):
        done = execution.run(made, call(settings=settings), grad=True)
        assert (done.outputs.tolist(), done.written) == ((factor * X).tolist(), ())
        assert execution.run(made, call(), grad=True).outputs.tolist() == X.tolist()
    assert execution.run(made, call(settings={"0.shift": 1.0}), grad=True).outputs.tolist() == (X + 1).tolist()
    assert "shift" not in made.module[0].__dict__


def test_modes_and_probabilities_are_settings() -> None:
    """Dropout off by its mode or by p = 0; a layer that is frozen in eval mode trains."""
    made = model(body())
    quiet = execution.run(made, call(settings={"1.training": False}), grad=True)
    assert not quiet.drew
    assert execution.run(made, call(settings={"1.p": 1.0}), grad=True).outputs.abs().max() == 0
    assert not quiet.moved
    trains = execution.run(made, call(settings={"2.training": True}), grad=True)
    assert (trains.moved, int(trains.buffers["2.num_batches_tracked"])) == (True, 1)
    assert not execution.run(made, call(), grad=True).moved


def test_a_setting_of_the_body_itself_has_no_dot() -> None:
    """And one that a forward changes is still named as changed."""

    def forward(m: Any, x: Tensor) -> Tensor:
        m.beta *= 2
        return x * m.beta

    made = Calls(forward)
    made.beta = 1.0
    ready = model(made)
    done = execution.run(ready, call(settings={"beta": 3.0}), grad=True)
    assert (done.outputs.tolist(), done.written) == ((6 * X).tolist(), ("beta",))
    assert execution.run(ready, call(), grad=True).outputs.tolist() == (2 * X).tolist()


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("9.beta", 1, "no module '9': expected one of"),
        ("0.betta", 1, r"Scaled has no such setting: expected one of \['_gain', 'beta', 'factors'"),
        ("0.forward", 1, "no such setting"),
        ("0.fixed", 1, "can't be set"),
        ("0.gain", -1.0, "can't be set: below 0"),
        ("0.weight", 1, "a part of Scaled and no setting"),
        ("2.running_mean", None, "a part of BatchNorm1d"),
        ("0", 1, "a part of Sequential"),
        ("0._forward_hooks", {}, "a part of Scaled"),
        ("0.__class__", 1, "a part of Scaled"),
        ("0.beta", torch.ones(1), "to Tensor: expected None, a bool, a number"),
        ("0.beta", {"a": [object()]}, "to dict: expected"),
        ("0.training", 1, "expected a bool"),
    ],
)
def test_what_is_no_setting_is_refused(path: str, value: Any, said: str) -> None:
    """By name; and the next call finds the body as it was built."""
    made = model(body())
    with pytest.raises(InputError, match=said):
        execution.run(made, call(settings={"0.beta": 9.0, path: value}, training=False), grad=True)
    expected = execution.run(model(body()), call(training=False), grad=True)
    assert execution.run(made, call(training=False), grad=True).crcs == expected.crcs


def test_a_recompute_has_the_settings_of_its_forward() -> None:
    """They are on record: a replica that never saw the forward gives the same gradients."""
    store = GradientStore(f"memory://{uuid.uuid4()}", sync="process")
    first, second = (SplitServer(nn.Sequential(Scaled()), store, keep_graphs=0) for _ in range(2))
    answer = first.forward(ahead(settings={"0.beta": 0.5}))
    assert answer.outputs.tolist() == (0.5 * X).tolist()
    grads = second.backward(back())
    assert grads.grad_inputs[0].tolist() == [[0.5, 0.5], [0.5, 0.5]]  # type: ignore[union-attr]


def test_a_linear_body_needs_no_settings() -> None:
    """None given, none looked at."""
    assert execution.run(model(linear()), call(settings={}), grad=True).outputs.tolist() == (2 * X).tolist()
