"""The report says what the history says, in one file that loads nothing and runs nothing from outside."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import threading
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import programs
import pytest

from splitfed import report
from splitfed.cli.command import main
from splitfed.errors import FormatError, InputError, MissingError
from splitfed.store.store import GradientStore
from splitfed.tracking.history import History
from splitfed.tracking.report import cards, participation
from splitfed.tracking.report.reading import ages, at_rounds, dots, natural, read, states, traffic

HOSTILE = '<img src=x onerror="alert(1)">'
RUN = {
    "kind": "run",
    "name": HOSTILE,
    "seed": 3,
    "mode": "buffered",
    "settings": {"alpha": 0.5, "note": HOSTILE},
    "clients": {"c-10": {"num_samples": 4, "classes": {"1": 3, "10": 1}}, "c-9": {"num_samples": 2}},
}


def a_round(number: int, **more: Any) -> dict[str, Any]:
    """A round in which c-9 took part, c-10 was late, x was dropped and y is missing."""
    return {
        "kind": "round",
        "round": number,
        "status": "complete",
        "version": 2 * number,
        "client_version": number,
        "seconds": 10.0 * number,
        "time": 100.0 * number,
        "loss": 1.0 / number,
        "accuracy": 1 - 0.5 / number,
        "train_loss": 0.9 / number,
        "sampled": ["c-10", "c-9", "x", "y"],
        "participants": ["c-9"],
        "late": ["c-10"],
        "missing": ["y"],
        "dropped": {"x": HOSTILE},
        "clients": {
            "c-9": {"num_samples": 2, "batches": 1, "train_loss": 0.5, "bytes_up": 3000, "bytes_down": 1000},
            "c-10": {"accuracy": 0.25, "bytes_up": 0, "bytes_down": 500},
        },
        "commits": 2,
        "gradients_folded": 7,
        "gradients_waiting": 0,
        "gradients_stale": number,
        "gradients_rejected": 0,
        "bytes_up": 3000,
        "bytes_down": 1500,
        "round_trips": 600,
    } | more


def a_commit(version: int, **more: Any) -> dict[str, Any]:
    """A commit of the body that folded two fresh gradients and one that was older."""
    base = {"kind": "commit", "lineage": "body", "version": version, "time": 50.0 * version, "num_batches": 3}
    return base | {"staleness": {"0": 2, "12": 1}, "delay": 0.5, "round": 1} | more


def history(*rows: dict[str, Any]) -> History:
    """A history in memory."""
    made = History()
    for row in rows:
        made.append(row)
    return made


FULL = (RUN, a_commit(1), a_commit(1, lineage="client"), a_round(1), a_commit(2), a_round(2))


class Page(HTMLParser):
    """Reads a page as a browser would: what it loads, its words, and that its elements are closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.names: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Open an element."""
        self.names.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        """Close an element: the one that was opened last."""
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        """Collect what is read."""
        if not self.open or self.open[-1] not in ("script", "style"):
            self.words.append(data)


def test_the_page_is_whole_and_loads_nothing() -> None:
    """Every element is closed, there is no address in it, and one script and one style, which are ours."""
    page = report.render(history(*FULL))
    read_page = Page(page)
    assert read_page.open == []
    assert read_page.names.count("script") == read_page.names.count("style") == 1
    assert not {"link", "img", "iframe", "object", "base"} & set(read_page.names)
    assert not {name for name, _ in read_page.attributes} & {"src", "href", "onload", "onerror"}
    assert not re.search(r"https?:|url\(|@import|fetch\(|XMLHttpRequest", page)


def test_names_from_outside_are_words() -> None:
    """A run, a setting and a reason that look like markup are shown as they are."""
    words = Page(report.render(history(*FULL))).words
    assert [word for word in words if word == HOSTILE] == [HOSTILE] * 4  # heading, two reasons, setting


def test_the_page_has_what_the_rows_have() -> None:
    """Figures at a glance, and every card."""
    words = "\n".join(Page(report.render(history(*FULL))).words)
    for expected in (
        *("4 clients · 2 rounds · mode buffered · seed 3", "75.0 %", "best 75.0 % in round 2", "at first 1"),
        *("14\n3 discarded", "client halves at version 2", "9 kB", "6 kB up, 3 kB down", "3.33 min on the run's clock"),
        *("Accuracy", "Loss", "Who took part", "Updates over time", "Staleness", "Bytes by client"),
        *("Examples by client and class", "Discarded gradients", "stale: 3 (too old by the policy)", "All rounds"),
        *("round trips\n1,200\n600 a round", "staleness\n4\ncommits on average, at most 12"),
        *("66.7 % of 6 were fresh", "10–19", "alpha", "rounds\n", "time", "bytes"),
    ):
        assert expected in words, expected


def test_what_isnt_known_is_said() -> None:
    """A run that nobody evaluated, measured or counted has no empty cards: a sentence names what isn't on record."""
    bare = {"kind": "round", "round": 1, "gradients_folded": 5, "gradients_waiting": 2}
    words = "\n".join(Page(report.render(history(bare))).words)
    for expected in (
        "split federated run",
        "Not on record: accuracy, loss, who took part, commits, bytes by client, classes by client.",
        "✓ Nothing was discarded: 5 gradients came and all were folded. 2 gradients waited at the end.",
    ):
        assert expected in words, expected
    assert "over" not in words.split("\n")
    assert "Who took part" not in words


