"""Detectors of torchvision on timm backbones: a feature pyramid for any of them, and what each detector needs of it."""

from __future__ import annotations

import inspect
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import timm
import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torchvision.models import detection
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

import vision_mamba.models  # noqa: F401  registers this package's models with timm
from vision_mamba.layers.pyramid import SimpleFeaturePyramid
from vision_mamba.text import nearest


class Pyramid(nn.Module):
    """A timm backbone and a feature pyramid on it, as torchvision's detectors take it.

    Backbones whose maps grow coarser get a `FeaturePyramidNetwork`; plain ones, all of whose maps are of one size, the
    simple feature pyramid of ViTDet on their last map.

    Args:
        name: of the backbone, registered with timm.
        strides: reductions of the maps wanted, rising.
        channels: of every map that comes out.
        extra: make the levels above the last stride; called with the channels of the pyramid.
        tap_norm: a layer norm on every map that is taken from a backbone of several sizes.
        kwargs: arguments of the backbone, such as pretrained.

    Shape: (B, 3, H, W) -> levels by name, each (B, channels, H / stride, W / stride).
    Raises: ValueError if the backbone has no map of one of the strides.

    >>> levels = Pyramid("test_vmamba", (4, 8, 16, 32), 32)(torch.randn(1, 3, 64, 96))
    >>> {name: tuple(level.shape[1:]) for name, level in levels.items()}
    {'0': (32, 16, 24), '1': (32, 8, 12), '2': (32, 4, 6), '3': (32, 2, 3)}
    """

    def __init__(
        self,
        name: str,
        strides: Sequence[int] = (4, 8, 16, 32),
        channels: int = 256,
        extra: Callable[[int], nn.Module] | None = None,
        tap_norm: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        with torch.device("meta"):  # only to ask what maps there are
            asked = timm.create_model(name, features_only=True, **(kwargs | {"pretrained": False}))
        taps: Any = asked.feature_info
        reductions = taps.reduction()
        self.strides, self.out_channels = tuple(strides), channels
        self.plain = len(set(reductions)) == 1
        above = None if extra is None else extra(channels)
        if self.plain:
            self.body = timm.create_model(name, features_only=True, out_indices=(taps.out_indices[-1],), **kwargs)
            scales = [reductions[0] / stride for stride in self.strides]
            self.fpn = SimpleFeaturePyramid(taps.channels()[-1], channels, scales, above)
            self.norms = nn.ModuleList([nn.Identity()])
            return
        for stride in self.strides:
            if stride not in reductions:
                raise ValueError(f"Pyramid: {name} has no map of stride {stride}; it has {tuple(reductions)}.")
        chosen = [len(reductions) - 1 - reductions[::-1].index(stride) for stride in self.strides]
        indices = tuple(taps.out_indices[place] for place in chosen)
        self.body = timm.create_model(name, features_only=True, out_indices=indices, **kwargs)
        widths = [taps.channels()[place] for place in chosen]
        self.norms = nn.ModuleList([LayerNorm2d(width) if tap_norm else nn.Identity() for width in widths])
        self.fpn = FeaturePyramidNetwork(widths, channels, above)

    def no_weight_decay(self) -> set[str]:
        """What the backbone exempts, by its name here."""
        model: Any = getattr(self.body, "model", self.body)
        exempt = model.no_weight_decay() if hasattr(model, "no_weight_decay") else set()
        return {f"*{pattern.removeprefix('*')}" for pattern in exempt}

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        maps = [norm(tap) for norm, tap in zip(self.norms, self.body(x), strict=True)]
        return self.fpn(maps[0] if self.plain else OrderedDict((str(i), tap) for i, tap in enumerate(maps)))


@dataclass(frozen=True)
class Sizes:
    """What detectors are told beside their backbone."""

    classes: int  # the background counts as one
    levels: tuple[int, ...]  # strides, those above the backbone's too
    anchor_scale: float  # smallest anchor of a level over its stride
    head_channels: int


@dataclass(frozen=True)
class Detector:
    """A detector of torchvision: its class and arguments, on which strides, what is above them, its anchors' scale.

    `predictors` are its modules that give offsets of boxes, scores and masks.
    """

    kind: type[nn.Module]
    build: Callable[..., dict[str, Any]]  # pyramid, sizes -> its arguments
    strides: tuple[int, ...]
    extra: Callable[[int], nn.Module]
    extra_levels: int
    anchor_scale: float
    predictors: tuple[str, ...]
    masks: bool = False


def _faster_rcnn(pyramid: Pyramid, sizes: Sizes) -> dict[str, Any]:
    names = [str(i) for i in range(len(pyramid.strides))]
    pool = MultiScaleRoIAlign(names, output_size=7, sampling_ratio=2)
    anchors = tuple((round(sizes.anchor_scale * stride),) for stride in sizes.levels)
    return dict(
        rpn_anchor_generator=AnchorGenerator(anchors, ((0.5, 1.0, 2.0),) * len(anchors)),
        box_roi_pool=pool,
        box_head=TwoMLPHead(pyramid.out_channels * 49, sizes.head_channels),
        box_predictor=detection.faster_rcnn.FastRCNNPredictor(sizes.head_channels, sizes.classes),
    )


def _mask_rcnn(pyramid: Pyramid, sizes: Sizes) -> dict[str, Any]:
    channels, names = pyramid.out_channels, [str(i) for i in range(len(pyramid.strides))]
    return dict(
        mask_roi_pool=MultiScaleRoIAlign(names, output_size=14, sampling_ratio=2),
        mask_head=MaskRCNNHeads(channels, (channels,) * 4, dilation=1),
        mask_predictor=MaskRCNNPredictor(channels, channels, sizes.classes),
        **_faster_rcnn(pyramid, sizes),
    )


def _retinanet(pyramid: Pyramid, sizes: Sizes) -> dict[str, Any]:
    octaves = tuple(
        tuple(round(sizes.anchor_scale * stride * 2 ** (third / 3)) for third in range(3)) for stride in sizes.levels
    )
    anchors = AnchorGenerator(octaves, ((0.5, 1.0, 2.0),) * len(octaves))
    return dict(num_classes=sizes.classes, anchor_generator=anchors)


def _fcos(pyramid: Pyramid, sizes: Sizes) -> dict[str, Any]:
    if pyramid.out_channels % 32 or pyramid.out_channels < 64:  # a group of one channel says nothing of one pixel
        raise ValueError(
            f"fcos: its 32 group norms need a multiple of 32 channels, 64 or more, got {pyramid.out_channels}."
        )
    points = tuple((round(sizes.anchor_scale * stride),) for stride in sizes.levels)
    return dict(num_classes=sizes.classes, anchor_generator=AnchorGenerator(points, ((1.0,),) * len(points)))


def _p6p7(channels: int) -> nn.Module:
    return LastLevelP6P7(channels, channels)


_TWO_STAGE: dict[str, Any] = dict(
    strides=(4, 8, 16, 32), extra=lambda channels: LastLevelMaxPool(), extra_levels=1, anchor_scale=8.0
)
_ONE_STAGE: dict[str, Any] = dict(strides=(8, 16, 32), extra=_p6p7, extra_levels=2, predictors=("head",))
_BOXES = ("rpn.head", "roi_heads.box_predictor")
_MASKS = (*_BOXES, "roi_heads.mask_predictor")
DETECTORS = {
    "faster_rcnn": Detector(detection.FasterRCNN, _faster_rcnn, **_TWO_STAGE, predictors=_BOXES),
    "mask_rcnn": Detector(detection.MaskRCNN, _mask_rcnn, **_TWO_STAGE, predictors=_MASKS, masks=True),
    "retinanet": Detector(detection.RetinaNet, _retinanet, **_ONE_STAGE, anchor_scale=4.0),
    "fcos": Detector(detection.FCOS, _fcos, **_ONE_STAGE, anchor_scale=1.0),
}


def _widened(module: nn.Module, arguments: Any, outputs: Any) -> Any:
    """A forward hook: float32 of what autocast has narrowed.

    torchvision casts anchors and boxes to the type of the offsets, and in bfloat16 the pixels beyond 1,024 are 8 apart.
    """
    narrow = (torch.float16, torch.bfloat16)
    return tree_map(lambda value: value.float() if getattr(value, "dtype", None) in narrow else value, outputs)


def create_detector(
    detector: str,
    backbone: str,
    classes: int,
    strides: Sequence[int] | None = None,
    channels: int = 256,
    head_channels: int = 1024,
    anchor_scale: float | None = None,
    tap_norm: bool = True,
    min_size: int = 800,
    max_size: int = 1333,
    detector_kwargs: dict[str, Any] | None = None,
    **kwargs: Any,
) -> nn.Module:
    """A detector on a backbone; it takes lists of images (3, H, W) from 0 to 1, of any sizes, and of targets.

    Args:
        detector: "faster_rcnn", "mask_rcnn", "retinanet" or "fcos".
        backbone: a registered name, of this package or of timm.
        classes: kinds of objects, the background not counted; labels are from 1 to this.
        strides: reductions of the backbone's maps to detect on; the detector's own by default.
        channels: of the feature pyramid.
        head_channels: hidden width of the box head of Faster and Mask R-CNN.
        anchor_scale: side of a level's smallest anchor over its stride; the detector's own by default.
        tap_norm: a layer norm on every map taken from the backbone.
        min_size, max_size: in evaluation, the sides that images are resized to. In training they come resized.
        detector_kwargs: further arguments of torchvision's class, such as box_detections_per_img.
        kwargs: arguments of the backbone, such as pretrained or drop_path_rate.

    Returns: a module as torchvision's: losses by name in training, boxes, labels, scores (and masks) in evaluation.
    Raises: ValueError for sizes that contradict each other.

    >>> model = create_detector("fcos", "test_vmamba", classes=2, channels=64).eval()
    >>> sorted(model([torch.rand(3, 64, 80)])[0])
    ['boxes', 'labels', 'scores']
    """
    kind, further = DETECTORS[detector], detector_kwargs or {}
    # What torchvision's classes do not know, they swallow.
    known = [name for name in inspect.signature(kind.kind).parameters if name not in ("backbone", "kwargs")]
    for name in further:
        if name not in known:
            raise ValueError(f"{detector} takes no argument {name!r}; did you mean {nearest(name, known)!r}?")
    pyramid = Pyramid(backbone, strides or kind.strides, channels, kind.extra, tap_norm, **kwargs)
    levels = pyramid.strides + tuple(pyramid.strides[-1] * 2**i for i in range(1, kind.extra_levels + 1))
    sizes = Sizes(classes + 1, levels, anchor_scale or kind.anchor_scale, head_channels)
    card = timm.get_pretrained_cfg(backbone, allow_unregistered=True)
    image: dict[str, Any] = dict(
        min_size=min_size,
        max_size=max_size,
        image_mean=list(card.mean) if card else None,
        image_std=list(card.std) if card else None,
        size_divisible=math.lcm(32, pyramid.strides[-1]),
        _skip_resize=True,  # in training, where the transforms do it, boxes and masks included
    )
    model = kind.kind(pyramid, **(kind.build(pyramid, sizes) | image | further))
    for name in kind.predictors:
        model.get_submodule(name).register_forward_hook(_widened)
    return model
