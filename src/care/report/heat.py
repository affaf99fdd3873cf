"""Heat maps in greys, with the values written in the cells."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .pictures import new_figure, save_png

DARK = 0.5
"""Shade above which a cell is written in white."""


@dataclass(frozen=True)
class HeatMap:
    """Shares between 0 and 1 by row and column, and what is written in each cell."""

    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    shares: Sequence[Sequence[float]]
    words: Sequence[Sequence[str]]


def draw_heat(axes: Any, heat: HeatMap, *, row_label: str, column_label: str) -> Any:  # noqa: ANN401 - matplotlib's
    """One map; the darker a cell, the larger its share."""
    drawn = axes.imshow(heat.shares, cmap="Greys", vmin=0, vmax=1, aspect="auto")
    for y, (shares, words) in enumerate(zip(heat.shares, heat.words, strict=True)):
        for x, (share, word) in enumerate(zip(shares, words, strict=True)):
            axes.text(x, y, word, ha="center", va="center", color="white" if share > DARK else "black")
    axes.set_xticks(range(len(heat.columns)), heat.columns)
    axes.set_yticks(range(len(heat.rows)), heat.rows)
    axes.set(title=heat.title, xlabel=column_label, ylabel=row_label)
    return drawn


def plot_heat(maps: Sequence[Sequence[HeatMap]], path: Path, *, row_label: str, column_label: str) -> None:
    """Maps in a grid, as PNG; BadInput without matplotlib or where the file cannot be written."""
    first = maps[0][0]
    width, height = 2.0 + 0.9 * len(first.columns), 1.3 + 0.55 * len(first.rows)
    figure = new_figure(max(width, 4.0) * len(maps[0]) + 1.0, height * len(maps))
    grid = figure.subplots(len(maps), len(maps[0]), squeeze=False)
    drawn = [
        draw_heat(axes, heat, row_label=row_label, column_label=column_label)
        for axes_row, maps_row in zip(grid, maps, strict=True)
        for axes, heat in zip(axes_row, maps_row, strict=True)
    ]
    figure.colorbar(drawn[0], ax=grid, label="share of the trials")
    save_png(figure, path)
