"""A template: a module's structure without its weights, and modules built from it that share what they are given."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bodies import with_buffers
from torch import Tensor, nn

from splitfed.errors import UnsupportedError
from splitfed.model.copying import deep_copy
from splitfed.model.skeleton import Template, named_state, transient_buffers, unwrap


def tied() -> nn.Module:
    """Two layers with one weight, the second frozen in its bias."""
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    module[1].weight = module[0].weight
    module[1].bias.requires_grad_(False)
    return module


def test_names_roles_and_ties() -> None:
    """Every name of the state_dict with the first name of its tensor; who trains and who never does."""
    template = Template(tied())
    assert template.names == {
        "0.weight": "0.weight",
        "0.bias": "0.bias",
        "1.weight": "0.weight",
        "1.bias": "1.bias",
    }
    assert (template.trainable, template.frozen) == (["0.weight", "0.bias"], ["1.bias"])
    assert template.fingerprint() == {
        "0.weight": {"role": "trainable", "shape": [2, 2], "dtype": "float32"},
        "0.bias": {"role": "trainable", "shape": [2], "dtype": "float32"},
        "1.weight": {"tied": "0.weight"},
        "1.bias": {"role": "frozen", "shape": [2], "dtype": "float32"},
    }


@pytest.mark.parametrize(
    "module",
    [tied, with_buffers, lambda: nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3)), lambda: nn.LSTM(2, 3, 2)],
    ids=["tied", "buffers", "batchnorm", "lstm"],
)
def test_names_are_those_of_the_state_dict(module: Any) -> None:
    """In its order, so that what a store hands out can be loaded as it is."""
    made = module()
    template = Template(made)
    assert list(template.names) == list(made.state_dict())
    assert list(template.expand(template.state(made))) == list(made.state_dict())


def test_a_template_holds_no_weights_and_leaves_the_module_alone() -> None:
    """Its blueprint is on the meta device; the module keeps its tensors and its modes."""
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2).eval())
    before = [(id(t), t.clone()) for t in module.state_dict(keep_vars=True).values()]
    template = Template(module)
    assert {t.device.type for t in template.blueprint.state_dict().values()} == {"meta"}
    after = module.state_dict(keep_vars=True).values()
    assert all(i == id(t) and torch.equal(c, t) for (i, c), t in zip(before, after, strict=True))
    assert [m.training for m in module.modules()] == [True, True, False]


def test_what_is_built_shares_memory_and_keeps_ties() -> None:
    """No weight is copied, a tied one is one parameter, and two builds share nothing else."""
    module = tied()
    template = Template(module)
    state = {name: tensor.clone() for name, tensor in template.state(module).items()}
    built = template.build(state)
    assert built[1].weight is built[0].weight
    assert {n: p.data_ptr() for n, p in built.named_parameters()} == {n: t.data_ptr() for n, t in state.items()}
    assert [p.requires_grad for p in built.parameters()] == [True, True, False]
    assert isinstance(built[0].weight, nn.Parameter)
    assert template.build(state)[0] is not built[0]


def test_buffers_that_arent_kept_are_copied_with_the_structure() -> None:
    """They have no name in the state, so a build gets what they were when the template was made."""
    module = with_buffers()
    template = Template(module)
    module.scratch.zero_()
    built = template.build(template.state(module), torch.device("cpu"))
    assert template.buffers.keys() == {"kept"}
    assert built.scratch.tolist() == [1, 2]
    assert built.none is None
    assert [leaf for _, leaf in transient_buffers(built)] == ["scratch"]


def test_recurrent_layers_use_the_parameters_that_they_show() -> None:
    """An LSTM holds a list of its weights besides; after a build it is the same list of the same tensors."""
    module = nn.LSTM(2, 3, bidirectional=True)
    template = Template(module)
    built = template.build({n: torch.full_like(t, 0.1) for n, t in template.state(module).items()})
    assert [id(p) for p in built._flat_weights] == [id(p) for p in built.parameters()]
    assert float(built._flat_weights[0].detach().mean()) == pytest.approx(0.1)


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_modes_of_submodules(mode: bool) -> None:
    """Its own mode keeps the flags that it was given, a frozen BatchNorm among them; the other is what train() sets."""
    module = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2)).train(mode)
    module[1].training = not mode
    modes = Template(module).modes
    assert modes[mode] == [mode, mode, not mode]
    assert modes[not mode] == [not mode] * 3


class StaysFrozen(nn.BatchNorm1d):
    """A BatchNorm that never trains, whatever it is told."""

    def train(self, mode: bool = True) -> Any:
        """Stay in eval mode."""
        return super().train(False)


def test_modes_ask_the_modules_own_train() -> None:
    """A module that overrides `train()` is asked, not told."""
    module = nn.Sequential(nn.Dropout(), StaysFrozen(2)).eval()
    assert Template(module).modes == {True: [True, True, False], False: [False] * 3}


class Wrapped(nn.Module):
    """What torch.compile returns, as far as names go."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self._orig_mod = inner

    def forward(self, x: Tensor) -> Any:
        """What it wraps."""
        return self._orig_mod(x)


