"""Pictures to train on where none can be had: scanned handwritten digits on parts of photographs.

Digits and photographs are those that scikit-learn ships: 1,797 scanned digits of 8x8 pixels, a fourth of which is kept
for the held-out images, and two photographs (china.jpg by Flickr user danielbuechele and flower.jpg by Flickr user
vultilion, both CC BY 2.0), whose right thirds are kept for the held-out images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

HELD_OUT_DIGITS, HELD_OUT_WIDTH = 0.25, 1 / 3
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
    from sklearn.datasets import load_digits, load_sample_image
    from sklearn.model_selection import train_test_split

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


def compose(
    material: Material, random: np.random.Generator, size: int, most: int, sides: tuple[int, int]
) -> tuple[Image.Image, list[tuple[int, np.ndarray]]]:
    """One image of size x size pixels with 1 to `most` digits, and of each its label and mask (size, size).

    Args:
        sides: least and greatest side of a digit in pixels, at most `size`.
    """
    photograph = material.photographs[int(random.integers(len(material.photographs)))]
    whole = min(photograph.shape[:2])  # of which a part is reduced to the image, or all of it enlarged
    side = int(random.integers(min(size, whole), whole + 1))
    top, left = (int(random.integers(0, length - side + 1)) for length in photograph.shape[:2])
    part = Image.fromarray(photograph[top : top + side, left : left + side]).resize((size, size), Image.Resampling.BOX)
    canvas, taken = np.asarray(part, np.float64) / 255, np.zeros((size, size), bool)
    objects: list[tuple[int, np.ndarray]] = []
    for _ in range(int(random.integers(1, most + 1))):
        which = int(random.integers(len(material.labels)))
        stamp = _scaled(material.digits[which], int(random.integers(sides[0], sides[1] + 1)))
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
