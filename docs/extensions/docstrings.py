"""Docstrings as Sphinx reads them: they are plain English with a little Markdown, as `help()` shows them.

Two things of it mean something else in reStructuredText: a plural behind code, such as `CutPoint`s, and a table.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from sphinx.application import Sphinx

_CODE = re.compile(r"(`+)([^`\n]+)\1(\w?)")


def restructured(lines: Sequence[str]) -> list[str]:
    """The lines of a docstring, in reStructuredText."""
    made: list[str] = []
    in_table = False
    for line in lines:
        text = _CODE.sub(lambda code: f"{code[1]}{code[2]}{code[1]}" + (code[3] and f"\\ {code[3]}"), line)
        row = text.strip()
        if not row.startswith(("| ", "|-")):
            in_table = False
            made.append(text)
            continue
        if not in_table:
            in_table = True
            made += ["", ".. list-table::", "   :header-rows: 1", ""]
        if row.strip("|- "):
            cells = [cell.strip() for cell in row.strip("|").split(" | ")]
            made += [f"   {'  ' if number else '* '}- {cell}" for number, cell in enumerate(cells)]
    return made


def setup(app: Sphinx) -> dict[str, Any]:
    """Do it before napoleon reads the sections."""

    def process(app: Sphinx, what: str, name: str, thing: object, options: object, lines: list[str]) -> None:
        lines[:] = restructured(lines)

    app.connect("autodoc-process-docstring", process, priority=100)
    return {"parallel_read_safe": True}
