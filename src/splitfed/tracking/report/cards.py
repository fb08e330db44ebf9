"""The cards of the page: what was learned, updates, traffic, discarded gradients, tables.

What isn't on record has no card: one sentence at the end names it. What is shown by client is plain
HTML, which fits any width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from splitfed._version import __version__
from splitfed.quantities import percent, plain, plural, size, span
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
    cards,
    client_line,
    details,
    empty,
    good,
    legend,
    note,
    table,
    tag,
)
from splitfed.tracking.report.participation import largest
from splitfed.tracking.report.reading import Run

_MOST_DROPPED = 200
_MOST_CLASS_NAMES = 20
# The page's CSS has colours c0 to c9; further classes use them again.
_CLASS_COLOURS = 10

AXES = {
    "round": Axis("round", plain, functools.partial(ticks, most=6, whole=True)),
    "time": Axis("time since the start", span, moments),
    "bytes": Axis("bytes so far", size, functools.partial(ticks, most=6)),
}
_AXIS_BUTTONS = {"round": "rounds", "time": "time", "bytes": "bytes"}
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
    """Accuracy and loss over rounds, time and bytes: three drawings each, of which one is shown.

    A run that nobody evaluated, as that of a server and its accumulator, shows how its batches were
    counted instead.
    """
    accuracies: dict[str, list[Curve]] = {}
    losses: dict[str, list[Curve]] = {}
    for axis, places in reading.at_rounds(run).items():
        shown = {"accuracy": "accuracy"}
        accuracies[axis] = reading.series(run, places, shown, ("accuracy", "train_accuracy"))
        shown = {"loss": "test loss", "train_loss": "training loss"}
        losses[axis] = reading.series(run, places, shown, ("loss", "train_loss"))
    accuracy = over_axes("Accuracy by round", accuracies, percent, ceiling=1.0)
    loss = over_axes("Loss by round", losses, plain)
    if not accuracy and not loss:
        return cards(_progress_card(run), _batches_card(run))
    legend_and_switch = tag(
        "div",
        _learning_legend(run, accuracies, losses),
        axis_switch(accuracies),
        class_="bar-top",
    )
    return tag(
        "div",
        legend_and_switch,
        card("Accuracy", accuracy or empty("No accuracy is on record: the run wasn't evaluated.")),
        card("Loss", loss or empty("No loss is on record.")),
        class_="cards learning",
    )


def _progress_card(run: Run) -> str:
    """How many batches were folded by when; nothing while that isn't known."""
    points = reading.progress(run)
    if not points:
        return ""
    drawing = curves("Batches over time", [Curve("batches", points)], AXES["time"], plain)
    return card("Batches over time", drawing, "How many gradients of batches were folded so far.")


def _batches_card(run: Run) -> str:
    """Folded batches by client; nothing while that isn't known."""
    counts = reading.batches_by_client(run)
    if not counts:
        return ""
    shown = largest(counts)
    longest = max(counts[client] for client in shown)
    lines = []
    for client in shown:
        count = counts[client]
        tip = f"{client}\n{plural(count, 'batch', 'batches')}"
        lines.append(_bar(client, [("up", 100 * count / longest)], plain(count), tip))
    others = len(counts) - len(shown)
    more = f"and {plural(others, 'client')} more" if others else ""
    return card("Batches by client", tag("div", *lines, class_="bars") + note(more))


def over_axes(
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
            drawing = curves(label, shown, AXES[axis], y_format, ceiling=ceiling)
            drawings.append(tag("div", drawing, class_=f"over-{axis}"))
    return "".join(drawings)


def axis_switch(axes: Iterable[str]) -> str:
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


# --------------------------------------------------------------------------------------- updates


def updates(run: Run) -> str:
    """When commits came, how long their batches were pending, and how stale they were."""
    dots = reading.dots(run)
    if not dots:
        return ""
    return cards(_timeline_card(run, dots), _staleness_card(run))


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
        key + timeline("Commits over time", dots, ends) + note(_first_versions(run)),
        f"A mark is a commit. Height: {height}; colour: their staleness, in commits.",
    )


def _first_versions(run: Run) -> str:
    """From where on the page tells, where it doesn't tell of all commits."""
    found = [f"{version:,} of {name}" for name, version in run.first_versions.items()]
    if not found:
        return ""
    return (
        f"The commits from version {', '.join(found)} on: earlier ones weren't read, or are gone."
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
    """Bytes and classes by client, as far as they are on record."""
    found = []
    traffic = reading.traffic(run)
    if traffic:
        key = legend([("up", "from the client"), ("down", "to the client")])
        about = "Tensors that crossed the cut, and halves that were exchanged."
        found.append(card("Bytes by client", key + traffic_bars(traffic), about))
    held = {name: known["classes"] for name, known in run.clients.items() if known.get("classes")}
    if held:
        found.append(card("Examples by client and class", class_bars(held)))
    return cards(*found, *_compression_card(run))


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
    shown = largest(sizes)
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
    shown = largest(sizes)
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


def _bar(client: str, parts: Sequence[tuple[str, float]], total: str, tip: str) -> str:
    """A line of a client: its name, a bar of parts by their CSS class and per cent, its total."""
    track = [f'<i class="{kind}" style="width:{width:.2f}%"></i>' for kind, width in parts]
    return client_line(client, tag("span", *track, class_="track"), total, data_tip=tip)


# ------------------------------------------------------------------------------------- discarded


def discarded(run: Run) -> str:
    """Gradients and updates that weren't folded, and why."""
    by_round = [(str(row["round"]), reading.discarded(row)) for row in run.rounds]
    sums = reading.num_discarded(run)
    dropped = reading.dropped(run)
    pending = _pending(run)
    if not any(sums.values()) and not dropped:
        folded = plural(reading.num_folded(run), "gradient")
        words = f"✓ Nothing was discarded: {folded} came and all were folded. {pending}".strip()
        return cards(card("Discarded", good(words), wide=True))
    # The update of a client may be dropped although none of its gradients was lost.
    shown = good("✓ No gradient was discarded.")
    if any(sums.values()):
        key = [(name, f"{name}: {sums[name]:,} ({why})") for name, why in _REASONS.items()]
        kinds = {name: name for name in _REASONS}
        shown = legend(key)
        if by_round:
            shown += stacked("Discarded gradients by round", by_round, kinds, "round")
    return cards(
        card("Discarded gradients", shown + note(pending), wide=not by_round),
        card("Dropped updates", _dropped_table(dropped)) if by_round else "",
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
        note(_unknown(run)),
        note(made_by),
        class_="card wide tables",
    )


def _unknown(run: Run) -> str:
    """A sentence on what other runs' pages have and this run's records don't say."""
    known = {
        "accuracy": any("accuracy" in row for row in run.rounds),
        "loss": any("loss" in row or "train_loss" in row for row in run.rounds),
        "who took part": reading.rounds_say_who(run) or bool(reading.batches_by_client(run)),
        "commits": bool(reading.dots(run)),
        "bytes by client": bool(reading.traffic(run)),
        "classes by client": any(known.get("classes") for known in run.clients.values()),
    }
    missing = [name for name, is_known in known.items() if not is_known]
    return f"Not on record: {', '.join(missing)}." if missing else ""


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
