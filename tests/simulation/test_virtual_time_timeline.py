"""The event queue: who is resumed when."""

from __future__ import annotations

from splitfed.simulation.virtual_time import Process, Timeline


def ticking(name: str, waits: list[float | None], timeline: Timeline, log: list[tuple[float, str]]) -> Process:
    """A process that notes when it is resumed."""
    for seconds in waits:
        log.append((timeline.now, name))
        yield seconds
    log.append((timeline.now, name))


def test_processes_are_resumed_at_their_instants() -> None:
    """One that waits 2 and 2 and one that waits 3: at 0, 0, 2, 3 and 4."""
    timeline, log = Timeline(), list[tuple[float, str]]()
    timeline.start(ticking("a", [2, 2], timeline, log))
    timeline.start(ticking("b", [3], timeline, log))
    while timeline.advance():
        pass
    assert log == [(0, "a"), (0, "b"), (2, "a"), (3, "b"), (4, "a")]
    assert len(timeline) == 0


def test_at_one_instant_the_first_to_wait_is_the_first_to_go_on() -> None:
    """Without time it is turn by turn."""
    timeline, log = Timeline(), list[tuple[float, str]]()
    for name in "cab":
        timeline.start(ticking(name, [0, 0], timeline, log))
    while timeline.advance():
        pass
    assert "".join(name for _, name in log) == "cabcabcab"


def test_the_clock_stops_where_it_is_told_to() -> None:
    """Nobody due by then is no reason to go further; and it never goes back."""
    timeline, log = Timeline(), list[tuple[float, str]]()
    timeline.start(ticking("a", [5], timeline, log))
    assert timeline.advance(until=3)
    assert not timeline.advance(until=3)
    assert timeline.now == 3
    assert not timeline.advance(until=1)
    assert timeline.now == 3
    assert timeline.advance(until=5)
    assert timeline.now == 5
    assert not timeline.advance()
    assert not timeline.advance(until=7)
    assert timeline.now == 7


def test_the_parked_go_on_together_when_they_are_released() -> None:
    """In the order in which they were parked, at the time of the release."""
    timeline, log = Timeline(), list[tuple[float, str]]()
    timeline.start(ticking("slow", [4, None], timeline, log))
    timeline.start(ticking("fast", [1, None], timeline, log))
    while timeline.advance():
        pass
    assert timeline.release() == 2
    while timeline.advance():
        pass
    assert log[-2:] == [(4, "fast"), (4, "slow")]
    assert timeline.release() == 0


def test_closing_ends_every_process_where_it_stands() -> None:
    """Waiting or parked, its own cleaning up is run."""
    timeline, closed = Timeline(), list[str]()

    def process(name: str, seconds: float | None) -> Process:
        try:
            yield seconds
        finally:
            closed.append(name)

    timeline.start(process("waiting", 1))
    timeline.start(process("parked", None))
    timeline.advance()
    timeline.advance()
    timeline.close()
    assert sorted(closed) == ["parked", "waiting"]
    assert len(timeline) == 0
