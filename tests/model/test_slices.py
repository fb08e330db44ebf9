"""Slices of a Sequential: one call where its own forward runs, and right wherever the model calls them itself."""

from __future__ import annotations

import copy
import pickle
import uuid
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bodies import Calls
from harness import Split, Wire, assert_step
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import splitfed
from splitfed.model.cutpoint import CutPoint
from splitfed.model.slices import SlicedForward, join_names, split_names

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))


def blocks(count: int = 6) -> nn.Sequential:
    """Layers, every second an activation."""
    return nn.Sequential(*[nn.Tanh() if i % 2 else nn.Linear(6, 6) for i in range(count)])


def sharing() -> nn.Sequential:
    """Layers of which the positions 1, 3 and 5 are one and the same activation."""
    layers = blocks(7)
    layers[3] = layers[5] = layers[1]
    return layers


def taps(m: Any, x: Tensor) -> Tensor:
    """Keeps some outputs of a loop."""
    kept = []
    for i, block in enumerate(m.blocks):
        x = block(x)
        if i in (1, 3, 5):
            kept.append(x)
    return torch.cat(kept, 1)


def indexed(m: Any, x: Tensor) -> Tensor:
    """Calls positions by their index, one of them twice and out of order."""
    return m.blocks[4](m.blocks[2](m.blocks[4](x))) + m.blocks[-1](x)


def sliced(m: Any, x: Tensor) -> Tensor:
    """Calls a slice that lies across the end of the one that is cut out."""
    return m.blocks[3:](m.blocks[:3](x)) + m.blocks[2:4](x)


def perceptual(m: Any, x: Tensor) -> Tensor:
    """Compares the outputs of each layer for two inputs."""
    y, total = x.flip(0), x.new_zeros(())
    for block in m.blocks:
        x, y = block(x), block(y)
        total = total + (x - y).abs().mean()
    return total


def both(m: Any, x: Tensor) -> Tensor:
    """Runs the Sequential as a whole, and a layer of it by itself."""
    return m.blocks(x) + m.blocks[2](x)


def interleaved(m: Any, x: Tensor) -> Tensor:
    """Puts a computation of its own between the layers."""
    for name, block in m.blocks.named_children():
        x = block(x) * (1 + int(name))
    return x


def chunked(m: Any, x: Tensor) -> Tensor:
    """Checkpoints some layers at a time."""
    return checkpoint_sequential(m.blocks, 3, x, use_reentrant=False)


def recomputed(m: Any, x: Tensor) -> Tensor:
    """Checkpoints the whole."""
    return checkpoint(m.blocks, x, use_reentrant=False)


def listed(m: Any, x: Tensor) -> Tensor:
    """Loops over a list that it makes of the layers."""
    for block in list(m.blocks.children())[1:5]:
        x = block(x)
    return x


WAYS = (taps, indexed, sliced, perceptual, both, interleaved, chunked, recomputed, listed)


def model(way: Callable[[Any, Tensor], Tensor]) -> nn.Module:
    """A model that calls its layers in this way."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Calls(way, blocks=blocks())


@pytest.mark.parametrize("at", ["blocks.2:5", "blocks.1:", ["blocks.0:2", "blocks.3:5"]], ids=str)
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_a_model_may_call_the_positions_itself(way: Callable[[Any, Tensor], Tensor], at: Any) -> None:
    """Reference and split both are the raw model, outputs and gradients."""
    found = splitfed.check(model(way), at, X)
    assert found.ok
    assert found.rows[0][1:] == ("equal", "equal")
    for _, against_raw, _ in found.rows:
        assert against_raw == "equal" or float(against_raw.split()[2]) < 1e-6


class Counting(Wire):
    """Notes which parts each forward asks for."""

    cuts: tuple[str, ...] = ()

    def send(self, method: str, request: Any) -> Any:
        """Note, then pass on."""
        if method == "forward":
            self.cuts += (request.cut,)
        return super().send(method, request)


@pytest.mark.parametrize(
    ("way", "at", "cuts"),
    [
        (lambda m, x: m.blocks(x), "blocks.2:5", [""]),
        (lambda m, x: m.blocks.forward(x), "blocks.2:5", [""]),
        (lambda m, x: m.blocks(x), ["blocks.0:2", "blocks.4:6"], ["blocks.0,blocks.1", "blocks.4,blocks.5"]),
        (taps, "blocks.2:5", ["2", "3", "4"]),
    ],
)
def test_a_slice_is_one_request_where_its_sequential_runs(way: Any, at: Any, cuts: list[str]) -> None:
    """As many as there are cuts; else one for each position that the model calls."""
    split = Split(model(way), at, f"memory://{uuid.uuid4().hex}", wire=Counting)
    expected = model(way)(X)
    assert torch.equal(split.client(X), expected)
    assert list(split.wire.cuts) == cuts


@pytest.mark.parametrize(
    ("at", "cuts"), [("1:6", [""]), ("0:6", [""]), ("2:6", ["3", ""]), ("2:5", ["3", "", "3"])], ids=str
)
def test_a_layer_that_is_in_several_positions_is_in_the_body_once(at: str, cuts: list[str]) -> None:
    """As an activation often is; outside of the slice it is a call of its own."""
    split = Split(sharing(), at, f"memory://{uuid.uuid4().hex}", wire=Counting)
    whole = splitfed.join(split.half, split.body)
    assert torch.equal(split.client(X), whole(X))
    assert list(split.wire.cuts) == cuts
    assert whole[1] is whole[3] is whole[5]
    assert splitfed.check(sharing(), at, X).ok


def test_hooks_on_the_half_see_each_position() -> None:
    """Values as the unsplit model has them, at whichever position of a slice they are asked for."""
    raw = model(lambda m, x: m.blocks(x))
    split = Split(model(lambda m, x: m.blocks(x)), "blocks.2:5", f"memory://{uuid.uuid4().hex}", wire=Counting)
    seen: dict[str, list[Tensor]] = {"raw": [], "split": []}
    for name, blocks_ in (("raw", raw.blocks), ("split", split.half.blocks)):
        blocks_[2].register_forward_hook(lambda m, given, out, name=name: seen[name].append(out))
    assert torch.equal(split.client(X), raw(X))
    assert torch.equal(seen["split"][0], seen["raw"][0])
    assert split.wire.cuts == ("2", "3", "4")


@pytest.mark.parametrize("change", ["exchanged", "taken out", "put in"])
def test_a_half_that_was_changed_computes_as_it_is_now(change: str) -> None:
    """What is in its positions counts, also in the middle of a slice."""
    raw, half = model(lambda m, x: m.blocks(x)), Split(model(lambda m, x: m.blocks(x)), "blocks.2:5", "memory://c")
    for layers in (raw.blocks, half.half.blocks):
        if change == "exchanged":
            layers[3] = nn.ReLU()
        elif change == "taken out":
            del layers[3]
        else:
            layers.insert(3, nn.Sigmoid())
    assert torch.equal(half.client(X), raw(X))


def test_copies_and_pickles_of_a_half_run_their_own_positions() -> None:
    """The forward of the Sequential goes along, and leads to the copy's cut points."""
    half, _ = splitfed.split(sharing(), "2:5")
    for twin in (copy.deepcopy(half), pickle.loads(pickle.dumps(half))):
        forward = vars(twin)["forward"]
        assert isinstance(forward, SlicedForward)
        assert forward.owner is twin
        assert forward.slices[0].members == (twin[2], twin[3], twin[4])
        assert twin[3] is twin[5] is twin[1]
        assert isinstance(twin[2], CutPoint)