def test_compiled_modules_have_the_names_of_the_plain_ones() -> None:
    """The wrapper around all is taken off, and the prefix of one within is left out."""
    plain = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    inner = nn.Sequential(Wrapped(nn.Linear(2, 2)), Wrapped(nn.BatchNorm1d(2)))
    assert Template(Wrapped(plain)).fingerprint() == Template(plain).fingerprint()
    assert Template(inner).fingerprint() == Template(plain).fingerprint()
    state = Template(plain).state(plain)
    built = Template(inner).build(state)
    assert [t.data_ptr() for _, t in named_state(built)] == [t.data_ptr() for t in state.values()]


class ExtraState(nn.Linear):
    """Keeps something that isn't a tensor."""

    def get_extra_state(self) -> Any:
        """Anything."""
        return {"seen": 3}


def not_a_leaf() -> nn.Module:
    """Holds a tensor with a graph."""
    module = nn.Linear(2, 2)
    module.cached = module.weight * 2
    return module


@pytest.mark.parametrize(
    ("module", "said"),
    [
        (lambda: nn.LazyLinear(2), "'weight' is lazy.*run the model once"),
        (lambda: nn.Sequential(nn.LazyBatchNorm1d()), r"'0\.\w+' is lazy"),
        (lambda: nn.Sequential(ExtraState(2, 2)), r"0 \(ExtraState\) keeps extra state.*buffers"),
        (lambda: nn.DataParallel(nn.Linear(2, 2)), r"DataParallel can't be served: pass its `\.module`"),
        (not_a_leaf, "Linear can't be copied.*parameters or buffers"),
        (lambda: (i for i in range(3)), "expected an nn.Module, got generator"),
    ],
    ids=["lazy", "lazy_within", "extra_state", "data_parallel", "not_a_leaf", "no_module"],
)
def test_what_has_no_template_is_refused(module: Any, said: str) -> None:
    """With what to do instead."""
    with pytest.raises(UnsupportedError, match=said):
        Template(module())


def test_unwrap_returns_a_plain_module_as_it_is() -> None:
    """Only wrappers come off."""
    module = nn.Linear(2, 2)
    assert unwrap(module) is module
    assert unwrap(Wrapped(module)) is module


def test_what_cant_be_copied_says_so() -> None:
    """A lock, a generator or an open file within a module."""
    module = nn.Linear(2, 2)
    module.stream = (i for i in range(3))
    with pytest.raises(UnsupportedError, match="keep what can't be deep-copied out"):
        deep_copy(module)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_a_scripted_part_is_refused() -> None:
    """Its parameters live in C++, where no version's can be put."""
    module = nn.Sequential(torch.jit.script(nn.Linear(2, 2)))
    with pytest.raises(UnsupportedError, match=r"torch\.jit\.script.*give the module that it was made from"):
        Template(module).build(dict(module.state_dict()))
