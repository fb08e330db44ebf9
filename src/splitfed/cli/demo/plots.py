"""The picture of a run: accuracy and loss by round, the federated model against the centralised one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from splitfed.store.rows import Row
from splitfed.tracking import plots

_FEDERATED, _CENTRALISED = plots.PALETTE[:2]


def curves(path: Path, history: Sequence[Row], pooled: Sequence[Row]) -> None:
    """Draw both runs into a PNG.

    Args:
        path: Where to write.
        history: A row per round of the federated run.
        pooled: A row per pass of the centralised run.
    """
    figure, (left, right) = plots.figure(10, 4.4, 2)
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
        color=plots.INK,
        fontsize=12.5,
        fontweight="bold",
    )
    plots.save(figure, path)


def _draw(axes: Axes, name: str, history: Sequence[Row], pooled: Sequence[Row]) -> None:
    lines = ((pooled, "centralised", _CENTRALISED, "--"), (history, "split federated", _FEDERATED, "-"))
    for rows, label, colour, style in lines:
        rounds, values = [row["round"] for row in rows], [row[name] for row in rows]
        axes.plot(rounds, values, style, color=colour, linewidth=2, marker="o", markersize=4.5, label=label)
    plots.style(axes, title=f"Test {name}", x="round (one pass over the training digits)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.set_xlim(0.7, len(history) + 0.3)
    axes.legend(
        frameon=False, labelcolor=plots.INK, reverse=True, loc="lower right" if name == "accuracy" else "upper right"
    )
