"""Scan orders drawn on an image: one panel a route, the path over the patches coloured by time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.figure import Figure
from PIL import Image

from vision_mamba import scans
from vision_mamba.scans import ScanOrder

_TIME = colormaps["cool"]  # cyan at the first step, magenta at the last
_SHADE = 0.7  # brightness of the image under the path
_OUTLINE = "#101018"
_PANEL, _GAP, _BLOCK_GAP, _TITLE = 1.8, 0.06, 0.2, 0.3  # inches: a panel's longer side, between panels, blocks, heads


def draw_order(order: ScanOrder | str, image: Image.Image | np.ndarray, grid: tuple[int, int] = (7, 7)) -> Figure:
    """Draw every route of an order on an image.

    The path runs through the centres of the patches, from the dot to the square, cyan to magenta; a thin line is a
    step between patches that do not touch. Padding steps are left out.

    Args:
        order: a scan order or the name of one.
        image: a picture, or an array (height, width, 3); its middle is cut to the shape of the grid.
        grid: rows and columns of patches.

    Returns: a matplotlib figure, ``.savefig("order.png")`` writes it.

    >>> figure = draw_order("cross", np.zeros((60, 60, 3), np.uint8), grid=(3, 3))
    >>> len(figure.axes)
    4
    """
    return draw_orders([order], image, grid)


def draw_orders(
    orders: Sequence[ScanOrder | str],
    image: Image.Image | np.ndarray,
    grid: tuple[int, int] = (7, 7),
    rows: int = 2,
    shown: float = 1.0,
) -> Figure:
    """Draw several orders side by side, each a block of panels; arguments as in `draw_order`.

    Args:
        rows: of panels in a block.
        shown: part of every route that is drawn, from its first step on.

    Raises: ValueError for an unknown order, a grid without patches, or an array that is no RGB picture.
    """
    found = [scans.get(order) if isinstance(order, str) else order for order in orders]
    picture = _cut(_as_picture(image), grid)
    columns = [-(-len(order) // rows) for order in found]
    across, down = (_PANEL * patches / max(grid) + _GAP for patches in (grid[1], grid[0]))
    width = across * sum(columns) - _GAP * len(found) + _BLOCK_GAP * (len(found) - 1)
    height = down * min(rows, max(map(len, found))) - _GAP + _TITLE
    figure = Figure(figsize=(width, height), dpi=130, facecolor="white")

    def inches(left: float, top: float) -> tuple[float, float, float, float]:
        """Left, bottom, width and height of a panel, in parts of the figure."""
        wide, high = across - _GAP, down - _GAP
        return left / width, 1 - (top + high) / height, wide / width, high / height

    left = 0.0
    for order, count in zip(found, columns, strict=True):
        middle = left + (across * count - _GAP) / 2
        figure.text(middle / width, 1 - _TITLE / 2 / height, order.name, ha="center", va="center", weight="bold")
        for number, route in enumerate(order.indices(*grid).tolist()):
            row, column = divmod(number, count)
            panel = figure.add_axes(inches(left + column * across, _TITLE + row * down))
            _draw_route(panel, [token for token in route if token >= 0], picture, grid, shown)
        left += across * count - _GAP + _BLOCK_GAP
    return figure


def _as_picture(image: Image.Image | np.ndarray) -> np.ndarray:
    """(height, width, 3) from 0 to 1."""
    picture = np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image)
    if picture.ndim != 3 or picture.shape[2] != 3:
        raise ValueError(f"draw_order: image must be (height, width, 3), got {picture.shape}; convert it to RGB.")
    return picture / 255 if picture.dtype == np.uint8 else picture


def _cut(picture: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """The largest middle part in which the patches of the grid are square."""
    if min(grid) < 1:
        raise ValueError(f"draw_order: grid must be at least one row and one column, got {grid}.")
    side = min(picture.shape[0] / grid[0], picture.shape[1] / grid[1])
    height, width = (max(1, round(side * patches)) for patches in grid)
    top, left = (picture.shape[0] - height) // 2, (picture.shape[1] - width) // 2
    return picture[top : top + height, left : left + width]


def animate_orders(
    orders: Sequence[ScanOrder | str],
    image: Image.Image | np.ndarray,
    path: str | Path,
    grid: tuple[int, int] = (7, 7),
    frames: int | None = None,
    seconds: float = 4.0,
) -> None:
    """Write an animated GIF in which the routes grow step by step, all of them at one time; it runs for ever.

    Args:
        orders, image, grid: as in `draw_orders`.
        path: of the GIF.
        frames: pictures, of which the last shows whole routes; as many as there are patches by default, 25 at most.
        seconds: of one run; the last picture stays for a third as long again.
    """
    drawn: list[Image.Image] = []
    frames = frames or max(1, min(25, grid[0] * grid[1]))
    for number in range(1, frames + 1):
        canvas = FigureCanvasAgg(draw_orders(orders, image, grid, shown=number / frames))
        canvas.draw()
        drawn.append(Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3]))
    # One palette for all, else colours would flicker: that of the last, which has the colours of every step.
    palette = drawn[-1].quantize(64, dither=Image.Dither.NONE)
    drawn = [whole.quantize(palette=palette, dither=Image.Dither.NONE) for whole in drawn]
    each = round(1000 * seconds / frames)
    durations = [each] * (frames - 1) + [each + round(1000 * seconds / 3)]
    drawn[0].save(path, format="GIF", save_all=True, append_images=drawn[1:], duration=durations, loop=0, disposal=1)


def _draw_route(panel: Axes, route: list[int], picture: np.ndarray, grid: tuple[int, int], shown: float) -> None:
    height, width = grid
    panel.imshow(picture * _SHADE, extent=(0, width, height, 0), interpolation="lanczos")
    lines: dict[str, Any] = dict(color="white", alpha=0.25, linewidth=0.4)
    panel.vlines(range(1, width), 0, height, **lines)
    panel.hlines(range(1, height), 0, width, **lines)
    panel.set(xlim=(0, width), ylim=(height, 0))
    panel.set_axis_off()
    if route:
        points = np.array([(token % width + 0.5, token // width + 0.5) for token in route])
        _draw_path(panel, points, max(grid), max(1, round(shown * len(route))))


def _draw_path(panel: Axes, points: np.ndarray, side: int, count: int) -> None:
    """A line through the first of (T, 2) points, on a panel of so many patches along its longer side."""
    colours, points = _TIME(np.linspace(0, 1, len(points)))[:count], points[:count]
    starts, ways = points[:-1], np.diff(points, axis=0)
    lengths = np.abs(ways).max(1, initial=0)
    near = lengths <= lengths.min(initial=side)  # a route over every other patch has neighbours two apart
    thick = 0.15 * _PANEL * 72 / side  # of the path, in points
    steps = np.stack((starts, starts + ways), 1)
    for chosen, wide in ((~near, thick / 4), (near, thick)):
        for colour, extra in ((_OUTLINE, wide * 0.6), (colours[1:][chosen], 0.0)):
            path = LineCollection(list(steps[chosen]), colors=colour, linewidths=wide + extra, capstyle="round")
            panel.add_collection(path)
    heads = [_head(starts[step] + ways[step] / 2, ways[step]) for step in _places_of_heads(ways, near)]
    panel.add_collection(PolyCollection(heads, facecolors="white", edgecolors=_OUTLINE, linewidths=thick / 6, zorder=4))
    for point, colour, marker in ((points[0], colours[0], "o"), (points[-1], colours[-1], "s")):
        size, edge = (2.3 * thick) ** 2, thick / 2
        style: dict[str, Any] = dict(s=size, color=[colour], edgecolors="white", linewidths=edge)
        panel.scatter(*point, marker=marker, zorder=5, **style)


def _places_of_heads(ways: np.ndarray, near: np.ndarray) -> list[int]:
    """The middle step of every straight run, but none closer than three steps to the one before."""
    places: list[int] = []
    first = 0
    for step in range(1, len(ways) + 1):
        if step == len(ways) or (ways[step] != ways[first]).any():
            middle = (first + step - 1) // 2
            if near[middle] and (not places or middle - places[-1] >= 3):
                places.append(middle)
            first = step
    return places


def _head(centre: np.ndarray, way: np.ndarray) -> np.ndarray:
    """A triangle of two fifths of a patch that points along the way."""
    along = way / np.linalg.norm(way) * 0.2
    side = along[::-1] * (1, -1)
    return np.array([centre + along, centre - along * 0.8 + side, centre - along * 0.8 - side])