def test_join_gives_the_sequential_its_own_forward_back() -> None:
    """Nothing of the cut is left, and a model with a forward of its own on the instance keeps that."""
    half, body = splitfed.split(blocks(), "2:5")
    whole = splitfed.join(half, body)
    assert "forward" not in vars(whole)
    assert torch.equal(whole(X), splitfed.join(half, body.state_dict())(X))


def reverse(self: nn.Sequential, x: Tensor) -> Tensor:
    """A forward that somebody has put on an instance."""
    for block in reversed(self):
        x = block(x)
    return x


def test_a_forward_of_the_users_own_on_the_instance_stays() -> None:
    """It calls the positions as it likes, and each is a call."""
    patched = model(lambda m, x: m.blocks(x))
    patched.blocks.forward = reverse.__get__(patched.blocks)
    found = splitfed.check(patched, "blocks.2:5", X)
    assert found.ok
    assert found.rows[0][1] == "equal"


def test_a_layer_of_a_slice_that_has_another_name_is_cut_under_both() -> None:
    """A tap that keeps one of the layers under a name of its own calls the body, too."""
    raw = model(lambda m, x: m.blocks(x) + m.tap(x))
    raw.tap = raw.blocks[2]
    half, body = splitfed.split(raw, "blocks.2:5")
    assert half.tap is half.blocks[2]
    assert splitfed.check(raw, "blocks.2:5", X).ok
    whole = splitfed.join(half, body)
    assert whole.tap is whole.blocks[2]


def test_a_slice_in_a_loop_trains_with_dropout_and_statistics() -> None:
    """Each position is a call with a seed of its own, which the reference draws likewise."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        return Calls(taps, blocks=nn.Sequential(*[nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.3)) for _ in range(6)]))

    split = Split(build(), "blocks.2:5", f"memory://{uuid.uuid4().hex}")
    reference = splitfed.reference(build(), "blocks.2:5")
    assert_step(split, reference, ((X,), {}))


def test_names_of_parts_are_joined_and_parted_again() -> None:
    """Commas and percent signs are the only characters that need care."""
    names = ["a,b", "100%", "", "%2C", "x:y", "layer.1", ","]
    assert split_names(join_names(names)) == names
    assert join_names(["encoder.1", "encoder.2"]) == "encoder.1,encoder.2"


class Keyed(nn.Module):
    """Layers under keys that nothing else would be named by."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({"stage:1": nn.Linear(6, 6), "a,b": nn.Linear(6, 6), "50%2C": blocks(3)})

    def forward(self, x: Tensor) -> Tensor:
        """All of them."""
        for part in self.parts.values():
            x = part(x)
        return x


@pytest.mark.parametrize(
    "at",
    ["parts.stage:1", "parts.a,b", "parts.50%2C.0:2", ["parts.stage:1"], ["parts.a,b", "parts.50%2C.0:2"]],
    ids=str,
)
def test_any_key_of_a_module_dict_names_a_cut(at: Any) -> None:
    """A name with a colon is a submodule first, and commas don't part it."""
    assert splitfed.check(Keyed(), at, X).ok


def test_a_cut_point_placed_by_hand_may_name_such_a_part() -> None:
    """The name as it is in the body."""
    body = Keyed()
    store = splitfed.GradientStore(f"memory://{uuid.uuid4().hex}", sync="process")
    client = splitfed.SplitClient(nn.Sequential(splitfed.CutPoint("parts.a,b")), splitfed.SplitServer(body, store), "a")
    assert torch.equal(client(X), body.parts["a,b"](X))
