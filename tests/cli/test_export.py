"""`splitfed export`: a file that any PyTorch program loads, of the body, the half or the whole model."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from toy import AT, model, run

from splitfed.cli.command import main
from splitfed.store.store import GradientStore


@pytest.fixture(scope="module")
def store() -> GradientStore:
    """A finished run with averaged halves."""
    store = GradientStore(f"memory://{uuid.uuid4()}")
    run(store=store)
    return store


def test_body_half_and_whole(
    store: GradientStore, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights of the store, by the keys of state_dict()."""
    (tmp_path / "users_model.py").write_text(
        f"import splitfed, toy\ndef half():\n    return splitfed.split(toy.model(), {AT!r})[0]\n"
    )
    monkeypatch.chdir(tmp_path)
    body, client, whole = (str(tmp_path / f"{name}.safetensors") for name in ("body", "client", "whole"))
    assert main(["export", body, "--store", store.url]) == 0
    assert main(["export", client, "--store", store.url, "--lineage", "client"]) == 0
    assert main(["export", whole, "--store", store.url, "--half", "users_model:half"]) == 0
    assert "the whole model at version" in capsys.readouterr().out
    assert all(torch.equal(t, store.load_weights()[name]) for name, t in load_file(body).items())
    loaded = model()
    loaded.load_state_dict(load_file(whole))
    state = loaded.state_dict()
    assert torch.equal(state["0.weight"], load_file(client)["0.weight"])
    assert torch.equal(state["1.weight"], store.load_weights()["1.weight"])


def test_what_is_refused(store: GradientStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file that is there, a version that isn't, a half that is none."""
    path = str(tmp_path / "x.safetensors")
    assert main(["export", path, "--store", store.url, "--version", "99"]) == 1
    assert main(["export", path, "--store", store.url, "--half", "torch:pi"]) == 2
    assert main(["export", path, "--store", store.url, "--half", "torch.nn:Identity"]) == 2
    assert list(tmp_path.iterdir()) == []
    assert main(["export", path, "--store", store.url]) == 0
    assert main(["export", path, "--store", store.url]) == 2
    assert "--force" in capsys.readouterr().err
    assert main(["export", path, "--store", store.url, "--force"]) == 0
