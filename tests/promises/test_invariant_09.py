"""Invariant 9, No code in data: safetensors, JSON and plain numbers only, and foreign bytes raise our own error."""

from __future__ import annotations

import ast
import json
import math
import os
import pickle
import re
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import Wire
from harness_store import Point, again, batch, check_counted_once, folder, noisy, plant, record, sgd
from processes import AT, Owner, model, new_accumulator
from torch import nn

import splitfed
from splitfed.accumulator.accumulator import Accumulator
from splitfed.errors import SplitFedError
from splitfed.model.cut import split
from splitfed.protocol import safetensors
from splitfed.protocol.messages import BackwardRequest
from splitfed.server.server import SplitServer
from splitfed.store.store import GradientStore

MODULES = sorted(Path(splitfed.__file__).parent.rglob("*.py"))
# What a run tells the processes that it starts itself goes by their pipes; it isn't data, and never in a file.
BETWEEN_OWN_PROCESSES = {"simulation/engines/tasks.py": {"pickle", "cloudpickle"}}
RUNS_CODE = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "code", "runpy"}


class Bomb:
    """Makes a folder where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> object:
        """The code that would run."""
        return os.mkdir, (str(self.path),)


def used(url: str) -> tuple[GradientStore, Wire]:
    """A store in mid-run: two commits, a batch that waits, a forward without its backward."""
    store = GradientStore(url, sync="process")
    wire = Wire(SplitServer(split(model(), AT)[1], store))
    owner, accumulator = Owner("a", wire), new_accumulator(store)
    for _ in range(2):
        owner.step()
        accumulator.step()
    owner.step()
    owner.client(torch.ones(3, 6))
    return store, wire


def test_everything_in_a_store_is_safetensors_json_or_a_number(tmp_path: Path) -> None:
    """Each file, by its bytes and not by its name; every kind is there."""
    store, _ = used((tmp_path / "store").as_uri())
    kinds = set()
    for path in folder(store).rglob("*"):
        if path.is_dir() or path.name.endswith(".lock"):
            continue
        data, kind = path.read_bytes(), path.relative_to(folder(store)).parts[1 if path.parent != folder(store) else 0]
        kinds.add(kind.partition("-")[0] if kind.startswith("settings-") else kind)
        if data[:1] in b"{[" or data.isdigit():
            json.loads(data)
        else:
            safetensors.decode(data)
    assert kinds == {
        *("format.json", "a", "fingerprint.json", "fingerprint-copy.json", "forward", "grad"),
        *("weights", "optimizer", "applied", "commit", "head", "settings"),
    }


@pytest.mark.parametrize("path", MODULES, ids=[str(path.relative_to(MODULES[0].parent)) for path in MODULES])
def test_no_module_can_run_data(path: Path) -> None:
    """None imports a module that does, or calls eval, exec, compile, __import__, torch.load or torch.save."""
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [str(node.module)]
        forbidden = RUNS_CODE - BETWEEN_OWN_PROCESSES.get(path.relative_to(MODULES[0].parent).as_posix(), set())
        assert not forbidden & {name.partition(".")[0] for name in names}, ast.unparse(node)
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert not re.fullmatch(
                r"(builtins\.)?(eval|exec|compile|__import__)|torch\.(load|save|jit\.load)", called
            ), called


def _forward(store: GradientStore, wire: Wire) -> object:
    return Owner("b", Wire(SplitServer(split(model(), AT)[1], store))).step()


def _backward(store: GradientStore, wire: Wire) -> object:
    server = SplitServer(split(model(), AT)[1], store)
    kept = store.pile().forward(2, "a", 1, 3)
    assert kept is not None
    return server.backward(BackwardRequest("a", 1, 3, 0, 2, 3, (torch.ones(3, 8),), None))


def _commit(store: GradientStore, wire: Wire) -> object:
    return new_accumulator(store).step()


def _load(store: GradientStore, wire: Wire) -> object:
    return store.load_weights()


def _head(store: GradientStore, wire: Wire) -> object:
    assert store.latest_version() == 2
    raise SplitFedError("as it should be")


@pytest.mark.parametrize(
    ("place", "act"),
    [
        ("format.json", _forward),
        ("body/fingerprint.json", _forward),
        ("body/commit/0000000002.json", _load),
        ("body/commit/0000000003.json", _load),
        ("body/weights/0000000002-", _load),
        ("body/weights/0000000002-", _forward),
        ("body/optimizer/0000000002-", _commit),
        ("body/applied/0000000000-", _commit),
        ("body/forward/a/0000000002-00000001-0000000003", _backward),
        ("body/head", _head),
    ],
)
def test_a_pickle_in_any_place_raises_our_own_error_and_never_runs(
    tmp_path: Path, place: str, act: Callable[[GradientStore, Wire], object]
) -> None:
    """In place of whatever file: an error of ours, and the folder that it would make isn't there."""
    store, wire = used((tmp_path / "store").as_uri())
    found = [key for key in store.blobs.list("") if key.startswith(place)]
    assert len(found) == (0 if place == "body/commit/0000000003.json" else 1)
    for key in found:
        store.blobs.delete(key)
    store.blobs.create((found or [place])[0], [pickle.dumps(Bomb(tmp_path / "pwned"))])
    with pytest.raises(SplitFedError):
        act(again(store), wire)
    assert not (tmp_path / "pwned").exists()


