"""The site, as `make docs` has built it: whole, findable, linked, and readable on a desktop and on a phone."""

from __future__ import annotations

import ast
import functools
import http.server
import importlib
import importlib.machinery
import importlib.util
import inspect
import json
import posixpath
import re
import shutil
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import unquote, urljoin, urlsplit

import pytest
from pages import ROOT, blocks
from playwright.sync_api import Browser, Page, sync_playwright
from sphinx.util.inventory import InventoryFile

import splitfed
from splitfed import errors

SITE = ROOT / "build" / "site"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))), None)
MODULES = ("callbacks", "partition", "policies", "progress", "status", "testing")
"""Modules that have a short name in `splitfed`, and all of whose names are public."""
PACKAGES = ("blobs", "client", "federation", "protocol", "server", "service.http", "service.mailbox", "simulation")

pytestmark = pytest.mark.skipif(not SITE.is_dir(), reason="`make docs` builds it first")


def load(path: Path) -> ModuleType:
    """A script or an extension of the site, as a module."""
    loader = importlib.machinery.SourceFileLoader(path.name.replace("-", "_").removesuffix(".py"), str(path))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


class Links(HTMLParser):
    """What a page of HTML can be linked by, and what it links."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.targets: list[str] = []
        self.feed(page.read_text("utf-8"))
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note an element."""
        found = dict(attrs)
        if found.get("id"):
            self.ids.add(str(found["id"]))
        for name in ("href", "src"):
            if found.get(name):
                self.targets.append(str(found[name]))


@pytest.fixture(scope="module")
def inventory() -> set[str]:
    """The full names that the reference has."""
    with (SITE / "objects.inv").open("rb") as file:
        found = InventoryFile.load(file, "", posixpath.join)
    data = found.data if hasattr(found, "data") else found
    return {name for kind, names in data.items() if kind.startswith("py:") for name in names}


@pytest.fixture(scope="module")
def pages() -> dict[str, Links]:
    """All pages, by their place."""
    return {path.relative_to(SITE).as_posix(): Links(path) for path in sorted(SITE.rglob("*.html"))}


def own_names(module: ModuleType) -> Iterator[str]:
    """The names without an underscore of what a module defines itself."""
    for name, value in vars(module).items():
        is_own = getattr(value, "__module__", None) == module.__name__ and hasattr(value, "__name__")
        if is_own and not name.startswith("_"):
            yield name


def entries(package: str, name: str) -> set[str]:
    """The full names under which something that a package exports may be found: there, at the top, where it is defined.

    Nothing for a module, or for an alias of a type, which has no name of its own.
    """
    value = getattr(importlib.import_module(package), name)
    if inspect.ismodule(value) or not hasattr(value, "__name__"):
        return set()
    return {f"{package}.{name}", f"splitfed.{name}", f"{value.__module__}.{value.__name__}"}


def without_entry(wanted: list[tuple[str, str]], inventory: set[str]) -> list[str]:
    """What is found under none of its names."""
    found = {f"{package}.{name}": entries(package, name) for package, name in wanted}
    return sorted(full for full, names in found.items() if names and not names & inventory)


def test_every_public_name_has_its_entry(inventory: set[str]) -> None:
    """Those of `splitfed`, of each package, of the modules with a short name, and all errors."""
    wanted = [("splitfed", name) for name in splitfed.__all__]
    wanted += [("splitfed", name) for name, value in vars(errors).items() if inspect.isclass(value)]
    for package in (f"splitfed.{name}" for name in PACKAGES):
        wanted += [(package, name) for name in importlib.import_module(package).__all__]
    for module in (getattr(splitfed, name) for name in MODULES):
        wanted += [(module.__name__, name) for name in own_names(module)]
    assert len(wanted) > 90
    assert "splitfed.__version__" in inventory
    assert without_entry(wanted, inventory) == []


def test_every_name_that_the_docs_import_has_its_entry(inventory: set[str]) -> None:
    """`from splitfed.x import Y` on a page: who looks `Y` up in the reference finds it."""
    wanted = []
    for page in sorted((ROOT / "docs").rglob("*.md")):
        for _, code in blocks(page, "python"):
            for node in ast.walk(ast.parse(code)):
                if isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] == "splitfed":
                    wanted += [(str(node.module), alias.name) for alias in node.names]
    assert len(wanted) > 10
    assert without_entry(wanted, inventory) == []


def test_no_link_is_dead(pages: dict[str, Links]) -> None:
    """Each link within the site leads to a file and, behind '#', to something on it; others have a host and HTTPS."""
    dead = []
    for name, page in pages.items():
        for target in page.targets:
            parts = urlsplit(target)
            if parts.scheme in ("data", "mailto"):
                continue
            if parts.scheme or parts.netloc:
                if not (parts.scheme in ("http", "https") and parts.netloc):
                    dead.append((name, target))
                continue
            place = posixpath.normpath(urljoin(name, unquote(parts.path))) if parts.path else name
            if not (SITE / place).is_file() or (
                parts.fragment and place in pages and unquote(parts.fragment) not in pages[place].ids
            ):
                dead.append((name, target))
    assert len(pages) > 60
    assert dead == []