def test_a_run_without_rounds_shows_its_commits() -> None:
    """Commits alone, as of an accumulator, make a page too: what was folded, by whom and when."""
    folded = {"folded": {"site-1": 2, "site-2": 1}, "num_stale": 1}
    rows = a_commit(1, **folded), a_commit(2, delay=None, **folded), a_commit(7, lineage="client", folded={"site-9": 1})
    page = report.render(history(*rows))
    words = "\n".join(Page(page).words)
    for expected in (
        *("Height: how many batches it folded", "3 clients · 3 commits", "gradients folded\n6\n2 discarded"),
        *("body version\n2\nof lineage body", "Batches over time", "Batches by client", "Who took part"),
        *("stale: 2 (too old by the policy)", "Not on record: accuracy, loss, bytes by client, classes by client."),
    ):
        assert expected in words, expected
    assert "All rounds" not in words
    # Two commits are two stretches of the 50 s between them; site-1 has twice what site-2 has.
    assert 'data-tip="site-1&#10;0 s to 25 s&#10;2 batches"' in page
    assert 'class="p h2" data-tip="site-2&#10;25 s to 50 s&#10;1 batch"' in page


def test_dropped_updates_without_lost_gradients_have_their_card() -> None:
    """An update that was refused isn't a gradient that was lost."""
    words = "\n".join(Page(report.render(history(a_round(1, gradients_stale=0)))).words)
    assert "✓ No gradient was discarded." in words
    assert "Dropped updates" in words


def test_nothing_to_report_is_an_error() -> None:
    """A run row alone isn't a run."""
    with pytest.raises(MissingError, match="no round and no commit"):
        report.render(history(RUN))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"round": None}, "a row of kind 'round' has the round None: expected its number"),
        ({"round": "1"}, "has the round '1'"),
        ({"clients": ["x"]}, "'clients' of a row of kind 'round' is .*: expected a dict"),
        ({"clients": {"x": None}}, "'clients' of a row of kind 'round' holds what isn't a dict"),
        ({"sampled": "x"}, "'sampled' of a row of kind 'round' is 'x': expected a list"),
    ],
)
def test_rows_of_ones_own_that_dont_fit_are_an_error(more: dict[str, Any], said: str) -> None:
    """By what is wrong with them, not from the depths of a drawing."""
    with pytest.raises(FormatError, match=said):
        report.render(history(a_round(1) | more))


