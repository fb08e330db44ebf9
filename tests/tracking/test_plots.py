"""Pictures have one look, touch nothing global, and order classes as people do."""

from __future__ import annotations

import sys

import matplotlib

from splitfed.tracking import plots


def test_classes_sort_as_numbers_and_then_as_names() -> None:
    """10 comes after 9, and names after numbers."""
    assert sorted(["b", "10", "9", "a", "1.5"], key=plots.class_order) == ["1.5", "9", "10", "a", "b"]


def test_figures_leave_pyplot_alone() -> None:
    """Drawing sets no global style and opens no window."""
    before = dict(matplotlib.rcParams)
    loaded = "matplotlib.pyplot" in sys.modules
    figure, axes = plots.figure(6, 3, 2)
    plots.class_bars({"hospital-north": {"cat": 2, "dog": 1}, "b": {"cat": 3}}, axes[0], title="Pets")
    assert len(axes) == len(figure.axes) == 2
    assert [text.get_text() for text in axes[0].get_legend().get_texts()] == ["dog", "cat"]
    assert dict(matplotlib.rcParams) == before
    assert ("matplotlib.pyplot" in sys.modules) == loaded


def test_many_clients_have_no_names_below() -> None:
    """With a hundred bars the axis counts instead, and bars touch."""
    axes = plots.figure(6, 3)[1][0]
    plots.class_bars({f"client-{n}": {"0": n} for n in range(100)}, axes)
    assert {bar.get_width() for bar in axes.patches} == {1.0}
    assert len(axes.get_xticks()) < 12
    crowded = plots.figure(6, 3)[1][0]
    plots.class_bars({f"a-long-name-{n}": {"0": n} for n in range(8)}, crowded)
    assert crowded.get_xticklabels()[0].get_rotation() == 60