def test_links_out_of_the_docs_lead_to_files_of_the_repository(pages: dict[str, Links]) -> None:
    """Examples, tests and the files at the top are linked in the repository, under the names that they have there."""
    prefix = re.compile(r"https://github\.com/splitfed/splitfed/(?:blob|tree|edit|raw)/main/([^?#]*)")
    found = {
        match[1] for page in pages.values() for target in page.targets for match in [prefix.match(target)] if match
    }
    found -= {place for place in found if place.startswith("docs/")}  # the page's own source
    assert "examples/hospitals.py" in found
    assert [place for place in sorted(found) if not (ROOT / place).exists()] == []


def test_pages_are_searched_without_a_server() -> None:
    """The index has the words of pages, reference and notebooks."""
    text = (SITE / "searchindex.js").read_text("utf-8")
    index = json.loads(text[text.index("(") + 1 : text.rindex(")")])
    for document in ("quickstart", "api/client", "notebooks/fifty-owners", "decisions/replay"):
        assert document in index["docnames"]
    for word in ("dirichlet", "cutpoint", "affin"):
        assert word in index["terms"] or word in index["titleterms"]


def test_code_in_backticks_is_a_link_where_it_names_something() -> None:
    """On a page and in a docstring; an ordinary word is none."""
    recipes = (SITE / "recipes.html").read_text("utf-8")
    assert re.search(
        r'<a class="reference internal" href="api/client\.html#splitfed\.SplitClient\.batch"[^>]*><code', recipes
    )
    client = (SITE / "api/client.html").read_text("utf-8")
    assert re.search(r'href="server\.html#splitfed\.SplitServer"[^>]*><code', client)
    assert re.search(r"(?<!>)<code[^>]*><span class=\"pre\">zero_grad\(\)</span>", recipes)


NAMES = {"splitfed.SplitClient", "splitfed.SplitClient.push", "splitfed.split", "splitfed.accumulator.policies.mode"}


@pytest.mark.parametrize(
    ("code", "scope", "name"),
    [
        ("SplitClient", "", "splitfed.SplitClient"),
        ("splitfed.SplitClient(...)", "", "splitfed.SplitClient"),
        ("client.push(num_samples=3)", "", "splitfed.SplitClient.push"),
        ('policies.mode("buffered")', "", "splitfed.accumulator.policies.mode"),
        ("push", "splitfed.SplitClient", "splitfed.SplitClient.push"),
        ("push()", "splitfed.SplitClient.pull", "splitfed.SplitClient.push"),
        ("push", "", None),
        ("loss", "", None),
        ("None", "", None),
        ("client_id=", "", None),
        ("split and join", "", None),
        ("client", "", None),
        ("", "", None),
    ],
)
def test_names_resolve(code: str, scope: str, name: str | None) -> None:
    """As they are typed, within a class by their last part, and never by a part of something longer."""
    assert load(ROOT / "docs/extensions/names.py").resolve(code, NAMES, scope) == name


def test_docstrings_become_restructured_text() -> None:
    """A plural behind code, and a table; all else stays as it is."""
    restructured = load(ROOT / "docs/extensions/docstrings.py").restructured
    assert restructured(["the `A`s of ``b`` and `c`."]) == [r"the `A`\ s of ``b`` and `c`."]
    assert restructured(["| a | b |", "|---|---|", "| `c` | d |"]) == [
        "",
        ".. list-table::",
        "   :header-rows: 1",
        "",
        "   * - a",
        "     - b",
        "   * - `c`",
        "     - d",
    ]


def test_links_are_made_absolute_only_where_they_leave_the_docs() -> None:
    """A page beside it, a heading and another host stay; a file and a folder lead to the repository."""
    absolute = load(ROOT / "docs/extensions/repository.py").absolute
    text = "[a](rounds.md#x) [b](#x) [c](https://host) [d](../examples/study.py) [e](../examples/deploy#y)"
    assert absolute(text, "docs", ROOT, "https://r", "v1.0.0") == (
        "[a](rounds.md#x) [b](#x) [c](https://host) "
        "[d](https://r/blob/v1.0.0/examples/study.py) [e](https://r/tree/v1.0.0/examples/deploy#y)"
    )


# ---------------------------------------------------------------------------------------------------- in a browser


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves a folder, and prints nothing."""

    def log_message(self, format: str, *args: Any) -> None:
        """Leave it."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A real one, without a window."""
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[str]:
    """The URL of a folder in which the site is published as `main` and as two releases."""
    published = load(ROOT / ".ci/publish-site").publish
    published(SITE, tmp_path, "v0.9.0")
    published(SITE, tmp_path, "v0.10.0")
    assert published(SITE, tmp_path, "main") == ["v0.10.0", "v0.9.0", "main"]
    (tmp_path / "v0.9.0" / "gpu.html").unlink()  # a page that is newer than that release
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(tmp_path)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    thread.join()
    server.server_close()


