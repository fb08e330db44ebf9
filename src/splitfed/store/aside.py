"""A run is set aside, so that another can begin in its place: nothing is ever deleted for that.

A folder gets another name, in one step. A bucket has no such step: an object would be copied after
the other, while servers and clients write, so there the new run needs a URL of its own.

The trap is a script of several processes of which each says `fresh=True`: the second would set
aside what the first has begun. So a run in which nothing was trained stays where it is.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

from splitfed.blobs.local import LocalBlobs
from splitfed.errors import InputError, StoreError

if TYPE_CHECKING:
    from splitfed.store.store import GradientStore


def set_aside(store: GradientStore) -> str | None:
    """Give the folder of a run another name, if something was trained in it.

    Args:
        store: The run's store; it must not be used any more.

    Returns:
        The folder's new name, `NAME-until-DATE-TIME` by its newest version; `None` if nothing was
        trained, and the run stays.

    Raises:
        InputError: it isn't in a folder of this machine.
        BusyError: an accumulator is at work on it.
        StoreError: it can't be renamed.
    """
    if store.header() is None:
        return None
    heads = {name: store.lineage(name).head() for name in store.lineages()}
    if max(heads.values(), default=0) <= 0 and not store.rounds().newest():
        return None
    if not isinstance(store.blobs.raw, LocalBlobs):
        raise InputError(
            f"fresh=True, and {store.shown} holds a run at version {heads.get('body', 0)}: only a "
            "folder of this machine can be set aside. Give the new run a URL of its own, or move "
            "the objects away with the tools of the storage"
        )
    with store.alone(heads):
        pass  # nobody is at work; held any longer, the locks' files couldn't move with the folder
    made = max(store.lineage(name).commit(head).time for name, head in heads.items() if head >= 0)
    root = store.blobs.raw.root
    named = time.strftime(f"{root}-until-%Y%m%d-%H%M%S", time.localtime(made))
    target, number = named, 2
    while os.path.lexists(target):
        target, number = f"{named}-{number}", number + 1
    try:
        os.rename(root, target)
    except OSError as error:
        raise StoreError(
            f"{root} can't be set aside as {target} ({error}): rename it, or choose another folder"
        ) from error
    return target
