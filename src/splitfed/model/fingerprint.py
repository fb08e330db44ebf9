"""Checks of modules and tensors against a fingerprint, and which tensors of a half are in one.

A fingerprint is what two modules must share to be the same architecture: for each name of the
`state_dict()` its role, shape and dtype, or the first name of a tied tensor. A lineage is begun
with one, and whatever is later given to that lineage is checked against it.

A personal tensor isn't in the `client` lineage at all: not in its fingerprint, not pushed, not
pulled. Clients and whoever averages their halves name the same patterns; if they don't, the
fingerprints differ and the error names the tensors.

The trap: a tied tensor has several names. Were one of them personal and another shared, a pull
would overwrite what was to stay; so such a pattern is refused.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, TypeGuard

from torch import Tensor, nn

from splitfed.errors import ArchitectureError, InputError, UnsupportedError
from splitfed.model.skeleton import Fingerprint, named_state, unwrap
from splitfed.model.walk import of_content

_SHOWN = 8
"""So many differing tensors stand in a message."""


def compare(expected: Fingerprint, got: Fingerprint, what: str) -> None:
    """Check a module's fingerprint against the store's.

    Raises:
        ArchitectureError: they differ; the message names the tensors.
    """
    everything = list({**expected, **got})
    names = [name for name in everything if expected.get(name) != got.get(name)]
    if not names:
        return
    shown = "; ".join(
        f"{name}: the store has {_description(expected, name)}, got {_description(got, name)}"
        for name in names[:_SHOWN]
    )
    if len(names) > _SHOWN:
        shown += f"; and {len(names) - _SHOWN} more"
    raise ArchitectureError(
        f"{what} isn't the one that this store was begun with: "
        f"{len(names)} of {len(everything)} tensors differ: {shown}. "
        "Use the same architecture, dtype and frozen parameters, or another store"
    )


def is_entry(entry: object) -> bool:
    """Whether this is what a fingerprint says of one tensor."""
    if not isinstance(entry, dict):
        return False
    return set(entry) in ({"tied"}, {"role", "shape", "dtype"}) and all(
        isinstance(value, list if key == "shape" else str) for key, value in entry.items()
    )


def check_whole(fingerprint: object, tensors: Mapping[str, Tensor]) -> None:
    """Check that tensors are all those of a fingerprint, and that it is one: neither is trusted.

    Raises:
        ArchitectureError: they aren't.
    """
    if not _is_fingerprint(fingerprint):
        raise ArchitectureError("this isn't a fingerprint: expected an object for each tensor")
    firsts = {name: entry for name, entry in fingerprint.items() if "tied" not in entry}
    ties = {entry["tied"] for entry in fingerprint.values() if "tied" in entry}
    # A tie to a name that is itself tied, or to none, is as wrong as a missing tensor.
    if not ties <= firsts.keys() or firsts.keys() != tensors.keys():
        wrong = sorted(firsts.keys() ^ tensors.keys())[:_SHOWN]
        raise ArchitectureError(f"the tensors aren't those of the fingerprint: {wrong}")
    for name, tensor in tensors.items():
        role = firsts[name]["role"]
        if role not in ("trainable", "frozen", "buffer"):
            raise ArchitectureError(f"tensor {name[:80]!r} has the unknown role {role[:20]!r}")
        check_tensors(fingerprint, {name: tensor}, role)


def check_tensors(fingerprint: Fingerprint, tensors: Mapping[str, Tensor], role: str) -> None:
    """Check that tensors are those of a fingerprint in one role ('trainable' or 'buffer').

    Raises:
        ArchitectureError: a name, shape or dtype that isn't.
    """
    for name, tensor in tensors.items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        got = {"role": role, "shape": list(tensor.shape), "dtype": dtype}
        if fingerprint.get(name) != got:
            raise ArchitectureError(
                f"tensor {name[:80]!r} doesn't fit the store: "
                f"it has {_description(fingerprint, name)}, got {_description({name: got}, name)}"
            )


def check_kind(name: str, base: Tensor, buffer: Tensor) -> None:
    """Check that a forward left a buffer's shape and dtype as they were.

    Raises:
        UnsupportedError: it didn't, and no commit could take the buffer.
    """
    before = f"{base.dtype} {tuple(base.shape)}".removeprefix("torch.")
    after = f"{buffer.dtype} {tuple(buffer.shape)}".removeprefix("torch.")
    if before != after:
        raise UnsupportedError(
            f"the body's buffer {name!r} is {before} at the start of forward and {after} at its "
            "end, and a version's buffers keep their shape and dtype: give it its full size from "
            "the beginning, with a buffer that counts how much of it is in use; "
            "or, if it finds its shape by itself (quantization observers), "
            "run the model once before split()"
        )


def values_beside(blueprint: nn.Module) -> dict[str, dict[str, Any]]:
    """What tells the tensors that no version has: transient buffers, and plain attributes.

    Args:
        blueprint: A template's module: only such tensors have values there.

    Returns:
        By name: the kind, shape, dtype and CRC-32 of each; plain JSON.

    Raises:
        UnsupportedError: one is on the meta device, so that it has no value anywhere.
    """
    found: dict[str, dict[str, Any]] = {}
    for prefix, owner in blueprint.named_modules():
        buffers = {n: owner._buffers[n] for n in owner._non_persistent_buffers_set}
        for kind, held in (("buffer", buffers), ("attribute", owner.__dict__)):
            for leaf, tensor in held.items():
                if not isinstance(tensor, Tensor) or (tensor.is_meta and kind != "buffer"):
                    continue
                name = f"{prefix}.{leaf}".lstrip(".").replace("_orig_mod.", "")
                if tensor.is_meta:
                    raise UnsupportedError(
                        f"buffer {name!r} of the body is on the meta device and in no state_dict, "
                        "so that no store could bring its value: build the body on a real device, "
                        "or register it as persistent"
                    )
                shape, dtype, *crc = of_content(tensor.detach().cpu())
                found[name] = {"kind": kind, "shape": shape, "dtype": dtype, "crc": crc}
    return found


def personal_names(half: nn.Module, patterns: Iterable[str]) -> frozenset[str]:
    """The names of parameters and buffers that fit one of the patterns.

    Args:
        half: The client half.
        patterns: As of `fnmatch`, over the names of `state_dict()`: `"head.*"`, `"*.running_mean"`.

    Raises:
        InputError: a pattern that fits nothing, a tied tensor of which it fits only one name,
            or nothing left to share.
    """
    # A string is an iterable of one-letter patterns, which is never meant.
    if isinstance(patterns, str):
        raise InputError(
            f"personal is the string {patterns!r}: "
            f"expected patterns in a tuple, such as ({patterns!r},)"
        )
    chosen = tuple(patterns)
    if not chosen:
        return frozenset()
    state = dict(named_state(unwrap(half)))
    found: set[str] = set()
    for pattern in chosen:
        found.update(_fitting(pattern, state, type(half).__name__))
    _check_ties(state, found)
    if len(found) == len(state):
        raise InputError(
            f"personal={chosen!r} leaves nothing of {type(half).__name__} to share: "
            "leave out personal, and call neither pull() nor push()"
        )
    return frozenset(found)


def _fitting(pattern: str, state: Mapping[str, Tensor], kind: str) -> list[str]:
    """The names that a pattern fits: at least one."""
    names = [name for name in state if fnmatchcase(name, pattern)]
    if not names:
        near = difflib.get_close_matches(pattern, list(state), n=3, cutoff=0.0)
        examples = ", ".join(map(repr, near)) or "none, for it has no state"
        raise InputError(
            f"the personal pattern {pattern!r} fits no parameter or buffer of {kind}: "
            f"expected a pattern of its state_dict names, such as {examples}"
        )
    return names


def _check_ties(state: Mapping[str, Tensor], personal: set[str]) -> None:
    """Refuse a tied tensor that is personal under one name and shared under another."""
    shared = {id(tensor): name for name, tensor in state.items() if name not in personal}
    for name in personal:
        other = shared.get(id(state[name]))
        if other is not None:
            raise InputError(
                f"{name!r} would be personal and {other!r} shared, and they are one tied tensor: "
                "name both in personal, or neither"
            )


def _is_fingerprint(value: object) -> TypeGuard[Fingerprint]:
    if not isinstance(value, dict) or not value:
        return False
    return all(type(name) is str for name in value) and all(map(is_entry, value.values()))


def _description(fingerprint: Fingerprint, name: str) -> str:
    """What a message says of a tensor in a fingerprint, whether there is one or not."""
    entry = fingerprint.get(name)
    if entry is None:
        return "nothing"
    if "tied" in entry:
        return f"a name of {entry['tied']!r}"
    return f"{entry['role']} {entry['dtype']} {tuple(entry['shape'])}"
