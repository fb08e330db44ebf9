"""`splitfed inspect`: shapes and bytes of the tensors that cross each cut, by one training step."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from typing import TYPE_CHECKING, Any

from splitfed.cli.options import load_body
from splitfed.cli.tables import table
from splitfed.errors import InputError, SplitFedError
from splitfed.quantities import size

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from splitfed.diagnostics.crossings import Inspection

_DESCRIPTION = """\
Run one training step on made-up input of the given shapes, in this process, and show the shape,
dtype and bytes of every tensor that crosses a cut, and the bytes of the requests around them. APP
is a body; with --at it is the whole model, which is cut there first."""
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
        "app",
        metavar="APP",
        help="module:attribute of the body or model: an nn.Module, or a function that returns it",
    )
    parser.add_argument(
        "--at",
        action="append",
        metavar="CUT",
        help="where to cut the model, as for splitfed.split; may be repeated",
    )
    parser.add_argument(
        "--input",
        action="append",
        required=True,
        metavar="SHAPE",
        help="shape of an argument, batch first, such as 32x3x224x224 or 8x128:int64; "
        "repeated for further arguments",
    )
    parser.add_argument("--json", action="store_true", help="as JSON, for programs")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the tensors that cross.

    Raises:
        InputError: a shape isn't one, or the model doesn't run on it.
    """
    example = [_example(spec) for spec in arguments.input]
    model = load_body(arguments.app)
    from splitfed.diagnostics.crossings import inspect
    from splitfed.model.cut import split
    from splitfed.model.cutpoint import CutPoint

    half: nn.Module = CutPoint()
    body = model
    if arguments.at:
        cuts = arguments.at[0] if len(arguments.at) == 1 else arguments.at
        half, body = split(model, cuts)
    try:
        found = inspect(half, body, *example)
    except SplitFedError:
        raise
    except Exception as error:  # the model's own code, which may raise anything
        shapes = ", ".join(arguments.input)
        raise InputError(
            f"{arguments.app} doesn't run on input {shapes}: {type(error).__name__}: {error}"
        ) from error
    print(json.dumps(dataclasses.asdict(found)) if arguments.json else _page(found))
    return 0


def _example(spec: str) -> Tensor:
    """A random tensor of a shape, or zeros where the dtype isn't a floating-point one."""
    import torch

    shape, dtype = _shape_and_dtype(spec)
    try:
        if dtype.is_floating_point or dtype.is_complex:
            return torch.randn(shape).to(dtype)
        return torch.zeros(shape, dtype=dtype)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--input {spec!r} can't be made: {reason}") from error


def _shape_and_dtype(spec: str) -> tuple[list[int], torch.dtype]:
    import torch

    found = _INPUT.fullmatch(spec)
    if found:
        dtype = getattr(torch, found[2] or "float32", None)
        # torch has other attributes too, such as `nn` and `randn`.
        if isinstance(dtype, torch.dtype):
            return [int(number) for number in found[1].split("x")], dtype
    raise InputError(
        f"--input {spec!r} isn't allowed: expected a shape and perhaps a dtype, such as 8x128:int64"
    )


def _page(found: Inspection) -> str:
    crossings: list[tuple[object, ...]] = [
        ("cut", "call", "what crosses", "shape", "dtype", "bytes")
    ]
    for one in found.crossings:
        shape = "x".join(map(str, one.shape)) or "scalar"
        crossings.append(
            (one.cut or "body", one.call, one.what, shape, one.dtype, size(one.num_bytes))
        )
    messages = [("message", "bytes")]
    messages += [(kind, size(count)) for kind, count in found.messages.items()]
    messages.append(("together", size(sum(found.messages.values()))))
    sides = [
        ("client half", f"{found.client_parameters:,} parameters"),
        ("body", f"{found.body_parameters:,} parameters, {size(found.body_bytes)} a version"),
    ]
    return "\n\n".join([table(crossings), table(messages), table(sides)])
