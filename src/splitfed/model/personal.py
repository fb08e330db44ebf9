"""Which tensors of a client half stay with their client: those whose names fit a pattern.

A personal tensor isn't in the `client` lineage at all: not in its fingerprint, not pushed, not pulled. Clients and
whoever averages their halves name the same patterns; if they don't, the fingerprints differ and say so.

The trap: a tied tensor has several names. Were one of them personal and another shared, a pull would overwrite what
was to stay; so such a pattern is refused.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import nn

from splitfed.errors import InputError
from splitfed.model.skeleton import named_state, unwrap


def personal_names(half: nn.Module, patterns: Iterable[str]) -> frozenset[str]:
    """The names of parameters and buffers that fit one of the patterns.

    Args:
        half: The client half.
        patterns: As of `fnmatch`, over the names of `state_dict()`: `"head.*"`, `"*.running_mean"`.

    Raises:
        InputError: a pattern that fits nothing, a tied tensor of which it fits only one name, or nothing left to share.
    """
    if isinstance(patterns, str):
        raise InputError(f"personal is the string {patterns!r}: expected patterns in a tuple, such as ({patterns!r},)")
    chosen = tuple(patterns)
    if not chosen:
        return frozenset()
    state = dict(named_state(unwrap(half)))
    for pattern in chosen:
        if not any(fnmatchcase(name, pattern) for name in state):
            near = difflib.get_close_matches(pattern, list(state), n=3, cutoff=0.0)
            raise InputError(
                f"the personal pattern {pattern!r} fits no parameter or buffer of {type(half).__name__}: expected a "
                f"pattern of its state_dict names, such as {', '.join(map(repr, near)) or 'none, for it has no state'}"
            )
    found = frozenset(name for name in state if any(fnmatchcase(name, pattern) for pattern in chosen))
    kept = {id(tensor): name for name, tensor in state.items() if name not in found}
    for name in found:
        if id(state[name]) in kept:
            raise InputError(
                f"{name!r} would be personal and {kept[id(state[name])]!r} shared, and they are one tied tensor: name "
                "both in personal, or neither"
            )
    if not kept:
        raise InputError(
            f"personal={chosen!r} leaves nothing of {type(half).__name__} to share: leave out personal, and call "
            "neither pull() nor push()"
        )
    return found
