"""The bar shows on a terminal, says nothing off it, and can be switched on or off."""

from __future__ import annotations

import sys

import pytest

from splitfed.errors import InputError
from splitfed.tracking.progress import Progress

ROWS = [
    {"kind": "run", "settings": {"rounds": 2}},
    {"kind": "commit", "version": 1},
    {"kind": "round", "round": 1, "loss": 0.5, "accuracy": 0.75},
    {"kind": "round", "round": 2, "loss": None},
]


def shown(progress: Progress) -> None:
    """A whole run."""
    for row in ROWS:
        progress.on_row(row)
    progress.write("a line")
    progress.close()
    progress.close()


def test_off_a_terminal_it_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    """Standard error stays empty; what is written goes to standard output as it is."""
    shown(Progress())
    assert capsys.readouterr() == ("a line\n", "")


def test_on_a_terminal_it_counts_rounds(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes its total from the run's settings and shows the newest figures; `False` keeps it off."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    shown(Progress(label="digits"))
    out, err = capsys.readouterr()
    assert out == "a line\n"
    assert "digits" in err
    assert "1/2" in err
    assert "2/2" in err
    assert "1 commits" in err
    assert "loss=0.5000, accuracy=0.7500" in err
    shown(Progress(False))
    assert capsys.readouterr().err == ""


def test_it_can_be_switched_on(capsys: pytest.CaptureFixture[str]) -> None:
    """`True` draws into a log too; a total that is given counts."""
    shown(Progress(True, total=5))
    assert "2/5" in capsys.readouterr().err


def test_tqdm_is_asked_for_by_its_extra(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without tqdm a bar that was asked for is an error, and one that wasn't is left out."""
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(InputError, match=r'pip install "\.\[progress\]" in a clone'):
        Progress(True).on_row(ROWS[0])
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    shown(Progress())
    assert capsys.readouterr().err == ""
