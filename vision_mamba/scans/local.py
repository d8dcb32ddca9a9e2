"""Scan orders of LocalMamba: four of eight directions, along rows, columns and windows, each there and back.

The published models have for every block the four that a search chose of these: Huang et al. 2024, arXiv:2403.09338.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from vision_mamba.scans.order import ScanOrder, get, register
from vision_mamba.scans.routes import Route, column_major, reverse, row_major, window

#: The directions by short names, "f" for flipped, in the order that the published parameters of a block follow.
DIRECTIONS: dict[str, Route] = {
    f"{name}{flipped}": reverse(route) if flipped else route
    for name, route in {"h": row_major, "v": column_major, "w2": window(2), "w7": window(7)}.items()
    for flipped in ("", "f")
}

# Known from the import on, since a saved program asks for them by name; 70 of them would bury the others in any list.
for _chosen in itertools.combinations(DIRECTIONS, 4):
    _routes = tuple(DIRECTIONS[direction] for direction in _chosen)
    register(ScanOrder(f"local_{'_'.join(_chosen)}", _routes), listed=False)


def columns_twice(height: int, width: int) -> Tensor:
    """Where a token's result comes from if a map is put back from columns as though it were square.

    On a square map that is the token itself: columns of columns are rows.

    >>> columns_twice(2, 3).tolist(), columns_twice(2, 2).tolist()
    ([0, 4, 3, 2, 1, 5], [0, 1, 2, 3])
    """
    columns = column_major(height, width)
    return columns[columns]


COLUMNS_TWICE = register(ScanOrder("columns_twice", (columns_twice,)), listed=False)


def column_routes(order: str) -> list[int]:
    """Which routes of a registered order go down the columns, or back up.

    >>> column_routes("cross")
    [1, 3]
    """
    with torch.device("cpu"):
        columns = column_major(2, 3).tolist()
        return [
            number for number, route in enumerate(get(order).routes) if route(2, 3).tolist() in (columns, columns[::-1])
        ]
