"""Pictures: every step of a scan order is drawn where it is, and the commands write what they promise."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from PIL import Image

from tools import visualize
from vision_mamba import scans, viz
from vision_mamba.viz import Panel, draw_order, draw_orders, draw_panels


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
    out = tmp_path / "new" / "order.png"
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
        (["--order", "cross", "--image", "none.jpg", "--out", "o.xyz"], "cannot write o.xyz: its ending must be"),
        (["--order", "cross", "--out", "order"], "must be a file whose ending tells its format, such as .png"),
    ],
)
def test_the_command_says_what_is_wrong(arguments: list[str], complaint: str, tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        visualize.main(["order", "--out", str(tmp_path / "order.png"), *arguments])
    assert stopped.value.code != 0
    assert complaint in f"{stopped.value.code}{capsys.readouterr().err}"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints as tools/train.py writes them, of models that have learned nothing."""
    folder = tmp_path_factory.mktemp("trained")
    arguments = {"test_vmamba": {}, "test_vim": {"img_size": 32, "patch_size": 4}}
    for name, kwargs in arguments.items():
        model = timm.create_model(name, in_chans=1, num_classes=10, **kwargs)
        data_config = dict(input_size=[1, 32, 32], mean=[0.5], std=[0.5], interpolation="bicubic", crop_pct=1.0,
                           crop_mode="center")  # fmt: skip
        content = {"arch": name, "state_dict": model.state_dict(), "classes": [str(i) for i in range(10)]}
        content |= {"args": {"model": name, "model_kwargs": kwargs or None, "in_chans": 1}, "data_config": data_config}
        torch.save(content, folder / f"{name}.pth")
    return {name: folder / f"{name}.pth" for name in arguments}


@pytest.mark.parametrize("model, command", [*(("test_vmamba", name) for name in visualize.MODEL_COMMANDS),
                                            ("test_vim", "grad-cam"), ("test_vim", "attention")])  # fmt: skip
def test_commands_show_a_trained_model(model: str, command: str, trained: dict, tmp_path: Path, monkeypatch) -> None:
    drawn: list[list[list[Panel]]] = []
    monkeypatch.setattr(viz, "draw_panels", lambda rows: drawn.append(rows) or draw_panels(rows))
    extra = ["--images", "3"] if command in ("erf", "grad-cam", "pca") else []
    if (command, model) == ("attention", "test_vim"):
        extra = ["--layer", "blocks.1.mixer"]
    out = tmp_path / "o.png"
    assert visualize.main([command, "--checkpoint", str(trained[model]), "--out", str(out), *extra]) == 0
    with Image.open(out) as picture:
        assert picture.width > 200
    (rows,) = drawn
    shapes = {  # of the maps, row by row
        ("erf", "test_vmamba"): [(32, 32)] * 4,
        ("grad-cam", "test_vmamba"): [(1, 1)] * 3,
        ("grad-cam", "test_vim"): [(8, 8)] * 3,
        ("attention", "test_vmamba"): [(8, 8)] * 5 + [(4, 4)] * 5,
        ("attention", "test_vim"): [(8, 8)] * 3,
        ("routes", "test_vmamba"): [(8, 8)] * 4 + [(4, 4)] * 4,
        ("pca", "test_vmamba"): [],
    }
    heats = [panel.heat for row in rows for panel in row if panel.heat is not None]
    assert [heat.shape for heat in heats] == shapes[command, model]
    if command == "pca":
        assert [row[0].image.shape for row in rows] == [(32, 32), (8, 8, 3), (4, 4, 3), (2, 2, 3)]


def test_layers_are_chosen_by_name(trained: dict, tmp_path: Path) -> None:
    words = ["routes", "--checkpoint", str(trained["test_vim"]), "--out", str(tmp_path / "o.png"), "--layer"]
    assert visualize.main([*words, "blocks.2.mixer"]) == 0
    with pytest.raises(SystemExit, match=r"no layer 'blocks.9' scans; known are blocks.0.mixer, blocks.1.mixer"):
        visualize.main([*words, "blocks.9"])


def test_what_a_model_cannot_show_is_told(trained: dict, tmp_path: Path) -> None:
    words = ["grad-cam", "--checkpoint", str(trained["test_vim"]), "--out", str(tmp_path / "o.png")]
    with pytest.raises(SystemExit, match="the logits do not depend on the patches that come out of blocks"):
        visualize.main([*words, "--images", "1", "--index", "3"])
    with pytest.raises(SystemExit, match=r"none.pth does not exist"):
        visualize.main(["pca", "--checkpoint", "none.pth", "--out", "o.png"])


def test_the_command_writes_an_animation(tmp_path: Path) -> None:
    Image.fromarray(photo()).save(tmp_path / "photo.png")
    words = ["order", "--order", "forward", "--grid", "2x2", "--image", str(tmp_path / "photo.png")]
    assert visualize.main([*words, "--out", str(tmp_path / "o.gif")]) == 0
    with Image.open(tmp_path / "o.gif") as gif:
        assert gif.n_frames == 4
