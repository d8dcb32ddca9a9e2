"""Data in the format of COCO: what a detector gets to see, and what is said of data that is wrong."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.detection import drawn
from tools import make_digits_coco
from vision_mamba.detection.coco import encoded, open_split
from vision_mamba.detection.metrics import measure
from vision_mamba.train.errors import DataError

Lists = dict[str, Any]


@pytest.fixture
def lists() -> Lists:
    return drawn.content(3, np.random.default_rng(0))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return drawn.draw(tmp_path, train=3, val=1)


def test_boxes_labels_and_masks_are_those_annotated(root: Path) -> None:
    images = open_split(root, "train", masks=True)
    assert images.names == ["light", "dark"] and len(images) == 3
    for number in range(3):
        pixels, target = images[number]
        entry = images.info(number)
        assert pixels.shape == (3, entry["height"], entry["width"]) and pixels.dtype == torch.uint8
        assert int(target["image_id"]) == entry["id"]
        for box, label, mask in zip(target["boxes"].int(), target["labels"], target["masks"], strict=True):
            inside = torch.zeros_like(mask)
            inside[box[1] : box[3], box[0] : box[2]] = 1
            assert torch.equal(mask, inside)
            assert (pixels[0][mask.bool()] == drawn.SQUARE[{1: 3, 2: 7}[int(label)]]).all()


def change(lists: Lists, number: int, **what: Any) -> None:
    lists["annotations"][number].update(what)


FAULTS: dict[str, tuple[Callable[[Lists], None], str]] = {
    "unknown category": (
        lambda lists: change(lists, 0, category_id=5),
        r"annotation 1: category_id 5 is not among the categories \(3, 7\)",
    ),
    "unknown image": (lambda lists: change(lists, 0, image_id=99), "annotation 1: image_id 99 is not among the images"),
    "empty box": (lambda lists: change(lists, 1, bbox=[4, 4, 0, 9]), r"annotation 2: its box \[4, 4, 0, 9\] is empty"),
    "outside": (lambda lists: change(lists, 1, bbox=[40, 4, 20, 9]), "lies outside the image, which is 48 x 64"),
    "text": (
        lambda lists: change(lists, 0, bbox=["1", "2", "3", "4"]),
        "annotation 1: has bbox .* must be four numbers",
    ),
    "a list for a number": (
        lambda lists: change(lists, 0, category_id=[3]),
        "has category_id .* must be a whole number",
    ),
    "a word for a flag": (
        lambda lists: change(lists, 1, iscrowd="no"),
        "annotation 2: has iscrowd 'no', which must be",
    ),
    "odd polygon": (
        lambda lists: change(lists, 0, segmentation=[[1, 2, 3, 4, 5]]),
        "must be polygons, each a list of 3",
    ),
    "mask of another size": (
        lambda lists: change(lists, 0, segmentation={"size": [5, 5], "counts": [25]}),
        r"of size \[5, 5\], the image of \[64, 48\]",
    ),
    "mask too short": (
        lambda lists: change(lists, 0, segmentation={"size": [64, 48], "counts": [25]}),
        "counts that are no run lengths of the image",
    ),
    "no object at all": (
        lambda lists: lists["annotations"].__setitem__(0, None),
        r"annotations\[0\]: must be an object",
    ),
    "no box": (lambda lists: change(lists, 0, bbox=[1, 2]), "must be four numbers x, y, width, height"),
    "not a number": (lambda lists: change(lists, 0, bbox=[1, 2, 3, float("nan")]), "must be four numbers"),
    "no mask": (lambda lists: change(lists, 2, segmentation=[]), "annotation 3: its segmentation is empty"),
    "missing image": (lambda lists: lists["images"][0].update(file_name="x.png"), r"x.png \(id 10\) does not exist"),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_what_is_wrong_is_named_and_can_be_left_out(root: Path, lists: Lists, kind: str, caplog) -> None:
    spoil, complaint = FAULTS[kind]
    sound = len(lists["annotations"])
    spoil(lists)
    drawn.write(root, "train", lists)
    with pytest.raises(DataError, match=complaint) as refused:
        open_split(root, "train", masks=True)
    assert "has 1 faults among 3 images" in str(refused.value) and "--skip-bad" in str(refused.value)
    with caplog.at_level(logging.WARNING):
        images = open_split(root, "train", masks=True, skip_bad=True)
    assert "left out" in caplog.text
    left = sum(len(objects) for objects in images.objects.values())
    assert (len(images), left) == ((2, sound - 2) if kind == "missing image" else (3, sound - 1))


def test_detectors_without_masks_need_none(root: Path, lists: Lists) -> None:
    for annotation in lists["annotations"]:
        del annotation["segmentation"]
    drawn.write(root, "train", lists)
    assert "masks" not in open_split(root, "train")[0][1]


def test_a_box_that_sticks_out_by_a_rounding_is_cut(root: Path, lists: Lists) -> None:
    change(lists, 0, bbox=[-0.5, 2, 20, 62.7])
    drawn.write(root, "train", lists)
    assert open_split(root, "train")[0][1]["boxes"][0].tolist() == [0, 2, 19.5, 64]


@pytest.mark.parametrize("numbers", [(0, 1, 2, 3, 4), (5, 5, 5, 5, 5), ("a", None, "b", "c", "d")])
def test_the_numbers_of_annotations_do_not_matter(root: Path, lists: Lists, numbers: tuple) -> None:
    """pycocotools counts an object of number 0 as not found."""
    for place, number in enumerate(numbers):
        change(lists, place, id=number)
    drawn.write(root, "train", lists)
    images = open_split(root, "train")
    found = [
        {"image_id": one["image_id"], "category_id": one["category_id"], "bbox": one["bbox"], "score": 1.0}
        for one in lists["annotations"]
    ]
    assert measure(images, found, masks=False)["AP"] == 1.0


def test_a_mask_that_cannot_be_drawn_is_named(root: Path, lists: Lists) -> None:
    change(lists, 0, segmentation={"size": [64, 48], "counts": "damaged"})
    drawn.write(root, "train", lists)
    with pytest.raises(DataError, match=r"with box \[8, 40, 18, 18\] on 10.png \(image_id 10\) cannot be drawn"):
        open_split(root, "train", masks=True)[0]


def test_crowds_are_not_learned(root: Path, lists: Lists) -> None:
    lists["annotations"] = [one for one in lists["annotations"] if one["image_id"] != 10]
    crowd = encoded(np.ones((64, 48), bool))
    one = {"id": 99, "image_id": 10, "category_id": 3, "iscrowd": 1, "bbox": [0, 0, 48, 64], "segmentation": crowd}
    lists["annotations"].append(one)
    drawn.write(root, "train", lists)
    images = open_split(root, "train", masks=True)
    assert images[0][1]["boxes"].shape == (0, 4) and images[0][1]["masks"].shape == (0, 64, 48)
    assert open_split(root, "train", keep_empty=False).images == [11, 12]


def test_a_file_of_another_size_or_kind_is_named(root: Path) -> None:
    images = open_split(root, "train")
    Image.new("RGB", (10, 10)).save(root / "train" / "10.png")
    (root / "train" / "11.png").write_text("no image")
    with pytest.raises(DataError, match=r"10.png \(id 10\) is 10 x 10, its annotation says 48 x 64"):
        images[0]
    with pytest.raises(DataError, match=r"11.png \(id 11\) cannot be read"):
        images[1]
    Image.fromarray(np.full((64, 48), 30_000, dtype=np.uint16)).save(root / "train" / "12.png")
    with pytest.raises(DataError, match=r"12.png \(id 12\) cannot be read: its pixels are wider than 8 bits"):
        images[2]


@pytest.mark.parametrize(
    "text, complaint",
    [("", "cannot be read"), ("[]", "must hold the lists"),
     ('{"images": [], "annotations": []}', "categories is missing"),
     ('{"images": [{"id": 1}], "annotations": [], "categories": []}', r"images\[0\] has no file_name, width, height"),
     ('{"images": [7], "annotations": [], "categories": []}', r"images\[0\] must be an object with id, .* got 7"),
     ('{"images": [{"id": 1, "file_name": 2, "width": 3, "height": 4}], "annotations": [], "categories": []}',
      r"images\[0\] has file_name 2, which must be text"),
     ('{"images": [{"id": 1, "file_name": "2", "width": "3", "height": 4}], "annotations": [], "categories": []}',
      r"images\[0\] has width '3', which must be a whole number above 0"),
     ('{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}',
      r"categories\[1\] has the id 1, as another one before it"),
     ('{"images": [], "annotations": [], "categories": []}', "no image with an object")],
)  # fmt: skip
def test_an_annotation_file_that_is_none_is_named(root: Path, text: str, complaint: str) -> None:
    (root / "annotations" / "instances_train.json").write_text(text)
    with pytest.raises(DataError, match=complaint):
        open_split(root, "train")


def test_the_layout_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"--data-dir is not given; the layout is DIR/annotations"):
        open_split(None, "train")
    with pytest.raises(DataError, match=r"instances_train.json does not exist; the layout is"):
        open_split(tmp_path, "train")


def test_digits_on_photographs_are_the_same_every_time(tmp_path: Path) -> None:
    for name, processes in (("one", 1), ("two", 2)):
        make_digits_coco.make(tmp_path / name, {"train": 2, "val": 1}, size=96, processes=processes)
    files = [sorted(path for path in (tmp_path / name).rglob("*.*")) for name in ("one", "two")]
    assert len(files[0]) == 5 and all(a.read_bytes() == b.read_bytes() for a, b in zip(*files, strict=True))
    images = open_split(tmp_path / "one", "train", masks=True)  # and nothing is wrong with them
    assert images.names == [str(digit) for digit in range(10)]
    for _, target in (images[0], images[1]):
        for box, mask in zip(target["boxes"].int().tolist(), target["masks"], strict=True):
            rows, columns = np.nonzero(mask.numpy())
            assert box == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert (target["masks"].sum(0) <= 1).all()


def test_a_folder_of_digits_that_cannot_be_made_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert make_digits_coco.main(["--out", str(tmp_path / "file" / "set"), "--train", "1", "--val", "1"]) == 1
    assert capsys.readouterr().err.startswith(f"error: --out {tmp_path / 'file' / 'set'}: ")
