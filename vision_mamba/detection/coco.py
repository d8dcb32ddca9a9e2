"""Images with annotated objects in the format of COCO, as a data set."""

from __future__ import annotations

import contextlib
import io
import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms.v2.functional import pil_to_tensor

from vision_mamba.detection import annotations as files
from vision_mamba.train.errors import DataError
from vision_mamba.train.images import eight_bits
from vision_mamba.train.seeds import seeded

_log = logging.getLogger("vision_mamba.detection")

Sample = tuple[Any, dict[str, Any]]


@dataclass
class CocoSet(Dataset):
    """Images of a split with their boxes, labels and, if wanted, masks.

    Args:
        folder: where the image files are.
        index: pycocotools' view of the annotations.
        images: ids of the images, in order.
        objects: id of an image -> its annotations; crowds are left out.
        categories: ids of the categories; label i + 1 stands for the i-th, 0 is the background.
        masks: give the masks of the objects too.
        transform: of torchvision.transforms.v2, on (image, target).
        seed: of the augmentation.
    """

    folder: Path
    index: COCO
    images: list[int]
    objects: dict[int, list[dict[str, Any]]]
    categories: list[int]
    masks: bool = False
    transform: Callable[[Any, Any], Sample] | None = None
    seed: int = 0
    _labels: dict[int, int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._labels = {category: number for number, category in enumerate(self.categories, 1)}

    def __len__(self) -> int:
        return len(self.images)

    @property
    def names(self) -> list[str]:
        """Of the categories, in the order of their labels."""
        return [self.index.cats[category]["name"] for category in self.categories]

    def info(self, number: int) -> dict[str, Any]:
        """The entry of an image: file_name, width, height, id."""
        return self.index.imgs[self.images[number]]

    def picture(self, number: int) -> Image.Image:
        """The decoded image.

        Raises: DataError naming the file if it cannot be read or is of another size than annotated.
        """
        entry = self.info(number)
        path = self.folder / entry["file_name"]
        try:
            with Image.open(path) as file:
                picture = eight_bits(file, "RGB")
        except Exception as error:  # decoders of damaged files raise nearly anything
            raise DataError(f"image {path} (id {entry['id']}) cannot be read: {error}") from error
        if picture.size != (entry["width"], entry["height"]):
            raise DataError(
                f"image {path} (id {entry['id']}) is {picture.width} x {picture.height}, its annotation says "
                f"{entry['width']} x {entry['height']}; boxes would lie at wrong places."
            )
        return picture

    def target(self, number: int) -> dict[str, Any]:
        """Boxes (n, 4) as x1, y1, x2, y2 within the image, labels (n,), and masks (n, H, W) if wanted."""
        entry, objects = self.info(number), self.objects[self.images[number]]
        size = (entry["height"], entry["width"])
        corners = torch.tensor([one["bbox"] for one in objects], dtype=torch.float32).reshape(-1, 4)
        corners[:, 2:] += corners[:, :2]
        corners[:, 0::2] = corners[:, 0::2].clamp(0, size[1])
        corners[:, 1::2] = corners[:, 1::2].clamp(0, size[0])
        target: dict[str, Any] = {
            "boxes": tv_tensors.BoundingBoxes(corners, format="XYXY", canvas_size=size),
            "labels": torch.tensor([self._labels[one["category_id"]] for one in objects], dtype=torch.int64),
        }
        if self.masks:
            layers = [self._mask(one) for one in objects]
            stacked = np.stack(layers) if layers else np.zeros((0, *size), np.uint8)
            target["masks"] = tv_tensors.Mask(torch.from_numpy(stacked))
        return target

    def _mask(self, one: dict[str, Any]) -> np.ndarray:
        try:
            return self.index.annToMask(one)
        except Exception as error:  # damaged run lengths raise several types
            entry = self.index.imgs[one["image_id"]]
            raise DataError(
                f"the segmentation of the object with box {one['bbox']} on {entry['file_name']} (image_id "
                f"{one['image_id']}) cannot be drawn: {error}"
            ) from error

    def __getitem__(self, number: int) -> Sample:
        picture, target = tv_tensors.Image(pil_to_tensor(self.picture(number))), self.target(number)
        if self.transform is not None:
            picture, target = self.transform(picture, target)
        # Plain tensors: the detectors know nothing of the kinds that the transforms go by.
        plain = {name: value.as_subclass(Tensor) for name, value in target.items()}
        return picture.as_subclass(Tensor), plain | {"image_id": torch.tensor(self.images[number])}

    def __getitems__(self, keys: Sequence[Any]) -> list[Sample]:
        """A batch: by numbers as they are, or by (epoch, batch, number) with the augmentation of that batch."""
        if not isinstance(keys[0], tuple):
            return [self[number] for number in keys]
        with seeded(self.seed, *keys[0]):
            return [self[number] for _, _, number in keys]

    def aspect(self, number: int) -> bool:
        """Whether an image is wider than high; batches of one kind waste less on padding."""
        entry = self.info(number)
        return entry["width"] > entry["height"]


def open_split(
    root: str | Path | None, split: str, masks: bool = False, skip_bad: bool = False, keep_empty: bool = True
) -> CocoSet:
    """A split of a data set laid out as COCO is: annotations/instances_<split>.json and images in <split>/.

    Args:
        masks: give masks, and hold the annotations to having them.
        skip_bad: leave out what is wrong and say so in the log.
        keep_empty: keep images without an object.

    Raises: DataError that counts and names what is wrong: a missing image, an annotation without area, a box outside
        its image, an unknown category or image, a missing mask; or if nothing is left.
    """
    layout = f"the layout is DIR/annotations/instances_{split}.json and DIR/{split}/*.jpg"
    if root is None:
        raise DataError(f"--data-dir is not given; {layout}.")
    annotations, folder = Path(root) / "annotations" / f"instances_{split}.json", Path(root) / split
    for path, there in ((annotations, annotations.is_file()), (folder, folder.is_dir())):
        if not there:
            raise DataError(f"{path} does not exist; {layout}.")
    content = files.read(annotations)
    absent = {entry["id"]: f"image {folder / entry['file_name']} (id {entry['id']}) does not exist"
              for entry in content["images"] if not (folder / entry["file_name"]).is_file()}  # fmt: skip
    wrong = dict(files.faults(content, masks))
    complaints = [*absent.values(), *wrong.values()]
    if complaints and not skip_bad:
        listed = "\n  ".join(complaints[:10])
        more = f"\n  ... and {len(complaints) - 10:,} more" if len(complaints) > 10 else ""
        raise DataError(
            f"{annotations} has {len(complaints):,} faults among {len(content['images']):,} images and "
            f"{len(content['annotations']):,} annotations:\n  {listed}{more}\n"
            "Mend them, or leave them out with --skip-bad."
        )
    for complaint in complaints:
        _log.warning("left out: %s", complaint)
    content["images"] = [entry for entry in content["images"] if entry["id"] not in absent]
    content["annotations"] = [
        one for i, one in enumerate(content["annotations"]) if i not in wrong and one["image_id"] not in absent
    ]
    return _set(content, folder, annotations, masks, keep_empty)


def _set(content: dict[str, Any], folder: Path, annotations: Path, masks: bool, keep_empty: bool) -> CocoSet:
    # Numbered anew from 1: pycocotools takes objects of equal numbers for one, and number 0 for not found.
    content["annotations"] = [
        {"iscrowd": 0, "area": one["bbox"][2] * one["bbox"][3], **one, "id": number}
        for number, one in enumerate(content["annotations"], 1)
    ]
    with quiet():
        index = COCO()
        index.dataset = content
        index.createIndex()
    objects: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for one in content["annotations"]:
        if not one["iscrowd"]:
            objects[one["image_id"]].append(one)
    images = [entry["id"] for entry in content["images"] if keep_empty or objects[entry["id"]]]
    if not images or not any(objects.values()):
        raise DataError(f"{annotations} has no image with an object; there is nothing to learn or to measure.")
    categories = sorted(entry["id"] for entry in content["categories"])
    return CocoSet(folder, index, images, {image: objects[image] for image in images}, categories, masks)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """pycocotools prints what it does."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def encoded(mask: np.ndarray) -> dict[str, Any]:
    """A mask (H, W) as COCO's run lengths, ready for JSON."""
    runs = rle.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(runs["size"]), "counts": runs["counts"].decode("ascii")}
