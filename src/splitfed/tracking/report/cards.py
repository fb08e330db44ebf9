"""The cards of the page: what was learned, who took part, updates, traffic, discarded gradients.

A card says what isn't known instead of showing an empty chart. What is shown by client is plain
HTML, which fits any width: a grid of clients by rounds, and bars.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from splitfed._version import __version__
from splitfed.store.rows import Row
from splitfed.tracking.plots import class_order
from splitfed.tracking.report import reading
from splitfed.tracking.report.charts import (
    MOST_LINES,
    STALENESS,
    Axis,
    Curve,
    Dot,
    Format,
    curves,
    moments,
    stacked,
    staleness_class,
    ticks,
    timeline,
)
from splitfed.tracking.report.markup import (
    card,
    details,
    empty,
    good,
    legend,
    note,
    percent,
    plain,
    plural,
    scrollable,
    size,
    span,
    table,
    tag,
    text,
)
from splitfed.tracking.report.reading import STATES, Run

MOST_CLIENTS = 40
MOST_ROUNDS = 100
_MOST_DROPPED = 200
_MOST_CLASS_NAMES = 20
# The page's CSS has colours c0 to c9; further classes use them again.
_CLASS_COLOURS = 10

_AXES = {
    "round": Axis("round", plain, functools.partial(ticks, most=6, whole=True)),
    "time": Axis("time since the start", span, moments),
    "bytes": Axis("bytes so far", size, functools.partial(ticks, most=6)),
}
_AXIS_BUTTONS = {"round": "rounds", "time": "time", "bytes": "bytes"}
_STATE_COLOURS = {"took part": "p", "late": "l", "missing": "m", "dropped": "d", "sampled": "s"}
_REASONS = {
    "stale": "too old by the policy",
    "rejected": "not finite, or unreadable",
    "skipped": "given up by their client",
}
_ROUND_COLUMNS: dict[str, Callable[[Any], str]] = {
    "round": plain,
    "status": str,
    "accuracy": percent,
    "loss": plain,
    "train_loss": plain,
    "participants": plain,
    "version": plain,
    "commits": plain,
    "batches": plain,
    "gradients_folded": plain,
    "gradients_waiting": plain,
    "gradients_stale": plain,
    "gradients_rejected": plain,
    "bytes_up": size,
    "bytes_down": size,
    "round_trips": plain,
    "time": span,
}


# -------------------------------------------------------------------------------------- learning


def learning(run: Run) -> str:
    """Accuracy and loss over rounds, time and bytes: three drawings each, of which one is shown."""
    accuracies: dict[str, list[Curve]] = {}
    losses: dict[str, list[Curve]] = {}
    for axis, places in reading.at_rounds(run).items():
        shown = {"accuracy": "accuracy"}
        accuracies[axis] = reading.series(run, places, shown, ("accuracy", "train_accuracy"))
        shown = {"loss": "test loss", "train_loss": "training loss"}
        losses[axis] = reading.series(run, places, shown, ("loss", "train_loss"))
    accuracy = _over_axes("Accuracy by round", accuracies, percent, ceiling=1.0)
    loss = _over_axes("Loss by round", losses, plain)
    legend_and_switch = tag(
        "div",
        _learning_legend(run, accuracies, losses),
        _axis_switch(accuracies),
        class_="bar-top",
    )
    return tag(
        "div",
        legend_and_switch,
        card("Accuracy", accuracy or empty("No accuracy is on record: the run wasn't evaluated.")),
        card("Loss", loss or empty("No loss is on record.")),
        class_="cards learning",
    )


def _over_axes(
    label: str,
    lines: Mapping[str, Sequence[Curve]],
    y_format: Format,
    *,
    ceiling: float | None = None,
) -> str:
    """A drawing over each axis; the CSS shows that of the axis which is switched on."""
    drawings = []
    for axis, shown in lines.items():
        if shown:
            drawing = curves(label, shown, _AXES[axis], y_format, ceiling=ceiling)
            drawings.append(tag("div", drawing, class_=f"over-{axis}"))
    return "".join(drawings)


def _axis_switch(axes: Iterable[str]) -> str:
    """Radio buttons for the axis: with CSS alone, so that they work without scripts too."""
    buttons = []
    for name in axes:
        checked = " checked" if name == "round" else ""
        # Not by `tag`: an input has no end tag, and `checked` no value.
        button = f'<input type="radio" name="axis" value="{name}"{checked}>'
        buttons.append(tag("label", button, _AXIS_BUTTONS[name]))
    if len(buttons) < 2:
        return ""
    return tag("div", tag("span", "over"), *buttons, class_="switch")


def _learning_legend(
    run: Run, accuracies: Mapping[str, Sequence[Curve]], losses: Mapping[str, Sequence[Curve]]
) -> str:
    entries = [("k-main", "overall"), ("k-dashed", "in training")]
    # All axes show the same lines, and every run with rounds has this axis.
    drawn = [*accuracies.get("round", ()), *losses.get("round", ())]
    num_clients = sum(line.client for line in drawn)
    # Clients that don't evaluate are drawn with the metrics of their training.
    source = "" if reading.has_client_evaluations(run) else ", in training"
    if num_clients > MOST_LINES:
        entries.append(("k-band", f"range of the clients{source}"))
    elif num_clients:
        entries.append(("k-client", f"each client{source}"))
    return legend(entries)


# ---------------------------------------------------------------------------------- participants


def participants(run: Run) -> str:
    """How many clients took part in each round, and which."""
    if not run.rounds:
        return ""
    kinds = {state.replace(" ", "-"): state for state in STATES}
    by_round = [
        (str(row["round"]), dict(zip(kinds, reading.tally(row), strict=True))) for row in run.rounds
    ]
    if not any(any(counts.values()) for _, counts in by_round):
        return _cards(card("Participants", empty("The rounds don't say who took part.")))
    key = legend(
        [
            ("p", "took part"),
            ("l", "late"),
            ("m", "missing"),
            ("d", "dropped"),
            ("n", "not sampled"),
        ]
    )
    chart = stacked("Clients by round", by_round[-MOST_ROUNDS:], kinds, "round")
    return _cards(
        card("Participants", key + chart, "How many clients took part in each round."),
        card(
            "Who took part",
            participation(run),
            "A row for each client, a square for each round.",
        ),
    )


def participation(run: Run) -> str:
    """A row for each client, a cell for each round: its state there, or empty if not sampled.

    Of many clients those are shown with which something was wrong, then those that took part most.
    """
    rounds = run.rounds[-MOST_ROUNDS:]
    by_round = [reading.states(row) for row in rounds]
    by_client = {client: [states.get(client) for states in by_round] for client in run.clients}
    # Python's sort is stable: of equal clients the first ones are shown.
    ranked = sorted(by_client, key=lambda client: _urgency(by_client[client]), reverse=True)
    shown = set(ranked[:MOST_CLIENTS])
    lines = [
        _participation_row(client, rounds, states)
        for client, states in by_client.items()
        if client in shown
    ]
    notes = []
    if len(shown) < len(by_client):
        notes.append(
            f"{len(shown)} of {len(by_client):,} clients: "
            "first those with which something was wrong"
        )
    if len(rounds) < len(run.rounds):
        notes.append(f"the last {MOST_ROUNDS} of {len(run.rounds):,} rounds")
    head = tag("thead", tag("tr", tag("th", "round"), *_round_numbers(rounds)))
    grid = tag("table", head, tag("tbody", *lines), class_="grid")
    return scrollable(grid) + note("; ".join(notes))


def _urgency(states: Sequence[str | None]) -> tuple[int, int]:
    """In how many rounds something was wrong with a client, and in how many it took part."""
    wrong = sum(state in ("dropped", "late", "missing") for state in states)
    return wrong, states.count("took part")


def _round_numbers(rounds: Sequence[Row]) -> list[str]:
    """The heads of the columns: at most twenty have a number, as more would touch each other."""
    every = math.ceil(len(rounds) / 20)
    numbers = [str(row["round"]) for row in rounds]
    return [
        tag("th", text(number) if place % every == 0 else "")
        for place, number in enumerate(numbers)
    ]


def _participation_row(client: str, rounds: Sequence[Row], states: Sequence[str | None]) -> str:
    name = tag("th", text(client), scope="row", data_client=client)
    cells = [_cell(client, row, state) for row, state in zip(rounds, states, strict=True)]
    return tag("tr", name, *cells, data_client=client)


def _cell(client: str, row: Row, state: str | None) -> str:
    if state is None:
        return "<td></td>"
    tip = [f"{client}, round {row['round']}", state]
    batches = row.get("clients", {}).get(client, {}).get("batches")
    if batches is not None:
        tip.append(plural(batches, "batch", "batches"))
    dropped = row.get("dropped", {})
    if client in dropped:
        tip.append(str(dropped[client]))
    return tag("td", tag("i", class_=_STATE_COLOURS[state]), data_tip="\n".join(tip))


# --------------------------------------------------------------------------------------- updates


def updates(run: Run) -> str:
    """When commits came, how long their batches were pending, and how stale they were."""
    dots = reading.dots(run)
    if not dots:
        return _cards(card("Updates", empty("No commits are on record."), wide=True))
    return _cards(_timeline_card(run, dots), _staleness_card(run))


def _timeline_card(run: Run, dots: Sequence[Dot]) -> str:
    height = "how long its batches had waited"
    if any(dot.delay is None for dot in dots):
        height = "how many batches it folded"
    key = legend([(f"s{number}", name) for number, name in enumerate(STALENESS)])
    if any(dot.lineage == "client" for dot in dots):
        key += legend([("k-circle", "body"), ("k-diamond", "client halves")])
    ends = [row["time"] for row in run.rounds if reading.value(row, "time") is not None]
    return card(
        "Updates over time",
        key + timeline("Commits over time", dots, ends),
        f"A mark is a commit. Height: {height}; colour: their staleness, in commits.",
    )


def _staleness_card(run: Run) -> str:
    ages = reading.ages(run)
    folded = sum(ages.values())
    about = "How many commits a gradient of the body was behind. "
    if folded:
        fresh = 100 * ages.get("0", 0) / folded
        about += f"{fresh:.3g} % of {folded:,} were fresh."
    if not ages:
        return card("Staleness", empty("Not known."), about)
    # A class of ages such as 10–19 has the colour of its youngest.
    columns = [
        (age, {staleness_class(int(age.partition("–")[0])): count}) for age, count in ages.items()
    ]
    kinds = {f"s{number}": "gradients" for number in range(len(STALENESS))}
    chart = stacked("Gradients by staleness", columns, kinds, "staleness in commits")
    return card("Staleness", chart, about)


# ------------------------------------------------------------------------------ traffic and data


def by_client(run: Run) -> str:
    """Bytes and classes by client."""
    traffic = reading.traffic(run)
    bytes_ = empty("The bytes weren't counted.")
    if traffic:
        key = legend([("up", "from the client"), ("down", "to the client")])
        bytes_ = key + traffic_bars(traffic)
    held = {name: known["classes"] for name, known in run.clients.items() if known.get("classes")}
    classes = class_bars(held) if held else empty("Clients keep their classes to themselves.")
    return _cards(
        card(
            "Bytes by client",
            bytes_,
            "Tensors that crossed the cut, and halves that were exchanged.",
        ),
        card("Examples by client and class", classes),
        *_compression_card(run),
    )


def _compression_card(run: Run) -> list[str]:
    """What compression has saved and changed, by flow; no card where nothing was coded."""
    flows = reading.compression(run)
    if not flows:
        return []
    heads = ["what", "bytes", "sent", "of them", "error"]
    lines = []
    for name, (exact, sent, error) in flows.items():
        share = percent(sent / exact if exact else 1.0)
        changed = "" if error is None else percent(error)
        lines.append([name.replace("_", " "), size(exact), size(sent), share, changed])
    about = (
        "What crossed the cuts over all rounds, as it is and as it was sent, and how much of it "
        "(as a norm) coding changed in the newest round, as clients told with their updates."
    )
    return [card("Compression", table(heads, lines), about)]


def traffic_bars(traffic: Mapping[str, tuple[float, float]]) -> str:
    """Bytes of each client, up and down; of many clients those with the most bytes are shown."""
    sizes = {client: sum(pair) for client, pair in traffic.items()}
    shown = _largest(sizes)
    longest = max((sizes[client] for client in shown), default=0) or 1
    lines = []
    for client in shown:
        up, down = traffic[client]
        parts = [("up", 100 * up / longest), ("down", 100 * down / longest)]
        tip = f"{client}\nup {size(up)}\ndown {size(down)}"
        lines.append(_bar(client, parts, size(sizes[client]), tip))
    bars = tag("div", *lines, class_="bars")
    num_others = len(sizes) - len(shown)
    if not num_others:
        return bars
    others = sum(sizes[client] for client in sizes if client not in shown)
    return bars + note(f"and {plural(num_others, 'client')} more with {size(others)}")


def class_bars(clients: Mapping[str, Mapping[str, int]]) -> str:
    """Examples of each class at each client; of many clients those with most are shown."""
    sizes = {client: sum(held.values()) for client, held in clients.items()}
    shown = _largest(sizes)
    longest = max((sizes[client] for client in shown), default=0) or 1
    labels = sorted({label for held in clients.values() for label in held}, key=class_order)
    lines = []
    for client in shown:
        parts = []
        tip = [client]
        # By its number among all classes: a class has the same colour at each client.
        for number, label in enumerate(labels):
            count = clients[client].get(label, 0)
            if count:
                parts.append((_class_colour(number), 100 * count / longest))
                tip.append(f"class {label}: {plain(count)}")
        lines.append(_bar(client, parts, plain(sizes[client]), "\n".join(tip)))
    num_others = len(sizes) - len(shown)
    others = f"and {plural(num_others, 'client')} more" if num_others else ""
    return _class_legend(labels) + tag("div", *lines, class_="bars") + note(others)


def _class_legend(labels: Sequence[str]) -> str:
    named = labels[:_MOST_CLASS_NAMES]
    num_others = len(labels) - len(named)
    more = f"and {num_others} classes more" if num_others else ""
    return legend([(_class_colour(number), label) for number, label in enumerate(named)], more)


def _class_colour(number: int) -> str:
    return f"c{number % _CLASS_COLOURS}"


def _largest(sizes: Mapping[str, float]) -> list[str]:
    """The clients with most, in their own order."""
    largest = set(sorted(sizes, key=lambda client: -sizes[client])[:MOST_CLIENTS])
    return [client for client in sizes if client in largest]


def _bar(client: str, parts: Sequence[tuple[str, float]], total: str, tip: str) -> str:
    """A line of a client: its name, a bar of parts by their CSS class and per cent, its total."""
    track = [f'<i class="{kind}" style="width:{width:.2f}%"></i>' for kind, width in parts]
    return tag(
        "div",
        tag("span", text(client), class_="name"),
        tag("span", *track, class_="track"),
        tag("span", text(total), class_="figure"),
        data_client=client,
        data_tip=tip,
    )


# ------------------------------------------------------------------------------------- discarded


def discarded(run: Run) -> str:
    """Gradients and updates that weren't folded, and why."""
    if not run.rounds:
        return ""
    by_round = [(str(row["round"]), reading.discarded(row)) for row in run.rounds]
    sums = {reason: sum(counts[reason] for _, counts in by_round) for reason in _REASONS}
    dropped = reading.dropped(run)
    pending = _pending(run)
    if not any(sums.values()) and not dropped:
        folded = plural(reading.total(run, "gradients_folded"), "gradient")
        words = f"✓ Nothing was discarded: {folded} came and all were folded. {pending}".strip()
        return _cards(card("Discarded", good(words), wide=True))
    # The update of a client may be dropped although none of its gradients was lost.
    shown = good("✓ No gradient was discarded.")
    if any(sums.values()):
        key = [(name, f"{name}: {sums[name]:,} ({why})") for name, why in _REASONS.items()]
        kinds = {name: name for name in _REASONS}
        shown = legend(key) + stacked("Discarded gradients by round", by_round, kinds, "round")
    return _cards(
        card("Discarded gradients", shown + note(pending)),
        card("Dropped updates", _dropped_table(dropped)),
    )


