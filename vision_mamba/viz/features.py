"""What a model sees: effective receptive field, Grad-CAM, and the main components of its features."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vision_mamba.layers.tokens import class_first, count_class_tokens


def effective_receptive_field(features: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """How much each input pixel moves the middle of a feature map.

    With f the map, c over its channels and p its middle: mean over the images of sum_channels |d sum_c f_cp / d image|.

    Args:
        features: images -> (B, C, h, w), such as a `features_only` model's map of one stage.
        images: (B, C, H, W), prepared for it; the more, the smoother.

    Returns: (H, W), the largest value 1 unless all are 0.
    Reference: Luo et al. 2016, Understanding the Effective Receptive Field, arXiv:1701.04128.
    """
    images = images.detach().requires_grad_()
    with torch.enable_grad():
        tap = features(images)
        middle = tap[:, :, tap.shape[2] // 2, tap.shape[3] // 2].sum()
        (gradient,) = torch.autograd.grad(middle, images)
    field = gradient.abs().sum(1).mean(0)
    return field / field.max().clamp_min(torch.finfo(field.dtype).tiny)


def grad_cam(model: Any, images: Tensor, target: int | None = None, index: int | None = None) -> Tensor:
    """Where on the image the evidence for a class lies.

    With a_c the channels of a map and g_c the mean over its patches of the logit's gradient with respect to a_c:
        relu(sum_c g_c a_c)

    Class tokens are left out of the map, wherever they stand. Where the classifier reads a class token, what comes out
    of the last block tells nothing of the patches, as its head does not see them; there the map is taken before it.

    Args:
        model: a timm classifier, of this package or another, with `feature_info`.
        images: (B, C, H, W), prepared for it.
        target: class; the most likely one of each image by default.
        index: which entry of feature_info to take the map of; the last that the classifier reads patches of by default.

    Returns: (B, h, w), the largest value of each image 1 unless all are 0.
    Raises: ValueError for a class or an index that does not exist, or if the logits do not depend on that map.
    Reference: Selvaraju et al. 2017, Grad-CAM, arXiv:1610.02391.
    """
    taps = model.feature_info
    if index is None:
        index = len(taps) - (2 if getattr(model, "global_pool", None) == "token" else 1)
    if not -len(taps) <= index < len(taps):
        raise ValueError(f"grad_cam: index must be from 0 to {len(taps) - 1}, got {index}.")
    name = taps[index]["module"]
    kept: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Tensor) -> None:
        kept.append(output)

    hook = model.get_submodule(name).register_forward_hook(keep)
    try:
        with torch.enable_grad():
            logits = model(images.detach().requires_grad_())
    finally:
        hook.remove()
    if target is not None and not 0 <= target < logits.shape[1]:
        raise ValueError(f"grad_cam: target must be one of {logits.shape[1]} classes, counted from 0, got {target}.")
    chosen = logits.argmax(1) if target is None else torch.full((len(images),), target, device=logits.device)
    (gradient,) = torch.autograd.grad(logits.gather(1, chosen[:, None]).sum(), kept[0])
    channels, slopes = (_channels_last(model, tap, images) for tap in (kept[0].detach(), gradient))
    if not slopes.any():
        raise ValueError(
            f"grad_cam: the logits do not depend on the patches that come out of {name}; take another index."
        )
    cam = torch.einsum("bhwc,bc->bhw", channels, slopes.mean((1, 2))).relu()
    return cam / cam.amax((1, 2), keepdim=True).clamp_min(torch.finfo(cam.dtype).tiny)


def _channels_last(model: Any, tap: Tensor, images: Tensor) -> Tensor:
    """A tap as (B, h, w, C): a token sequence without its class tokens, or a map."""
    if tap.dim() == 4:
        return tap if getattr(model, "output_fmt", "NCHW") == "NHWC" else tap.permute(0, 2, 3, 1)
    where = getattr(model, "class_token", "none")
    tokens = class_first(tap, where)[:, count_class_tokens(where) :]
    return tokens.unflatten(1, model.patch_embed.dynamic_feat_size(tuple(images.shape[-2:])))


def feature_pca(features: Tensor, components: int = 3) -> Tensor:
    """The main components of a feature map, common to all images, so that equal colours mean alike features.

    Args:
        features: (B, C, h, w). components: how many.

    Returns: (B, h, w, components), each component from 0 to 1 between its 1st and 99th percentile, its sign such that
        the channel with the largest weight has a positive one.
    """
    batch, channels, height, width = features.shape
    points = features.detach().double().permute(0, 2, 3, 1).reshape(-1, channels)
    points = points - points.mean(0)
    axes = torch.linalg.svd(points, full_matrices=False)[2][:components]
    axes = axes * axes.gather(1, axes.abs().argmax(1, keepdim=True)).sign()
    found = points @ axes.T
    low, high = found.quantile(torch.tensor([0.01, 0.99], dtype=torch.float64), dim=0)
    scaled = (found - low) / (high - low).clamp_min(1e-12)
    return scaled.clamp(0, 1).reshape(batch, height, width, -1)
