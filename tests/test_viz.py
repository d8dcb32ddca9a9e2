"""Scan orders as pictures: every step is drawn where it is, and the command writes them."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from PIL import Image

from tools import visualize
from vision_mamba import scans
from vision_mamba.viz import draw_order, draw_orders


def photo(height: int = 60, width: int = 90) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def drawn_steps(panel: Axes) -> set[tuple]:
    lines = [c for c in panel.collections if isinstance(c, LineCollection) and c.get_capstyle() == "round"]
    return {tuple(map(tuple, segment)) for line in lines for segment in line.get_segments()}


@pytest.mark.parametrize("name", scans.names())
@pytest.mark.parametrize("grid", [(1, 1), (1, 5), (5, 1), (3, 4), (7, 7)])
def test_each_panel_draws_the_steps_of_its_route(name: str, grid: tuple[int, int]) -> None:
    figure = draw_order(name, photo(), grid)
    routes = scans.get(name).indices(*grid).tolist()
    assert len(figure.axes) == len(routes)
    for panel, route in zip(figure.axes, routes, strict=True):
        centres = [(token % grid[1] + 0.5, token // grid[1] + 0.5) for token in route if token >= 0]
        assert drawn_steps(panel) == set(pairwise(centres))
    figure.canvas.draw()


def test_orders_stand_side_by_side_under_their_names() -> None:
    figure = draw_orders(["cross", scans.BIDIRECTIONAL], photo(), (4, 4))
    assert len(figure.axes) == 6
    assert [text.get_text() for text in figure.texts] == ["cross", "bidirectional"]


def test_image_is_cut_to_the_shape_of_the_grid() -> None:
    height, width = draw_order("cross", photo(60, 90), (3, 3)).axes[0].images[0].get_array().shape[:2]
    assert (height, width) == (60, 60)
    height, width = draw_order("cross", Image.fromarray(photo(60, 90)), (1, 3)).axes[0].images[0].get_array().shape[:2]
    assert (height, width) == (30, 90)


def test_errors_name_the_rule_and_the_finding() -> None:
    with pytest.raises(ValueError, match=r"image must be \(height, width, 3\), got \(60, 90\)"):
        draw_order("cross", photo()[..., 0])
    with pytest.raises(ValueError, match="grid must be at least one row and one column"):
        draw_order("cross", photo(), (0, 3))
    with pytest.raises(ValueError, match="did you mean 'cross'"):
        draw_order("crosss", photo())


def test_the_command_writes_a_picture(tmp_path: Path) -> None:
    Image.fromarray(photo()).save(tmp_path / "photo.png")
    out = tmp_path / "order.png"
    which = ["order", "--order", "cross", "snake", "--image", str(tmp_path / "photo.png"), "--grid", "3x4"]
    assert visualize.main([*which, "--out", str(out)]) == 0
    with Image.open(out) as image:
        assert image.width > image.height > 100
        assert len(image.convert("RGB").getcolors(1 << 24)) > 50


def test_without_an_image_it_draws_on_the_dahlia(tmp_path: Path) -> None:
    assert visualize.load(None).size == (640, 427)


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["--order", "cros"], "did you mean 'cross'"),
        (["--order", "cross", "--grid", "7"], "must be rows x columns such as 7x7, got '7'"),
        (["--order", "cross", "--image", "none.jpg"], "cannot read the image none.jpg"),
        (["--order", "cross", "--out", "order.xyz"], "cannot write order.xyz"),
    ],
)
def test_the_command_says_what_is_wrong(arguments: list[str], complaint: str, tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        visualize.main(["order", "--out", str(tmp_path / "order.png"), *arguments])
    assert stopped.value.code != 0
    assert complaint in f"{stopped.value.code}{capsys.readouterr().err}"
