"""A run is set aside, so that another can begin in its place: nothing is ever deleted for that.

A folder gets another name, in one step. A bucket has no such step: an object would be copied after
the other, while servers and clients write, so there the new run needs a URL of its own.
"""

from __future__ import annotations

import os
import time

from splitfed.blobs.contract import Blobs
from splitfed.blobs.local import LocalBlobs
from splitfed.errors import InputError, StoreError


def folder_of(blobs: Blobs, shown: str) -> str:
    """The folder of a run.

    Args:
        blobs: The backend.
        shown: Its URL, for the message.

    Raises:
        InputError: it isn't in a folder of this machine.
    """
    if not isinstance(blobs, LocalBlobs):
        raise InputError(
            f"fresh=True, and {shown} holds a run: only a folder of this machine can be set aside. "
            "Give the new run a URL of its own, or move the objects away with the tools of the "
            "storage"
        )
    return blobs.root


def set_aside(folder: str, made: float) -> str:
    """Give the folder of a run another name, and return it: `FOLDER-until-DATE-TIME`.

    Args:
        folder: The folder.
        made: When its newest version was made, in seconds since 1970.

    Raises:
        StoreError: it can't be renamed.
    """
    named = time.strftime(f"{folder}-until-%Y%m%d-%H%M%S", time.localtime(made))
    target, number = named, 2
    while os.path.lexists(target):
        target, number = f"{named}-{number}", number + 1
    try:
        os.rename(folder, target)
    except OSError as error:
        raise StoreError(
            f"{folder} can't be set aside as {target} ({error}): "
            "rename it, or choose another folder"
        ) from error
    return target
