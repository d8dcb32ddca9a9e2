"""LocalMamba's orders: every choice of four directions by name, and what a map put back wrongly looks like."""

from __future__ import annotations

import doctest
import itertools

import pytest
import torch

from vision_mamba import scans
from vision_mamba.scans import local

DIRECTIONS = ("h", "hf", "v", "vf", "w2", "w2f", "w7", "w7f")


def test_every_choice_of_four_has_a_name_but_stands_in_no_list() -> None:
    assert tuple(local.DIRECTIONS) == DIRECTIONS
    for chosen in itertools.combinations(DIRECTIONS, 4):
        name = f"local_{'_'.join(chosen)}"
        assert len(scans.get(name)) == 4 and name not in scans.names()
    assert "local_2" in scans.names()


def test_flipped_directions_are_reversed_with_their_padding() -> None:
    table = scans.get("local_v_vf_w2_w2f").indices(3, 3)
    columns = [0, 3, 6, 1, 4, 7, 2, 5, 8]
    windows = [0, 1, 3, 4, 2, -1, 5, -1, 6, 7, -1, -1, 8, -1, -1, -1]
    end = [-1] * 7
    assert table.tolist() == [columns + end, columns[::-1] + end, windows, windows[::-1]]


@pytest.mark.parametrize("grid", [(2, 3), (5, 2), (4, 4)])
def test_columns_twice_is_what_a_reshape_of_the_wrong_shape_does(grid: tuple[int, int]) -> None:
    """Columns that are read as rows of the same map and turned, for want of the map's two sides being exchanged."""
    height, width = grid
    tokens = torch.arange(height * width)
    along = tokens.view(height, width).T.flatten()
    assert torch.equal(along.view(height, width).T.flatten(), local.columns_twice(height, width))
    assert torch.equal(along.view(width, height).T.flatten(), tokens)  # the right way


def test_column_routes_are_found_in_any_order() -> None:
    assert scans.column_routes("local_h_vf_w7_w7f") == [1]
    assert scans.column_routes("local_2") == scans.column_routes("snake") == []


def test_its_examples() -> None:
    assert doctest.testmod(local) == (0, 2)
