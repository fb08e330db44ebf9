"""The cards of the page: what the run learned, who took part, when updates came, what crossed, what was lost.

A card says what isn't known instead of showing an empty chart.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

from splitfed._version import __version__
from splitfed.tracking.report import columns, people, reading
from splitfed.tracking.report.axes import moments, ticks
from splitfed.tracking.report.charts import MOST_LINES, Axis, curves
from splitfed.tracking.report.markup import percent, plain, plural, size, span, tag, text
from splitfed.tracking.report.reading import STATES, Run

_AXES = {
    "round": Axis("round", plain, functools.partial(ticks, most=6, whole=True)),
    "time": Axis("time since the start", span, moments),
    "bytes": Axis("bytes so far", size, functools.partial(ticks, most=6)),
}
_SWITCH = {"round": "rounds", "time": "time", "bytes": "bytes"}
_REASONS = {
    "stale": "too old by the policy",
    "rejected": "not finite, or unreadable",
    "skipped": "given up by their client",
}


def learning(run: Run) -> str:
    """Accuracy and loss, over rounds, time and bytes: three drawings each, of which one is shown."""
    axes = reading.at_rounds(run) if run.rounds else {}
    switch = [
        tag(
            "label",
            f'<input type="radio" name="axis" value="{name}"{" checked" if name == "round" else ""}>',
            _SWITCH[name],
        )
        for name in axes
    ]
    accuracy, loss = [], []
    drawn_clients = 0
    for name, where in axes.items():
        lines = reading.series(run, where, {"accuracy": "accuracy"}, ("accuracy", "train_accuracy"))
        if lines:
            drawing = curves("Accuracy by round", lines, _AXES[name], percent, ceiling=1.0)
            accuracy.append(tag("div", drawing, class_=f"over-{name}"))
        both = reading.series(run, where, {"loss": "test loss", "train_loss": "training loss"}, ("loss", "train_loss"))
        drawn_clients = max(drawn_clients, sum(line.client for line in [*lines, *both]))
        if both:
            loss.append(tag("div", curves("Loss by round", both, _AXES[name], plain), class_=f"over-{name}"))
    many = drawn_clients > MOST_LINES
    entries = [("k-main", "overall"), ("k-dashed", "in training")]
    if drawn_clients:
        own = any(
            {"accuracy", "loss"} & set(figures) for row in run.rounds for figures in row.get("clients", {}).values()
        )
        who = "range of the clients" if many else "each client"
        entries.append(("k-band" if many else "k-client", who if own else f"{who}, in training"))
    key = people.legend(entries)
    cards = [
        _card("Accuracy", "".join(accuracy) or _empty("No accuracy is on record: the run wasn't evaluated.")),
        _card("Loss", "".join(loss) or _empty("No loss is on record.")),
    ]
    bar = tag(
        "div",
        key,
        tag("div", tag("span", "over"), *switch, class_="switch") if len(switch) > 1 else "",
        class_="bar-top",
    )
    return tag("div", bar, *cards, class_="cards learning")


def who(run: Run) -> str:
    """How many clients took part in each round, and which."""
    if not run.rounds:
        return ""
    key = people.legend([("p", "took part"), ("l", "late"), ("m", "missing"), ("d", "dropped"), ("n", "not sampled")])
    kinds = {kind.replace(" ", "-"): kind for kind in STATES}
    made = [(str(row["round"]), dict(zip(kinds, reading.tally(row), strict=True))) for row in run.rounds]
    if not any(any(held.values()) for _, held in made):
        return tag("div", _card("Participants", _empty("The rounds don't say who took part.")), class_="cards")
    chart = columns.stacked("Clients by round", made[-people.MOST_ROUNDS :], kinds, "round")
    return tag(
        "div",
        _card("Participants", key + chart, "How many clients took part in each round."),
        _card("Who took part", people.participation(run), "A row for each client, a square for each round."),
        class_="cards",
    )


def when(run: Run) -> str:
    """When commits came, how long their batches had waited, and how stale they were."""
    dots, ages = reading.dots(run), reading.ages(run)
    if not dots:
        return tag("div", _card("Updates", _empty("No commits are on record."), wide=True), class_="cards")
    known = all(dot.delay is not None for dot in dots)
    how = "Height: how long its batches had waited" if known else "Height: how many batches it folded"
    key = people.legend([(f"s{n}", name) for n, name in enumerate(columns.STALENESS)])
    if any(dot.lineage == "client" for dot in dots):
        key += people.legend([("k-circle", "body"), ("k-diamond", "client halves")])
    ends = [row["time"] for row in run.rounds if reading.value(row, "time") is not None]
    drawn = columns.timeline("Commits over time", dots, ends)
    hist = [(age, {"s" + str(_shade(age)): float(count)}) for age, count in ages.items()]
    shades = {f"s{number}": "gradients" for number in range(len(columns.STALENESS))}
    old = columns.stacked("Gradients by staleness", hist, shades, "staleness in commits")
    folded = sum(ages.values())
    fresh = f"{100 * ages.get('0', 0) / folded:.3g} % of {folded:,} were fresh." if folded else ""
    return tag(
        "div",
        _card("Updates over time", key + drawn, f"A mark is a commit. {how}; colour: their staleness, in commits."),
        _card(
            "Staleness",
            old if ages else _empty("Not known."),
            f"How many commits a gradient of the body was behind. {fresh}",
        ),
        class_="cards",
    )


def _shade(age: str) -> int:
    first = int(age.partition("–")[0])
    return (first > 0) + (first > 2) + (first > 5)


def what(run: Run) -> str:
    """Bytes and classes by client."""
    traffic = reading.traffic(run)
    held = {name: known["classes"] for name, known in run.clients.items() if known.get("classes")}
    key = people.legend([("up", "from the client"), ("down", "to the client")])
    bars = key + people.traffic_bars(traffic) if traffic else _empty("The bytes weren't counted.")
    classes = people.class_bars(held) if held else _empty("Clients keep their classes to themselves.")
    return tag(
        "div",
        _card("Bytes by client", bars, "Tensors that crossed the cut, and halves that were exchanged."),
        _card("Examples by client and class", classes),
        class_="cards",
    )


def lost(run: Run) -> str:
    """What wasn't folded, and why."""
    if not run.rounds:
        return ""
    by_round = [(str(row["round"]), {k: float(n) for k, n in reading.lost(row).items()}) for row in run.rounds]
    sums = {kind: sum(int(held[kind]) for _, held in by_round) for kind in _REASONS}
    left = reading.value(run.rounds[-1], "gradients_waiting")
    waiting = f" {plural(int(left), 'gradient')} waited at the end." if left else ""
    dropped = [(row["round"], name, why) for row in run.rounds for name, why in row.get("dropped", {}).items()]
    if not any(sums.values()) and not dropped:
        folded = reading.total(run, "gradients_folded")
        words = f"✓ Nothing was discarded: {plural(folded, 'gradient')} came and all were folded.{waiting}"
        return tag("div", _card("Discarded", tag("p", text(words), class_="good"), wide=True), class_="cards")
    chart = columns.stacked("Discarded gradients by round", by_round, {kind: kind for kind in _REASONS}, "round")
    key = people.legend([(kind, f"{kind}: {sums[kind]:,} ({why})") for kind, why in _REASONS.items()])
    table = (
        _table(["round", "client", "why"], dropped[-200:], "table words")
        if dropped
        else _empty("No client's update was dropped.")
    )
    shown = key + chart if any(sums.values()) else tag("p", "✓ No gradient was discarded.", class_="good")
    return tag(
        "div", _card("Discarded gradients", shown + _note(waiting)), _card("Dropped updates", table), class_="cards"
    )


