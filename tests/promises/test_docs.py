"""What the documentation says is what happens: its code runs, its links lead somewhere, and no name is missing."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pages import BLOCK, ROOT, blocks, run
from torch import Tensor, nn

import splitfed
from splitfed import errors

README = ROOT / "README.md"
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CODE_OF_CONDUCT.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "examples").rglob("README.md")),
]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
_LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")


def prose(page: Path) -> str:
    """A page without its code blocks."""
    return BLOCK.sub("", page.read_text("utf-8"))


def anchors(page: Path) -> set[str]:
    """The fragments that a page's headings can be linked by."""
    titles = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.fixture
def accelerate_reset() -> Iterator[None]:
    """Forgets the process-wide state that an Accelerator leaves behind, for the tests that come after."""
    yield
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(True)
        GradientState._reset_state()


TRAINERS = "docs/trainers.md"
APART = ("docs/exporting.md", "docs/trackers.md")
"""Pages whose code needs the environment of `tests/integrations`: tests there run it."""
RUN = [
    pytest.param(page, id=name, marks=[pytest.mark.integration] if name == TRAINERS else [])
    for page, name in zip(PAGES, NAMES, strict=True)
    if name not in APART
]
"""The others; that on trainers is one of `make integrations`, with all the libraries that it brings."""


@pytest.mark.usefixtures("accelerate_reset", "forked_workers")
@pytest.mark.parametrize("page", RUN)
def test_every_python_block_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a page, one after another in one namespace and an empty folder, run as they stand."""
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for line, code in blocks(page, "python"):
        run(code, str(page), line, namespace)


@pytest.mark.integration
def test_the_page_on_simulation_runs_as_one_script(tmp_path: Path) -> None:
    """All its blocks pasted below each other, with worker processes, which import the script themselves."""
    script = tmp_path / "pasted.py"
    script.write_text("\n\n".join(code for _, code in blocks(ROOT / "docs/simulation.md", "python")))
    command = [sys.executable, str(script)]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "runs/workers").is_dir()


def test_pages_with_code_are_found() -> None:
    """README, quickstart and recipes have code, so the test above tests something."""
    for name in ("README.md", "docs/quickstart.md", "docs/recipes.md", "docs/exactness.md"):
        assert list(blocks(ROOT / name, "python")), name


def test_readme_leads_with_the_diff_and_a_runnable_block() -> None:
    """The diff comes within the first 15 lines, and a block that can be copied and run as it is within the first 45."""
    ((line, _),) = blocks(README, "diff")
    assert line <= 15
    first, code = next(blocks(README, "python"))
    assert first <= 45
    assert "import splitfed" in code
    assert "print(" in code


def test_readme_diff_changes_where_it_trains_and_not_what_comes_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both sides of the README's diff run, and end in the same weights, bit for bit."""
    monkeypatch.chdir(tmp_path)
    ((_, diff),) = blocks(README, "diff")
    ends = []
    for dropped in "-+":
        code = "\n".join(line[1:] for line in diff.splitlines() if not line.startswith(dropped))
        torch.manual_seed(0)
        layers = nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10)
        loader = [(torch.randn(8, 64), torch.randint(0, 10, (8,))) for _ in range(5)]
        namespace: dict[str, Any] = {"model": nn.Sequential(*layers), "loader": loader}
        run("import torch\nfrom torch.nn.functional import cross_entropy\n" + code, "README diff", 1, namespace)
        ends.append(namespace)
    split, raw = ends
    assert split["store"].latest_version() == 5
    whole: dict[str, Tensor] = splitfed.join(split["client"], split["store"].load_weights()).state_dict()
    for name, tensor in raw["model"].state_dict().items():
        assert torch.equal(tensor, whole[name]), name


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_relative_links_lead_somewhere(page: Path) -> None:
    """A link without a scheme names a file of the repository and, after '#', one of its headings."""
    for target in _LINK.findall(prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, fragment = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), target
        assert found.is_relative_to(ROOT), target
        assert not fragment or fragment in anchors(found), target


