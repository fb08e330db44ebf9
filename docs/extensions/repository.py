"""What a page is on the site that it isn't in the repository: in a site's tree, and far from all other files.

Links that lead out of `docs/`, to examples, tests and the files at the top, are relative, so that they can be followed
in a clone or on a branch. On the site they lead to the repository. And a `README.md`, which a repository shows for its
folder, holds the other pages of that folder.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

_LINK = re.compile(r"(\]\()(?![a-z]+:|#)([^)\s#]+)((?:#[^)\s]*)?\))")
_FOLDER = "\n```{toctree}\n:glob:\n:hidden:\n\n*\n```\n"


def absolute(text: str, folder: str, root: Path, repository: str, revision: str) -> str:
    """A page whose links out of `docs/` lead to the repository.

    Args:
        text: The page, in Markdown.
        folder: Where links of the page begin, below the root: `docs`, or a folder in it.
        root: The repository's root.
        repository: Its URL.
        revision: A branch or tag of it.
    """

    def lead(found: re.Match[str]) -> str:
        place = posixpath.normpath(posixpath.join(folder, found[2]))
        if place.startswith("docs/"):
            return found[0]
        kind = "tree" if (root / place).is_dir() else "blob"
        return f"{found[1]}{repository}/{kind}/{revision}/{place}{found[3]}"

    return _LINK.sub(lead, text)


def setup(app: Sphinx) -> dict[str, Any]:
    """Do it whenever a page is read."""
    app.add_config_value("repository", "", "env")
    app.add_config_value("revision", "main", "env")
    root = Path(app.srcdir).parent

    def read(app: Sphinx, name: str, source: list[str]) -> None:
        path = Path(app.env.doc2path(name))
        if path.suffix == ".md":
            folder = posixpath.dirname(f"docs/{name}")
            source[0] = absolute(source[0], folder, root, app.config.repository, app.config.revision)
        if path.name == "README.md":
            source[0] += _FOLDER

    app.connect("source-read", read)
    return {"parallel_read_safe": True}
