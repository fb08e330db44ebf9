"""Who took part and with what: a grid of rounds by clients, and bars by client. Plain HTML, which fits any width."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from splitfed.tracking.plots import class_order
from splitfed.tracking.report.markup import plain, plural, size, tag, text
from splitfed.tracking.report.reading import Run, states

MOST_CLIENTS = 40
MOST_ROUNDS = 100
_CSS = {"took part": "p", "late": "l", "missing": "m", "dropped": "d", "sampled": "s"}


def participation(run: Run) -> str:
    """A row for each client, a cell for each round: took part, late, missing, dropped, or not sampled.

    With many clients those are shown with which something was wrong, then those that took part most.
    """
    rounds = run.rounds[-MOST_ROUNDS:]
    known = [states(row) for row in rounds]
    became = {client: [found.get(client) for found in known] for client in run.clients}
    shown = sorted(became, key=lambda client: _weight(became[client]), reverse=True)[:MOST_CLIENTS]
    order = [client for client in run.clients if client in set(shown)]
    lines = [
        tag(
            "tr",
            tag("th", text(client), scope="row", data_client=client),
            *(_cell(client, row, became[client][number]) for number, row in enumerate(rounds)),
            data_client=client,
        )
        for client in order
    ]
    every = -(-len(rounds) // 20)
    head = [tag("th", text(row["round"] if n % every == 0 else "")) for n, row in enumerate(rounds)]
    notes = []
    if len(order) < len(became):
        notes.append(f"{len(order)} of {len(became):,} clients: first those with which something was wrong")
    if len(rounds) < len(run.rounds):
        notes.append(f"the last {MOST_ROUNDS} of {len(run.rounds):,} rounds")
    table = tag("table", tag("thead", tag("tr", tag("th", "round"), *head)), tag("tbody", *lines), class_="grid")
    return tag("div", table, class_="scroll", tabindex="0") + _note("; ".join(notes))


def _weight(became: Sequence[str | None]) -> tuple[int, int]:
    return sum(one in ("dropped", "late", "missing") for one in became), sum(one == "took part" for one in became)


def _cell(client: str, row: Mapping[str, object], became: str | None) -> str:
    if became is None:
        return "<td></td>"
    tip = [f"{client}, round {row['round']}", became]
    figures = row.get("clients")
    mine = figures.get(client, {}) if isinstance(figures, dict) else {}
    if mine.get("batches") is not None:
        tip.append(plural(mine["batches"], "batch", "batches"))
    dropped = row.get("dropped")
    if isinstance(dropped, dict) and client in dropped:
        tip.append(str(dropped[client]))
    return tag("td", tag("i", class_=_CSS[became]), data_tip="\n".join(tip))


def traffic_bars(traffic: Mapping[str, tuple[float, float]]) -> str:
    """Bytes of each client, up and down, those with most first when there are many."""
    shown, rest = _largest(traffic, {client: sum(pair) for client, pair in traffic.items()})
    largest = max((sum(traffic[client]) for client in shown), default=0) or 1
    lines = [
        _line(
            client,
            [("up", 100 * traffic[client][0] / largest), ("down", 100 * traffic[client][1] / largest)],
            size(sum(traffic[client])),
            f"{client}\nup {size(traffic[client][0])}\ndown {size(traffic[client][1])}",
        )
        for client in shown
    ]
    note = f"and {plural(len(rest), 'client')} more with {size(sum(sum(traffic[c]) for c in rest))}" if rest else ""
    return tag("div", *lines, class_="bars") + _note(note)


def class_bars(clients: Mapping[str, Mapping[str, int]]) -> str:
    """How many examples of each class each client has."""
    sizes = {client: sum(held.values()) for client, held in clients.items()}
    shown, rest = _largest(clients, sizes)
    largest = max((sizes[client] for client in shown), default=0) or 1
    labels = sorted({label for held in clients.values() for label in held}, key=class_order)
    lines = []
    for client in shown:
        held = [(label, clients[client].get(label, 0)) for label in labels]
        tip = [client, *(f"class {label}: {plain(count)}" for label, count in held if count)]
        parts = [(f"c{labels.index(label) % 10}", 100 * count / largest) for label, count in held if count]
        lines.append(_line(client, parts, plain(sizes[client]), "\n".join(tip)))
    few = labels[:20]
    key = [(f"c{number % 10}", label) for number, label in enumerate(few)]
    more = f"and {len(labels) - len(few)} classes more" if len(labels) > len(few) else ""
    note = f"and {plural(len(rest), 'client')} more" if rest else ""
    return legend(key, more) + tag("div", *lines, class_="bars") + _note(note)


def legend(entries: Sequence[tuple[str, str]], more: str = "") -> str:
    """What the colours mean: CSS class and name."""
    items = [tag("li", tag("i", class_=kind), text(name)) for kind, name in entries]
    return tag("ul", *items, tag("li", text(more)) if more else "", class_="legend")


def _largest(clients: Mapping[str, object], weights: Mapping[str, float]) -> tuple[list[str], list[str]]:
    """The clients that are shown, in their own order, and the rest."""
    first = set(sorted(clients, key=lambda client: -weights[client])[:MOST_CLIENTS])
    return [client for client in clients if client in first], [client for client in clients if client not in first]


def _line(client: str, parts: Sequence[tuple[str, float]], figure: str, tip: str) -> str:
    bars = "".join(f'<i class="{kind}" style="width:{width:.2f}%"></i>' for kind, width in parts)
    return tag(
        "div",
        tag("span", text(client), class_="name"),
        tag("span", bars, class_="track"),
        tag("span", text(figure), class_="figure"),
        data_client=client,
        data_tip=tip,
    )


def _note(words: str) -> str:
    return tag("p", text(words), class_="note") if words else ""
