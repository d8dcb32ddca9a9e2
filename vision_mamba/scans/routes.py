"""Routes over a grid of tokens: pure functions (height, width) -> int64 (S,) of the tokens visited, in order.

Token r * width + c is at row r, column c; -1 is a padding step. Routes are index arithmetic on torch tensors without a
look at their values, so they trace with symbolic heights and widths too. What makes routes of numbers or of other
routes gives the same one for the same arguments, so that orders made of them are equal.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Route = Callable[[int, int], Tensor]


def _grid(height: int, width: int) -> Tensor:
    return torch.arange(height * width).view(height, width)


def row_major(height: int, width: int) -> Tensor:
    """Row after row, each from left to right.

    >>> row_major(2, 3).tolist()
    [0, 1, 2, 3, 4, 5]
    """
    return _grid(height, width).flatten()


def column_major(height: int, width: int) -> Tensor:
    """Column after column, each from top to bottom.

    >>> column_major(2, 3).tolist()
    [0, 3, 1, 4, 2, 5]
    """
    return _grid(height, width).T.flatten()


def snake(height: int, width: int) -> Tensor:
    """Row after row in alternating directions, so that every step goes to a neighbour (PlainMamba, arXiv:2403.17695).

    >>> snake(3, 3).tolist()
    [0, 1, 2, 5, 4, 3, 6, 7, 8]
    """
    grid = _grid(height, width)
    odd = (torch.arange(height) % 2 == 1).unsqueeze(1)
    return torch.where(odd, grid.flip(1), grid).flatten()


@functools.cache
def reverse(route: Route) -> Route:
    """The same route from its end to its start, padding included.

    >>> reverse(row_major)(1, 3).tolist()
    [2, 1, 0]
    """

    def reversed_route(height: int, width: int) -> Tensor:
        return route(height, width).flip(0)

    return reversed_route


@functools.cache
def transpose(route: Route) -> Route:
    """The same route with rows and columns exchanged: transpose(row_major) is column_major.

    >>> transpose(snake)(2, 3).tolist()
    [0, 3, 4, 1, 2, 5]
    """

    def transposed_route(height: int, width: int) -> Tensor:
        other = route(width, height)  # token c * height + r of the transposed grid
        return torch.where(other < 0, other, other % height * width + other // height)

    return transposed_route


@functools.cache
def window(size: int) -> Route:
    """Window after window in row-major order, each inside in row-major order (LocalMamba, arXiv:2403.09338).

    Where windows hang over the right or lower edge, their missing tokens are padding steps.

    >>> window(2)(2, 3).tolist()
    [0, 1, 3, 4, 2, -1, 5, -1]
    """
    _require_positive("window", "size", size)

    def window_route(height: int, width: int) -> Tensor:
        rows, columns = -(-height // size), -(-width // size)
        # Arithmetic on the step's number and no view of the grid: a view's strides would tie a traced size down.
        step = torch.arange(rows * columns * size**2)
        number, inside = step // size**2, step % size**2
        row = number // columns * size + inside // size
        column = number % columns * size + inside % size
        return torch.where((row < height) & (column < width), row * width + column, -1)

    return window_route


@functools.cache
def atrous(step: int, offset: tuple[int, int] | None = None) -> Route:
    """Every `step`-th token of every `step`-th row: one such sub-grid after the other, or the one at `offset` alone.

    A single sub-grid is a partial route: the tokens off it take no part (EfficientVMamba, arXiv:2403.09977). All
    sub-grids are of one size; where they hang over the right or lower edge, their missing tokens are padding steps.

    >>> atrous(2)(2, 4).tolist(), atrous(2, (1, 1))(2, 3).tolist()
    ([0, 2, 1, 3, 4, 6, 5, 7], [4, -1])
    """
    _require_positive("atrous", "step", step)
    if offset is not None and not all(0 <= start < step for start in offset):
        raise ValueError(f"atrous: offset must be two numbers from 0 to {step - 1}, got {offset}.")
    starts = [(row, column) for row in range(step) for column in range(step)] if offset is None else [offset]

    def atrous_route(height: int, width: int) -> Tensor:
        grid = F.pad(_grid(height, width), (0, -width % step, 0, -height % step), value=-1)
        return torch.cat([grid[row::step, column::step].flatten() for row, column in starts])

    return atrous_route


#: How a route comes to a token, in the order that published parameters follow.
MOVES = ("start", "right", "left", "up", "down")


def visits(route: Route, height: int, width: int) -> Tensor:
    """When and how a route comes to each token: int64 (2, L), steps and moves; both are -1 off the route.

    Moves are numbers in `MOVES`, those of the step from one neighbour to the next (PlainMamba, arXiv:2403.17695); the
    first token, and what a route jumps to, is a start.

    >>> visits(snake, 2, 2).tolist()
    [[0, 1, 3, 2], [0, 1, 2, 4]]
    """
    tokens = route(height, width)
    # The end of a row and the start of the next have numbers that follow each other, but are no neighbours.
    rows, columns = tokens // width, tokens % width
    down, right = (F.pad(place[1:] - place[:-1], (1, 0)) for place in (rows, columns))
    on_grid = F.pad((tokens[1:] >= 0) & (tokens[:-1] >= 0), (1, 0))
    moves = torch.zeros_like(tokens)
    for number, (across, along) in enumerate(((0, 1), (0, -1), (-1, 0), (1, 0)), 1):
        moves = torch.where(on_grid & (down == across) & (right == along), number, moves)
    found = torch.stack((torch.arange(tokens.shape[0]), moves))
    # Padding lands in front of the tokens, where it is cut off.
    places = torch.full((2, height * width + 1), -1)
    return places.scatter(1, (tokens + 1).expand(2, -1), found)[:, 1:]


def _require_positive(where: str, name: str, value: int) -> None:
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{where}: {name} must be a whole number of at least 1, got {value!r}.")
