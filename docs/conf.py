"""Settings of the site: Sphinx over the pages of this folder. `make docs` builds it into build/site."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import splitfed

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "extensions"))

project = "splitfed"
author = "The splitfed maintainers"
project_copyright = author
version = release = splitfed.__version__
repository = "https://github.com/splitfed/splitfed"
# The branch or tag of the repository that this site is of: links to files outside of docs/ lead there.
revision = os.environ.get("SITE_REVISION", "main")

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinxcontrib.mermaid",
    "commands",
    "docstrings",
    "names",
    "repository",
]
exclude_patterns = ["_static", "_templates", "extensions", "img"]
suppress_warnings = ["mystnb.unknown_mime_type"]

# ------------------------------------------------------------------------------------------------------------- pages

myst_heading_anchors = 4  # as GitHub makes them
myst_enable_extensions = ["attrs_inline"]
myst_fence_as_directive = ["mermaid"]
copybutton_exclude = ".linenos, .gp, .go"
mermaid_use_local = "mermaid.esm.min.mjs"  # `make docs` fetches it: no page asks another host for anything
mermaid_height = "auto"
mermaid_fullscreen_button = "+"  # its own character is in few fonts

# --------------------------------------------------------------------------------------------------------- notebooks

nb_execution_mode = "cache"
nb_execution_cache_path = str(HERE.parent / "build" / "notebooks")
nb_execution_in_temp = True
nb_execution_timeout = 600  # of a cell, on a machine that has other work
nb_execution_raise_on_error = True
nb_execution_show_tb = True

# --------------------------------------------------------------------------------------------------------- reference

default_role = "literal"  # single backticks are code; `names` makes links of those that name something
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_default_options = {"members": True}
python_maximum_signature_line_length = 88
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
add_module_names = False
modindex_common_prefix = ["splitfed."]

# --------------------------------------------------------------------------------------------------------------- html

html_theme = "furo"
html_title = f"splitfed {version}"
html_favicon = "_static/favicon.svg"
html_static_path = ["_static", "../build/mermaid"]
templates_path = ["_templates"]
html_css_files = ["site.css"]
html_js_files = [("versions.js", {"defer": "defer"})]
html_copy_source = False
html_show_sphinx = False
html_theme_options = {
    "source_repository": repository,
    "source_branch": revision,
    "source_directory": "docs/",
}
html_sidebars = {
    "**": [
        "sidebar/brand.html",
        "sidebar/versions.html",
        "sidebar/search.html",
        "sidebar/scroll-start.html",
        "sidebar/navigation.html",
        "sidebar/scroll-end.html",
    ]
}