def opened(body: nn.Module | None = None) -> tuple[GradientStore, Accumulator]:
    """A new store in memory, begun with a `Point` or another body."""
    store = GradientStore(f"memory://{uuid.uuid4()}")
    return store, Accumulator(body or Point(), store, sgd())


BUFFERED = [{"values": {"running_mean": torch.ones(2)}, "bases": {"running_mean": torch.zeros(2)}, "num_samples": 1.0}]
MALICIOUS: dict[str, dict[str, Any]] = {
    "another name": {"gradients": {"v": torch.ones(2)}},
    "another shape": {"gradients": {"w": torch.ones(3)}},
    "another dtype": {"gradients": {"w": torch.ones(2, dtype=torch.float64)}},
    "integers": {"gradients": {"w": torch.ones(2, dtype=torch.int64)}},
    "NaN": {"gradients": {"w": torch.tensor([1.0, math.nan])}},
    "Inf": {"gradients": {"w": torch.tensor([math.inf, 1.0])}},
    "a list of gradients": {"gradients": [torch.ones(2)]},
    "a number as a gradient": {"gradients": {"w": 3}},
    "None as gradients": {"gradients": None},
    "gradients by number": {"gradients": {3: torch.ones(2)}},
    "negative samples": {"num_samples": -1.0},
    "no samples": {"num_samples": 0},
    "NaN samples": {"num_samples": math.nan},
    "samples in words": {"num_samples": "many"},
    "samples as a tensor": {"num_samples": torch.ones(2)},
    "loss scale 0": {"loss_scale": 0.0},
    "loss scale in words": {"loss_scale": "x"},
    "a loss scale that overflows": {"loss_scale": 1e-300},
    "a base in the future": {"base_version": 10},
    "half a base": {"base_version": 0.5},
    "an infinite base": {"base_version": math.inf},
    "a base in words": {"base_version": "1"},
    "a negative base": {"base_version": -3},
    "a base as a tensor": {"base_version": torch.tensor(1)},
    "an unknown kind": {"kind": "weights"},
    "a kind that can't be": {"kind": ["gradient"]},
    "buffers as a number": {"buffers": 5},
    "buffers as text": {"buffers": "abc"},
    "buffers as a list": {"buffers": [[1]]},
    "a buffer that isn't there": {"buffers": BUFFERED},
    "buffers without samples": {"buffers": [{"values": {}, "bases": {}}]},
    "buffers with negative samples": {"buffers": [{"values": {}, "bases": {}, "num_samples": -1.0}]},
    "buffers with NaN samples": {"buffers": [{"values": {}, "bases": {}, "num_samples": math.nan}]},
    "buffers with samples in words": {"buffers": [{"values": {}, "bases": {}, "num_samples": "x"}]},
    "buffer values as a list": {"buffers": [{"values": [1], "bases": {}, "num_samples": 1.0}]},
}


@pytest.mark.parametrize("fields", MALICIOUS.values(), ids=MALICIOUS)
def test_a_malicious_gradient_is_rejected_and_blocks_nobody(fields: dict[str, Any]) -> None:
    """Beside an honest batch at head 2: that one counts, as if it were alone; the other is warned of and on record."""
    store, accumulator = opened()
    for seq in range(2):
        store.pile().create(batch(seq), record([0.0, 0.0], base_version=seq))
        accumulator.step()
    store.pile().create(batch(2), record([1.0, 2.0], base_version=2))
    plant(store, batch(0, "m"), record(**{"base_version": 2, **fields}))
    with pytest.warns(UserWarning, match="batch m/1/0 is rejected"):
        commit = accumulator.step()
    assert commit is not None
    assert (list(commit.folded), list(commit.rejected)) == ([batch(2)], [batch(0, "m")])
    check_counted_once(store, [batch(0), batch(1), batch(2), batch(0, "m")])
    assert again(store).load_weights(3)["w"].tolist() == [-1.0, -2.0]


def test_buffers_with_a_value_but_no_base_are_rejected() -> None:
    """`values` and `bases` must name the same ones."""
    body = nn.BatchNorm1d(2)
    store, accumulator = opened(body)
    store.pile().create(batch(0), noisy(body, batch(0), 0))
    bad = noisy(body, batch(0, "m"), 0)
    bad.buffers[0]["bases"].pop("running_mean")  # type: ignore[attr-defined]
    plant(store, batch(0, "m"), bad)
    with pytest.warns(UserWarning, match="batch m/1/0 is rejected"):
        commit = accumulator.step()
    assert commit is not None
    assert list(commit.rejected) == [batch(0, "m")]
