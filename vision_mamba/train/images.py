"""Images with labels, opened on demand, and where they come from."""

from __future__ import annotations

import glob
import itertools
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from timm.data.readers.img_extensions import get_img_extensions
from timm.data.readers.reader_image_folder import find_images_and_targets
from timm.utils.misc import natural_key
from torch.utils.data import Dataset

from vision_mamba.text import shortened
from vision_mamba.train.bad_images import BadImages
from vision_mamba.train.errors import DataError
from vision_mamba.train.sampler import Key
from vision_mamba.train.seeds import seeded

HELD_OUT_SYNONYMS = ("validation", "val", "valid", "eval")
DIGITS_HELD_OUT = 0.2
DIGITS_SPLIT_SEED = 0  # the split stays the same whatever the seed of a run, so that runs can be compared


def eight_bits(image: Image.Image, mode: str) -> Image.Image:
    """An image with 8 bits a channel.

    Raises: ValueError for pixels of 16 or 32 bits, of which all above 255 would turn white without a word.
    """
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"its pixels are wider than 8 bits (mode {image.mode}), which would cut them off at 255; "
                         "scale them to 8 bits first")  # fmt: skip
    return image.convert(mode)


@dataclass
class ImageSet(Dataset):
    """Images that are opened on demand.

    Args:
        names: one a image, a path where it is a file.
        targets: class index of each, -1 where unknown.
        classes: names of the classes, in the order of the indices.
        open_image: index -> PIL image, not yet decoded.
        mode: PIL mode that images are converted to, "RGB" or "L".
        transforms: PIL image -> tensor, one for each size of images.
        seed: of the augmentation, beside epoch and batch.
        bad: where unreadable images are told, which the next readable one stands in for; None raises at the first.
    """

    names: Sequence[str]
    targets: Sequence[int]
    classes: Sequence[str]
    open_image: Callable[[int], Image.Image]
    mode: str = "RGB"
    transforms: Sequence[Callable[[Image.Image], Any]] = ()
    seed: tuple[int, ...] = (0,)
    bad: BadImages | None = None

    def __len__(self) -> int:
        return len(self.names)

    def image(self, index: int) -> Image.Image:
        """The decoded image.

        Raises: DataError naming the file if it cannot be read.
        """
        try:
            with self.open_image(index) as image:
                return eight_bits(image, self.mode)
        except Exception as error:  # decoders of damaged files raise nearly anything
            raise DataError(f"image {self.names[index]} cannot be read: {_reason(error)}") from error

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """An image and its class, transformed."""
        return self._sample(index, 0)

    def __getitems__(self, keys: Sequence[int] | Sequence[Key]) -> list[tuple[Any, int]]:
        """A batch: by indices as they are, or by keys with the augmentation of that batch."""
        if not isinstance(keys[0], tuple):
            return [self[index] for index in keys]  # type: ignore[index]
        with seeded(*self.seed, keys[0].epoch, keys[0].batch):
            return [self._sample(key.image, key.size) for key in keys]  # type: ignore[union-attr]

    def _sample(self, index: int, size: int) -> tuple[Any, int]:
        """An image and its class, or the next that can be read."""
        for other in ((index + step) % len(self) for step in range(len(self))):
            try:
                return self.transforms[size](self.image(other)), self.targets[other]
            except DataError as error:
                if self.bad is None:
                    raise
                self.bad.tell(str(error))
        raise DataError(f"none of the {len(self):,} images can be read; see the log for each.")

    def only(self, keep: Sequence[int]) -> ImageSet:
        """The images of these indices."""
        names, targets = [self.names[i] for i in keep], [self.targets[i] for i in keep]
        return ImageSet(names, targets, self.classes, _Renumbered(self.open_image, keep), self.mode)


@dataclass(frozen=True)
class _Renumbered:
    """A lambda would not reach the loading processes."""

    open_image: Callable[[int], Image.Image]
    keep: Sequence[int]

    def __call__(self, index: int) -> Image.Image:
        return self.open_image(self.keep[index])


@dataclass(frozen=True)
class _Files:
    paths: Sequence[str]

    def __call__(self, index: int) -> Image.Image:
        return Image.open(self.paths[index])


@dataclass(frozen=True)
class _Arrays:
    pixels: np.ndarray

    def __call__(self, index: int) -> Image.Image:
        return Image.fromarray(self.pixels[index])


