"""Make class folders with as many images as one likes: each a handwritten digit on a part of a photograph.

    python tools/make_digits_folder.py --out output/digits_folder --train 100000 --val 5000
    python tools/train.py --config configs/digits/photographs.yaml --data-dir output/digits_folder

What they are made of, and whose it is, stands in vision_mamba/train/scenes.py. A digit's side is a fourth to three
fourths of the image's. The same arguments give the same set, with any number of processes.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from vision_mamba.train.scenes import SPLITS, compose, materials

CHUNK = 250  # images that a process makes at a time
QUALITY = 90  # of JPEG
_materials = functools.cache(materials)  # once a process


def write(out: Path, size: int, seed: int, split: str, first: int, count: int) -> int:
    """Write the images from `first` on; each is a function of seed, split and its number."""
    material, number = _materials()[split], SPLITS.index(split)
    for index in range(first, first + count):
        random = np.random.default_rng((seed, number, index))
        image, ((digit, _), *_) = compose(material, random, size, 1, (size // 4, 3 * size // 4))
        image.save(out / split / str(digit) / f"{index:07d}.jpg", quality=QUALITY)
    return count


def make(out: Path, counts: dict[str, int], size: int = 256, seed: int = 0, processes: int = 1) -> None:
    """Write the set.

    Args:
        out: folder that gets <split>/<digit>/*.jpg.
        counts: images of each split.
        size: side of an image in pixels.
    """
    for split in counts:
        for digit in range(10):
            (out / split / str(digit)).mkdir(parents=True, exist_ok=True)
    shares = [
        (split, first, min(CHUNK, count - first)) for split, count in counts.items() for first in range(0, count, CHUNK)
    ]
    _materials()  # which processes that are forked inherit
    task = functools.partial(write, out, size, seed)
    with ProcessPoolExecutor(processes) as pool:
        for _ in pool.map(task, *zip(*shares, strict=True)):
            pass


def main(arguments: list[str] | None = None) -> int:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--train", type=int, default=10000, help="images to train on (default 10000)")
    parser.add_argument("--val", type=int, default=1000, help="images held out (default 1000)")
    parser.add_argument("--size", type=int, default=256, help="side of an image in pixels (default 256)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="(default: one a core)")
    options = parser.parse_args(arguments)
    if min(options.train, options.val, options.processes) < 1 or not 32 <= options.size <= 1024:
        parser.error("--train, --val and --processes must be at least 1, --size from 32 to 1024")
    if options.out.exists() and any(options.out.iterdir()):
        parser.error(f"{options.out} holds something already; name another folder")
    began = time.perf_counter()
    make(options.out, {"train": options.train, "val": options.val}, options.size, options.seed, options.processes)
    seconds = time.perf_counter() - began
    sys.stdout.write(f"{options.out}: {options.train + options.val:,} images in {seconds:.1f} s\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
