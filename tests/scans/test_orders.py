"""Routes and orders: exact tables on small grids, round trips on all grids, refusals by their sentence."""

from __future__ import annotations

import doctest

import pytest
import torch
from torch import Tensor

from vision_mamba import scans
from vision_mamba.ops.reference import put_tokens, take_steps
from vision_mamba.scans import ScanOrder, atrous, column_major, reverse, routes, row_major, snake, transpose, window

GRIDS = [(1, 1), (1, 7), (7, 1), (2, 3), (3, 2), (4, 4), (5, 7), (14, 14), (13, 9)]
ROUTES = dict(
    row_major=row_major,
    column_major=column_major,
    snake=snake,
    transposed_snake=transpose(snake),
    window_2=window(2),
    window_3=window(3),
    window_7=window(7),
    transposed_window=transpose(window(3)),
    atrous_2=atrous(2),
    atrous_3=atrous(3),
)
ALL = ROUTES | {f"reversed_{name}": reverse(route) for name, route in ROUTES.items()}


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("name", ALL)
def test_a_route_visits_every_token_once(name: str, grid: tuple[int, int]) -> None:
    steps = ALL[name](*grid)
    visited = steps[steps >= 0]
    assert steps.dtype == torch.int64 and steps.min() >= -1
    assert torch.equal(visited.sort().values, torch.arange(grid[0] * grid[1]))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_tables_are_what_the_papers_draw(grid: tuple[int, int]) -> None:
    """Against slow loops over rows and columns, written from the papers' figures."""
    height, width = grid
    tokens = [[r * width + c for c in range(width)] for r in range(height)]
    rows = [t for row in tokens for t in row]
    columns = [tokens[r][c] for c in range(width) for r in range(height)]
    zigzag = [t for r, row in enumerate(tokens) for t in (row if r % 2 == 0 else row[::-1])]
    windows = [
        tokens[r][c] if r < height and c < width else -1
        for top in range(0, height, 3)
        for left in range(0, width, 3)
        for r in range(top, top + 3)
        for c in range(left, left + 3)
    ]
    holes = [
        tokens[r][c] if r < height and c < width else -1
        for i in range(2)
        for j in range(2)
        for r in range(i, height + i, 2)
        for c in range(j, width + j, 2)
    ]
    assert scans.CROSS.indices(*grid).tolist() == [rows, columns, rows[::-1], columns[::-1]]
    assert scans.BIDIRECTIONAL.indices(*grid).tolist() == [rows, rows[::-1]]
    assert snake(*grid).tolist() == zigzag
    assert window(3)(*grid).tolist() == windows
    assert reverse(window(3))(*grid).tolist() == windows[::-1]
    assert atrous(2)(*grid).tolist() == holes