def test_clients_sort_as_people_count() -> None:
    """client-9 stands before client-10, and clients that no run row names are there too."""
    assert sorted(["c-10", "c-9", "c", "b2c"], key=natural) == ["b2c", "c", "c-9", "c-10"]
    assert list(read(history(*FULL)).clients) == ["c-9", "c-10", "x", "y"]


def test_states_of_clients() -> None:
    """Dropped, late, there or missing; sampled while nothing is known."""
    assert states(a_round(1)) == {"x": "dropped", "c-10": "late", "c-9": "took part", "y": "missing"}
    assert states({"kind": "round", "round": 1, "sampled": ["z"]}) == {"z": "sampled"}


def test_axes_are_there_when_every_round_has_them() -> None:
    """Rounds always; the clock, real seconds without one, and bytes only where all rounds have them."""
    assert at_rounds(read(history(*FULL))) == {
        "round": {1: 1, 2: 2},
        "time": {1: 100.0, 2: 200.0},
        "bytes": {1: 4500.0, 2: 9000.0},
    }
    real = {"kind": "round", "round": 1, "seconds": 3.0}
    assert at_rounds(read(history(real))) == {"round": {1: 1}, "time": {1: 3.0}}
    assert set(at_rounds(read(history(real, {"kind": "round", "round": 2})))) == {"round"}


def test_times_since_1970_begin_with_the_run() -> None:
    """Commits that carry the wall clock lie on the timeline by when the first was made."""
    run = read(history(a_commit(1, time=1.7e9), a_commit(2, time=1.7e9 + 5), a_commit(3, num_batches=0)))
    assert [(dot.time, dot.staleness) for dot in dots(run)] == [(0.0, 4.0), (5.0, 4.0)]


def test_staleness_and_bytes_add_up() -> None:
    """Over all commits and rounds; above 9 by doubling."""
    run = read(history(*FULL, a_commit(3, staleness={"25": 1})))
    assert [count for count in ages(run).values() if count] == [4, 2, 1]
    assert list(ages(run))[-2:] == ["10–19", "20–39"]
    assert traffic(run) == {"c-9": (6000, 2000), "c-10": (0, 1000)}
    assert ages(read(history(a_round(1)))) == {}


def test_a_thousand_clients_stay_readable() -> None:
    """Sixty lines a card, first those with which something was wrong, and a word on the rest."""
    names = [f"client-{n}" for n in range(1000)]
    clients = {name: {"classes": {str(n): 1 for n in range(25)}} for name in names}
    figures = {name: {"bytes_up": n, "bytes_down": 1} for n, name in enumerate(names)}
    rows = [
        a_round(n, sampled=names, participants=names[1:], late=[], missing=["client-0"], dropped={}, clients={})
        for n in range(1, 120)
    ]
    rows.append(rows[0] | {"round": 120, "clients": figures})
    run = read(history({"kind": "run", "clients": clients}, *rows))
    grid = participation.participants(run)
    assert grid.count('class="name"') == participation.MOST_CLIENTS == 60
    assert "client-0," in grid
    assert "60 of 1,000 clients" in grid
    assert "the last 100 of 120 rounds" in grid
    assert "and 940 clients more with" in cards.traffic_bars(traffic(run))
    classes = cards.class_bars({name: known["classes"] for name, known in clients.items()})
    assert "and 5 classes more" in classes
    assert len(report.render(history({"kind": "run", "clients": clients}, *rows))) < 2_000_000


