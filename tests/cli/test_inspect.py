"""`splitfed inspect` on a module of the user's, in the folder where the command runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from splitfed.cli.command import main

SOURCE = """
from torch import nn
model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5), nn.Linear(5, 2))
def body():
    return nn.Embedding(10, 4)
class Odd(nn.Module):
    def forward(self, x):
        raise OSError("out of order")
"""


@pytest.fixture
def app(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module with models, importable from the folder."""
    (tmp_path / "inspected_models.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "inspected_models"


def test_a_model_and_its_cut(app: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The page has a row for each tensor, the messages, and both sides."""
    assert main(["inspect", f"{app}:model", "--at", "1", "--input", "7x3"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["body", "0", "activations", "7x4", "float32", "112", "B"] in lines
    assert ["body", "0", "grad_outputs", "7x5", "float32", "140", "B"] in lines
    assert ["client", "half", "28", "parameters"] in lines
    assert ["body", "25", "parameters,", "100", "B", "a", "version"] in lines


def test_several_cuts_and_json(app: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Repeated cuts make one body; JSON holds the same figures."""
    assert main(["inspect", f"{app}:model", "--at", "0", "--at", "2", "--input", "7x3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["cut"] for one in found["crossings"] if one["what"] == "outputs"] == ["0", "2"]
    assert found["crossings"][0]["shape"] == [7, 3]


def test_a_body_of_integers(app: str, capsys: pytest.CaptureFixture[str]) -> None:
    """APP alone is the body, made by a function; a dtype follows the shape."""
    assert main(["inspect", f"{app}:body", "--input", "2x3:int64"]) == 0
    assert ["2x3", "int64"] in [line.split()[3:5] for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["body", "--input", "2x"], 2, "expected a shape and perhaps a dtype"),
        (["body", "--input", "2x3:nosuch"], 2, "expected a shape and perhaps a dtype"),
        (["body", "--input", "9999999999x9999999999"], 2, "can't be made: "),
        (["body"], 2, "--input"),
        (["model", "--at", "9", "--input", "7x3"], 1, "no submodule '9'"),
        (["model", "--at", "1", "--input", "7x4"], 2, "doesn't run on input 7x4: RuntimeError: mat1"),
        (["Odd", "--input", "7x4"], 1, "out of order"),
    ],
)
def test_mistakes(
    app: str, arguments: list[str], status: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is wrong is told in one line, without a traceback."""
    assert main(["inspect", f"{app}:{arguments[0]}", *arguments[1:]]) == status
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