def test_a_snake_moves_to_neighbours_only() -> None:
    for route in (snake, transpose(snake)):
        steps = route(5, 7)
        distance = (steps // 7).diff().abs() + (steps % 7).diff().abs()
        assert (distance == 1).all()


def test_atrous_routes_share_the_grid_out() -> None:
    """EfficientVMamba's four partial routes: disjoint, complete; the second and fourth go column by column.

    All are as long as the first: what they miss at the lower and right edge are steps too.
    """
    table = scans.ATROUS_2.indices(5, 6)
    assert torch.equal(table[table >= 0].sort().values, torch.arange(30, dtype=torch.int32))
    assert scans.ATROUS_2.indices(4, 4).tolist() == [[0, 2, 8, 10], [4, 12, 6, 14], [1, 3, 9, 11], [5, 13, 7, 15]]
    assert scans.ATROUS_2.indices(3, 3).tolist() == [[0, 2, 6, 8], [3, -1, 5, -1], [1, -1, 7, -1], [4, -1, -1, -1]]
    assert scans.ATROUS_2.indices(1, 1).tolist() == [[0], [-1], [-1], [-1]]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("name", ["snake", "cross", "local_2", "atrous_2"])
def test_visits_are_the_table_inside_out(name: str, grid: tuple[int, int]) -> None:
    """Of each route the step at which it comes to a token, and the move from the token before, if a neighbour."""
    height, width = grid
    table, (steps, moves) = scans.get(name).indices(*grid), scans.get(name).visits(*grid)
    places = {"start": (0, 0), "right": (0, 1), "left": (0, -1), "up": (-1, 0), "down": (1, 0)}
    for k, route in enumerate(table.tolist()):
        for token in range(height * width):
            if token not in route:
                assert steps[k, token] == moves[k, token] == -1
                continue
            step = int(steps[k, token])
            assert route[step] == token
            before = route[step - 1] if step else -1
            row, column = places[scans.MOVES[moves[k, token]]]
            if before >= 0 and abs(before // width - token // width) + abs(before % width - token % width) == 1:
                assert (before // width + row, before % width + column) == divmod(token, width)
            else:  # a row's end and the next one's start have numbers that follow each other, but are apart
                assert moves[k, token] == 0 and (name != "snake" or step == 0)
    like = torch.zeros(1)
    assert torch.equal(torch.ops.vision_mamba.scan_visits(like, name, *grid), scans.get(name).visits(*grid))


@pytest.mark.parametrize("name", scans.names())
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_round_trip_is_exact(name: str, grid: tuple[int, int]) -> None:
    table = scans.get(name).indices(*grid)
    assert table.dtype == torch.int32 and table.is_contiguous() and table.shape[0] == len(scans.get(name))
    tokens = torch.randn(2, grid[0] * grid[1], table.shape[0], 3)
    on_route = torch.stack([torch.isin(torch.arange(tokens.shape[1]), row[row >= 0]) for row in table], 1)
    back = put_tokens(take_steps(tokens, table), table, tokens.shape[1])
    assert torch.equal(back, tokens * on_route[None, :, :, None])
    steps = take_steps(tokens, table)
    assert (steps.transpose(1, 2)[:, table < 0] == 0).all()


@pytest.mark.parametrize("name", scans.names())
@pytest.mark.parametrize("place", [0, 4, 15])
def test_a_class_token_anywhere(name: str, place: int) -> None:
    """It is visited at its own place; the patches keep their order around it."""
    order = scans.get(name)
    table, plain = order.indices(3, 5, class_token=place), order.indices(3, 5)
    at = min(place, plain.shape[1])
    assert (table[:, at] == place).all() if name != "atrous_2" else (table == place).sum(1).eq(1).all()
    for row, expected in zip(table, plain, strict=True):
        patches = row[(row >= 0) & (row != place)]
        assert torch.equal(patches - (patches > place).int(), expected[expected >= 0])


@pytest.mark.parametrize("place", [0, 98, 196])
def test_a_token_sequence_is_a_grid_of_one_row(place: int) -> None:
    """Vim's two directions over 196 patches and a class token at any place: the way back is the exact reverse."""
    table = scans.BIDIRECTIONAL.indices(1, 197)
    assert torch.equal(table[0], torch.arange(197, dtype=torch.int32)) and torch.equal(table[1], table[0].flip(0))
    assert table[0, place] == place and table[1, 196 - place] == place


def test_tables_are_made_once_and_outlive_inference_mode() -> None:
    order = ScanOrder("only_here", (row_major,))
    with torch.inference_mode():
        table = order.indices(3, 4)
    assert table is order.indices(3, 4) and not table.is_inference()
    with torch.device("meta"):
        assert order.indices(3, 9).device.type == "cpu"


def test_user_made_orders_run_by_name() -> None:
    def diagonal(height: int, width: int) -> Tensor:
        row = torch.arange(height).repeat_interleave(width)
        column = torch.arange(width).repeat(height)
        return torch.argsort((row + column) * height + row)

    order = scans.register(ScanOrder("diagonal", (diagonal, reverse(diagonal))))
    assert scans.get("diagonal") is order and scans.register(order) is order and "diagonal" in scans.names()
    assert order.indices(2, 3).tolist()[0] == [0, 1, 3, 2, 4, 5]
    table = torch.ops.vision_mamba.scan_indices(torch.zeros(1), "diagonal", 2, 3)
    assert torch.equal(table, order.indices(2, 3))
    with pytest.raises(ValueError, match="an order named 'diagonal' exists; choose another name"):
        scans.register(ScanOrder("diagonal", (row_major,)))


def test_the_same_order_may_be_written_and_registered_twice() -> None:
    def write() -> ScanOrder:
        pieces = window(3), reverse(window(3)), transpose(snake), atrous(2), reverse(atrous(3, (1, 1)))
        return ScanOrder("twice", pieces)

    assert scans.register(write()) == scans.register(write())
    assert window(3) is not window(4) and atrous(2) is not atrous(2, (0, 0))


def test_unknown_names_get_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"no scan order is named 'cros'; known are .*; did you mean 'cross'\?"):
        scans.get("cros")
    with pytest.raises(ValueError, match=r"no scan order is named 'xyzzy'; .* register it with"):
        torch.ops.vision_mamba.scan_indices(torch.zeros(1), "xyzzy", 2, 3)


@pytest.mark.parametrize(
    ("route", "sentence"),
    [
        (
            lambda h, w: torch.arange(h * w) + 1,
            r"'bad': route 0 on a 2 x 3 grid must visit tokens from 0 to 5 .* got 6",
        ),
        (lambda h, w: torch.arange(h * w) - 2, r"must visit tokens from 0 to 5 or -1 for padding, got -2"),
        (lambda h, w: torch.arange(h * w) // 2, r"visits token 0 2 times; once a route is the rule"),
        (lambda h, w: torch.zeros(h, w), r"must be a tensor of whole numbers \(steps,\)"),
        (lambda h, w: [0, 1], r"must be a tensor of whole numbers \(steps,\), got \[0, 1\]"),
        (lambda h, w: torch.arange(0), r"must be a tensor of whole numbers"),
    ],
)
def test_broken_routes_are_refused(route, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        ScanOrder("bad", (route,)).indices(2, 3)


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="'none': an order needs at least one route"):
        ScanOrder("none", ())
    with pytest.raises(ValueError, match="window: size must be a whole number of at least 1, got 0"):
        window(0)
    with pytest.raises(ValueError, match=r"atrous: step must be a whole number of at least 1, got 1\.5"):
        atrous(1.5)
    with pytest.raises(ValueError, match=r"atrous: offset must be two numbers from 0 to 1, got \(0, 2\)"):
        atrous(2, (0, 2))
    with pytest.raises(ValueError, match="the grid must have tokens, got 0 x 3; sides are whole"):
        scans.CROSS.indices(0, 3)
    with pytest.raises(ValueError, match=r"the grid must have tokens, got 4\.5 x 4; sides are whole"):
        scans.CROSS.indices(4.5, 4)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"'three': route 0 must be a function \(height, width\) -> tokens, got 3; "):
        ScanOrder("three", (3,))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="class_token must be from 0 to 6, got 7"):
        scans.CROSS.indices(2, 3, class_token=7)


def test_examples_in_docstrings() -> None:
    result = doctest.testmod(routes)
    assert result.attempted >= 7 and result.failed == 0
