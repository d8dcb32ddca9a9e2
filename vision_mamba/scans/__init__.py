"""Scan orders: which token comes when. Pure index maths on a grid, as tables that the scan operators follow."""

from vision_mamba.scans.local import COLUMNS_TWICE, column_routes
from vision_mamba.scans.order import (
    ATROUS_2,
    BIDIRECTIONAL,
    CROSS,
    FORWARD,
    LOCAL_2,
    LOCAL_7,
    SNAKE,
    ScanOrder,
    get,
    names,
    register,
)
from vision_mamba.scans.routes import (
    MOVES,
    Route,
    atrous,
    column_major,
    reverse,
    row_major,
    snake,
    transpose,
    visits,
    window,
)

__all__ = [
    "ATROUS_2",
    "BIDIRECTIONAL",
    "COLUMNS_TWICE",
    "CROSS",
    "FORWARD",
    "LOCAL_2",
    "LOCAL_7",
    "MOVES",
    "SNAKE",
    "Route",
    "ScanOrder",
    "atrous",
    "column_major",
    "column_routes",
    "get",
    "names",
    "register",
    "reverse",
    "row_major",
    "snake",
    "transpose",
    "visits",
    "window",
]
