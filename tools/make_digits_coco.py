"""Make a small detection set in the format of COCO: handwritten digits on parts of photographs, with boxes and masks.

    python tools/make_digits_coco.py --out output/digits_coco

Digits and photographs are those that scikit-learn ships: 1,797 scanned digits of 8x8 pixels, a fourth of which is kept
for the held-out images, and two photographs (china.jpg by Flickr user danielbuechele and flower.jpg by Flickr user
vultilion, both CC BY 2.0), whose right thirds are kept for the held-out images. The same arguments give the same set.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits, load_sample_image
from sklearn.model_selection import train_test_split

from vision_mamba.detection.coco import encoded

HELD_OUT_DIGITS, HELD_OUT_WIDTH = 0.25, 1 / 3
LEAST, GREATEST = 20, 44  # side of a digit, in pixels
SPLITS = ("train", "val")
# Strokes are light or dark, in one of several colours, so that colour does not tell the digits.
STROKES = ((255, 255, 255), (255, 225, 60), (130, 230, 255), (20, 20, 20), (150, 10, 40), (10, 40, 150))


@dataclass(frozen=True)
class Material:
    """What the images of a split are made of."""

    digits: np.ndarray  # (n, 8, 8), 0..16
    labels: np.ndarray  # (n,)
    photographs: Sequence[np.ndarray]  # (H, W, 3)


def materials() -> dict[str, Material]:
    """Of either split; no digit and no part of a photograph is in both."""
    bunch = load_digits()
    parts = train_test_split(
        bunch.images, bunch.target, test_size=HELD_OUT_DIGITS, stratify=bunch.target, random_state=0
    )
    made = {}
    for number, split in enumerate(SPLITS):
        photographs = []
        for name in ("china.jpg", "flower.jpg"):
            whole = load_sample_image(name)
            border = round(whole.shape[1] * (1 - HELD_OUT_WIDTH))
            photographs.append(whole[:, border:] if number else whole[:, :border])
        made[split] = Material(parts[number], parts[2 + number], photographs)
    return made


def compose(material: Material, random: np.random.Generator, size: int, most: int) -> tuple[Image.Image, list[Any]]:
    """One image of size x size pixels with 1 to `most` digits, and of each its label and mask (size, size)."""
    photograph = material.photographs[int(random.integers(len(material.photographs)))]
    side = int(random.integers(size, min(photograph.shape[:2]) + 1))
    top, left = (int(random.integers(0, whole - side + 1)) for whole in photograph.shape[:2])
    part = Image.fromarray(photograph[top : top + side, left : left + side]).resize((size, size), Image.Resampling.BOX)
    canvas, taken = np.asarray(part, np.float64) / 255, np.zeros((size, size), bool)
    objects: list[Any] = []
    for _ in range(int(random.integers(1, most + 1))):
        which = int(random.integers(len(material.labels)))
        stamp = _scaled(material.digits[which], int(random.integers(LEAST, GREATEST + 1)))
        for _ in range(20):  # tries to find room
            y, x = (int(random.integers(0, size - length + 1)) for length in stamp.shape)
            place = np.s_[y : y + stamp.shape[0], x : x + stamp.shape[1]]
            if not taken[place].any():
                colour = np.array(_visible(canvas[place].mean(), random)) / 255
                canvas[place] += stamp[..., None] * (colour - canvas[place])
                taken[place] = True
                mask = np.zeros((size, size), bool)
                mask[place] = stamp > 0.5
                objects.append((int(material.labels[which]), mask))
                break
    return Image.fromarray(np.round(canvas * 255).astype(np.uint8)), objects


def _scaled(digit: np.ndarray, side: int) -> np.ndarray:
    """A digit's ink, 0..1, enlarged to that side and cut to where there is any."""
    big = Image.fromarray((digit * (255 / 16)).astype(np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
    ink = np.clip(np.asarray(big, np.float64) / 255 * 1.4 - 0.2, 0, 1)
    rows, columns = np.flatnonzero(ink.max(1) > 0.5), np.flatnonzero(ink.max(0) > 0.5)
    return ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _visible(brightness: float, random: np.random.Generator) -> tuple[int, int, int]:
    """A light colour where it is dark, a dark one where it is light."""
    half = len(STROKES) // 2
    return STROKES[int(random.integers(half)) + (half if brightness > 0.5 else 0)]


def make(out: Path, counts: dict[str, int], size: int = 128, most: int = 6, seed: int = 0) -> None:
    """Write the set.

    Args:
        out: folder that gets annotations/instances_<split>.json and <split>/*.png.
        counts: images of each split.
        size: side of an image. most: digits on one.
    """
    (out / "annotations").mkdir(parents=True, exist_ok=True)
    categories = [{"id": digit + 1, "name": str(digit), "supercategory": "digit"} for digit in range(10)]
    for number, (split, material) in enumerate(materials().items()):
        random = np.random.default_rng((seed, number))
        (out / split).mkdir(exist_ok=True)
        images: list[Any] = []
        annotations: list[Any] = []
        for image_id in range(1, counts[split] + 1):
            picture, objects = compose(material, random, size, most)
            name = f"{image_id:06d}.png"
            picture.save(out / split / name)
            images.append({"id": image_id, "file_name": name, "width": size, "height": size})
            for digit, mask in objects:
                annotations.append({"id": len(annotations) + 1, "image_id": image_id, **_annotation(digit, mask)})
        content = {"images": images, "annotations": annotations, "categories": categories}
        (out / "annotations" / f"instances_{split}.json").write_text(json.dumps(content), encoding="utf-8")


def _annotation(digit: int, mask: np.ndarray) -> dict[str, Any]:
    ys, xs = np.nonzero(mask)
    box = [int(xs.min()), int(ys.min()), int(xs.max() - xs.min() + 1), int(ys.max() - ys.min() + 1)]
    return {"category_id": digit + 1, "bbox": box, "area": int(mask.sum()), "iscrowd": 0, "segmentation": encoded(mask)}


def main(arguments: list[str] | None = None) -> int:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--train", type=int, default=1000, help="images to train on (default 1000)")
    parser.add_argument("--val", type=int, default=200, help="images held out (default 200)")
    parser.add_argument("--size", type=int, default=128, help="side of an image in pixels (default 128)")
    parser.add_argument("--most", type=int, default=6, help="digits on an image, at most (default 6)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if min(options.train, options.val, options.most) < 1 or not GREATEST <= options.size <= 400:
        parser.error(f"--train, --val and --most must be at least 1, --size from {GREATEST} to 400")
    make(options.out, {"train": options.train, "val": options.val}, options.size, options.most, options.seed)
    sys.stdout.write(f"{options.out}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
