"""How a lineage begins: with the weights of the first module that comes, and of no later one.

After that a server or an accumulator needs the structure alone, and most are made again and again
from a body with its first weights. Other weights may be meant: a checkpoint that was loaded into
the body of a run that has begun. They aren't used, which is said once.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

from splitfed.errors import InputError
from splitfed.model.skeleton import Fingerprint
from splitfed.store.lineage import Lineage

DURABILITIES = ("gradient", "log")
"""What may be on file when a batch is acknowledged."""
LARGE = 4 * 2**20
"""Bytes of a gradient from which on a new run is a log, if nobody has said what it is to be ..."""
SHARE = 4
"""... unless less than one in so many of the body's parameters trains: beside what a call computes,
the gradient is small then (adapters)."""


def check_durability(durability: str | None) -> None:
    """Refuse one that doesn't exist.

    Raises:
        InputError: it isn't one.
    """
    if durability is not None and durability not in DURABILITIES:
        raise InputError(
            f"durability={durability!r} isn't known: expected 'gradient' (a batch's gradient is on "
            "file when it is acknowledged) or 'log' (what it follows from)"
        )


def durability_of(fingerprint: Fingerprint) -> str:
    """What is on file of a batch, by the body's size, where nobody has said it."""
    sizes = {"trainable": 0, "frozen": 0, "buffer": 0}
    for entry in fingerprint.values():
        if "role" in entry:
            itemsize = getattr(torch, entry["dtype"]).itemsize
            sizes[entry["role"]] += itemsize * math.prod(entry["shape"])
    own = sizes["trainable"]
    return "log" if own >= LARGE and SHARE * own >= own + sizes["frozen"] else "gradient"


def begin_with(
    versions: Lineage,
    fingerprint: Fingerprint,
    state: Mapping[str, Tensor],
    part: str | None = None,
    durability: str | None = None,
    *,
    inline: bool = False,
) -> None:
    """Publish a module's weights as version 0, or warn, once, that a body's come too late.

    They are told by the hashes that commits have of their files: nothing is read.

    Args:
        versions: The lineage.
        fingerprint: The module's architecture.
        state: Its tensors by first name.
        part: The stamp of the body's cut, if it has one.
        durability: What is on file when a batch is acknowledged; `None` for what the lineage was
            begun with, or, if it is new, by the body's size.
        inline: Whether its batches follow from nothing in the store (averages of clients' bodies),
            so that they are gradients whatever their size, if nobody says otherwise.

    Raises:
        ArchitectureError: the lineage was begun with another architecture, or for another part of a
            model.
    """
    is_inline = inline or versions.name != "body"
    default = "gradient" if is_inline else durability_of(fingerprint)
    begun = versions.initialise(
        fingerprint, state, part=part, durability=durability, default=default
    )
    # Halves that will be averaged may well begin with weights of their own, and the body of one
    # client begins as the newest of all.
    is_derived = versions.name == "client" or "@" in versions.name
    if begun or versions.warned_of_unused or is_derived:
        return
    if any(tensor.is_meta for tensor in state.values()):
        return
    head = versions.head()
    if any(versions.holds(version, state) for version in dict.fromkeys((0, head))):
        return
    versions.warned_of_unused = True
    warnings.warn(
        f"the weights of this body are neither those that the store's lineage {versions.name!r} "
        f"began with nor those of its newest version {head}, and aren't used: the store's are. "
        "A loaded checkpoint needs a new store, or store.rollback to a version. If only the "
        'structure is meant, build the body under torch.device("meta"), or from the same seed',
        stacklevel=3,
    )
