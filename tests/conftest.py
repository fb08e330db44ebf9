"""What all tests share: one thread, one seed, and a store of their own."""

from __future__ import annotations

import os

# Bits depend on the number of threads, so it is one: here and, through the environment, in every process that a test
# starts. OpenMP reads this when torch is imported, hence before all other imports.
os.environ.update({"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"})
os.environ.setdefault("MPLBACKEND", "Agg")
# The model libraries under test must never look for a network.
os.environ.update({"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"})

import random
import uuid
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch
from servers import COUNTING, azurite, ignoring, moto, seaweed

__all__ = ["azurite", "ignoring", "moto", "seaweed"]  # fixtures: each starts its server when a test first asks for it

# The same examples on every run: a red test is red for whoever looks at it next. The soak draws new ones.
hypothesis.settings.register_profile("tests", derandomize=True, deadline=None)
hypothesis.settings.register_profile("soak", deadline=None, max_examples=2_000, print_blob=True)

# Files that take longest go first, so that two processes which take a file at a time end at about the same time.
LONGEST = (
    *("test_examples", "test_object_stores", "test_transparency", "test_http_serving", "test_crew", "test_kill"),
    *("test_docs", "test_race", "test_study", "test_invariant_04", "test_perclient", "test_service_processes"),
    *("test_demo", "test_blobs", "test_stragglers", "test_invariant_06", "test_foreign", "test_simulation"),
)
# Counting lines takes a third of a run: not in those of the long files whose lines other tests count.
UNCOUNTED = (
    *("test_docs", "test_invariant_04", "test_invariant_06", "test_invariant_08", "test_kill", "test_object_stores"),
    *("test_race", "test_stragglers", "test_transparency"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, the others as they came."""
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))
    for item in items:
        if item.path.stem in UNCOUNTED:
            item.add_marker("no_cover")


def pytest_configure(config: pytest.Config) -> None:
    """Choose the hypothesis profile: fixed examples in the tests, many fresh ones in the soak."""
    hypothesis.settings.load_profile("soak" if config.option.markexpr == "soak" else "tests")


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    """Each test starts with one thread, the same generators, float32 and grad mode on, whatever ran before."""
    torch.set_num_threads(1)
    torch.set_grad_enabled(True)
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    random.seed(0)
    yield
    if torch.are_deterministic_algorithms_enabled():  # asked first: switching loads the compiler, which takes seconds
        torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def uncounted(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is marked `no_cover` counts no lines in the processes that it starts either."""
    if request.node.get_closest_marker("no_cover") is not None:
        monkeypatch.delenv(COUNTING, raising=False)


@pytest.fixture(params=["file", "memory"])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty store, once as files and once in memory."""
    return (tmp_path / "store").as_uri() if request.param == "file" else f"memory://{uuid.uuid4()}"
