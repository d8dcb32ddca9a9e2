"""A sheet of images with true and detected objects side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torchvision
from PIL import Image, ImageDraw
from torch import Tensor
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

# Told apart by colour-blind readers too (Okabe and Ito); categories take turns.
COLOURS = ((230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167))
_SIDE, _GAP, _HEAD = 256, 6, 18  # of a tile, between tiles, and the line above: pixels


class Scene(NamedTuple):
    """An image (3, H, W) from 0 to 1, what is on it, and what was found: boxes, labels, masks, and scores of these."""

    image: Tensor
    truth: dict[str, Tensor]
    found: dict[str, Tensor]


def drawn(image: Tensor, objects: dict[str, Tensor], names: Sequence[str], side: int = _SIDE) -> Image.Image:
    """An image of that longer side with the boxes of its objects, their names and scores, and their masks.

    Args:
        image: (3, H, W) from 0 to 1.
        objects: boxes, labels, and if there are masks and scores.
        names: of the labels, which begin at 1.
    """
    scale = side / max(image.shape[-2:])
    size = [max(1, round(scale * length)) for length in image.shape[-2:]]
    resize = torchvision.transforms.v2.functional.resize
    canvas = (resize(image, size).clamp(0, 1) * 255).byte().cpu()
    labels = objects["labels"].tolist()
    if not labels:
        return _picture(canvas)
    colours = [COLOURS[label % len(COLOURS)] for label in labels]
    if "masks" in objects:
        masks = objects["masks"].reshape(len(labels), 1, *image.shape[-2:]).cpu().float()
        canvas = draw_segmentation_masks(canvas, resize(masks, size)[:, 0] > 0.5, alpha=0.45, colors=colours)
    captions = [names[label - 1] for label in labels]
    if "scores" in objects:
        scores = objects["scores"].tolist()
        captions = [f"{name} {100 * score:.0f}" for name, score in zip(captions, scores, strict=True)]
    stretch = torch.tensor([size[1] / image.shape[2], size[0] / image.shape[1]]).repeat(2)
    boxes = objects["boxes"].cpu() * stretch
    picture = _picture(draw_bounding_boxes(canvas, boxes, colors=colours, width=2))
    pen = ImageDraw.Draw(picture)
    for (left, top, *_), caption, colour in zip(boxes.tolist(), captions, colours, strict=True):
        corner = (left, max(0, top - 11))
        pen.rectangle(pen.textbbox(corner, caption), fill=colour)
        pen.text(corner, caption, "black")
    return picture


def _picture(canvas: Tensor) -> Image.Image:
    return Image.fromarray(canvas.permute(1, 2, 0).numpy())


def sheet(scenes: Sequence[Scene], names: Sequence[str], threshold: float = 0.5, columns: int = 4) -> Image.Image:
    """Truth above, detections of at least that score below, image beside image.

    Args:
        names: of the labels, which begin at 1.
        threshold: least score of a detection that is drawn.
    """
    rows = -(-len(scenes) // columns)
    across = min(columns, max(1, len(scenes)))
    made = Image.new("RGB", (across * (_SIDE + _GAP) - _GAP, rows * 2 * (_SIDE + _HEAD)), "white")
    pen = ImageDraw.Draw(made)
    for number, scene in enumerate(scenes):
        row, column = divmod(number, columns)
        sure = scene.found["scores"] >= threshold
        found = {name: value[sure] for name, value in scene.found.items()}
        heads = ("truth", f"found, score of at least {100 * threshold:.0f} %")
        for line, (head, objects) in enumerate(zip(heads, (scene.truth, found), strict=True)):
            left, top = column * (_SIDE + _GAP), (2 * row + line) * (_SIDE + _HEAD)
            pen.text((left + 2, top + 3), head, "black")
            made.paste(drawn(scene.image, objects, names), (left, top + _HEAD))
    return made


def write(scenes: Sequence[Scene], names: Sequence[str], path: Path) -> None:
    """Write a sheet as a PNG with a palette, a quarter of its size in full colour."""
    sheet(scenes, names).quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
