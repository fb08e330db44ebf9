"""The pages of the documentation and the code blocks in them."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^( *)```([a-z]*)[^\n]*\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> Iterator[tuple[int, str]]:
    """The code blocks of a page in one language, each with the number of its first line."""
    text = page.read_text("utf-8")
    for found in BLOCK.finditer(text):
        if found[2] == language:
            yield text.count("\n", 0, found.start(3)) + 1, textwrap.dedent(found[3])


def run(code: str, name: str, line: int, namespace: dict[str, Any]) -> None:
    """Run a block; a traceback shows its own line of the page."""
    exec(compile("\n" * (line - 1) + code, name, "exec"), namespace)
