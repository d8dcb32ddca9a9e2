"""A sheet of images with what models said of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure
from PIL import Image

RIGHT, WRONG, UNKNOWN = "#0072B2", "#D55E00", "#444444"  # blue and vermilion: told apart by colour-blind readers too


class Tile(NamedTuple):
    """One image, what was predicted of it, how surely (0..1), and what it is, if that is known."""

    image: Image.Image
    predicted: str
    confidence: float
    target: str | None


def draw_predictions(panels: Sequence[tuple[str, Sequence[Tile]]], path: str | Path, columns: int = 10) -> None:
    """Write a PNG with one panel a model: right predictions in blue, mistakes in orange with the true class beside.

    Args:
        panels: a title and its tiles, in the order in which they are drawn.
        path: of the PNG. columns: tiles in a row.
    """
    rows = [max(1, math.ceil(len(tiles) / columns)) for _, tiles in panels]
    figure = Figure(figsize=(columns * 1.1, sum(rows) * 1.35 + 0.5 * len(panels)), dpi=130, layout="constrained")
    parts = figure.subfigures(len(panels), 1, height_ratios=[count + 0.4 for count in rows], squeeze=False)
    for part, count, (title, tiles) in zip(parts[:, 0], rows, panels, strict=True):
        part.suptitle(title, fontsize=11, x=0.01, ha="left")
        axes = part.subplots(count, columns, squeeze=False)
        for axis in axes.flat:
            axis.set_axis_off()
        for axis, tile in zip(axes.flat, tiles, strict=False):
            _draw(axis, tile)
    figure.savefig(path, format="png")


def _draw(axis: object, tile: Tile) -> None:
    wrong = tile.target is not None and tile.predicted != tile.target
    colour = UNKNOWN if tile.target is None else WRONG if wrong else RIGHT
    caption = f"{tile.predicted}  {100 * tile.confidence:.0f} %" + (f"\nis {tile.target}" if wrong else "\n")
    axis.imshow(tile.image, cmap="gray", interpolation="nearest")  # type: ignore[attr-defined]
    axis.set_title(caption, color=colour, fontsize=8, fontweight="bold" if wrong else "normal", pad=2)  # type: ignore[attr-defined]
