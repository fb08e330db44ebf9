"""One look for every picture that matplotlib draws: of a partition, of a run, of a study.

Figures are made without pyplot, so neither matplotlib's global state nor the user's display is
touched. matplotlib is imported when something is drawn: training needs none of it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from splitfed.checks import install
from splitfed.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#1f2933"
FAINT = "#6b7785"
GRID = "#e4e8ec"
# Ten hues that differ in lightness too, so that neighbours stay apart in grey and for most eyes.
PALETTE = (
    "#1864ab", "#e8590c", "#2b8a3e", "#f2b705", "#7048a8",
    "#66b2e8", "#c2255c", "#8fce6b", "#8a5a2b", "#6b7785",
)  # fmt: skip
_MOST_NAMES = 30
_MOST_LEVEL_LETTERS = 60


def figure(width: float, height: float, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """Make a figure and its axes, side by side.

    Args:
        width: In inches.
        height: In inches.
        columns: How many axes.

    Raises:
        InputError: matplotlib isn't installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError:
        raise InputError(f"pictures need matplotlib: {install('plots')}") from None
    engine = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1)
    made = Figure(figsize=(width, height), dpi=160, facecolor="white", layout=engine)
    FigureCanvasAgg(made)
    return made, list(made.subplots(1, columns, squeeze=False)[0])


def style(
    axes: Axes, *, title: str | None = None, x: str | None = None, y: str | None = None
) -> None:
    """Give axes the common look: horizontal grid lines, no frame, a title at the left.

    Args:
        axes: The axes to style.
        title: The title above them.
        x: The label of the horizontal axis.
        y: The label of the vertical axis.
    """
    axes.set_title(title or "", loc="left", color=INK, fontsize=11)
    axes.set_xlabel(x or "", color=FAINT)
    axes.set_ylabel(y or "", color=FAINT)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=FAINT, length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GRID)


def class_bars(
    clients: Mapping[str, Mapping[str, int]],
    where: str | os.PathLike[str] | Axes,
    *,
    title: str | None = None,
) -> None:
    """Draw the number of examples of each class at each client, as stacked bars.

    Args:
        clients: For each client, the number of its examples of each class.
        where: The picture's path, or the axes to draw on.
        title: The title above it.

    Raises:
        InputError: matplotlib isn't installed, or the path can't be a picture's.
    """
    if not isinstance(where, str | os.PathLike):
        _draw_bars(where, clients, title)
        return
    made, (axes,) = figure(min(4.5 + 0.28 * len(clients), 12), 4)
    _draw_bars(axes, clients, title)
    save(made, where)


def save(made: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure; the path's ending says in which format.

    Raises:
        InputError: there is no such format, or the path can't be written.
    """
    try:
        made.savefig(os.fspath(path))
    except (ValueError, OSError) as error:
        raise InputError(f"no picture can be written to {os.fspath(path)!r}: {error}") from error


def class_order(label: str) -> tuple[int, float, str]:
    """A sorting key for classes: by number where they are numbers, by name otherwise."""
    try:
        return (0, float(label), "")
    except ValueError:
        return (1, 0.0, label)


def _draw_bars(axes: Axes, clients: Mapping[str, Mapping[str, int]], title: str | None) -> None:
    many = len(clients) > _MOST_NAMES
    # Of many bars the gaps between them would be wider than the bars: they touch.
    look: dict[str, Any] = {"width": 1.0}
    if not many:
        look = {"width": 0.8, "edgecolor": "white", "linewidth": 0.6}
    bottoms = [0] * len(clients)
    labels = {label for held in clients.values() for label in held}
    for number, label in enumerate(sorted(labels, key=class_order)):
        heights = [held.get(label, 0) for held in clients.values()]
        colour = PALETTE[number % len(PALETTE)]
        places = range(len(clients))
        axes.bar(places, heights, bottom=bottoms, color=colour, label=label, **look)
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    style(axes, title=title or "Examples of each class at each client", x="client", y="examples")
    _name_bars(axes, list(clients), many)
    _class_legend(axes)


def _name_bars(axes: Axes, names: Sequence[str], many: bool) -> None:
    """Below each bar its client; below many bars only their numbers, as an axis has them."""
    from matplotlib.ticker import MaxNLocator

    places = range(len(names))
    if many:
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    elif sum(map(len, names)) > _MOST_LEVEL_LETTERS:
        axes.set_xticks(places, names, rotation=60, ha="right")
    else:
        axes.set_xticks(places, names, rotation=0, ha="center")
    axes.set_xlim(-0.6, len(names) - 0.4)


def _class_legend(axes: Axes) -> None:
    """The classes at the right, from the top down as the bars are stacked."""
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(
        handles[::-1],
        labels[::-1],
        title="class",
        frameon=False,
        labelcolor=INK,
        loc="center left",
        bbox_to_anchor=(1.0, 0.5),
        fontsize=8,
        title_fontsize=9,
        handlelength=1.0,
    )
