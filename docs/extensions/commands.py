"""The directive `commands`: what each command of `splitfed` prints for `--help`, a section each."""

from __future__ import annotations

import argparse
import os
from typing import Any
from unittest import mock

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from splitfed.cli.command import _parser

_COLUMNS = 96


def helps() -> dict[str, str]:
    """The help of each command, by its name."""
    parser = _parser()
    (verbs,) = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    with mock.patch.dict(os.environ, COLUMNS=str(_COLUMNS)):
        return {name: verb.format_help() for name, verb in sorted(verbs.choices.items())}


class Commands(SphinxDirective):
    """A section for each command."""

    def run(self) -> list[nodes.Node]:
        """The sections."""
        made: list[nodes.Node] = []
        for name, text in helps().items():
            section = nodes.section(ids=[nodes.make_id(f"splitfed-{name}")])
            section += nodes.title("", "", nodes.literal("", f"splitfed {name}"))
            section += nodes.literal_block(text, text, language="text")
            made.append(section)
        return made


def setup(app: Sphinx) -> dict[str, Any]:
    """Add the directive."""
    app.add_directive("commands", Commands)
    return {"parallel_read_safe": True}
