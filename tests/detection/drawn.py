"""A set in the format of COCO in an instant: bright squares (category 3) and dark ones (category 7) on grey noise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SQUARE = {3: 230, 7: 20}


def content(images: int, random: np.random.Generator, folder: Path | None = None) -> dict[str, Any]:
    """The lists of an annotation file; the images too if there is a folder. Every other image is wide."""
    entries, annotations = [], []
    for image_id in range(10, 10 + images):
        width, height = (64, 48) if image_id % 2 else (48, 64)
        entries.append({"id": image_id, "file_name": f"{image_id}.png", "width": width, "height": height})
        pixels = random.integers(100, 150, (height, width, 3), dtype=np.uint8)
        for number, category in enumerate((3, 7) if image_id % 3 else (3,)):
            side = int(random.integers(12, 20))
            x, y = int(random.integers(0, 24 - side + 4)) + 24 * number, int(random.integers(0, height - side))
            side = min(side, width - x)
            pixels[y : y + side, x : x + side] = SQUARE[category]
            corners = [x, y, x + side, y, x + side, y + side, x, y + side]
            annotations.append(
                {"id": len(annotations) + 1, "image_id": image_id, "category_id": category, "iscrowd": 0,
                 "bbox": [x, y, side, side], "area": side * side, "segmentation": [corners]}
            )  # fmt: skip
        if folder is not None:
            Image.fromarray(pixels).save(folder / f"{image_id}.png")
    categories = [{"id": 3, "name": "light"}, {"id": 7, "name": "dark"}]
    return {"images": entries, "annotations": annotations, "categories": categories}


def draw(root: Path, train: int = 8, val: int = 3) -> Path:
    """Write both splits."""
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    for seed, (split, count) in enumerate({"train": train, "val": val}.items()):
        (root / split).mkdir(exist_ok=True)
        write(root, split, content(count, np.random.default_rng(seed), root / split))
    return root


def write(root: Path, split: str, lists: dict[str, Any]) -> None:
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(lists))
