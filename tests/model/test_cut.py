"""Cutting: anywhere, with all names kept, the caller's model untouched; joining is the exact inverse."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from bodies import Calls
from torch import nn

from splitfed.errors import ArchitectureError, CutError, NotConnectedError, UnknownCutError, UnsupportedError
from splitfed.model.cut import find_cuts, join, split
from splitfed.model.cutpoint import CutPoint


def line(count: int = 5) -> nn.Sequential:
    """Layers named by their positions."""
    return nn.Sequential(*[nn.Linear(2, 2) for _ in range(count)])


def deep() -> nn.Module:
    """A model with a Sequential two levels down, a buffer, a frozen parameter and mixed modes."""
    encoder = Calls(lambda m, x: m.layer(x), layer=nn.Sequential(*line(4), nn.BatchNorm1d(2)))
    model = Calls(
        lambda m, x: m.head(m.encoder(m.stem(x))), stem=nn.Linear(2, 2), encoder=encoder, head=nn.Linear(2, 2)
    )
    encoder.layer[1].weight.requires_grad_(False)
    encoder.layer[4].eval()
    return model


def keys(module: nn.Module) -> list[str]:
    """The names of its layers that have parameters."""
    return sorted({name.rpartition(".")[0] for name, _ in module.named_parameters()})


NAMES = {
    "submodule": ("encoder", ["head", "stem"], ["layer.0", "layer.1", "layer.2", "layer.3", "layer.4"]),
    "at_depth": ("encoder.layer.1", None, [""]),
    "slice": ("encoder.layer.1:3", None, ["1", "2"]),
    "open_end": ("encoder.layer.3:", None, ["3", "4"]),
    "open_start": ("encoder.layer.:2", None, ["0", "1"]),
    "negative": ("encoder.layer.-3:-1", None, ["2", "3"]),
    "root": ("", [], None),
    "list": (["stem", "encoder.layer.1:3"], None, ["encoder.layer.1", "encoder.layer.2", "stem"]),
    "list_of_one": (["encoder.layer.4"], None, ["encoder.layer.4"]),
}


@pytest.mark.parametrize(("at", "half_keys", "body_keys"), NAMES.values(), ids=NAMES)
def test_names_stay(at: Any, half_keys: list[str] | None, body_keys: list[str] | None) -> None:
    """The half keeps its names; the body has its own, its positions in the slice, or for a list the model's."""
    model = deep()
    half, body = split(model, at)
    assert keys(body) == (keys(model) if body_keys is None else body_keys)
    assert half_keys is None or keys(half) == half_keys
    assert set(half.state_dict()) <= set(model.state_dict())
    assert len(half.state_dict()) + len(body.state_dict()) == len(model.state_dict())
    parts = [part for cut in find_cuts(model, at) for part in cut.parts]
    assert [name for name, m in half.named_modules() if isinstance(m, CutPoint)] == parts


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("at", [at for at, *_ in NAMES.values()], ids=NAMES)
def test_split_then_join_is_the_identity(at: Any, train: bool) -> None:
    """Names, values, who requires grad, modes, and outputs: by the weights, or by the body itself."""
    model = deep() if train else deep().eval()
    half, body = split(model, at)
    for given in (body.state_dict(), body):
        whole = join(half, given)
        assert list(whole.state_dict()) == list(model.state_dict())
        for (name, a), (_, b) in zip(whole.named_parameters(), model.named_parameters(), strict=True):
            assert torch.equal(a, b), name
            assert a.requires_grad == b.requires_grad, name
        assert [m.training for m in whole.modules()] == [m.training for m in model.modules()]
        assert torch.equal(whole.eval()(torch.ones(2, 2)), deep_eval(model)(torch.ones(2, 2)))


def deep_eval(model: nn.Module) -> nn.Module:
    """A joined copy in eval mode, so that the model keeps its modes."""
    return join(*split(model, "")).eval()


def test_the_callers_model_isnt_changed_nor_shared() -> None:
    """Both halves are copies; so is what join returns."""
    model = deep()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    half, body = split(model, "encoder")
    whole = join(half, body)
    with torch.no_grad():
        for parameter in [*half.parameters(), *body.parameters(), *whole.parameters()]:
            parameter.fill_(7)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert isinstance(model.encoder.layer, nn.Sequential)
    assert not any(isinstance(m, CutPoint) for m in model.modules())
    assert isinstance(half.encoder, CutPoint)


def test_a_slice_that_begins_with_a_frozen_layer_trains() -> None:
    """Each position has its own mode, and what counts is the client's."""
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout(), nn.Linear(2, 2))
    model[1].eval()
    half, body = split(model, "1:3")
    assert (half[1].training, half[2].training, body.training) == (False, True, True)
    assert [m.training for m in join(half, body)] == [True, False, True, True]


def test_a_list_of_cuts_of_a_model_in_eval_mode_can_be_trained() -> None:
    """Each mode is the parts' own: once the half is set to train, so are they."""
    half, body = split(deep().eval(), ["stem", "encoder"])
    assert not body.training
    half.train()
    assert all(m.training for m in join(half, body.state_dict()).modules())


def test_a_cut_placed_by_hand() -> None:
    """The body is the caller's own; join needs it, since weights alone don't say what they belong to."""
    half, body = line(3), nn.Linear(2, 2)
    half[1] = CutPoint()
    assert keys(join(half, body)) == ["0", "1", "2"]
    assert torch.equal(join(half, body)[1].weight, body.weight)
    with pytest.raises(CutError, match=r"placed by hand.*join\(client_half, body\)"):
        join(half, body.state_dict())