@pytest.mark.parametrize("where", ["store", "folder", "file"])
def test_the_command_finds_a_run(where: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`splitfed report RUN -o FILE` takes a store, a folder or a file, makes the folder, and names what it wrote."""
    run = tmp_path / "run"
    kept = History(GradientStore(run) if where == "store" else run / "history.jsonl")
    for row in FULL:
        kept.append(row)
    kept.close()
    output = tmp_path / "new" / "page.html"
    assert main(["report", str(run / "history.jsonl" if where == "file" else run), "-o", str(output)]) == 0
    assert capsys.readouterr() == (f"{output}\n", "")
    assert output.read_text("utf-8") == report.render(history(*FULL))


def test_a_users_mistake_is_told_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No run there, and no place to write to: each with its exit status and without a traceback."""
    assert main(["report", str(tmp_path / "nowhere")]) == 1
    assert "nowhere isn't there: expected a run's store" in capsys.readouterr().err
    with pytest.raises(InputError, match="can't be written"):
        report.write(history(*FULL), tmp_path)


BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))), None)


def in_a_frame(page: Path, width: int, script: str, folder: Path) -> str:
    """What a browser shows after a script has looked at a page in the frame `f` of that width.

    A window of a browser can't be as narrow as a phone, so it is a frame.
    """
    frame = (
        f"<iframe id=f src={page.name} style='border:0;width:{width}px;height:900px'></iframe>"
        f"<script>f.onload = () => {{ {script} }}</script>"
    )
    (folder / "frame.html").write_text(f"<!doctype html>{frame}", "utf-8")
    command = [
        *(str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
        *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
        *("--allow-file-access-from-files", f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=3000"),
        *("--window-size=1400,1000", "--dump-dom", (folder / "frame.html").as_uri()),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.mark.skipif(BROWSER is None, reason="no browser is installed")
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_it_without_an_error(width: int, tmp_path: Path) -> None:
    """The script runs and nothing sticks out sideways, at the width of a phone and of a desk; of several runs too."""
    page = tmp_path / "page.html"
    measure = (
        "const d = f.contentDocument.documentElement; "
        "d.querySelector('[data-tip]').dispatchEvent(new PointerEvent('pointermove', {bubbles: true})); "
        "document.title = `wide ${d.scrollWidth - d.clientWidth} tip ${!d.querySelector('#tip').hidden}`"
    )
    for runs in (history(*FULL), {"one": history(*FULL), "another": history(*comparable(3))}):
        page.write_text(report.render(runs), "utf-8")
        assert "<title>wide 0 tip true</title>" in in_a_frame(page, width, measure, tmp_path)


def comparable(rounds: int, **more: Any) -> list[dict[str, Any]]:
    """A run of so many rounds with a commit in each."""
    rows = [RUN | {"name": "digits"} | more]
    for number in range(1, rounds + 1):
        rows += [a_commit(number), a_round(number)]
    return rows


def test_several_runs_share_their_axes() -> None:
    """A curve a run in a colour of its own, all in one legend, and a line each of where it ended."""
    page = report.render({"few": history(*comparable(2)), "many": history(*comparable(4))})
    words = "\n".join(Page(page).words)
    for expected in (
        *(
            "2 runs",
            "few · many",
            "Where they ended",
            "few\n75 %\n75 %\n0.5\n4\n2\n2",
            "many\n87.5 %\n87.5 %\n0.25\n4\n4\n4",
        ),
        *("Accuracy", "Loss", "Batches over time", "Commits over time", "rounds\n"),
    ):
        assert expected in words, expected
    for place, name in enumerate(("few", "many")):
        # Accuracy and loss over three axes each, batches, commits.
        assert page.count(f'class="curve r{place}" d="') == 8
        assert page.count(f'data-run="{name}"') == 8
    assert 'class="dot"' not in page


def test_a_run_without_rounds_is_compared_by_its_commits() -> None:
    """It has no accuracy: it is in the table and among the batches."""
    page = report.render([history(*comparable(2)), history(a_commit(1), a_commit(2))])
    words = "\n".join(Page(page).words)
    assert "digits · split federated run" in words
    assert page.count('class="curve r1"') == 2
    assert page.count('class="curve r0"') == 8


def test_runs_of_one_name_are_told_apart() -> None:
    """By a number; and no run at all is a mistake."""
    words = Page(report.render([history(*comparable(1)), history(*comparable(2))])).words
    assert "digits · digits (2)" in words
    with pytest.raises(InputError, match="there is no run to report"):
        report.render([])


def test_the_command_compares_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`splitfed report A B -o FILE`."""
    for name in ("a", "b"):
        with History(tmp_path / f"{name}.jsonl") as kept:
            for row in comparable(2, name=name):
                kept.append(row)
    output = tmp_path / "both.html"
    assert main(["report", str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl"), "-o", str(output)]) == 0
    assert capsys.readouterr().out == f"{output}\n"
    assert "a · b" in Page(output.read_text("utf-8")).words


def test_a_watched_run_is_written_again_until_a_signal(tmp_path: Path) -> None:
    """From before its first commit on: the page follows it, and says at the end that nobody writes it any more."""
    kept = History(tmp_path / "run.jsonl")
    output = tmp_path / "page.html"
    command = ("report", tmp_path / "run.jsonl", "-o", output, "--watch", "0.05")
    (tmp_path / "run.jsonl").touch()
    with programs.program(programs.command, *command) as watching:
        while not watching._errors.exists() or "waiting:" not in watching._errors.read_text():
            threading.Event().wait(0.02)
        seen: set[str] = set()
        for number in (1, 2):
            kept.append(a_round(number))
            while f"{number} round" not in "\n".join(seen):
                threading.Event().wait(0.02)
                if output.exists():
                    seen = set(Page(page := output.read_text("utf-8")).words)
        assert '<meta http-equiv="refresh" content="0.05">' in page
        assert any("goes on: as it was at" in word for word in seen)
        watching.send_signal(signal.SIGTERM)
        ended = watching.communicate(60)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count("waiting:") == 1
    assert "http-equiv" not in output.read_text("utf-8")
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_a_pause_that_makes_no_sense_is_a_mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Zero seconds would never end a look."""
    assert main(["report", str(tmp_path), "--watch", "0"]) == 2
    assert "--watch 0.0 isn't allowed: expected seconds above 0" in capsys.readouterr().err


@pytest.mark.skipif(BROWSER is None, reason="no browser is installed")
@pytest.mark.parametrize("width", [390, 1280])
def test_fifty_clients_have_whole_lines(width: int, tmp_path: Path) -> None:
    """At the width of a phone and of a desk: each line lies within its card, none is cut, all cells show."""
    names = [f"hospital-{n}" for n in range(50)]
    clients = {name: {"classes": {"0": 3}} for name in names}
    rows = [
        a_round(n, sampled=names, participants=names[n % 9 :], late=[], missing=names[: n % 9], dropped={}, clients={})
        for n in range(1, 101)
    ]
    page = tmp_path / "page.html"
    page.write_text(report.render(history({"kind": "run", "clients": clients}, *rows)), "utf-8")
    measure = (
        "const d = f.contentDocument, all = [...d.querySelectorAll('.who > div')];"
        "const card = d.querySelector('.who').closest('.card').getBoundingClientRect();"
        "const inside = all.filter((line) => { const box = line.getBoundingClientRect();"
        " return box.left >= card.left && box.right <= card.right && box.bottom <= card.bottom && box.height > 9; });"
        "const strips = all.filter((line) => { const strip = line.querySelector('.strip');"
        " return strip.children.length === 100 && strip.scrollWidth <= strip.clientWidth"
        " && strip.lastChild.getBoundingClientRect().width >= 1; });"
        "document.title = `lines ${all.length} inside ${inside.length} whole ${strips.length}`"
        " + ` wide ${d.documentElement.scrollWidth - d.documentElement.clientWidth}`"
    )
    assert "<title>lines 50 inside 50 whole 50 wide 0</title>" in in_a_frame(page, width, measure, tmp_path)
