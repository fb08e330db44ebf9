"""Code in single backticks becomes a link where it names something public.

Pages and docstrings write `SplitClient`, `client.batch()` or `policies.mode("buffered")` as they would be typed. What
is in the reference is linked to it; all other code stays code, so no word in backticks can break the build. The role
`any` of Sphinx would warn of each `loss` and `None`.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterator
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.nodes import make_refnode

_NAME = re.compile(r"(?:splitfed\.)?([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)(?:\([^\n]*\))?")
_HOLDERS = {
    "accumulator": "Accumulator",
    "client": "SplitClient",
    "commit": "Commit",
    "federation": "Federation",
    "history": "History",
    "server": "SplitServer",
    "store": "GradientStore",
}
"""What a variable of such a name holds, on every page."""
_MODULES = {
    "callbacks": "tracking.callbacks",
    "partition": "simulation.partition",
    "policies": "accumulator.policies",
    "progress": "tracking.progress",
    "report": "tracking.report",
    "status": "store.status",
    "testing": "blobs.testing",
}
"""Modules that have a short name in `splitfed`."""


def resolve(code: str, names: Container[str], scope: str = "") -> str | None:
    """The full name of what code in backticks means, or `None`.

    Args:
        code: The code.
        names: All full names that the reference has.
        scope: The full name of what the docstring belongs to, if it is one.
    """
    found = _NAME.fullmatch(code)
    if found is None:
        return None
    return next((name for name in _candidates(found[1], scope) if name in names), None)


def _candidates(name: str, scope: str) -> Iterator[str]:
    """The full names that it may stand for, the nearest first."""
    while scope.count("."):
        yield f"{scope}.{name}"
        scope = scope.rpartition(".")[0]
    yield f"splitfed.{name}"
    first, dot, rest = name.partition(".")
    if not dot:
        return
    if first in _HOLDERS:
        yield f"splitfed.{_HOLDERS[first]}.{rest}"
    if first in _MODULES:
        yield f"splitfed.{_MODULES[first]}.{rest}"


def _scope(node: nodes.Element) -> str:
    """The full name of the object whose description a node is in."""
    inner: nodes.Element | None = node
    while inner is not None and inner.tagname != "desc":
        inner = inner.parent
    if inner is None or not isinstance(inner[0], nodes.Element) or not inner[0].get("fullname"):
        return ""
    return f"{inner[0]['module']}.{inner[0]['fullname']}"


def _link(app: Sphinx, page: str, code: str, scope: str, content: nodes.Element) -> nodes.reference | None:
    objects = app.env.domains["py"].data["objects"]
    name = resolve(code, objects, scope)
    if name is None:
        return None
    entry = objects[name]
    return make_refnode(app.builder, page, entry.docname, entry.node_id, content, name)


def _link_code(app: Sphinx, page: nodes.document, name: str) -> None:
    """Make links of the code of a page."""
    for code in list(page.findall(nodes.literal)):
        parents = []
        parent = code.parent
        while parent is not None:
            parents.append(parent.tagname)
            parent = parent.parent
        if {"reference", "title", "desc_signature", "desc_parameterlist"} & set(parents):
            continue
        link = _link(app, name, code.astext(), _scope(code), code.deepcopy())
        if link is not None:
            code.replace_self(link)


def _link_missing(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, content: nodes.Element
) -> nodes.reference | None:
    """Make a link of the name of an error or of a base class, as a docstring has it."""
    if node.get("refdomain") != "py":
        return None
    scope = ".".join(filter(None, (node.get("py:module"), node.get("py:class"))))
    return _link(app, node["refdoc"], node["reftarget"], scope, content)


def setup(app: Sphinx) -> dict[str, Any]:
    """Do it once all names are known."""
    app.connect("doctree-resolved", _link_code)
    app.connect("missing-reference", _link_missing)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
