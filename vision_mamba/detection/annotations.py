"""Annotation files in the format of COCO: reading them, and naming what is wrong with them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from vision_mamba.text import shortened
from vision_mamba.train.errors import DataError

EDGE = 1.0  # pixels that a box may stick out of its image: published annotations are rounded

Rule = tuple[str, Callable[[Any], bool]]  # what a value must be, and whether it is


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


_WHOLE: Rule = "a whole number", _is_whole
_SIDE: Rule = "a whole number above 0", lambda value: _is_whole(value) and value > 0
_TEXT: Rule = "text", lambda value: isinstance(value, str) and value != ""
_BOX: Rule = (
    "four numbers x, y, width, height",
    lambda value: isinstance(value, list) and len(value) == 4 and all(map(_is_number, value)),
)
_FLAG: Rule = "0 or 1", lambda value: value in (0, 1)
_AREA: Rule = "a number", _is_number

#: Of what everything else refers to; a mistake there cannot be left out.
_NEEDED = {
    "images": {"id": _WHOLE, "file_name": _TEXT, "width": _SIDE, "height": _SIDE},
    "categories": {"id": _WHOLE, "name": _TEXT},
}
_ANNOTATION = {"image_id": _WHOLE, "category_id": _WHOLE, "bbox": _BOX}
_OPTIONAL = {"iscrowd": _FLAG, "area": _AREA}


def read(path: Path) -> dict[str, Any]:
    """The lists images, annotations and categories of a file, of which the first and the last are sound.

    Raises: DataError naming the entry.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    for name in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(name), list):
            raise DataError(f"{path} must hold the lists images, annotations and categories; {name} is missing.")
    for name, rules in _NEEDED.items():
        seen: set[int] = set()
        for place, entry in enumerate(content[name]):
            if why := _fault(entry, rules):
                raise DataError(f"{path}: {name}[{place}] {why}.")
            if entry["id"] in seen:
                raise DataError(f"{path}: {name}[{place}] has the id {entry['id']}, as another one before it.")
            seen.add(entry["id"])
    return content


def faults(content: dict[str, Any], masks: bool) -> Iterator[tuple[int, str]]:
    """Annotations that cannot be learned from: their place in the list, and which and why.

    Args:
        masks: whether they must have masks.
    """
    sizes = {entry["id"]: (entry["width"], entry["height"]) for entry in content["images"]}
    categories = {entry["id"] for entry in content["categories"]}
    for place, one in enumerate(content["annotations"]):
        if why := _fault_of_annotation(one, sizes, categories, masks):
            yield place, f"{_name(one, place)}: {why}"


def _name(one: Any, place: int) -> str:
    return f"annotation {one['id']}" if isinstance(one, dict) and "id" in one else f"annotations[{place}]"


def _fault(entry: Any, rules: dict[str, Rule], optional: bool = False) -> str | None:
    if not isinstance(entry, dict):
        return f"must be an object with {', '.join(rules)}, got {entry!r:.60}"
    missing = [key for key in rules if key not in entry]
    if missing and not optional:
        return f"has no {', '.join(missing)}"
    for key, (rule, holds) in rules.items():
        if key in entry and not holds(entry[key]):
            return f"has {key} {entry[key]!r:.60}, which must be {rule}"
    return None


def _fault_of_annotation(one: Any, sizes: dict[int, tuple[int, int]], categories: set[int], masks: bool) -> str | None:
    if why := _fault(one, _ANNOTATION) or _fault(one, _OPTIONAL, optional=True):
        return why
    image = one["image_id"]
    if image not in sizes:
        return f"image_id {image} is not among the images"
    if one["category_id"] not in categories:
        return f"category_id {one['category_id']} is not among the categories ({shortened(sorted(categories))})"
    why = _fault_of_box(one["bbox"], *sizes[image])
    if why is None and masks:
        why = _fault_of_mask(one.get("segmentation"), *sizes[image])
    return why and f"{why} (image_id {image})"


def _fault_of_box(box: list[float], width: int, height: int) -> str | None:
    x, y, wide, high = box
    if wide <= 0 or high <= 0:
        return f"its box {box} is empty: width and height must be above 0"
    if x < -EDGE or y < -EDGE or x + wide > width + EDGE or y + high > height + EDGE:
        return f"its box {box} lies outside the image, which is {width} x {height}"
    return None


def _fault_of_mask(outline: Any, width: int, height: int) -> str | None:
    """What can be seen without drawing it: a file may hold a million."""
    if not outline:
        return "its segmentation is empty; detectors without masks need none"
    if isinstance(outline, dict):
        size, counts = outline.get("size"), outline.get("counts")
        if size != [height, width]:
            return f"its segmentation is of size {size}, the image of {[height, width]}"
        if isinstance(counts, str) or (
            isinstance(counts, list) and all(_is_whole(n) and n >= 0 for n in counts) and sum(counts) == height * width
        ):
            return None
        return "its segmentation has counts that are no run lengths of the image"
    polygons = outline if isinstance(outline, list) else [outline]
    for polygon in polygons:
        if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2 or not all(map(_is_number, polygon)):
            return "its segmentation must be polygons, each a list of 3 or more pairs x, y, or run lengths"
    return None
