"""Make a small detection set in the format of COCO: handwritten digits on parts of photographs, with boxes and masks.

    python tools/make_digits_coco.py --out output/digits_coco

What they are made of, and whose it is, stands in vision_mamba/train/scenes.py. The same arguments give the same set.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from vision_mamba.detection.coco import encoded
from vision_mamba.train.scenes import compose, materials

SIDES = 20, 44  # least and greatest side of a digit, in pixels


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
            picture, objects = compose(material, random, size, most, SIDES)
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
    if min(options.train, options.val, options.most) < 1 or not SIDES[1] <= options.size <= 400:
        parser.error(f"--train, --val and --most must be at least 1, --size from {SIDES[1]} to 400")
    make(options.out, {"train": options.train, "val": options.val}, options.size, options.most, options.seed)
    sys.stdout.write(f"{options.out}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