def _note(words: str) -> str:
    return tag("p", text(words.strip()), class_="note") if words else ""


def tables(run: Run) -> str:
    """All figures of all rounds, and the settings."""
    figures = {
        "round": plain, "status": str, "accuracy": percent, "loss": plain, "train_loss": plain, "participants": plain,
        "version": plain, "commits": plain, "batches": plain, "gradients_folded": plain, "gradients_waiting": plain,
        "gradients_stale": plain, "gradients_rejected": plain, "bytes_up": size, "bytes_down": size, "time": span,
    }  # fmt: skip
    rows = [{key: len(v) if isinstance(v, list) else v for key, v in row.items()} for row in run.rounds]
    heads = [name for name in figures if any(row.get(name) is not None for row in rows)]
    cells = [
        ["" if row.get(name) is None else figures[name](row[name]) for name in heads]  # type: ignore[operator]
        for row in rows
    ]
    rounds = tag("details", tag("summary", "All rounds"), _table([head.replace("_", " ") for head in heads], cells))
    settings = sorted(run.about.get("settings", {}).items())
    told = (
        tag("details", tag("summary", "Settings"), _table(["setting", "value"], settings, "table words"))
        if settings
        else ""
    )
    by = tag("p", text(f"Made by splitfed {__version__}. Everything is in this file."), class_="note")
    return tag("section", rounds if run.rounds else "", told, by, class_="card wide tables")


def _table(heads: Sequence[str], rows: Sequence[Sequence[object]], class_: str = "table") -> str:
    head = tag("thead", tag("tr", *(tag("th", text(head)) for head in heads)))
    body = tag("tbody", *(tag("tr", *(tag("td", text(cell)) for cell in row)) for row in rows))
    return tag("div", tag("table", head, body, class_=class_), class_="scroll", tabindex="0")


def _card(title: str, content: str, about: str = "", wide: bool = False) -> str:
    words = tag("p", text(about), class_="about") if about else ""
    return tag("section", tag("h2", text(title)), words, content, class_="card wide" if wide else "card")


def _empty(words: str) -> str:
    return tag("p", text(words), class_="empty")