def test_cuts_placed_by_hand_name_their_parts() -> None:
    """Two of them belong to one body, each to the part that it names."""
    half, body = line(4), nn.ModuleDict({"low": nn.Linear(2, 2), "high": nn.Linear(2, 2)})
    half[1], half[2] = CutPoint("low"), CutPoint("high")
    whole = join(half, body)
    assert torch.equal(whole[1].weight, body["low"].weight)
    assert torch.equal(whole[2].weight, body["high"].weight)


def test_a_module_under_two_names_is_cut_under_both() -> None:
    """One cut point stands in both places, and join puts one module back in both."""
    shared = nn.Linear(2, 2)
    model = Calls(lambda m, x: m.again(m.first(x)), first=shared, again=shared)
    half, body = split(model, "first")
    assert half.first is half.again
    assert isinstance(half.first, CutPoint)
    whole = join(half, body.state_dict())
    assert whole.first is whole.again


@pytest.mark.parametrize(
    ("at", "said"),
    [
        ("encoder.layr", r"no submodule 'encoder.layr': the nearest are \['encoder.layer'"),
        ("hed", "nearest are .*'head'"),
        ("encoder.layer.9", "nearest are"),
        ("???", "there are .*'stem'"),
        ("encoder.lay.1:3", "no submodule 'encoder.lay': the nearest are"),
        ("encoder.layer.2:2", r"the slice 'encoder.layer.2:2' is empty: 'encoder.layer' has 5 positions"),
        ("encoder.layer.4:1", "is empty"),
        ("encoder.layer.3:99", "past the end: 'encoder.layer' has 5 positions, so its bounds are from 0 to 5, or open"),
        ("encoder.layer.6:", "goes past the end"),
        ("encoder.layer.-9:2", "goes past the end"),
        ("encoder.1:3", "'encoder', which is a Calls: only an nn.Sequential has slices"),
        ("encoder.layer.a:b", "isn't a slice: expected two positions, such as '2:5'"),
        ("encoder.layer.0:4:2", "isn't a slice"),
        (["stem", "heat"], "nearest are .*'head'"),
    ],
)
def test_an_unknown_cut_says_what_there_is(at: Any, said: str) -> None:
    """A LookupError and a ValueError, with the nearest names."""
    with pytest.raises(UnknownCutError, match=said) as caught:
        split(deep(), at)
    assert isinstance(caught.value, LookupError)


@pytest.mark.parametrize(
    "at",
    [["encoder", "encoder.layer.1"], ["stem", "stem"], ["encoder.layer.0:2", "encoder.layer.1:3"], ["", "stem"], []],
    ids=["within", "twice", "slices", "root", "none"],
)
def test_cuts_that_overlap_are_refused(at: list[str]) -> None:
    """A layer can't be in the body twice, and no cut is none."""
    with pytest.raises(CutError, match=r"overlap|no cut was named"):
        split(deep(), at)


@pytest.mark.parametrize("at", [None, 5, [3], [""]], ids=repr)
def test_what_names_no_cut_is_refused(at: Any) -> None:
    """With our own error."""
    with pytest.raises(CutError):
        split(deep(), at)


class Summing(nn.Sequential):
    """Uses its layers in a way of its own."""

    def forward(self, x: Any) -> Any:
        """Each layer adds to its input."""
        return functools.reduce(lambda x, layer: x + layer(x), self, x)


def test_a_slice_of_a_sequential_with_a_forward_of_its_own_is_refused() -> None:
    """Its layers aren't simply called one after another, so a slice of them would compute something else."""
    with pytest.raises(CutError):
        split(Summing(*line(4)), "1:3")


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (lambda: nn.Sequential(nn.LazyLinear(2), nn.Linear(2, 2)), "'0.weight' is lazy.*run the model once"),
        (lambda: nn.DataParallel(line()), "DataParallel can't be served"),
        (lambda: 3, "expected an nn.Module, got int"),
    ],
    ids=["lazy", "data_parallel", "no_module"],
)
def test_what_cant_be_cut_is_refused(model: Any, said: str) -> None:
    """Lazy parameters on either side, wrappers, and what is no module."""
    with pytest.raises(UnsupportedError, match=said):
        split(model(), "1")


def test_join_refuses_what_doesnt_fit() -> None:
    """Weights of another body, by the names that are wrong; a half without a cut; a half without a body."""
    half, body = split(deep(), "encoder.layer.1")
    weights = body.state_dict()
    with pytest.raises(ArchitectureError, match=r"missing or different \['weight'\], unknown \['more'\]"):
        join(half, {"weight": torch.zeros(3, 3), "bias": weights["bias"], "more": torch.zeros(1)})
    with pytest.raises(CutError, match="Linear has no CutPoint: expected the client half"):
        join(body, weights)


def test_a_cut_point_outside_of_a_client_says_so() -> None:
    """A half that is called by itself has no server."""
    half, _ = split(line(), "1:3")
    with pytest.raises(NotConnectedError, match=r"client = SplitClient\(client_half, server"):
        half(torch.zeros(1, 2))


def test_a_body_of_several_parts_isnt_called_as_a_whole() -> None:
    """The cut points say which part is meant."""
    _, body = split(line(), ["1", "3"])
    with pytest.raises(CutError, match="through a SplitClient"):
        body(torch.zeros(1, 2))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_scripted_submodule_is_found() -> None:
    """torch.jit gives no class a `forward` to look at."""
    assert [cut.owner for cut in find_cuts(nn.Sequential(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2))), "0")] == [
        "0"
    ]
