"""`splitfed export`: the weights of a version as one safetensors file."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from splitfed.cli.options import add_store, load_object, open_store
from splitfed.errors import InputError
from splitfed.quantities import size

if TYPE_CHECKING:
    from torch import Tensor

    from splitfed.store.store import GradientStore

_DESCRIPTION = """\
Write the weights of a version to a safetensors file, with the keys of the module's state_dict(): of
the body, of the averaged client half (--lineage client), or of the whole model (--half APP). Load
it anywhere: model.load_state_dict(safetensors.torch.load_file(FILE))."""


def add(verbs: argparse._SubParsersAction[Any]) -> None:
    """Describe the verb and its arguments."""
    parser = verbs.add_parser(
        "export",
        help="write the weights of a version as safetensors",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("output", metavar="FILE", help="such as model.safetensors")
    add_store(parser, writes=False)
    parser.add_argument(
        "--lineage", default="body", help="body (default), client or body@<client id>"
    )
    parser.add_argument(
        "--version", type=int, metavar="N", help="which, as far as it is kept (default: the newest)"
    )
    parser.add_argument(
        "--half",
        metavar="APP",
        help="the client half as module:attribute, as split() returned it: the whole model is "
        "written, with its original keys. The half's weights are the newest average in the store; "
        "its own, where clients keep theirs",
    )
    parser.add_argument("--force", action="store_true", help="replace the file if it is there")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Write the file.

    Raises:
        InputError: the file is there, or an argument doesn't fit.
        MissingError: there is no such version.
        ExpiredError: its weights aren't kept any more.
    """
    if os.path.exists(arguments.output) and not arguments.force:
        raise InputError(f"{arguments.output!r} is there already: give --force to replace it")
    store = open_store(arguments)
    version = arguments.version
    if version is None:
        version = store.latest_version(arguments.lineage)
    weights: Mapping[str, Tensor] = store.load_weights(version, arguments.lineage)
    if arguments.half is not None:
        weights = _whole(store, weights, arguments)
    names = {"lineage": arguments.lineage, "version": str(version), "format": "pt"}
    _write(arguments.output, weights, names)
    num_bytes = os.path.getsize(arguments.output)
    what = "the whole model" if arguments.half is not None else arguments.lineage
    print(
        f"{arguments.output}: {what} at version {version} of {store.shown}, "
        f"{len(weights)} tensors, {size(num_bytes)}"
    )
    return 0


def _whole(
    store: GradientStore, body: Mapping[str, Tensor], arguments: argparse.Namespace
) -> dict[str, Tensor]:
    """The weights of the whole model, by its original keys."""
    from torch import nn

    from splitfed.model.cut import join

    if arguments.lineage == "client":
        raise InputError("--half with --lineage client: the half is asked for twice")
    half = load_object(arguments.half, "--half")
    half = half() if not isinstance(half, nn.Module) and callable(half) else half
    if not isinstance(half, nn.Module):
        raise InputError(
            f"--half {arguments.half!r} is a {type(half).__name__}: expected the client half that "
            "split() returned, or a function that returns it"
        )
    if "client" in store.lineages():
        held = store.load_weights(lineage="client")
        missing, unexpected = half.load_state_dict(held, strict=False)
        # What is personal to clients is in no average.
        if unexpected:
            raise InputError(
                f"--half {arguments.half!r} has no {unexpected[:3]}, which the store's client "
                "half has: give the half of the same model and cut"
            )
        if missing:
            print(f"of the half's own, as clients keep them to themselves: {missing[:5]}")
    return join(half, body).state_dict()


def _write(path: str, weights: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a whole file, or none."""
    from safetensors.torch import save_file

    # Tied tensors are written under each of their names, as a plain load_state_dict wants them.
    copies = {name: tensor.detach().clone().contiguous() for name, tensor in weights.items()}
    place = f"{path}.{os.getpid()}.tmp"
    try:
        save_file(copies, place, metadata)
        os.replace(place, path)
    finally:
        if os.path.exists(place):
            os.unlink(place)
