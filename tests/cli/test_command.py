"""The command as a whole: its two names, its version, and a help that is there at once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from splitfed.cli.command import main
from splitfed.service.http.auth import new_token

# What the script `splitfed` does that an installation makes of the entry point.
SCRIPT = [sys.executable, "-c", "import sys; from splitfed.cli import main; sys.exit(main())"]
MODULE = [sys.executable, "-m", "splitfed"]


def ended(command: list[str], *arguments: str) -> tuple[int, str, str]:
    """Exit status, output and errors of a command."""
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=120, check=False)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["--help"], 0, "usage: splitfed [-h] [--version] VERB"),
        (["token", "--help"], 0, "usage: splitfed token [-h] ACTION"),
        (["--version"], 0, "splitfed "),
        (["dance"], 2, "splitfed: error: argument VERB: invalid choice: 'dance'"),
    ],
)
def test_the_package_runs_as_the_command_does(arguments: list[str], status: int, said: str) -> None:
    """`python -m splitfed` is `splitfed`: the same name, help, version, errors and exit status."""
    found = ended(MODULE, *arguments)
    assert found == ended(SCRIPT, *arguments)
    assert found[0] == status
    assert "".join(found[1:]).startswith(said)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no such device here")
@pytest.mark.parametrize("command", [MODULE, SCRIPT], ids=["module", "script"])
def test_output_that_nobody_takes_is_no_traceback(command: list[str], tmp_path: Path) -> None:
    """A pipe whose reader has left, as `| head` leaves, ends it as shells expect; a full disk is one line.

    The verb is one that needs no torch; none writes otherwise.
    """
    new_token(tmp_path / "tokens", "a")
    words = [*command, "token", "list", "--tokens", str(tmp_path / "tokens")]
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as left, open("/dev/full", "w") as full:
        gone = subprocess.run(words, stdout=left, stderr=subprocess.PIPE, text=True, check=False)
        filled = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (gone.returncode, gone.stderr) == (141, "")
    assert (filled.returncode, filled.stderr) == (1, "splitfed: error: [Errno 28] No space left on device\n")


def test_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """`splitfed --version` names the version."""
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith("splitfed ")


def test_help_needs_no_torch() -> None:
    """Each verb's module is imported for its arguments, and torch only when it runs."""
    code = "import sys; from splitfed.cli.command import _parser; _parser(); print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert found.stdout == "False\n"
