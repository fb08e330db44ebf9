"""`splitfed inspect`: shapes and bytes of what crosses each cut, found by one training step on made-up input."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from typing import TYPE_CHECKING, Any

from splitfed.cli.apps import load_body
from splitfed.cli.tables import size, table
from splitfed.errors import InputError, SplitFedError

if TYPE_CHECKING:
    from torch import Tensor

    from splitfed.diagnostics.crossings import Inspection

_DESCRIPTION = """\
Run one training step on made-up input of the given shapes, in this process, and show the shape, dtype and bytes of
every tensor that crosses a cut, and the bytes of the requests around them. APP is a body; with --at it is the whole
model, which is cut there first."""
_INPUT = re.compile(r"(\d+(?:x\d+)*)(?::([a-z]+[0-9]*))?")


def add(verbs: argparse._SubParsersAction[Any]) -> None:
    """Describe the verb and its arguments."""
    parser = verbs.add_parser(
        "inspect",
        help="what crosses each cut of a model: shapes and bytes",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "app", metavar="APP", help="module:attribute of the body or model: an nn.Module, or a function that returns it"
    )
    parser.add_argument(
        "--at", action="append", metavar="CUT", help="where to cut the model, as for splitfed.split; may be repeated"
    )
    parser.add_argument(
        "--input",
        action="append",
        required=True,
        metavar="SHAPE",
        help="shape of an argument, batch first, such as 32x3x224x224 or 8x128:int64; repeated for further arguments",
    )
    parser.add_argument("--json", action="store_true", help="as JSON, for programs")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print what crosses.

    Raises:
        InputError: a shape isn't one, or the model doesn't run on it.
    """
    example = [_example(text) for text in arguments.input]
    model = load_body(arguments.app)
    from splitfed.diagnostics.crossings import inspect
    from splitfed.model.cut import split
    from splitfed.model.cutpoint import CutPoint

    cuts = arguments.at
    half, body = split(model, cuts[0] if len(cuts) == 1 else cuts) if cuts else (CutPoint(), model)
    try:
        found = inspect(half, body, *example)
    except SplitFedError:
        raise
    except Exception as error:  # the model's own code, of which anything may come
        shapes = ", ".join(arguments.input)
        raise InputError(f"{arguments.app} doesn't run on input {shapes}: {type(error).__name__}: {error}") from error
    print(json.dumps(dataclasses.asdict(found)) if arguments.json else _page(found))
    return 0


def _example(text: str) -> Tensor:
    import torch

    found = _INPUT.fullmatch(text)
    dtype = getattr(torch, found[2] or "float32", None) if found else None
    if not found or not isinstance(dtype, torch.dtype):
        raise InputError(f"--input {text!r} isn't allowed: expected a shape and perhaps a dtype, such as 8x128:int64")
    shape = [int(number) for number in found[1].split("x")]
    floating = dtype.is_floating_point or dtype.is_complex
    try:
        return torch.randn(shape).to(dtype) if floating else torch.zeros(shape, dtype=dtype)
    except RuntimeError as error:
        raise InputError(f"--input {text!r} can't be made: {str(error).splitlines()[0]}") from error


def _page(found: Inspection) -> str:
    rows: list[tuple[object, ...]] = [("cut", "call", "what crosses", "shape", "dtype", "bytes")]
    for one in found.crossings:
        shape = "x".join(map(str, one.shape)) or "scalar"
        rows.append((one.cut or "body", one.call, one.what, shape, one.dtype, size(one.num_bytes)))
    sent = [("message", "bytes"), *((kind, size(count)) for kind, count in found.messages.items())]
    sent.append(("together", size(sum(found.messages.values()))))
    sides = [
        ("client half", f"{found.client_parameters:,} parameters"),
        ("body", f"{found.body_parameters:,} parameters, {size(found.body_bytes)} a version"),
    ]
    return "\n\n".join([table(rows), table(sent), table(sides)])
