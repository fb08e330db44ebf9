"""What `module:attribute` on a command line means: the user's own code, loaded as uvicorn loads an app.

The folder that the command runs in comes first on the import path, as for a script there. What fails inside the user's
module keeps its own message, and the line it happened in: without that, an import error is a riddle.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from typing import TYPE_CHECKING, Any

from splitfed.errors import InputError

if TYPE_CHECKING:
    from torch import nn


def load_object(spec: str, what: str) -> Any:
    """The attribute that `module:attribute` names; dots after the colon go deeper.

    Args:
        spec: Such as `hospital.models:body`.
        what: Which argument it is, for the message.

    Raises:
        InputError: it isn't of this form, or there is no such module or attribute, or importing or reading it raised.
    """
    module, colon, path = spec.partition(":")
    if not (module and colon and path):
        raise InputError(f"{what} is {spec!r}: expected module:attribute, such as my_models:body")
    if "/" in module or module.startswith(".") or module.endswith(".py"):
        raise InputError(
            f"{what} is {spec!r}, which names a file: expected the name by which Python imports it from the current "
            "folder, such as my_models:body for my_models.py, or sites.my_models:body for sites/my_models.py"
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module)
    except Exception as error:
        raise InputError(f"{what} {spec!r}: importing {module!r} from {os.getcwd()} raised {_told(error)}") from error
    for name in path.split("."):
        try:
            found = getattr(found, name)
        except AttributeError as error:
            raise InputError(f"{what} {spec!r}: {module!r} has no attribute {name!r} of {path!r}") from error
        except Exception as error:
            raise InputError(f"{what} {spec!r}: reading {name!r} raised {_told(error)}") from error
    return found


def load_body(spec: str) -> nn.Module:
    """The body that APP names: a module, or a function (or class) without arguments that returns one.

    Raises:
        InputError: it is neither, or calling it raised.
    """
    from torch import nn

    found = load_object(spec, "APP")
    if not isinstance(found, nn.Module) and callable(found):
        try:
            found = found()
        except Exception as error:
            raise InputError(f"APP {spec!r}: calling it raised {_told(error)}") from error
    if not isinstance(found, nn.Module):
        raise InputError(
            f"APP {spec!r} is a {type(found).__name__}: expected the body as an nn.Module, or a function that returns "
            "it, such as lambda: splitfed.split(model, '1:5')[1]"
        )
    return found


def _told(error: Exception) -> str:
    """What was raised, and where; a place in here or in Python's import would be none of the user's."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    mine = last.filename != __file__ and not last.filename.startswith("<frozen importlib")
    where = f" ({os.path.basename(last.filename)}, line {last.lineno})" if mine else ""
    return f"{type(error).__name__}: {error}{where}"
