"""The life of a sum in stages, at which a real process stops when it is asked to, so that it is killed right there.

A stage is a place in a real function: nothing of it is replaced, it is only wrapped. Who kills writes the name of a
stage to a file; the first process that comes there says so, and waits for its end.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from splitfed.accumulator import accumulator, gather
from splitfed.accumulator.accumulator import Accumulator
from splitfed.accumulator.derive import Deriver
from splitfed.accumulator.gather import Gatherer
from splitfed.store import holder, sums
from splitfed.store.checked import Checked
from splitfed.store.holder import Holder
from splitfed.store.lineage import Lineage

FOLDER = "SPLITFED_TEST_STAGES"
"""The variable that names the folder of the files; where it is set, a run is a log."""
STAGES = (
    *("created", "adding", "added", "writing", "linking", "written", "answering"),
    *("asked", "gathered", "deriving", "folded", "committed", "cleaning"),
)
"""Of a server: its batch is created and not held; added, and not listed yet; its sum is written. Of an accumulator: it
has asked; has what there is; computes what is missing; has added up, and not committed; has committed."""


def install() -> bool:
    """Have this process stop at stages, and hold next to nothing as it is; whether it is told to."""
    if FOLDER not in os.environ:
        return False
    holder.LEAST, holder.BYTES, holder.NEAR = 1, 0, 0.002
    gather.WAIT = 0.2
    holder._UNASKED = 3_600.0  # else on a busy machine all is on file before anybody has to ask
    _lose_for(Holder, "write", "deriving")
    _wrap(Holder, "put", before="created")
    _wrap(sums, "add_products", before="adding", after="added")
    _wrap(Holder, "_create", before="writing", after="written")
    _wrap(os, "link", before="linking", at="/body/sum/")
    _wrap(Checked, "delete", before="answering", at="body/ask/")
    _wrap(Checked, "put", after="asked", at="body/ask/")
    _wrap(Gatherer, "gather", after="gathered")
    _wrap(Deriver, "gradient", before="deriving")
    _wrap(Accumulator, "_publish", before="folded")
    _wrap(Lineage, "publish", after="committed")
    _wrap(Gatherer, "clean", before="cleaning")
    assert accumulator.Deriver is Deriver
    return True


def _wrap(owner: Any, name: str, *, before: str = "", after: str = "", at: str = "") -> None:
    """Have a function stop before or after it; only if it is given something with `at` in it."""
    function: Callable[..., Any] = getattr(owner, name)

    def wrapped(*given: Any, **named: Any) -> Any:
        is_here = not at or any(at in str(value) for value in given)
        if before and is_here:
            stop(before)
        found = function(*given, **named)
        if after and is_here:
            stop(after)
        return found

    setattr(owner, name, wrapped)


def _lose_for(owner: Any, name: str, stage: str) -> None:
    """Have a server lose what it holds instead of writing it, if somebody is to be killed who computes it again."""
    function: Callable[..., Any] = getattr(owner, name)

    def losing(self: Holder) -> Any:
        if _read(Path(os.environ[FOLDER], "wanted")) == stage:
            self.collect()
        return function(self)

    setattr(owner, name, losing)


def stop(stage: str) -> None:
    """Wait here, if it is where somebody is to be killed."""
    wanted = Path(os.environ[FOLDER], "wanted")
    if _read(wanted) != stage:
        return
    Path(os.environ[FOLDER], f"here-{os.getpid()}").touch()
    while _read(wanted) == stage:
        time.sleep(0.002)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except FileNotFoundError:
        return ""


def caught(folder: Path, stage: str, seconds: float) -> int:
    """The process that has come to a stage, by its id; 0 if none does in so many seconds. It goes on by `release`."""
    (folder / "new").write_text(stage)
    (folder / "new").replace(folder / "wanted")
    began = time.monotonic()
    ahead = 0
    while time.monotonic() < began + seconds:
        for path in folder.glob("here-*"):
            return int(path.name.partition("-")[2])
        if time.monotonic() > began + ahead + 1:
            # One commit may have taken all that owners who keep pace have sent: they send more.
            ahead += 1
            (folder / "killed").write_text(str(int(_read(folder / "killed") or 0) + 1))
        time.sleep(0.002)
    return 0


def keep_pace(step: int, steps: int, kills: int) -> None:
    """Let an owner wait before a step that is meant to come after more kills: none is to come when all is over."""
    killed = Path(os.environ.get(FOLDER, ""), "killed")
    while FOLDER in os.environ and step * kills >= (int(_read(killed) or 0) + 2) * steps:
        time.sleep(0.002)


def release(folder: Path, killed: int) -> None:
    """Let everybody go on, as so many were killed so far."""
    (folder / "new").write_text(str(killed))
    (folder / "new").replace(folder / "killed")
    (folder / "wanted").unlink(missing_ok=True)
    for path in folder.glob("here-*"):
        path.unlink(missing_ok=True)
