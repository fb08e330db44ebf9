"""Flags of Hugging Face models that ask for what a module within the part gives.

`output_attentions` and the like are collected by hooks on all modules of a class, which are
installed once a model is asked for any of them, and do something only where theirs is asked for.
On a module within a part that was cut out no hook is ever called: the flag would give a shorter
tuple, shifted by one. So the flags are noted as the hooks come, and a call under one is refused.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from typing import Any

from splitfed.errors import AbsentError

_HOME = "transformers.utils.output_capturing"


def flag_of(hook: Any) -> str | None:
    """The key that a hook of transformers collects under; `None` for any other hook."""
    if getattr(hook, "__module__", None) != _HOME or not hasattr(_home(), "_active_collector"):
        return None
    key = inspect.getclosurevars(hook).nonlocals.get("key")
    return key if isinstance(key, str) else None


def check(recorded: Mapping[str, str]) -> None:
    """Refuse a call whose flags ask for what is within the part.

    Args:
        recorded: The keys, with the name of the module that each is collected from.

    Raises:
        AbsentError: one of them is asked for.
    """
    if not recorded:
        return
    asked = _home()._active_collector.get() or {}
    for key, path in recorded.items():
        if key in asked:
            raise AbsentError(
                f"output_{key} asks for what {path!r} gives, which is within the part that was cut "
                f"out: call with output_{key}=False, or cut beside it"
            )


def _home() -> Any:
    return sys.modules.get(_HOME)
