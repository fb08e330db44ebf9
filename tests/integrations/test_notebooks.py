"""The notebooks run as a reader runs them: from top to bottom, in a fresh kernel and an empty folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from pages import ROOT

import splitfed

FOLDER = ROOT / "docs" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
SECONDS = 60
"""How long one may take on two idle cores."""


def read(path: Path) -> Any:
    """A notebook, if it is a valid one."""
    notebook = nbformat.read(path, as_version=4)  # type: ignore[no-untyped-call]
    nbformat.validate(notebook)
    return notebook


def test_all_are_there() -> None:
    """Three, each on the site and linked by the others."""
    names = [path.stem for path in NOTEBOOKS]
    assert names == ["fifty-owners", "first-split-run", "hospital-over-http"]
    index = (ROOT / "docs/index.md").read_text("utf-8")
    assert all(f"notebooks/{name}\n" in index for name in names)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_nothing_is_stored_with_it(path: Path) -> None:
    """No outputs, no counts, nothing of the machine that it was written on."""
    notebook = read(path)
    for cell in notebook.cells:
        assert cell.metadata == {}
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert notebook.metadata.language_info == {"name": "python"}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To its end, with no warning shown; its processor time is below what it may take on idle cores."""
    source = Path(splitfed.__file__).parents[1]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(source), os.environ.get("PYTHONPATH")))))
    monkeypatch.delenv("MPLBACKEND")  # the kernel's own, as a reader has it
    before = os.times()
    client = NotebookClient(read(path), timeout=500, resources={"metadata": {"path": str(tmp_path)}})
    with client.setup_kernel():  # waits for the end of the kernel, whose time counts then
        for number, cell in enumerate(client.nb.cells):
            client.execute_cell(cell, number)
    after = os.times()
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    assert 1 < spent < SECONDS
    outputs = [output for cell in client.nb.cells if cell.cell_type == "code" for output in cell.outputs]
    assert [output.text for output in outputs if output.get("name") == "stderr"] == []
    if path.stem == "fifty-owners":
        assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
