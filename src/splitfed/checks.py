"""Checks of arguments that many classes take, and what to do where a package is missing.

Each check returns the value, or raises `InputError` with the argument's name.
"""

from __future__ import annotations

import sys
import warnings

from splitfed.errors import InputError


def positive(name: str, value: float) -> float:
    """Return `value` if it is a finite number above 0.

    Raises:
        InputError: it isn't.
    """
    number = isinstance(value, int | float) and not isinstance(value, bool)
    # The upper limit refuses infinity, and the comparison NaN; an int may be beyond any float.
    if not number or not 0 < value <= sys.float_info.max:
        raise InputError(f"{name} is {value!r}: expected a finite number above 0")
    return value


def at_least(name: str, value: int, least: int) -> int:
    """Return `value` if it is an integer of at least `least`.

    Raises:
        InputError: it isn't.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise InputError(f"{name} is {value!r}: expected an integer of at least {least}")
    return value


def install(extra: str) -> str:
    """How to install what an extra has, for the message of an error.

    Args:
        extra: Its name in `pyproject.toml`.
    """
    return f'pip install ".[{extra}]" in a clone of splitfed'


def warn_once(told: set[str], what: str, text: str, stacklevel: int) -> None:
    """Warn of something that whoever keeps `told` hasn't warned of before.

    Args:
        told: What it has warned of; this is added.
        what: Under which name it is warned of only once.
        text: The warning.
        stacklevel: As of `warnings.warn`, called in the place of this.
    """
    if what not in told:
        told.add(what)
        warnings.warn(text, stacklevel=stacklevel + 1)
