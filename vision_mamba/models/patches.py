"""What a checkpoint knows of its image size, made to fit another: patch kernels, position embedding, rotations."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from timm.layers import resample_patch_embed, to_2tuple
from torch import Tensor

from vision_mamba.layers.embed import count_patches
from vision_mamba.layers.tokens import resample_pos_embed, rotation

_log = logging.getLogger("vision_mamba")


def fit_patches(state: dict[str, Tensor], model: Any) -> None:
    """Resample the patch kernel and the position embedding of a state dict, by our names, to a plain model's sizes.

    Raises: ValueError if nothing says which grid the position embedding is for.
    """
    kernel = state["patch_embed.proj.weight"]
    fineness = model.patch_embed.fineness
    patch = (kernel.shape[2] * fineness, kernel.shape[3] * fineness)
    if model.pos_embed is not None:
        grid = _source_grid(state["pos_embed"], patch, model)
        size = model.patch_embed.grid_size
        if size != grid:
            _log.info("position embedding resampled from the checkpoint's grid %s to %s", grid, size)
        state["pos_embed"] = resample_pos_embed(state["pos_embed"], size, grid, model.class_token)
    if patch != model.patch_embed.patch_size:
        sides = [side // fineness for side in model.patch_embed.patch_size]
        state["patch_embed.proj.weight"] = resample_patch_embed(kernel, sides)


def _source_grid(pos_embed: Tensor, patch: tuple[int, int], model: Any) -> tuple[int, int]:
    """Grid that a checkpoint's position embedding is for: that of the image size it came with, or else a square."""
    size = getattr(model, "pretrained_model_args", {}).get("img_size")
    if size is None:
        size = getattr(model, "pretrained_cfg", {}).get("input_size", (3, 224, 224))[-2:]
    ours = model.patch_embed
    stride = patch if ours.stride == ours.patch_size else ours.stride
    patches = pos_embed.shape[1] - model.num_prefix_tokens
    grid = tuple(count_patches(*sides) for sides in zip(to_2tuple(size), patch, stride, strict=True))
    for rows, columns in (grid, ours.grid_size, (math.isqrt(patches),) * 2):
        if rows * columns == patches:
            return rows, columns
    raise ValueError(
        f"VisionMamba: the checkpoint's pos_embed is for {patches} patches, which is neither the grid {grid} of "
        f"{size} pixels nor a square; give the size it was trained at by pretrained_cfg_overlay=dict(input_size=...)."
    )


def take_out_rotations(state: dict[str, Tensor], model: Any) -> None:
    """Take a published file's tables of rotations out of its state dict, if they are what the model computes.

    Raises: ValueError if they are not.
    """
    tables = ("rope.freqs_sin", "rope.freqs_cos")
    if not all(name in state for name in tables):
        return
    theirs = torch.stack([state.pop(name) for name in tables]).float()
    side = math.isqrt(theirs.shape[1])
    ours = rotation(theirs, [side, side], [side, side], "none")
    if ours.shape != theirs.shape or not torch.allclose(ours, theirs, atol=1e-4):
        raise ValueError(
            f"{type(model).__name__}: the checkpoint's {' and '.join(tables)} are not the rotary embedding of a square "
            f"grid and {model.embed_dim} channels, which this model has; without them, the rest may load."
        )
