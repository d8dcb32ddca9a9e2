"""Make a small detection set in the format of COCO: handwritten digits on parts of photographs, with boxes and masks.

    python tools/make_digits_coco.py --out output/digits_coco

What they are made of, and whose it is, stands in vision_mamba/train/scenes.py. The same arguments give the same set,
with any number of processes.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from vision_mamba.detection.coco import encoded
from vision_mamba.train.scenes import SPLITS, compose, materials

SIDES = 20, 44  # least and greatest side of a digit, in pixels
QUALITY = 90  # of JPEG
_materials = functools.cache(materials)  # once a process


def draw(folder: Path, size: int, most: int, seed: int, split: str, image_id: int) -> list[dict[str, Any]]:
    """Write an image, which is a function of seed, split and its number, and tell what is on it."""
    random = np.random.default_rng((seed, SPLITS.index(split), image_id))
    picture, objects = compose(_materials()[split], random, size, most, SIDES)
    picture.save(folder / split / _name(image_id), quality=QUALITY)
    return [{"image_id": image_id, **_annotation(digit, mask)} for digit, mask in objects]


def make(out: Path, counts: dict[str, int], size: int = 256, most: int = 24, seed: int = 0, processes: int = 1) -> None:
    """Write the set.

    Args:
        out: folder that gets annotations/instances_<split>.json and <split>/*.jpg.
        counts: images of each split.
        size: side of an image. most: digits on one.
    """
    (out / "annotations").mkdir(parents=True, exist_ok=True)
    categories = [{"id": digit + 1, "name": str(digit), "supercategory": "digit"} for digit in range(10)]
    _materials()  # which processes that are forked inherit
    with ProcessPoolExecutor(processes) as pool:
        for split, count in counts.items():
            (out / split).mkdir(exist_ok=True)
            numbers = range(1, count + 1)
            drawn = pool.map(functools.partial(draw, out, size, most, seed, split), numbers, chunksize=50)
            objects = [one for objects in drawn for one in objects]
            content = {
                "images": [{"id": i, "file_name": _name(i), "width": size, "height": size} for i in numbers],
                "annotations": [{"id": number, **one} for number, one in enumerate(objects, 1)],
                "categories": categories,
            }
            (out / "annotations" / f"instances_{split}.json").write_text(json.dumps(content), encoding="utf-8")


def _name(image_id: int) -> str:
    return f"{image_id:06d}.jpg"


def _annotation(digit: int, mask: np.ndarray) -> dict[str, Any]:
    ys, xs = np.nonzero(mask)
    box = [int(xs.min()), int(ys.min()), int(xs.max() - xs.min() + 1), int(ys.max() - ys.min() + 1)]
    return {"category_id": digit + 1, "bbox": box, "area": int(mask.sum()), "iscrowd": 0, "segmentation": encoded(mask)}


def main(arguments: list[str] | None = None) -> int:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--train", type=int, default=1500, help="images to train on (default 1500)")
    parser.add_argument("--val", type=int, default=200, help="images held out (default 200)")
    parser.add_argument("--size", type=int, default=256, help="side of an image in pixels (default 256)")
    parser.add_argument("--most", type=int, default=24, help="digits on an image, at most (default 24)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="(default: one a core)")
    options = parser.parse_args(arguments)
    if min(options.train, options.val, options.most, options.processes) < 1 or not SIDES[1] <= options.size <= 400:
        parser.error(f"--train, --val, --most and --processes must be at least 1, --size from {SIDES[1]} to 400")
    if options.seed < 0:
        parser.error("--seed must not be below 0")
    counts = {"train": options.train, "val": options.val}
    try:
        make(options.out, counts, options.size, options.most, options.seed, options.processes)
    except OSError as error:  # a file in the way, no right to write, a full disk
        sys.stderr.write(f"error: --out {options.out}: {error}\n")
        return 1
    sys.stdout.write(f"{options.out}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
