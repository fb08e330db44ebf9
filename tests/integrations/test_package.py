"""What is published: wheel and source, installed as a user installs them, and typed for a user's own script."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_string
from email.message import Message
from pathlib import Path

import pytest
from pages import ROOT

import splitfed

NAME = f"splitfed-{splitfed.__version__}"
TYPED = ROOT / "tests/promises/typing_api.py"


def command(*words: object, folder: Path = ROOT, status: int = 0) -> str:
    """Run a command, and return all that it prints."""
    ran = subprocess.run(
        [*map(str, words)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert ran.returncode == status, ran.stdout + ran.stderr
    return ran.stdout + ran.stderr


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Source and wheel; the wheel is built from the source, as a package index's users may do."""
    folder = tmp_path_factory.mktemp("dist")
    command(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder)
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    """The wheel."""
    return built / f"{NAME}-py3-none-any.whl"


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    """What the index shows."""
    with zipfile.ZipFile(wheel) as archive:
        return message_from_string(archive.read(f"{NAME}.dist-info/METADATA").decode())


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel and nothing else of ours; what it needs is that of the tests."""
    place = tmp_path_factory.mktemp("clean") / "venv"
    command(sys.executable, "-m", "venv", place)
    python = place / "bin" / "python"
    command(python, "-m", "pip", "install", "--no-deps", "--no-index", wheel)
    (library,) = place.glob("lib/python3.*/site-packages")
    (needs,) = {path for path in map(Path, sys.path) if (path / "torch").is_dir()}
    (library / "needs.pth").write_text(f"{needs}\n")
    return python


@pytest.mark.timeout(600)
def test_both_are_whole(built: Path) -> None:
    """The index takes them, and the source has what a distribution tests and builds."""
    assert sorted(path.name for path in built.iterdir()) == [f"{NAME}-py3-none-any.whl", f"{NAME}.tar.gz"]
    said = command(sys.executable, "-m", "twine", "check", "--strict", *sorted(built.iterdir()))
    assert said.count("PASSED") == 2
    with tarfile.open(built / f"{NAME}.tar.gz") as archive:
        names = {name.removeprefix(f"{NAME}/") for name in archive.getnames()}
    assert {"LICENSE", "README.md", "CHANGELOG.md", "Makefile", "docs/conf.py", "tests/conftest.py"} <= names
    assert not {name for name in names if ".venv" in name or name.startswith(("build/", "runs/"))}


def test_the_wheel_has_the_package_alone(wheel: Path) -> None:
    """Its types too, and no test."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert "splitfed/py.typed" in names
    assert {name.partition("/")[0] for name in names} == {"splitfed", f"{NAME}.dist-info"}


def test_links_of_the_readme_can_be_followed_from_an_index(metadata: Message) -> None:
    """Each is absolute, and those to the repository lead to a file of it."""
    links = re.findall(r"\]\(([^)\s]+)\)", str(metadata.get_payload()))
    assert len(links) > 20
    assert [link for link in links if not link.startswith("https://")] == []
    prefix = "https://github.com/splitfed/splitfed/blob/main/"
    places = [link.removeprefix(prefix).partition("#")[0] for link in links if link.startswith(prefix)]
    assert [place for place in places if not (ROOT / place).exists()] == []


def test_the_extra_all_has_all_others(metadata: Message) -> None:
    """A new extra is added to it."""
    of: dict[str, set[str]] = {}
    for line in metadata.get_all("Requires-Dist") or ():
        requirement, _, marker = line.partition("; ")
        for extra in re.findall(r"extra == '([a-z0-9-]+)'", marker):
            of.setdefault(extra, set()).add(requirement)
    everything = of.pop("all")
    assert len(of) > 8
    assert everything == set().union(*of.values())


def test_urls_are_those_of_one_repository(metadata: Message) -> None:
    """As the site and the citation have them."""
    urls = dict(line.split(", ", 1) for line in metadata.get_all("Project-URL") or ())
    assert set(urls) == {"Homepage", "Documentation", "Repository", "Issues", "Changelog"}
    for place in ("docs/conf.py", "CITATION.cff"):
        assert urls["Repository"] in (ROOT / place).read_text("utf-8"), place


