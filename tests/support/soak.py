"""The parts of `make soak`, and their ledger: long runs in pieces, whose totals come from several runs.

Each test of the soak is of the part that its file is in. A run adds a line to `runs/soak.jsonl`: when, which commit and
part, how many tests passed and failed, how long it took, and what the tests have counted (`note`).
"""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
LEDGER = ROOT / "runs/soak.jsonl"
PARTS = {
    "kills": ("faults/test_kill", "faults/test_kill_owners"),
    "services": ("faults/test_service_processes", "promises/test_deploy"),
    "stores": ("blobs/test_object_stores", "faults/test_damage"),
    "hostile": ("faults/test_hostile_account", "faults/test_http_mutations"),
    "faults": ("faults/test_system_calls",),
    "simulator": ("faults/test_simulator",),
    "growth": ("store/test_growth",),
    "log": ("promises/test_log",),
    "clients": ("client/test_resume", "simulation/test_launch"),
}
"""The test files of each part."""


class Ledger:
    """A plugin that notes what a run of the soak has done."""

    def __init__(self, part: str) -> None:
        self._part = part
        self._began = time.time()
        self._outcomes = {"passed": 0, "failed": 0, "skipped": 0}
        self._counts: dict[str, float] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count a test, and what it has noted."""
        if report.when == "call" or report.outcome != "passed":
            self._outcomes[report.outcome] += 1
        if report.when == "call":
            for name, value in report.user_properties:
                if isinstance(value, int | float):
                    self._counts[name] = self._counts.get(name, 0) + value

    def pytest_sessionfinish(self) -> None:
        """Add the line."""
        if not any(self._outcomes.values()):
            return
        LEDGER.parent.mkdir(exist_ok=True)
        line: dict[str, Any] = {
            "time": round(self._began),
            "commit": _commit(),
            "part": self._part,
            "seconds": round(time.time() - self._began, 1),
            **self._outcomes,
            "counts": self._counts,
        }
        with LEDGER.open("a") as file:
            file.write(json.dumps(line) + "\n")


def totals(path: Path = LEDGER) -> dict[str, dict[str, float]]:
    """What all runs on record add up to, by part."""
    found: dict[str, dict[str, float]] = {}
    for line in path.read_text().splitlines() if path.is_file() else ():
        row = json.loads(line)
        total = found.setdefault(row["part"], {})
        for name, value in {"runs": 1, **{n: row[n] for n in ("passed", "failed", "seconds")}, **row["counts"]}.items():
            total[name] = total.get(name, 0) + value
    return found


def _commit() -> str:
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return found.stdout.strip()


if __name__ == "__main__":
    for part, total in sorted(totals().items()):
        print(part, json.dumps(total))