def _pending(run: Run) -> str:
    """A sentence on the gradients that were still pending after the last round, if any were."""
    pending = reading.value(run.last_round, "gradients_waiting")
    if not pending:
        return ""
    return f"{plural(int(pending), 'gradient')} waited at the end."


def _dropped_table(dropped: Sequence[tuple[object, ...]]) -> str:
    if not dropped:
        return empty("No client's update was dropped.")
    return table(["round", "client", "why"], dropped[-_MOST_DROPPED:], "table words")


# ---------------------------------------------------------------------------------------- tables


def tables(run: Run) -> str:
    """All metrics of all rounds, and the settings."""
    made_by = f"Made by splitfed {__version__}. Everything is in this file."
    return tag(
        "section",
        _rounds_table(run),
        _settings_table(run),
        note(made_by),
        class_="card wide tables",
    )


def _rounds_table(run: Run) -> str:
    if not run.rounds:
        return ""
    known = [
        name for name in _ROUND_COLUMNS if any(row.get(name) is not None for row in run.rounds)
    ]
    heads = [name.replace("_", " ") for name in known]
    lines = [[_round_cell(name, row.get(name)) for name in known] for row in run.rounds]
    return details("All rounds", table(heads, lines))


def _round_cell(name: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list):
        value = len(value)
    return _ROUND_COLUMNS[name](value)


def _settings_table(run: Run) -> str:
    settings = sorted(run.about.get("settings", {}).items())
    if not settings:
        return ""
    return details("Settings", table(["setting", "value"], settings, "table words"))


def _cards(*cards: str) -> str:
    return tag("div", *cards, class_="cards")
