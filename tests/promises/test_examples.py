"""The examples run as a newcomer would run them, in processes of their own, and reach what they say."""

from __future__ import annotations

import contextlib
import importlib.util
import re
import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import programs
import pytest
from servers import unmeasured

from splitfed import GradientStore
from splitfed.blobs import open_blobs

TESTS = Path(__file__).parent
EXAMPLES = TESTS.parents[1] / "examples"
SMALL = {
    "custom_backend.py": [],
    "quickstart.py": ["--epochs", "4"],
    "hospitals.py": [],
    "bert.py": ["--steps", "100"],
    "unet.py": ["--steps", "60"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where each example has its store, under its own name."""
    return tmp_path_factory.mktemp("stores")


@pytest.fixture
def printed(request: pytest.FixtureRequest, folder: Path) -> str:
    """What the example that a test is named after prints; warnings in it are errors.

    The quickstart is run as from a shell, the others where torch is imported.
    """
    name = request.node.name.removeprefix("test_") + ".py"
    words = [EXAMPLES / name, *SMALL[name], "--store", folder / name]
    if name == "quickstart.py":
        command = [sys.executable, "-W", "error", *map(str, words)]
        ended: Any = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False, env=unmeasured())
    else:
        ended = programs.run(programs.script, *words, strict=True)
    assert ended.returncode == 0, ended.stderr
    return str(ended.stdout)


def figures(pattern: str, printed: str) -> list[float]:
    """The numbers that a pattern's one group finds."""
    return [float(found) for found in re.findall(pattern, printed)]


def test_all_examples_are_here() -> None:
    """A new script in `examples/` needs its test, in here or in a file of its own."""
    own = {path.name for path in EXAMPLES.glob("*.py") if (TESTS / f"test_{path.name}").exists()}
    assert own | SMALL.keys() == {path.name for path in EXAMPLES.glob("*.py")}


def test_custom_backend(printed: str, folder: Path) -> None:
    """All of the run is in the database, which holds a model that a linear one can't equal."""
    assert "version 60, " in printed
    assert (folder / "custom_backend.py" / "run.db").stat().st_size > 100_000
    (right,) = figures(r"accuracy: ([\d.]+)", printed)
    assert right >= 0.95


def conformance() -> type:
    """The conformance suite at the end of the example."""
    spec = importlib.util.spec_from_file_location("custom_backend", EXAMPLES / "custom_backend.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    suite: type = module.TestSqlite
    return suite


TestSqlite = conformance()


def test_the_backend_waits_for_whoever_writes_to_a_new_file(tmp_path: Path) -> None:
    """Another connection is at it first: the file is opened when that one is done, not found locked."""
    database = str(tmp_path / "run.db")
    blobs = open_blobs("sqlite://tests/run", database=database)
    with contextlib.closing(sqlite3.connect(database, isolation_level=None)) as other, ThreadPoolExecutor(1) as pool:
        other.execute("BEGIN IMMEDIATE")
        created = pool.submit(blobs.create, "a/1", [b"1"])
        assert not wait([created], timeout=0.3).done
        other.execute("COMMIT")
        assert created.result(60)


def test_quickstart(printed: str, folder: Path) -> None:
    """14 batches per owner and epoch make 14 commits; after 4 epochs both owners are right on 88 % or more."""
    assert figures(r"epoch \d: .* version (\d+)", printed) == [14, 28, 42, 56]
    right = figures(r"accuracy of owner-[ab]: ([\d.]+)", printed)
    assert len(right) == 2
    assert min(right) >= 0.88
    store = GradientStore(folder / "quickstart.py")
    assert store.latest_version() == 56
    assert store.waiting() == []


def test_hospitals(printed: str) -> None:
    """Together the hospitals come near the pooled model, as neither does alone."""
    assert "body at version 72, halves at version 8" in printed
    referral, screening, together, pooled = figures(r"accuracy .*: ([\d.]+)", printed)
    assert together >= max(0.92, pooled - 0.04)
    assert together > max(referral, screening)


def test_bert(printed: str) -> None:
    """The cut is exact, and with a layer on the server BERT learns which marker comes first."""
    table = [line for line in printed.splitlines() if line.startswith(("outputs", "input", "parameter g", "buffers"))]
    assert [line.split()[-1] for line in table] == ["equal"] * 4
    (right,) = figures(r"accuracy: ([\d.]+)", printed)
    assert right >= 0.85


@pytest.mark.integration
def test_unet(printed: str) -> None:
    """The split network marks discs far better than a threshold does."""
    found, threshold = figures(r"dice.* ([\d.]{5})", printed)
    assert found >= 0.7 > threshold + 0.2
