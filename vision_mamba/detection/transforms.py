"""What is done to images, boxes and masks before the detector sees them; made of torchvision.transforms.v2."""

from __future__ import annotations

from typing import Any

import torch
from torchvision.transforms import v2

from vision_mamba.detection.options import Config


class RandomSizeCrop(v2.Transform):
    """Crop a part whose height and width are drawn, each by itself, from a range; the image limits them.

    Args:
        least: of either side, in pixels. greatest: of either side.
    """

    def __init__(self, least: int, greatest: int) -> None:
        super().__init__()
        self.least, self.greatest = least, greatest

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Where to crop."""
        height, width = v2.query_size(flat_inputs)
        sides = [self._draw(min(self.least, side), min(self.greatest, side)) for side in (height, width)]
        top, left = (self._draw(0, whole - part) for whole, part in zip((height, width), sides, strict=True))
        return {"top": top, "left": left, "height": sides[0], "width": sides[1]}

    @staticmethod
    def _draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, ()))

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Crop an image, boxes or masks."""
        return self._call_kernel(v2.functional.crop, inpt, **params)


def augmentation(config: Config) -> v2.Transform:
    """The transforms of training, resizing included; with crop_size those of DETR, arXiv:2005.12872, appendix A.4.

    An object of which a crop leaves nothing is dropped.
    """
    resize = v2.RandomShortestSize(list(config.min_size), config.max_size)
    steps: list[v2.Transform] = [v2.RandomPhotometricDistort()] if config.photometric else []
    steps.append(v2.RandomHorizontalFlip(config.hflip))
    if config.crop_size is None:
        steps.append(resize)
    else:
        before = v2.RandomShortestSize(list(config.crop_min_size), config.max_size)
        cropped = v2.Compose([before, RandomSizeCrop(*config.crop_size), resize])
        steps.append(v2.RandomChoice([resize, cropped]))
    return v2.Compose([*steps, v2.ClampBoundingBoxes(), v2.SanitizeBoundingBoxes(), *_as_floats()])


def preparation() -> v2.Transform:
    """The transforms of evaluation; the detector itself resizes, and brings its results back to the image's size."""
    return v2.Compose(_as_floats())


def _as_floats() -> list[v2.Transform]:
    return [v2.ToDtype(torch.float32, scale=True)]
