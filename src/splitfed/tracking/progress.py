"""A progress bar over the rounds of a run; silent where nobody looks.

Off a terminal a bar is only noise in a log, so unless it is told otherwise it shows where standard error is one. It
draws when the first row comes, not when it is made.
"""

from __future__ import annotations

import sys
from typing import Any

from splitfed.errors import InputError
from splitfed.store.rows import Row


class Progress:
    """A callback that draws a bar: one tick per round, with the newest figures behind it.

    Args:
        show: `False` for never, `True` for always, `None` where standard error is a terminal and tqdm is installed.
        total: How many rounds there will be; what the run row's settings say, if it isn't given.
        label: What stands in front of it.
    """

    def __init__(self, show: bool | None = None, *, total: int | None = None, label: str = "rounds") -> None:
        self._show = show
        self._total = total
        self._label = label
        self._bar: Any = None
        self._commits = 0

    def on_row(self, row: Row) -> None:
        """Move the bar on by a round, or show that a commit was made.

        Raises:
            InputError: the bar was asked for, and tqdm isn't installed.
        """
        if row.get("kind") == "run":
            self._total = self._total or row.get("settings", {}).get("rounds")
        if self._bar is None and self._show is not False:
            self._bar = self._open()
        if self._bar is None:
            return
        if row.get("kind") == "commit":
            self._commits += 1
            self._bar.set_postfix_str(f"{self._commits} commits")
        elif row.get("kind") == "round":
            figures = {name: row[name] for name in ("loss", "accuracy") if isinstance(row.get(name), float)}
            self._bar.set_postfix({name: f"{value:.4f}" for name, value in figures.items()}, refresh=False)
            self._bar.update()

    def write(self, line: str) -> None:
        """Print a line to standard output, above the bar if there is one."""
        if self._bar is None:
            sys.stdout.write(f"{line}\n")
        else:
            self._bar.write(line)

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()
            self._bar, self._show = None, False

    def _open(self) -> Any:
        if self._show is None and not sys.stderr.isatty():
            return None
        try:
            from tqdm import tqdm
        except ImportError:
            if self._show:
                raise InputError("a progress bar needs tqdm: pip install 'splitfed[progress]'") from None
            return None
        # Rounds are rare: each is shown, however soon it comes.
        return tqdm(total=self._total, desc=self._label, unit="round", leave=False, mininterval=0)
