"""A history keeps every row whose writing ended, wherever it lies and whoever else writes there."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import programs
import pytest

from splitfed.blobs.contract import Buffer
from splitfed.errors import FormatError, InputError, MissingError
from splitfed.store.rows import to_lines
from splitfed.store.store import GradientStore
from splitfed.tracking.history import History

RUN = {"kind": "run", "name": "digits", "seed": 3, "settings": {"rounds": 2}}


def a_round(number: int, **more: Any) -> dict[str, Any]:
    """A round's report."""
    return {"kind": "round", "round": number, "loss": 1.0 / number, **more}


def a_commit(version: int, lineage: str = "body") -> dict[str, Any]:
    """A commit's row."""
    return {"kind": "commit", "lineage": lineage, "version": version}


ROWS = [RUN, a_commit(1), a_commit(1, "client"), a_round(1), a_commit(2), a_round(2)]


def filled(where: GradientStore | Path | None) -> History:
    """A closed history of the rows above."""
    with History(where) as history:
        for row in ROWS:
            history.append(row)
    return history


def test_rows_come_back_from_a_store(store_url: str) -> None:
    """What one process wrote, another loads, from the store or its URL."""
    assert filled(GradientStore(store_url)).rows == ROWS
    assert History.load(GradientStore(store_url)).rows == ROWS
    assert History.load(store_url).rows == ROWS


def test_rows_come_back_from_a_file(tmp_path: Path) -> None:
    """A local file has a line per row; it is loaded by its name, its folder's, or the folder's whose store has one."""
    filled(tmp_path / "new" / "history.jsonl")
    assert (tmp_path / "new" / "history.jsonl").read_bytes().count(b"\n") == len(ROWS)
    assert History.load(tmp_path / "new" / "history.jsonl").rows == ROWS
    assert History.load(str(tmp_path / "new")).rows == ROWS
    filled(GradientStore(tmp_path / "demo" / "store"))
    (tmp_path / "demo" / "history.jsonl").write_text('{"kind": "round", "round": 9}\n')
    assert History.load(tmp_path / "demo").rows == History.load(tmp_path / "demo" / "store").rows == ROWS


def test_a_history_is_continued(store_url: str, tmp_path: Path) -> None:
    """A new process adds to what is there, and sees all of it."""
    for where in (GradientStore(store_url), tmp_path / "h.jsonl"):
        filled(where)
        with History(where) as history:
            history.append(a_round(3))
        assert history.rows == [*ROWS, a_round(3)]
        assert History.load(where).rows == [*ROWS, a_round(3)]


def test_opening_one_does_no_io(tmp_path: Path) -> None:
    """Neither a store nor a file comes about before the first row."""
    History(GradientStore(tmp_path / "store")).close()
    History(tmp_path / "h.jsonl").close()
    assert list(tmp_path.iterdir()) == []


def test_rows_of_commits_wait_for_the_next_other_row(tmp_path: Path) -> None:
    """A round with 50 commits is one file; closing writes what is left."""
    store = GradientStore(tmp_path)
    history = History(store)
    for version in range(1, 51):
        history.append(a_commit(version))
    assert store.blobs.list("history") == []
    history.append(a_round(1))
    assert store.blobs.list("history") == ["history/0000000001.jsonl"]
    history.on_row(a_commit(51))
    history.close()
    assert len(store.blobs.list("history")) == 2
    assert len(History.load(store).commits()) == 51


def test_commits_without_end_are_written_in_between(tmp_path: Path) -> None:
    """A thousand that wait are as many as are ever held."""
    store = GradientStore(tmp_path, sync="process")
    history = History(store)
    for version in range(1, 1002):
        history.append(a_commit(version))
    assert len(History.load(store).commits()) == 1000


def test_two_writers_lose_no_row(store_url: str) -> None:
    """Two coordinators of one store take the numbers by turns: each file is created once."""
    store = GradientStore(store_url)
    first, second = History(store), History(GradientStore(store_url))
    first.append(a_round(1, by="first"))
    second.append(a_round(2, by="second"))
    first.append(a_round(3, by="first"))
    second.append(a_round(4, by="second"))
    assert [row["by"] for row in History.load(store).rows] == ["first", "second", "first", "second"]


