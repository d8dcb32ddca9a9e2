"""Average precision as COCO defines it, by pycocotools."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from vision_mamba.detection.coco import CocoSet, encoded, quiet

#: Of COCOeval's twelve figures those that are told, by their place: over IoU 0.5 to 0.95, at one IoU, by objects' size.
FIGURES = {"AP": 0, "AP50": 1, "AP75": 2, "AP_small": 3, "AP_medium": 4, "AP_large": 5, "AR": 8}

Found = list[dict[str, Any]]


def results(detections: Sequence[dict[str, Tensor]], image_ids: Sequence[int], categories: Sequence[int]) -> Found:
    """Detections of some images as COCO's results: plain data, one entry an object.

    Args:
        detections: boxes (n, 4) as x1, y1, x2, y2, scores, labels, and masks (n, 1, H, W) from 0 to 1 if there are.
        categories: label i + 1 stands for the i-th.
    """
    found: Found = []
    for image_id, one in zip(image_ids, detections, strict=True):
        corners = one["boxes"].cpu().double()
        boxes = torch.cat((corners[:, :2], corners[:, 2:] - corners[:, :2]), 1).tolist()
        columns = [boxes, one["labels"].tolist(), one["scores"].tolist()]
        masks = (one["masks"][:, 0] > 0.5).cpu().numpy() if "masks" in one else None
        for i, (box, label, score) in enumerate(zip(*columns, strict=True)):
            entry = {"image_id": image_id, "category_id": categories[label - 1], "bbox": box, "score": score}
            found.append(entry if masks is None else entry | {"segmentation": encoded(masks[i])})
    return found


def measure(held_out: CocoSet, found: Found, masks: bool) -> dict[str, float | None]:
    """Figures of the boxes, and with the prefix mask_ those of the masks; None where there is nothing to measure by.

    Args:
        found: as `results` gives them, of every image of the set.
    """
    measured: dict[str, float | None] = {}
    for kind, prefix in (("bbox", ""), *((("segm", "mask_"),) if masks else ())):
        with quiet():
            stats = _stats(held_out, found, kind)
        measured |= {f"{prefix}{name}": _known(stats[place]) for name, place in FIGURES.items()}
    return measured


def _known(figure: float) -> float | None:
    """pycocotools says -1 where there is no object of that size."""
    return None if figure < 0 else round(float(figure), 4)


def _stats(held_out: CocoSet, found: Found, kind: str) -> np.ndarray:
    detected = COCO()
    if found:  # loadRes refuses an empty list
        # It writes into the entries: areas and numbers, which differ between boxes and masks.
        other = "segmentation" if kind == "bbox" else "bbox"
        entries = [{key: value for key, value in one.items() if key != other} for one in found]
        detected = held_out.index.loadRes(entries)
    else:
        detected.dataset = {**held_out.index.dataset, "annotations": []}
        detected.createIndex()
    evaluation = COCOeval(held_out.index, detected, kind)
    evaluation.params.imgIds = sorted(held_out.images)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return np.asarray(evaluation.stats)
