"""Names of a package that load when they are first used (PEP 562).

Each `__init__` of ours only re-exports, and all of them do it this way. Eager imports would bring
starlette to a client that wants the HTTP transport, the whole store to a mailbox's client that
wants its keys, and torch to `BatchId`.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

_HELPERS = {"TYPE_CHECKING", "annotations", "lazily"}
"""Names of an `__init__` that nobody wants to see in `dir()`."""


def lazily(
    package: str, names: Mapping[str, str], modules: Mapping[str, str] | None = None
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` for the `__init__` of a package.

    Args:
        package: The package: its `__name__`.
        names: For each public name, the module that defines it, without the leading `splitfed.`.
        modules: Modules that are used by a name of their own, as in
            `splitfed.policies.mode("buffered")`.
    """

    def get(name: str) -> Any:
        if modules is not None and name in modules:
            value = importlib.import_module(f"splitfed.{modules[name]}")
        elif name in names:
            value = getattr(importlib.import_module(f"splitfed.{names[name]}"), name)
        else:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        # The next access finds the value itself and never comes here.
        setattr(sys.modules[package], name, value)
        return value

    def listed() -> list[str]:
        return sorted({*vars(sys.modules[package]), *names, *(modules or ())} - _HELPERS)

    return get, listed
