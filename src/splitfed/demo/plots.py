"""The picture of a run: accuracy and loss by round, the federated model against the centralised one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from splitfed.demo.screen import Row

_INK, _FAINT, _GRID = "#1f2933", "#6b7785", "#e4e8ec"
_FEDERATED, _CENTRALISED = "#1864ab", "#e8590c"


def curves(path: Path, history: Sequence[Row], pooled: Sequence[Row]) -> None:
    """Draw both runs into a PNG; matplotlib's global state and the user's display aren't touched.

    Args:
        path: Where to write.
        history: A row per round of the federated run.
        pooled: A row per pass of the centralised run.
    """
    figure = Figure(
        figsize=(10, 4.4), dpi=160, facecolor="white", layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1)
    )
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for axes, name in ((left, "accuracy"), (right, "loss")):
        _draw(axes, name, history, pooled)
    left.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")
    right.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
    right.set_ylim(bottom=0)
    figure.suptitle(
        f"{history[-1]['accuracy']:.1%} of the test digits right, split over data owners; "
        f"{pooled[-1]['accuracy']:.1%} with all data in one place",
        x=0.01,
        ha="left",
        color=_INK,
        fontsize=12.5,
        fontweight="bold",
    )
    figure.savefig(path)


def _draw(axes: Axes, name: str, history: Sequence[Row], pooled: Sequence[Row]) -> None:
    lines = ((pooled, "centralised", _CENTRALISED, "--"), (history, "split federated", _FEDERATED, "-"))
    for rows, label, colour, style in lines:
        rounds, values = [row["round"] for row in rows], [row[name] for row in rows]
        axes.plot(rounds, values, style, color=colour, linewidth=2, marker="o", markersize=4.5, label=label)
    axes.set_title(f"Test {name}", loc="left", color=_INK, fontsize=11)
    axes.set_xlabel("round (one pass over the training digits)", color=_FAINT)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.set_xlim(0.7, len(history) + 0.3)
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_FAINT, length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_GRID)
    axes.legend(
        frameon=False, labelcolor=_INK, reverse=True, loc="lower right" if name == "accuracy" else "upper right"
    )
