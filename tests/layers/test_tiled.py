"""A scan in tiles is the scan of the whole, and the page on it is true."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import pytest
import torch

from vision_mamba import ops, scans
from vision_mamba.layers import tiled
from vision_mamba.layers.tiled import Tile, scan_in_tiles

PAGE = Path(__file__).resolve().parents[2] / "docs" / "tiled.md"


@pytest.mark.parametrize("order", [scans.FORWARD, scans.BIDIRECTIONAL], ids=lambda order: order.name)
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])
@pytest.mark.parametrize("lengths", [(24,), (7, 1, 16), (12, 12)])
def test_tiles_give_what_the_whole_gives(order: scans.ScanOrder, shared: bool, lengths: tuple[int, ...]) -> None:
    routes, length, width, states, rank = len(order), sum(lengths), 6, 3, 2
    x = torch.randn(2, length, *(() if shared else (routes,)), width)
    dt, B, C = (torch.randn(2, length, routes, size) for size in (rank, states, states))
    A, D, bias = -torch.rand(routes, width, states), torch.randn(routes, width), torch.randn(routes, width)
    weight = torch.randn(routes, width, rank)
    tiles = [Tile(*parts) for parts in zip(*(part.split(lengths, 1) for part in (x, dt, B, C)), strict=True)]
    found = scan_in_tiles(tiles, A, D, weight, bias)
    assert [part.shape[1] for part in found] == list(lengths)
    whole = ops.cross_selective_scan(
        x, dt, A, B, C, D, indices=order.indices(1, length), dt_weight=weight, dt_bias=bias
    )
    assert (torch.cat(found, 1) - whole).norm() < 1e-6 * whole.norm()


def test_tiles_are_asked_for_one_by_one_there_and_back() -> None:
    asked: list[int] = []

    class Lazy:
        def __len__(self) -> int:
            return 3

        def __getitem__(self, place: int) -> Tile:
            asked.append(place)
            return Tile(*(torch.ones(1, 2, 2, size) for size in (4, 4, 1, 1)))

    scan_in_tiles(Lazy(), -torch.ones(2, 4, 1))  # type: ignore[arg-type]
    assert asked == [0, 1, 2, 2, 1, 0]


def test_more_routes_are_refused() -> None:
    with pytest.raises(ValueError, match="A must be of one route or two, there and back, got 4"):
        scan_in_tiles([], -torch.ones(4, 2, 1))


@pytest.mark.parametrize("routes", [1, 3])
def test_a_route_too_many_or_too_few_is_named(routes: int) -> None:
    A, tile = -torch.ones(2, 4, 1), Tile(*(torch.ones(1, 2, routes, size) for size in (4, 4, 1, 1)))
    with pytest.raises(ValueError, match=rf"x of tile 0 must be .* A's 2 routes, got \(1, 2, {routes}, 4\)"):
        scan_in_tiles([tile], A)
    with pytest.raises(ValueError, match=rf"dt_bias must be of A's 2 routes, got {routes}"):
        scan_in_tiles([], A, dt_bias=torch.ones(routes, 4))


def test_the_page_and_the_docstring_run(one_thread) -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 5 and all(block.endswith("\n\n") for block in blocks)
    done = doctest.testfile(str(PAGE), module_relative=False, encoding="utf-8")
    assert done.attempted > 20 and done.failed == 0
    done = doctest.testmod(tiled)
    assert done.attempted == 5 and done.failed == 0
