"""The benchmark of replicas: its virtual time against numbers worked by hand, its tables and its picture."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from benchmarks import page
from benchmarks.scaling import __main__ as script
from benchmarks.scaling import virtual
from benchmarks.scaling.measured import Times

TIMES = Times(client=0.5, forward=0.5, backward=1.0, commit=4.0, load=0.25, start=3.0)


def rate(times: Times, replicas: int, clients: int, **settings: float) -> tuple[float, float]:
    """Batches a second over 1,000 seconds, and the share of backwards whose graph was kept."""
    fleet = virtual.Fleet(times, replicas, clients, **settings)  # type: ignore[arg-type]
    found = fleet.rate(1000.0, warm=20.0)
    return found, fleet.kept / fleet.batches


def test_one_client_at_one_replica() -> None:
    """A batch takes 0.25 + 0.5 + 0.25 + 1 seconds; every graph is kept."""
    assert rate(TIMES, 1, 1) == (pytest.approx(0.5, abs=2e-3), 1.0)


def test_as_many_clients_as_replicas_take_turns_at_none() -> None:
    """Each has a replica of its own: eight times as many batches."""
    assert rate(TIMES, 8, 8) == (pytest.approx(4.0, abs=1e-2), 1.0)


def test_a_replica_answers_one_request_at_a_time() -> None:
    """Of many clients it answers a batch in 1.5 seconds, whatever they do meanwhile."""
    assert rate(TIMES, 1, 10)[0] == pytest.approx(1 / 1.5, rel=1e-2)
    assert rate(TIMES, 4, 40)[0] == pytest.approx(4 / 1.5, rel=2e-2)


def test_a_version_is_loaded_once_by_each_replica() -> None:
    """Eight batches take 16 seconds, and each commit makes one of the next ones 0.25 longer."""
    assert rate(TIMES, 1, 1, per_commit=8)[0] == pytest.approx(8 / 16.25, rel=1e-2)


def test_a_killed_replica_is_away_until_it_has_started() -> None:
    """Alone, it answers for 7 of 10 seconds, and the request under way is lost; of two, the other takes its client."""
    alone, kept = rate(TIMES, 1, 1, kill_every=10.0)
    assert 0.5 * 0.5 < alone < 0.7 * 0.5
    assert 0.6 < kept < 0.8  # of the four batches between two kills, one lost its graph
    both = rate(TIMES, 2, 2, kill_every=10.0)[0]
    assert 0.7 * 1.0 < both < 1.0


def test_a_balancer_without_affinity_would_recompute() -> None:
    """The backward at another replica takes the forward's time more: what the affinity saves."""
    ours = rate(TIMES, 4, 40)[0]
    without = rate(replace(TIMES, backward=TIMES.backward + TIMES.forward), 4, 40)[0]
    assert ours / without == pytest.approx(2.0 / 1.5, rel=2e-2)


def test_the_tables_and_the_picture_show_what_was_found(tmp_path: Path) -> None:
    """A row for each way, and an SVG that a browser can read; the page is filled between its markers."""
    beyond = [1, 2, 4]
    one = {"rate": 2.0, "best": 2.1, "driver": 0.01}
    names = ["bare 1", "bare 2", "direct 1", "direct 2", "balanced 1", "balanced 2"]
    found = {
        **page.machine(),
        "parts": asdict(TIMES),
        "counts": [1, 2],
        "beyond": beyond,
        "replicas": {name: {**one, "rate": 2.0 * int(name[-1])} for name in names},
        "commits": {"without": one, "one per 8 batches": {**one, "rate": 1.8}},
        "kills": {"rate without kills": 3.0, "rate with kills": 2.4, "kills": 3},
        "affinity": {"named": {"kept": 1.0, "by replica": [3.0, 4.0, 5.0]}},
        "memory": {"1000": 100.0},
        "virtual": virtual.rates(TIMES, beyond, seconds=40.0),
    }
    table = script.table(found)
    for row in (
        "| two replicas, two clients | 4.00 | 2.00 |",
        "| two replicas, one commit per 8 batches on the same cores | 1.80 | 0.90 |",
        "| named | 100.0 % |",
        "| 1,000 | 100 |",
    ):
        assert row in table.splitlines()
    assert "commits eight batches as fast as 4 such replicas answer them" in table  # 8 of 2 s, in 4 s
    script.draw(found, tmp_path / "picture.svg")
    assert ElementTree.parse(tmp_path / "picture.svg").getroot().tag.endswith("svg")
    place = tmp_path / "page.md"
    place.write_text("before\n<!-- scaling -->\nold\n<!-- end of scaling -->\nafter\n")
    page.fill(place, "scaling", table)
    assert place.read_text() == f"before\n<!-- scaling -->\n{table}\n<!-- end of scaling -->\nafter\n"
    with pytest.raises(SystemExit, match="no place for the table"):
        page.fill(place, "other", table)