def _reason(error: Exception) -> str:
    """Why an image could not be read, without the name of the file, which PIL repeats."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return "not an image in a known format" if isinstance(error, Image.UnidentifiedImageError) else str(error)


def digits(held_out: bool, mode: str = "L") -> ImageSet:
    """The 1,797 handwritten digits that scikit-learn ships, 8x8 pixels in 17 greys; a stratified fifth is held out.

    Raises: DataError if scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise DataError("dataset digits comes with scikit-learn, which is missing: pip install scikit-learn") from error
    bunch = load_digits()
    chosen = train_test_split(
        np.arange(len(bunch.target)), test_size=DIGITS_HELD_OUT, stratify=bunch.target, random_state=DIGITS_SPLIT_SEED
    )[int(held_out)]
    pixels = np.round(bunch.images * (255 / 16)).astype(np.uint8)[chosen]
    names = [f"digit {index}" for index in chosen]
    return ImageSet(names, bunch.target[chosen].tolist(), [str(d) for d in range(10)], _Arrays(pixels), mode)


def split_folder(root: str | Path | None, split: str) -> Path:
    """The folder or tar file of a split under a data directory; a held-out one may go by any of its usual names.

    Raises: DataError if there is no directory, or none of that name in it.
    """
    layout = "the layout is DIR/train/<class>/*.jpg and DIR/val/<class>/*.jpg"
    if root is None:
        raise DataError(f"--data-dir is not given; {layout}, or choose --dataset digits.")
    root = Path(root)
    if not root.is_dir():
        found = "is not a directory" if root.exists() else "does not exist"
        raise DataError(f"--data-dir {root} {found}; {layout}.")
    names = dict.fromkeys((split, *HELD_OUT_SYNONYMS)) if split in HELD_OUT_SYNONYMS else (split,)
    for name in names:
        for place, there in ((root / name, Path.is_dir), (root / f"{name}.tar", Path.is_file)):
            if there(place):
                return place
    found = shortened(sorted(entry.name for entry in root.iterdir())) or "nothing, it is empty"
    raise DataError(f"--data-dir {root} must hold a folder {' or '.join(names)}, found {found}; {layout}.")


def class_folders(folder: str | Path, mode: str, classes: Sequence[str] | None = None) -> ImageSet:
    """The images below a folder, labelled by the name of the folder that each lies in.

    Args:
        classes: names in the order of their indices; sorted names if not given.

    Raises: DataError if there is no image, no class folder, or one that is not among `classes`.
    """
    folder = Path(folder)
    samples, class_to_idx = find_images_and_targets(str(folder))
    if not samples:
        what = "is empty" if not any(folder.iterdir()) else "has no image in it"
        raise DataError(f"{folder} {what}; known are files ending in {' '.join(get_img_extensions())}.")
    if "" in class_to_idx:
        loose = [Path(path).name for path, target in samples if target == class_to_idx[""]]
        raise DataError(
            f"{folder} must hold one folder a class, found {len(loose):,} images in none ({shortened(loose, 3)}); "
            f"move them into {folder}/<class>/."
        )
    found = sorted(class_to_idx, key=natural_key)
    classes = list(classes or found)
    if strange := [name for name in found if name not in classes]:
        raise DataError(
            f"{folder} has classes that are not trained on: {shortened(strange)}; known: {shortened(classes)}."
        )
    paths = [path for path, _ in samples]
    targets = [classes.index(found[target]) for _, target in samples]
    return ImageSet(paths, targets, classes, _Files(paths), mode)


def _matching(given: str | Path) -> Iterable[str | Path]:
    """The paths that a pattern stands for; what exists stands for itself, and what nothing fits too."""
    return [given] if os.path.exists(given) else sorted(glob.glob(str(given), recursive=True)) or [given]


def files(inputs: Iterable[str | Path], mode: str, classes: Sequence[str]) -> ImageSet:
    """Images given as files, folders and patterns, labelled where the folder that one lies in bears a class's name.

    Raises: DataError for a path that does not exist, a pattern that nothing fits and a folder without images.
    """
    paths: list[str] = []
    matched = (
        [each] if os.path.exists(each) else sorted(glob.glob(str(each), recursive=True)) or [each] for each in inputs
    )
    for given in map(Path, itertools.chain.from_iterable(matched)):
        if given.is_dir():
            kinds = get_img_extensions(True)
            found = (path for path in given.rglob("*") if path.suffix.lower() in kinds and not path.is_dir())
            below = sorted(map(str, found), key=natural_key)
            if not below:
                raise DataError(
                    f"{given} has no image in it; known are files ending in {' '.join(get_img_extensions())}."
                )
            paths += below
        elif given.is_file():
            paths.append(str(given))
        else:
            raise DataError(
                f"{given} does not exist; give image files, folders of them, or patterns such as 'a/*.jpg'."
            )
    index = {name: i for i, name in enumerate(classes)}
    targets = [index.get(Path(path).parent.name, -1) for path in paths]
    return ImageSet(paths, targets, classes, _Files(paths), mode)