PHONE, DESKTOP = (390, 844), (1440, 900)
LOOKED_AT = (
    "index.html",
    "architecture.html",
    "recipes.html",
    "exactness.html",
    "http.html",
    "api/client.html",
    "api/errors.html",
    "api/commands.html",
    "notebooks/fifty-owners.html",
)


def looking(browser: Browser, size: tuple[int, int], scheme: Any) -> tuple[Page, list[str], list[str]]:
    """A page of the browser; what it asks for, and what it complains about."""
    page = browser.new_page(viewport={"width": size[0], "height": size[1]}, color_scheme=scheme)
    asked: list[str] = []
    complaints: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    return page, asked, complaints


@pytest.mark.timeout(600)
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_pages_fit_and_load_nothing_from_elsewhere(
    browser: Browser, served: str, size: tuple[int, int], scheme: str
) -> None:
    """No page is wider than its window, none complains, none asks another host, and text has the scheme's colours."""
    page, asked, complaints = looking(browser, size, scheme)
    for name in LOOKED_AT:
        page.goto(f"{served}main/{name}")
        page.wait_for_load_state("networkidle")
        width = page.evaluate("document.documentElement.scrollWidth")
        assert width <= size[0], name
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        brightness = sum(map(int, re.findall(r"\d+", background)[:3])) / 3
        assert (brightness < 64) == (scheme == "dark"), name
    page.close()
    assert [url for url in asked if not url.startswith((served, "data:", "about:", "blob:"))] == []
    assert complaints == []


@pytest.mark.timeout(300)
def test_diagrams_are_drawn(browser: Browser, served: str) -> None:
    """Both of the architecture page, with their words, and no message of an error."""
    page, _, complaints = looking(browser, DESKTOP, "light")
    page.goto(f"{served}main/architecture.html")
    # The text of a diagram is there before it is drawn, and the image before its words are.
    images = "[...document.querySelectorAll('.mermaid svg')].map((one) => one.textContent)"
    page.wait_for_function(
        f"['server/', 'BackwardRequest'].every((word, n) => {images}[n]?.includes(word))", timeout=120_000
    )
    drawn = page.evaluate(images)
    page.close()
    assert "server/" in drawn[0]
    assert "BackwardRequest" in drawn[1]
    assert "Syntax error" not in "".join(drawn)
    assert complaints == []


@pytest.mark.timeout(300)
def test_another_version_is_chosen(browser: Browser, served: str) -> None:
    """The list has the versions; the same page opens where it is there, else the first one."""
    page, _, _ = looking(browser, DESKTOP, "light")
    page.goto(f"{served}main/api/client.html")
    choice = page.locator(".versions select")
    choice.wait_for(state="visible")
    assert choice.locator("option").all_inner_texts() == ["v0.10.0", "v0.9.0", "main"]
    assert choice.input_value() == "main"
    choice.select_option("v0.10.0")
    page.wait_for_url(f"{served}v0.10.0/api/client.html")
    page.goto(f"{served}main/gpu.html")
    choice.wait_for(state="visible")
    choice.select_option("v0.9.0")
    page.wait_for_url(f"{served}v0.9.0/")
    page.goto(served)
    page.wait_for_url(f"{served}v0.10.0/")
    page.close()


def test_only_releases_and_main_are_published(tmp_path: Path) -> None:
    """Another name is refused, so that no branch becomes a version by accident."""
    with pytest.raises(SystemExit, match=r"'feature' isn't published"):
        load(ROOT / ".ci/publish-site").publish(SITE, tmp_path, "feature")


@pytest.mark.timeout(300)
def test_the_search_finds(browser: Browser, served: str) -> None:
    """A word of a page, typed into the search."""
    page, _, _ = looking(browser, DESKTOP, "light")
    page.goto(f"{served}main/search.html?q=dirichlet")
    page.wait_for_selector("ul.search li a", timeout=60_000)
    found = page.locator("ul.search li a").all_inner_texts()
    page.close()
    assert any("Simulation" in title or "Monitoring" in title for title in found)


def test_a_version_that_is_published_again_replaces_what_was_there(tmp_path: Path) -> None:
    """No page stays of an earlier build; with no release the first page is that of main."""
    publish = load(ROOT / ".ci/publish-site").publish
    publish(SITE, tmp_path, "main")
    (tmp_path / "main" / "old.html").touch()
    assert publish(SITE, tmp_path, "main") == ["main"]
    assert not (tmp_path / "main" / "old.html").exists()
    assert 'url=main/"' in (tmp_path / "index.html").read_text()
