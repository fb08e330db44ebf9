"""A progress bar over the rounds of a run.

Off a terminal a bar is only noise in a log, so by default it shows where standard error is a
terminal. It is drawn when the first row comes, not when it is made.
"""

from __future__ import annotations

import sys
from typing import Any

from splitfed.checks import install
from splitfed.errors import InputError
from splitfed.store.rows import Row


class Progress:
    """A callback that draws a bar: one tick per round, with the newest metrics behind it.

    Args:
        show: `False` for never, `True` for always, `None` where standard error is a terminal and
            tqdm is installed.
        total: The number of rounds; that of the run row's settings, if it isn't given.
        label: The text before the bar.
    """

    def __init__(
        self, show: bool | None = None, *, total: int | None = None, label: str = "rounds"
    ) -> None:
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
        kind = row.get("kind")
        if kind == "run" and not self._total:
            self._total = row.get("settings", {}).get("rounds")
        # Not before: its total may come with this very row.
        if self._bar is None:
            self._bar = self._open()
        if self._bar is None:
            return
        if kind == "commit":
            self._commits += 1
            self._bar.set_postfix_str(f"{self._commits} commits")
        elif kind == "round":
            metrics = [(name, row.get(name)) for name in ("loss", "accuracy")]
            known = {name: f"{value:.4f}" for name, value in metrics if isinstance(value, float)}
            self._bar.set_postfix(known, refresh=False)
            self._bar.update()

    def write(self, line: str) -> None:
        """Print a line to standard output, above the bar if there is one."""
        if self._bar is None:
            sys.stdout.write(f"{line}\n")
        else:
            self._bar.write(line)

    def close(self) -> None:
        """Remove the bar; later rows don't draw it again."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
            self._show = False

    def _open(self) -> Any:
        """The bar of tqdm, or `None` where none is shown."""
        wanted = sys.stderr.isatty() if self._show is None else self._show
        if not wanted:
            return None
        try:
            from tqdm import tqdm
        except ImportError:
            if self._show:
                raise InputError(f"a progress bar needs tqdm: {install('progress')}") from None
            return None
        # Rounds are rare: each is shown, however soon it comes.
        return tqdm(total=self._total, desc=self._label, unit="round", leave=False, mininterval=0)