def test_every_public_name_is_mentioned() -> None:
    """Each name of `splitfed.__all__` stands in the README or in `docs/`, as code."""
    text = "\n".join(page.read_text("utf-8") for page in PAGES)
    code = "\n".join([*re.findall(r"`[^`\n]+`", text), *(found[3] for found in BLOCK.finditer(text))])
    assert [name for name in splitfed.__all__ if not re.search(rf"\b{name}\b", code)] == []


def test_the_architecture_page_names_what_is_there() -> None:
    """Each file that it names exists, and its table of rooms has each package once."""
    page = (ROOT / "docs/architecture.md").read_text("utf-8")
    package = Path(splitfed.__file__).parent
    named = set(re.findall(r"`([a-z_]+(?:/[a-z_]+)+\.py)`", page))
    assert len(named) > 20
    assert [name for name in sorted(named) if not (package / name).is_file() and not (ROOT / name).is_file()] == []
    rooms = re.findall(r"^\| `([a-z]+)/` \|", page, re.MULTILINE)
    assert sorted(rooms) == sorted(path.parent.name for path in package.glob("*/__init__.py"))


def test_every_error_has_its_row() -> None:
    """The table in `docs/exactness.md` has each error once, with the status that the class carries."""
    rows = re.findall(r"^\| `(\w+)` \|.*\| (\d+) \|$", (ROOT / "docs/exactness.md").read_text("utf-8"), re.MULTILINE)
    tree = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.SplitFedError)]
    assert sorted(rows) == sorted((kind.__name__, str(kind.status)) for kind in tree)


def test_every_key_of_a_store_is_in_its_layout(tmp_path: Path) -> None:
    """A run with frozen parameters, client halves and an open batch leaves no key that the page doesn't have."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    model[1].requires_grad_(False)
    half, body = splitfed.split(model, "1:3")
    store = splitfed.GradientStore(tmp_path)
    client = splitfed.SplitClient(half, splitfed.SplitServer(body, store), client_id="a")
    client.pull()
    accumulator = splitfed.Accumulator(body, store, optimizer=lambda params: torch.optim.Adam(params))
    for _ in range(2):
        (client(torch.ones(3, 4)).sum() + client(torch.ones(3, 4)).sum()).backward()
        accumulator.step()
    client(torch.ones(3, 4)).sum().backward()
    client.push(num_samples=3)
    unfinished = client(torch.ones(3, 4))
    page = (ROOT / "docs/store.md").read_text("utf-8")
    found = {part for key in store.blobs.list("") for part in re.sub(r"[0-9a-f]{16,}|\d{6,}", "#", key).split("/")}
    assert {"grad", "forward", "weights", "optimizer", "applied", "commit", "clients", "client"} <= found
    for part in found - {"a"}:
        assert part.partition("#")[0] in page, part
    assert unfinished.requires_grad


def test_extras_that_are_named_exist() -> None:
    """On a page and in the message of an error; none is named as if the index had the package."""
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    section = project.partition("[project.optional-dependencies]\n")[2].partition("\n[")[0]
    extras = set(re.findall(r"^([a-z0-9]+) = ", section, re.MULTILINE))
    sources = [path.read_text("utf-8") for path in sorted(Path(splitfed.__file__).parent.rglob("*.py"))]
    texts = [page.read_text("utf-8") for page in PAGES]
    named = {name for text in sources for name in re.findall(r"\binstall\([\"'](\w+)[\"']\)", text)}
    named |= {
        name for text in texts for found in re.findall(r"\"\.\[([a-z0-9,]+)\]\"", text) for name in found.split(",")
    }
    assert len(named) > 8
    assert named - {"dev"} <= extras
    assert [text for text in (*sources, *texts) if re.search(r"install [\"']?splitfed\b", text)] == []


def test_examples_are_all_listed() -> None:
    """Each script in `examples/` is linked from its index, and each link there is a script."""
    scripts = {path.name for path in (ROOT / "examples").glob("*.py")}
    linked = {target for target in _LINK.findall(prose(ROOT / "examples/README.md")) if target.endswith(".py")}
    assert scripts == linked
    for path in (ROOT / "examples").glob("*.py"):
        assert ast.get_docstring(ast.parse(path.read_text("utf-8"))), path.name
        assert len(path.read_text("utf-8").splitlines()) < 120, path.name