def test_a_lost_reply_writes_no_row_twice() -> None:
    """When the store kept the row and said "exists", the row is there once and the next has the next number."""
    store = GradientStore("memory://lost-reply")

    class Lossy:
        def create(self, key: str, parts: Sequence[Buffer]) -> bool:
            store.blobs.create(key, parts)
            return False

        def __getattr__(self, name: str) -> Any:
            return getattr(store.blobs, name)

    lossy = GradientStore("memory://lost-reply")
    lossy.blobs = Lossy()  # type: ignore[assignment]
    history = History(lossy)
    history.append(a_round(1))
    history.append(a_round(2))
    assert History.load(store).rows == [a_round(1), a_round(2)]


def test_a_torn_line_is_no_row(tmp_path: Path) -> None:
    """What a kill left of a line is cut off before the next one is written."""
    path = tmp_path / "h.jsonl"
    filled(path)
    with path.open("ab") as file:
        file.write(b'{"kind": "round", "rou')
    assert History.load(path).rows == ROWS
    with History(path) as history:
        history.append(a_round(3))
    assert History.load(path).rows == [*ROWS, a_round(3)]


def test_a_row_that_another_process_appends_meanwhile_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes just after the file was looked through for a torn line, and is none."""
    path = tmp_path / "h.jsonl"
    filled(path)
    look = Path.read_bytes

    def look_before_it_comes(looked_at: Path) -> bytes:
        found = look(looked_at)
        with path.open("ab") as file:
            file.write(to_lines([a_round(7)]))
        return found

    with monkeypatch.context() as patch, History(path) as history:
        patch.setattr(Path, "read_bytes", look_before_it_comes)
        history.append(a_round(3))
    assert History.load(path).rows == [*ROWS, a_round(7), a_round(7), a_round(3)]


def test_a_file_that_isnt_a_history_stays_as_it_is(tmp_path: Path) -> None:
    """Somebody else's file is refused, not cut."""
    path = tmp_path / "notes.txt"
    for text, message in (("precious", "ends in what isn't a row"), ("more\nprecious\n", "line 1 of .*notes.txt")):
        path.write_text(text)
        with pytest.raises(FormatError, match=message):
            History(path).append(RUN)
        assert path.read_text() == text


def test_a_killed_process_leaves_whole_rows(tmp_path: Path) -> None:
    """SIGKILL between rows: all that was written is there."""
    code = f"""
import os, signal, splitfed
history = splitfed.History(splitfed.GradientStore({str(tmp_path)!r}))
history.append({{"kind": "round", "round": 1}})
history.append({{"kind": "commit", "version": 7}})
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert programs.run(programs.code, code).returncode == -9
    assert History.load(tmp_path).rows == [{"kind": "round", "round": 1}]


def test_rows_are_found_by_kind() -> None:
    """The newest run, the rounds by number with the last word on each, the commits of a lineage."""
    history = filled(None)
    history.append(RUN | {"seed": 4})
    history.append(a_round(1, again=True))
    assert history.run == RUN | {"seed": 4}
    assert history.rounds() == [a_round(1, again=True), a_round(2)]
    assert [row["version"] for row in history.commits()] == [1, 1, 2]
    assert [row["version"] for row in history.commits("body")] == [1, 2]
    assert History().run is None


def test_a_history_becomes_a_data_frame() -> None:
    """A line per round or commit, or per client of each round."""
    history = filled(None)
    history.append(a_round(3, clients={"a": {"loss": 0.5, "status": "complete"}, "b": {"loss": 0.25}}))
    assert history.to_pandas()["loss"].tolist() == [1.0, 0.5, 1 / 3]
    assert history.to_pandas("commit")["lineage"].tolist() == ["body", "client", "body"]
    assert history.to_pandas("run")["name"].tolist() == ["digits"]
    clients = history.to_pandas("client")
    assert clients[["round", "client", "loss"]].to_numpy().tolist() == [[3, "a", 0.5], [3, "b", 0.25]]
    with pytest.raises(InputError, match="kind 'batch' isn't known: expected 'round'"):
        history.to_pandas("batch")


def test_pandas_is_asked_for_by_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without pandas the error says how to get it."""
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(InputError, match=r'pip install "\.\[pandas\]" in a clone'):
        History().to_pandas()


def test_where_no_history_is_says_so(tmp_path: Path) -> None:
    """A name that isn't there, a folder and a store without one, and a URL in place of a store, each in one line."""
    with pytest.raises(MissingError, match="nowhere isn't there: expected a run's store"):
        History.load(tmp_path / "nowhere")
    with pytest.raises(MissingError, match="holds no run"):
        History.load(tmp_path)
    with pytest.raises(MissingError, match="holds no run"):
        History.load("memory://empty-history")
    with pytest.raises(InputError, match="is a URL: expected a GradientStore over it"):
        History("s3://bucket/run")
