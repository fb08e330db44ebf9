"""The report of a run: one HTML file with everything in it, drawn from a history.

Leaf first: `markup` (escaped elements, numbers for people), `axes` (the frame of a chart), `curves` and `columns` (the
charts), `reading` (what the history says), `people` (who took part), `page` (cards, style and script).
"""

from __future__ import annotations

import os
from pathlib import Path

from splitfed.errors import InputError
from splitfed.history import History
from splitfed.report.page import page
from splitfed.report.reading import read

__all__ = ["render", "write"]


def render(history: History) -> str:
    """The report as HTML.

    Args:
        history: What to report; one in memory will do.

    Raises:
        MissingError: it has neither rounds nor commits.
    """
    return page(read(history))


def write(history: History, path: str | os.PathLike[str]) -> None:
    """Write the report.

    Args:
        history: What to report.
        path: Where; the folder is made if need be, an older report is replaced.

    Raises:
        MissingError: the history has neither rounds nor commits.
        InputError: the file can't be written.
    """
    written = render(history)
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(written, encoding="utf-8")
    except OSError as error:
        raise InputError(f"the report can't be written to {os.fspath(path)} ({error}): choose another place") from error
