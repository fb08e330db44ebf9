"""Which store a verb works on: an argument or the environment, and credentials from the environment alone."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from splitfed.cli.stores import add_store, open_store
from splitfed.errors import InputError


def parsed(*words: str, writes: bool = True) -> argparse.Namespace:
    """The arguments of a verb that has nothing but a store."""
    parser = argparse.ArgumentParser()
    add_store(parser, writes=writes)
    return parser.parse_args(words)


def test_the_argument_comes_before_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SPLITFED_STORE is used where no --store is given."""
    monkeypatch.setenv("SPLITFED_STORE", str(tmp_path / "there"))
    assert open_store(parsed()).url == str(tmp_path / "there")
    assert open_store(parsed("--store", str(tmp_path / "here"))).url == str(tmp_path / "here")


def test_no_store_is_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    """It says both ways to name one."""
    monkeypatch.delenv("SPLITFED_STORE", raising=False)
    with pytest.raises(InputError, match=r"--store URL.*SPLITFED_STORE"):
        open_store(parsed())


def test_durability_is_asked_of_writers_only() -> None:
    """A verb that only reads has no --sync; one that writes is safe against power cuts unless told otherwise."""
    assert parsed(writes=False).sync == parsed().sync == "power"
    assert open_store(parsed("--store", "memory://x", "--sync", "process")).sync == "process"
    with pytest.raises(SystemExit):
        parsed("--sync", "process", writes=False)
