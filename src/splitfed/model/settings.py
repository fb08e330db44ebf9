"""Settings of a part that its half has changed: they come with a call, and hold for its run only.

`client.layer.beta = 0.5` can't reach the layer, which is on the server. So the change travels with
each call, is on record with it, and is made on the module before the run, as the assignment would
have been made on the unsplit model. After the run the module is as it was built.

The trap: a call may come from anywhere. It may set what the body has, to plain values, and nothing
that a module is made of.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from splitfed.errors import InputError
from splitfed.model.attributes import of_every_module

_PLAIN = frozenset((type(None), bool, int, float, str))


def apply_settings(owners: Mapping[str, nn.Module], settings: Mapping[str, Any]) -> list[nn.Module]:
    """Set attributes of submodules.

    Args:
        owners: The submodules by name.
        settings: Plain values by module and attribute: `layer.beta`, `1.training`.

    Returns:
        The submodules that were changed.

    Raises:
        InputError: a module or attribute that the body doesn't have or that can't be set, or a
            value that isn't plain.
    """
    changed = []
    for path, value in settings.items():
        owner = _owner(owners, path)
        leaf = path.rpartition(".")[2]
        _check(owner, leaf, path, value)
        try:
            setattr(owner, leaf, copy.deepcopy(value))
        except Exception as error:  # a property of the user's may raise anything
            raise InputError(f"setting {path[:80]!r} of the body can't be set: {error}") from error
        changed.append(owner)
    return changed


def _owner(owners: Mapping[str, nn.Module], path: str) -> nn.Module:
    prefix = path.rpartition(".")[0]
    owner = owners.get(prefix)
    if owner is None:
        raise InputError(
            f"a call sets {path[:80]!r}, and the body has no module {prefix[:80]!r}: "
            f"expected one of {list(owners)[1:11]}"
        )
    inner = owner.__dict__.get("_modules", {}).get("_orig_mod")  # torch.compile's wrapper
    return owner if inner is None else inner


def _check(owner: nn.Module, leaf: str, path: str, value: Any) -> None:
    kind = type(owner).__name__
    if not _is_plain(value):
        raise InputError(
            f"a call sets {path[:80]!r} to {type(value).__name__}: "
            "expected None, a bool, a number, text, or a list, tuple or dict of such"
        )
    if leaf == "training":
        if type(value) is not bool:
            raise InputError(f"a call sets {path[:80]!r} to {value!r:.40}: expected a bool")
        return
    tables = (owner._parameters, owner._buffers, owner._modules)
    if leaf.startswith("__") or leaf in of_every_module() or any(leaf in held for held in tables):
        raise InputError(
            f"a call sets {path[:80]!r}, which is a part of {kind} and no setting: only the "
            "accumulator changes parameters and buffers, and nothing exchanges submodules or hooks"
        )
    if leaf in owner.__dict__:
        return
    found = inspect.getattr_static(type(owner), leaf, inspect)
    if found is inspect or (callable(found) and not isinstance(found, property)):
        known = sorted(owner.__dict__.keys() - of_every_module())[:10]
        raise InputError(
            f"a call sets {path[:80]!r}, and {kind} has no such setting: expected one of {known}"
        )


def _is_plain(value: Any) -> bool:
    if type(value) in (list, tuple):
        return all(map(_is_plain, value))
    if type(value) is dict:
        return all(type(key) is str and _is_plain(held) for key, held in value.items())
    return type(value) in _PLAIN
