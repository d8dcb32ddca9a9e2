"""Copies of a model made ready for an exporter; the model itself stays as it is."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import nn


def _backbone(model: nn.Module) -> nn.Module:
    """The model in timm's wrapper for features_only, or the model."""
    return getattr(model, "model", model)


def coarsest(model: nn.Module) -> int:
    """Pixels a token of the last map: sides that are multiples of it are tiled at every stage."""
    return max(int(info["reduction"]) for info in _infos(_backbone(model)))


def _infos(model: nn.Module) -> list[dict[str, int]]:
    return getattr(model, "feature_info", None) or [{"reduction": 32}]


def takes_any_size(model: nn.Module) -> bool:
    return bool(getattr(_backbone(model), "dynamic_img_size", True))


def for_one_size(model: nn.Module, size: Sequence[int]) -> nn.Module:
    """The same for images of one size: position embeddings are resampled now and not in every call.

    Not so where the published code's behaviour at other sizes than the nominal one is asked for, which needs that.
    """
    fixed = copy.deepcopy(model)
    backbone: Any = _backbone(fixed)
    if hasattr(backbone, "dynamic_img_size") and not getattr(backbone, "published_quirks", False):
        backbone.set_input_size((int(size[0]), int(size[1])))
        backbone.dynamic_img_size = False
    return fixed


def as_plain(model: nn.Module) -> nn.Module:
    """The same with scans in plain torch, as timm's ``create_model(..., exportable=True)`` builds it."""
    plain = copy.deepcopy(model)
    for module in plain.modules():
        if getattr(module, "exportable", None) is False:
            setattr(module, "exportable", True)  # noqa: B010  modules declare no such attribute to mypy
    return plain


def int8_weights(model: nn.Module) -> nn.Module:
    """The same with the weights of its linear layers in int8, one scale a row; they are widened where they are used."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    narrow = copy.deepcopy(model)
    quantize_(narrow, Int8WeightOnlyConfig())
    return narrow