@pytest.mark.timeout(600)
def test_it_works_where_nothing_else_is(installed: Path, tmp_path: Path) -> None:
    """The command says its version, a mistake says how to mend it, and a batch is trained."""
    place = tmp_path / "elsewhere"
    place.mkdir()
    assert splitfed.__version__ in command(installed.parent / "splitfed", "--version", folder=place)
    script = place / "script.py"
    script.write_text(
        """
import splitfed, torch
from torch import nn
assert "site-packages" in splitfed.__file__ and "clean" in splitfed.__file__, splitfed.__file__
half, body = splitfed.split(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)), "1")
store = splitfed.GradientStore("runs/clean", sync="process")
client = splitfed.SplitClient(half, splitfed.SplitServer(body, store), client_id="a")
client(torch.ones(3, 4)).sum().backward()
print(splitfed.Accumulator(body, store, lambda params: torch.optim.SGD(params, lr=0.1)).step().version)
"""
    )
    assert command(installed, "-I", script, folder=place).split()[-1] == "1"


@pytest.mark.timeout(1200)  # mypy reads all of torch
@pytest.mark.parametrize("checker", ["mypy", "pyright"])
def test_a_users_script_is_typed(installed: Path, checker: str, tmp_path: Path) -> None:
    """`mypy --strict` and pyright read the types of the installed package, and find a mistake."""
    script = tmp_path / "script.py"
    script.write_text(
        """
import torch
from torch import nn

import splitfed


def sgd(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1)


half, body = splitfed.split(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)), "1")
store = splitfed.GradientStore("runs/typed")
client = splitfed.SplitClient(half, splitfed.SplitServer(body, store), client_id="a")
commit = splitfed.Accumulator(body, store, optimizer=sgd).step()
if commit is not None:
    version: int = commit.version
"""
    )
    wrong = tmp_path / "wrong.py"
    wrong.write_text(script.read_text() + 'splitfed.SplitClient(half, 8000, client_id="a")\n')
    if checker == "mypy":
        cache = tmp_path / "cache"
        words = [sys.executable, "-m", "mypy", "--strict", "--python-executable", installed, "--cache-dir", cache]
    else:
        words = [sys.executable, "-m", "pyright", "--pythonpath", installed]
    said = command(*words, script, wrong, folder=tmp_path, status=1)
    mistakes = [line for line in said.splitlines() if re.search(r"\berror: ", line)]
    assert len(mistakes) == 1, said
    assert "wrong.py" in mistakes[0]


def test_a_tag_is_the_version(tmp_path: Path) -> None:
    """The release's check passes for the version, and names what differs for any other tag."""
    assert command(ROOT / ".ci/check-tag", f"v{splitfed.__version__}") == ""
    assert "_version.py has another version" in command(ROOT / ".ci/check-tag", "v99.0.0", status=1)
    assert "_version.py has another version" in command(ROOT / ".ci/check-tag", splitfed.__version__, status=1)


SCHEMAS = {
    "github-workflows": [".github/workflows/ci.yml", ".github/workflows/docs.yml", ".github/workflows/release.yml"],
    "github-issue-forms": [f".github/ISSUE_TEMPLATE/{name}.yml" for name in ("bug", "idea", "model")],
    "github-issue-config": [".github/ISSUE_TEMPLATE/config.yml"],
    "dependabot": [".github/dependabot.yml"],
    "citation-file-format": ["CITATION.cff"],
    "compose-spec": ["examples/deploy/compose.yaml"],
}


@pytest.mark.parametrize("schema", SCHEMAS)
def test_files_of_the_project_are_valid(schema: str) -> None:
    """By the schemas that their readers publish."""
    command(sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{schema}", *SCHEMAS[schema])


def test_no_file_of_the_host_is_left_out() -> None:
    """Each workflow and template has its schema above."""
    found = {path.relative_to(ROOT).as_posix() for path in (ROOT / ".github").rglob("*.yml")}
    assert found <= {name for names in SCHEMAS.values() for name in names}
