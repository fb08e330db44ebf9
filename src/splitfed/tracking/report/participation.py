"""The card of who took part: a sentence, the rounds as columns, and a line for each client.

A client's line is a strip of cells, one for each round: as narrow as the rounds are many, so that
fifty clients over a hundred rounds fit a desk without scrolling, and few rounds leave room for
several lines side by side. A run without rounds has cells for stretches of time, shaded by how many
batches were folded in each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from splitfed.quantities import plain, plural, span
from splitfed.store.rows import Row
from splitfed.tracking.report import reading
from splitfed.tracking.report.markup import card, cards, client_line, legend, note, tag, text
from splitfed.tracking.report.reading import STATES, Run

MOST_CLIENTS = 60
"""So many clients have a line of their own."""
MOST_ROUNDS = 100
MOST_STRETCHES = 60
_CLASSES = {"took part": "p", "late": "l", "missing": "m", "dropped": "d", "sampled": "s"}
# Up to so many lines stand below each other, whatever the room beside them.
_FEW = 8
_WIDEST = 28  # px, as in the page's CSS
# The least width of a cell in px for up to so many cells.
_CELLS = ((12, 14), (30, 10), (60, 7), (MOST_ROUNDS, 5))
_SHADES = 4


def participants(run: Run) -> str:
    """Who took part in which round or, in a run without rounds, at which time."""
    if reading.rounds_say_who(run):
        return cards(card("Who took part", _of_rounds(run), _sentence(run), wide=True))
    lines = reading.stretches(run, MOST_STRETCHES)
    if lines:
        about = (
            "When batches of each client were folded, from the first commit to the last: "
            "the darker, the more."
        )
        return cards(card("Who took part", _of_stretches(run, lines), about, wide=True))
    return ""


def _sentence(run: Run) -> str:
    """The rounds in words: how many took part of those that were asked, and what went wrong."""
    sums = dict.fromkeys(STATES, 0)
    full = 0
    for row in run.rounds:
        tally = reading.tally(row)
        full += bool(tally[0]) and not any(tally[1:])
        for state, count in zip(STATES, tally, strict=True):
            sums[state] += count
    rounds = len(run.rounds)
    if full == rounds:
        return f"All that were asked took part in each of {plural(rounds, 'round')}."
    asked = sum(sums.values())
    wrong = [f"{sums[state]:,} {state}" for state in STATES[1:] if sums[state]]
    share = f"{sums['took part'] / rounds:.3g} of {asked / rounds:.3g}"
    return (
        f"On average {share} clients took part in a round; "
        f"over {plural(rounds, 'round')} {', '.join(wrong)}."
    )


# ------------------------------------------------------------------------------------- of rounds


def _of_rounds(run: Run) -> str:
    rounds = run.rounds[-MOST_ROUNDS:]
    by_round = [reading.states(row) for row in rounds]
    by_client = {client: [states.get(client) for states in by_round] for client in run.clients}
    # Python's sort is stable: of equal clients the first ones are shown.
    ranked = sorted(by_client, key=lambda client: _urgency(by_client[client]), reverse=True)
    shown = set(ranked[:MOST_CLIENTS])
    lines = [
        _round_line(client, rounds, states)
        for client, states in by_client.items()
        if client in shown
    ]
    notes = [f"A line a client, a square a round: {_range(rounds)}"]
    if len(shown) < len(by_client):
        notes.append(
            f"{len(shown)} of {len(by_client):,} clients: "
            "first those with which something was wrong"
        )
    if len(rounds) < len(run.rounds):
        notes.append(f"the last {MOST_ROUNDS} of {len(run.rounds):,} rounds")
    return _key(by_round) + _columns(rounds) + _lines(lines, len(rounds)) + note("; ".join(notes))


def _urgency(states: Sequence[str | None]) -> tuple[int, int]:
    """In how many rounds something was wrong with a client, and in how many it took part."""
    wrong = sum(state in ("dropped", "late", "missing") for state in states)
    return wrong, states.count("took part")


def _range(rounds: Sequence[Row]) -> str:
    first, last = rounds[0]["round"], rounds[-1]["round"]
    return f"round {first}" if first == last else f"{first} (left) to {last} (right)"


def _key(by_round: Sequence[Mapping[str, str]]) -> str:
    """The meaning of the colours that occur."""
    seen = {state for states in by_round for state in states.values()}
    entries = [(kind, state) for state, kind in _CLASSES.items() if state in seen]
    return legend([*entries, ("n", "not sampled")])


def _columns(rounds: Sequence[Row]) -> str:
    """How many clients were in each state, a column a round; none where all columns are alike."""
    tallies = [reading.tally(row) for row in rounds]
    if all(tally == tallies[0] for tally in tallies):
        return ""
    highest = max(map(sum, tallies)) or 1
    columns = []
    for row, tally in zip(rounds, tallies, strict=True):
        tip = [f"round {row['round']}"]
        parts = []
        for state, count in zip(STATES, tally, strict=True):
            if count:
                tip.append(f"{state}: {count:,}")
                height = f"height:{100 * count / highest:.1f}%"
                parts.append(tag("i", class_=_CLASSES[state], style=height))
        columns.append(tag("span", *parts, data_tip="\n".join(tip)))
    axis = tag("span", text(f"{highest:,}"), class_="top")
    return tag("div", axis, *columns, class_="rounds")


def _round_line(client: str, rounds: Sequence[Row], states: Sequence[str | None]) -> str:
    cells = [_cell(client, row, state) for row, state in zip(rounds, states, strict=True)]
    asked = sum(state is not None for state in states)
    return _line(client, cells, f"{states.count('took part')} of {asked}")


def _cell(client: str, row: Row, state: str | None) -> str:
    if state is None:
        return "<i></i>"
    tip = [f"{client}, round {row['round']}", state]
    batches = row.get("clients", {}).get(client, {}).get("batches")
    if batches is not None:
        tip.append(plural(batches, "batch", "batches"))
    dropped = row.get("dropped", {})
    if client in dropped:
        tip.append(str(dropped[client]))
    return tag("i", class_=_CLASSES[state], data_tip="\n".join(tip))


# ---------------------------------------------------------------------------------- of stretches


def _of_stretches(run: Run, stretches: Sequence[reading.Stretch]) -> str:
    sums = reading.batches_by_client(run)
    shown = largest(sums)
    most = max(max(stretch.folded.values(), default=0) for stretch in stretches)
    lines = []
    for client in shown:
        cells = [_shade(client, stretch, most) for stretch in stretches]
        lines.append(_line(client, cells, plain(sums[client])))
    notes = ["A line a client, with the number of its folded batches"]
    if stretches[0].end:
        notes.append(f"a square is {span(stretches[0].end - stretches[0].start)}")
    if len(shown) < len(sums):
        notes.append(f"{len(shown)} of {len(sums):,} clients: those with most batches")
    return _lines(lines, len(stretches)) + note("; ".join(notes))


def _shade(client: str, stretch: reading.Stretch, most: int) -> str:
    count = stretch.folded.get(client, 0)
    if not count:
        return "<i></i>"
    shade = math.ceil(_SHADES * count / most)
    tip = [client, f"{span(stretch.start)} to {span(stretch.end)}"]
    tip.append(plural(count, "batch", "batches"))
    return tag("i", class_=f"p h{shade}", data_tip="\n".join(tip))


# ----------------------------------------------------------------------------------------- lines


def largest(sizes: Mapping[str, float]) -> list[str]:
    """The clients with most, as many as have a line, in their own order."""
    found = set(sorted(sizes, key=lambda client: -sizes[client])[:MOST_CLIENTS])
    return [client for client in sizes if client in found]


def _line(client: str, cells: Sequence[str], figure: str) -> str:
    return client_line(client, tag("span", *cells, class_="strip"), figure)


def _lines(lines: Sequence[str], num_cells: int) -> str:
    """The lines, side by side where they are short; the page's CSS makes columns of that width."""
    if len(lines) <= _FEW:
        return tag("div", *lines, class_="who", style=f"max-width:{190 + num_cells * _WIDEST}px")
    cell = next((px for most, px in _CELLS if num_cells <= most), _CELLS[-1][1])
    return tag("div", *lines, class_="who", style=f"column-width:{190 + num_cells * cell}px")
