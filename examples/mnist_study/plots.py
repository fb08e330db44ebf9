"""The plots of the study: accuracy of each training method by rounds, by seconds and by bytes."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from mnist_study.recipe import Deal
from splitfed import partition
from splitfed.tracking import plots

Curve = dict[str, list[Any]]
_NAMES = {
    "round": "split, one update a round",
    "buffered": "split, buffered",
    "sflv2": "split, an update a batch (SFLV2)",
    "sflv1": "split, a body per client (SFLV1)",
    "synchronous": "split, synchronous",
    "grouped": "split, grouped",
    "centralised": "all digits in one place",
    "fedavg": "FedAvg of the whole model",
    "local": "each owner alone (mean)",
    "sum": "the study's rule: the sum",
    "mean": "the mean in its place",
}
_COLOURS = dict(zip(_NAMES, (*plots.PALETTE[:6], "#1f2933", "#6b7785", "#a9b3bd", "#c2255c", "#1864ab"), strict=True))


def curves(path: Path, lines: Mapping[str, Curve], baselines: Collection[str], title: str) -> None:
    """Draw accuracy against rounds, seconds and megabytes; baselines are dashed.

    Args:
        path: Where to write.
        lines: The curves by mode or baseline.
        baselines: Which of them are baselines.
        title: What was trained.
    """
    figure, axes = plots.figure(13.5, 4.8, columns=3)
    for panel, (key, label, factor) in zip(
        axes,
        (("round", "rounds (passes)", 1.0), ("seconds", "seconds", 1.0), ("bytes", "megabytes sent", 1e-6)),
        strict=True,
    ):
        for name, curve in lines.items():
            across = [factor * value for value in _across(curve, key)]
            if key != "round" and not across[-1] > 0:
                continue  # what sends nothing has no place on an axis of bytes
            style = {"linestyle": "--", "marker": ""} if name in baselines else {"marker": "o", "markersize": 3.5}
            panel.plot(across, curve["accuracy"], color=_COLOURS[name], linewidth=1.8, label=_NAMES[name], **style)
        plots.style(panel, title="Test accuracy" if key == "round" else None, x=label)
        _percent(panel)
        if key == "round":
            panel.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        else:
            panel.set_xscale("log")
            panel.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            panel.xaxis.set_minor_locator(NullLocator())
            panel.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    _same_height(axes, [value for curve in lines.values() for value in curve["accuracy"]])
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, labelcolor=plots.INK, fontsize=9)
    figure.suptitle(title, x=0.01, ha="left", color=plots.INK, fontsize=12.5, fontweight="bold")
    plots.save(figure, path)


def rule(path: Path, rules: Mapping[str, Curve], title: str) -> None:
    """Draw the study's rule and the mean in its place, round by round."""
    figure, (axes,) = plots.figure(9, 4.2)
    for name, curve in rules.items():
        rounds = _across(curve, "round")
        axes.plot(rounds, curve["accuracy"], color=_COLOURS[name], linewidth=1.8, label=_NAMES[name])
    plots.style(axes, x="rounds")
    _percent(axes)
    axes.set_ylim(0, 1)
    axes.legend(frameon=False, labelcolor=plots.INK, loc="lower right")
    figure.suptitle(title, x=0.01, ha="left", color=plots.INK, fontsize=12.5, fontweight="bold")
    plots.save(figure, path)


def classes(path: Path, deal: Deal, title: str) -> None:
    """Draw how many digits of each class each owner has."""
    names = [str(number) for number in range(len(deal.parts))]
    partition.chart(deal.parts, deal.labels, path, names=names, title=title)


def _across(curve: Curve, key: str) -> list[float]:
    if key == "round":
        return list(range(1, len(curve["accuracy"]) + 1))
    if key == "bytes":
        both = zip(curve["bytes_up"], curve["bytes_down"], strict=True)
        return list(itertools.accumulate(up + down for up, down in both))
    return list(curve[key])


def _percent(axes: Axes) -> None:
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")


def _same_height(axes: list[Axes], values: list[float]) -> None:
    """All panels show the same accuracies: the better half of what there is, where curves differ."""
    top = max(values)
    low = max(min(values), top - 0.25)
    for panel in axes:
        panel.set_ylim(low - 0.01, min(1.0, top + 0.01))
