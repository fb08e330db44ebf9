"""The scripts of `silent/`, each of which once ended in a wrong result without a word.

The first two lines of each say what is right; it exits 0 then. They are kept as they were found: short, each by itself,
to be run by hand too (`python tests/promises/silent/NAME.py`).
"""

from __future__ import annotations

import importlib.util
import os
import runpy
import warnings
from pathlib import Path

import pytest

SCRIPTS = sorted((Path(__file__).parent / "silent").glob("*.py"))
UNFIT = {
    "store_shared_by_a_group": (
        lambda: not hasattr(os, "geteuid") or os.geteuid() != 0,
        "its processes take two users' ids, which only root may",
    ),
    "hidden_states_of_a_cut_layer": (
        lambda: importlib.util.find_spec("transformers") is None,
        "it needs transformers",
    ),
}
"""What keeps a script from running here, and why."""


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_nothing_is_silently_wrong(script: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The result is the unsplit model's, or an error or a warning of ours says that it isn't."""
    is_unfit, reason = UNFIT.get(script.stem, (lambda: False, ""))
    if is_unfit():
        pytest.skip(reason)
    with warnings.catch_warnings():
        warnings.simplefilter("default")  # in some of them a warning is the answer
        assert not exit_code_of(script), capfd.readouterr().out


def exit_code_of(script: Path) -> object:
    """What a script leaves for the shell."""
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as ended:
        return ended.code
    return 0


def test_all_scripts_are_here() -> None:
    """None is lost on the way."""
    assert len(SCRIPTS) == 23
