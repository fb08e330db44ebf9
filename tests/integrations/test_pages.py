"""Pages of the documentation whose code needs more than the other tests have installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pages import ROOT, blocks, run


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["docs/exporting.md"])  # as in tests/promises/test_docs.py, which leaves them out
@pytest.mark.filterwarnings("default")  # what onnx and its exporter warn of themselves
def test_every_python_block_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks, one after another in one namespace and an empty folder, run as they stand."""
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for line, code in blocks(ROOT / name, "python"):
        run(code, name, line, namespace)
    assert (tmp_path / "runs/whole.onnx").is_file()
