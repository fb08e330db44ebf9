"""The public API under mypy --strict, as users who check their own code would see it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def mypy(*args: str) -> tuple[int, str]:
    """Run mypy as `make test` does, on other files, and with its warm cache."""
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), *args]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    return run.returncode, run.stdout + run.stderr


def test_the_public_api_is_typed_as_users_write_it(tmp_path: Path) -> None:
    """Type checking by mypy --strict accepts ordinary use and reports each mistake in `typing_api.py`.

    And the check can fail: were `split` untyped, its `assert_type` and its `type: ignore` would be reported, as they
    are in the second file.
    """
    right = ROOT / "tests" / "promises" / "typing_api.py"
    source = right.read_text()
    broken = tmp_path / "typing_broken.py"
    broken.write_text(source.replace("def cutting(model: nn.Module,", "def cutting(model: nn.Module, splitfed: Any,"))
    status, output = mypy(str(right.relative_to(ROOT)), str(broken))
    assert status == 1, output
    found = [line for line in output.splitlines() if ": error: " in line]
    assert [line for line in found if broken.name not in line] == []
    assert "assert-type" in output
    assert "unused-ignore" in output
