"""What every page of figures says of the machine, and the place in the docs where a table goes."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch

import splitfed


def machine() -> dict[str, Any]:
    """The machine and the versions that figures were measured with."""
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "ram": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB",
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "splitfed": splitfed.__version__,
        "threads": torch.get_num_threads(),
    }


def _cpu() -> str:
    """The processor's name, and what its cores share."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def described(found: dict[str, Any]) -> str:
    """The machine in one line."""
    return (
        f"Measured on {found['cores']} cores ({found['cpu']}, {found['ram']}, {found['system']}), "
        f"Python {found['python']}, torch {found['torch']}, splitfed {found['splitfed']}."
    )


def check(path: Path, name: str) -> None:
    """End the program if a page has no place of that name: before hours were measured, not after.

    Args:
        path: The page.
        name: Of the markers, as in `fill`.
    """
    _around(path, name)


def fill(path: Path, name: str, text: str) -> None:
    """Write a text into a page of the docs, between its markers.

    Args:
        path: The page.
        name: Of the markers: `<!-- name -->` and `<!-- end of name -->`.
        text: What goes between them.
    """
    before, behind = _around(path, name)
    path.write_text(f"{before}\n{text}\n{behind}", "utf-8")


def _around(path: Path, name: str) -> tuple[str, str]:
    """What a page has before its place of that name and behind it, with the markers."""
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    page = path.read_text("utf-8") if path.is_file() else ""
    if page.count(begin) != 1 or page.count(end) != 1:
        raise SystemExit(f"{path} has no place for the table: expected {begin} and {end}, once each")
    before, _, rest = page.partition(begin)
    return before + begin, end + rest.partition(end)[2]
