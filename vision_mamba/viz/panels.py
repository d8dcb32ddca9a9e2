"""Maps over images, in rows of panels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

_SIDE = 1.5  # inches of a panel
HEAT = "magma"


class Panel(NamedTuple):
    """An image (H, W) grey or (H, W, 3), and a map over it that may be of another size; either may be None."""

    title: str
    image: np.ndarray | None = None
    heat: np.ndarray | None = None
    mark: tuple[float, float] | None = None  # column and row of a point, in parts of the panel's sides


def draw_panels(rows: Sequence[Sequence[Panel]], opacity: float = 0.65) -> Figure:
    """Draw panels row by row; maps lie over their image, each from its own least to its greatest value.

    Args:
        opacity: of a map where there is an image under it.
    """
    columns = max(len(row) for row in rows)
    figure = Figure(figsize=(columns * _SIDE, len(rows) * (_SIDE + 0.25)), dpi=130, layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for line, row in zip(axes, rows, strict=True):
        for axis, panel in zip(line, row, strict=False):
            axis.set_title(panel.title, fontsize=8, pad=2)
            axis.set(xlim=(0, 1), ylim=(1, 0), aspect="auto")
            extent = (0, 1, 1, 0)
            if panel.image is not None:
                axis.imshow(panel.image, cmap="gray", extent=extent, interpolation="nearest", aspect="auto")
            if panel.heat is not None:
                alpha = 1.0 if panel.image is None else opacity
                axis.imshow(panel.heat, cmap=HEAT, alpha=alpha, extent=extent, interpolation="nearest", aspect="auto")
            if panel.mark is not None:
                axis.scatter(*panel.mark, s=30, marker="s", facecolors="none", edgecolors="#39FF88", linewidths=1.5)
    return figure
