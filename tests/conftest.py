"""What all tests share: one thread, one seed, and a store of their own."""

from __future__ import annotations

import os

# Bits depend on the number of threads, so it is one: here and, through the environment, in every process that a test
# starts. OpenMP reads this when torch is imported, hence before all other imports.
os.environ.update({"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"})
os.environ.setdefault("MPLBACKEND", "Agg")
# The model libraries under test must never look for a network.
os.environ.update({"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"})

import gc
import multiprocessing
import random
import uuid
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
from log_mode import LEFT_OUT, begin_logs
from servers import COUNTING, azurite, ignoring, moto, seaweed
from soak import PARTS, Ledger

__all__ = ["azurite", "ignoring", "moto", "seaweed"]  # fixtures: each starts its server when a test first asks for it

# The same examples on every run: a red test is red for whoever looks at it next. The soak draws new ones.
hypothesis.settings.register_profile("tests", derandomize=True, deadline=None)
hypothesis.settings.register_profile("soak", deadline=None, max_examples=2_000, print_blob=True)

TESTS = Path(__file__).parent
# Files that take longest go first, so that two processes which take a file at a time end at about the same time.
LONGEST = (
    "faults/test_simulator",
    "blobs/test_object_stores",
    "promises/test_docs",
    "client/test_resume",
    "promises/test_transparency",
    "promises/test_examples",
    "faults/test_hostile_account",
    "faults/test_service_processes",
    "service/http/test_serve",
    "service/http/test_guard",
    "promises/test_typing",
    "simulation/engines/test_processes",
    "cli/test_demo",
    "blobs/test_sharing",
    "faults/test_race",
    "faults/test_kill",
    "federation/test_per_client",
    "promises/test_invariant_06",
    "promises/test_invariant_04",
    "simulation/test_launch",
    "store/test_bounded",
    "store/test_holder",
    "cli/test_doctor",
    "promises/test_study",
    "protocol/test_header",
)
# Counting lines takes a third of a run: not in those of the long files whose lines other tests count.
UNCOUNTED = (
    "promises/test_silent",
    "promises/test_docs",
    "promises/test_invariant_04",
    "promises/test_invariant_06",
    "promises/test_invariant_08",
    "faults/test_kill",
    "faults/test_kill_owners",
    "faults/test_simulator",
    "blobs/test_object_stores",
    "faults/test_race",
    "faults/test_system_calls",
    "promises/test_stragglers",
    "promises/test_transparency",
)
# What other libraries make of a split model, for `make integrations`: their models, adapters and trainers.
INTEGRATIONS = (
    "promises/test_language_models",
    "promises/test_graphs_and_idioms",
    "promises/test_trainers",
    "promises/test_leakage",
)
APART = "integrations/"
"""Tests that run in an environment of their own, also for `make integrations`."""


def _name(item: pytest.Item) -> str:
    """A test's file by its place."""
    return _place(item.path)


def _place(path: Path) -> str:
    """A file by its place below this folder; file names repeat."""
    return path.relative_to(TESTS).with_suffix("").as_posix()


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--part` of the soak."""
    parser.addoption("--part", choices=sorted(PARTS), help="of the soak: only this part")
    parser.addoption("--log", choices=("sums", "derive"), help="begin every store as a log (log_mode.py)")


@pytest.hookimpl(tryfirst=True)  # before markers choose what runs
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The longest files first, the others as they came; of the soak, one part."""
    part = config.getoption("part")
    if part is not None:
        items[:] = [item for item in items if _name(item) in PARTS[part]]
    listed = (*LONGEST, *UNCOUNTED, *INTEGRATIONS, *(name for files in PARTS.values() for name in files))
    missing = [name for name in listed if not (TESTS / f"{name}.py").is_file()]
    if missing:
        raise pytest.UsageError(f"conftest.py orders files that are gone: {missing}")
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(_name(item), len(place)))
    for item in items:
        if _name(item) in UNCOUNTED:
            item.add_marker("no_cover")
        if _name(item) in INTEGRATIONS or _name(item).startswith(APART):
            item.add_marker("integration")
        reason = LEFT_OUT.get(item.name.partition("[")[0])
        if config.getoption("log") is not None and reason is not None:
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Files of `make integrations` are imported where they are wanted only: some bring a library that takes seconds."""
    expression = config.option.markexpr
    is_unwanted = expression == "soak" or "not integration" in expression
    place = _place(collection_path)
    return True if is_unwanted and (place in INTEGRATIONS or place.startswith(APART)) else None


def pytest_configure(config: pytest.Config) -> None:
    """Choose the hypothesis profile: fixed examples in the tests, many fresh ones in the soak."""
    is_soak = config.option.markexpr == "soak"
    hypothesis.settings.load_profile("soak" if is_soak else "tests")
    if config.getoption("log") is not None:
        begin_logs(config.getoption("log"))
    if is_soak and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Ledger(config.getoption("part") or "all"))


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """What the imports have made isn't looked at again: a collection of all garbage takes a second with it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    """Each test starts with one thread, the same generators, float32 and grad mode on, whatever ran before."""
    import torch  # here: the process that only deals out the tests does without

    torch.set_num_threads(1)
    torch.set_grad_enabled(True)
    torch.set_default_dtype(torch.float32)
    torch.default_generator.manual_seed(0)  # the CPU's alone: torch.manual_seed notes a traceback for each other kind
    random.seed(0)
    yield
    if torch.are_deterministic_algorithms_enabled():  # asked first: switching loads the compiler, which takes seconds
        torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def uncounted(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is marked `no_cover` counts no lines in the processes that it starts either."""
    if request.node.get_closest_marker("no_cover") is not None:
        monkeypatch.delenv(COUNTING, raising=False)


@pytest.fixture
def forked_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Worker processes of simulations begin where torch is imported already: three seconds less than those of users."""
    from processes import CONTEXT

    monkeypatch.setattr(multiprocessing, "get_context", lambda method: CONTEXT)


@pytest.fixture(params=["file", "memory"])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty store, once as files and once in memory."""
    return (tmp_path / "store").as_uri() if request.param == "file" else f"memory://{uuid.uuid4()}"
