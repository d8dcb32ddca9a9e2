"""VideoMamba's models of images: Vim with the class token in front and the sum of both ways, not their mean.

Li et al. 2024, "VideoMamba: State Space Model for Efficient Video Understanding", arXiv:2403.06977. Published code and
weights: https://github.com/OpenGVLab/VideoMamba (Apache-2.0).

The published weights of the middle and the base model come from a training that drew their features towards those of
the small one; what it needed for that, and classifies nothing, is left out when they are loaded.
"""

import logging
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import trunc_normal_
from timm.models import generate_default_cfgs, register_model, register_model_deprecations
from torch import Tensor, nn

from vision_mamba.layers.bimamba import BiMamba
from vision_mamba.layers.init import init_in_float32_
from vision_mamba.models import vim
from vision_mamba.models.builder import build
from vision_mamba.models.checkpoint import unwrap
from vision_mamba.models.localmamba import LocalVim
from vision_mamba.models.vim import to_published as to_published

__all__ = ["VideoMamba"]

_log = logging.getLogger(__name__)


class VideoMamba(LocalVim):
    """`VisionMamba` with VideoMamba's start: LocalVim's, which draws the weights within the mixers alike too."""

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Fill all parameters as published; steps start from softplus(0) = 0.69.

        Args:
            needs_reset: fill those of the submodules anew too, as is needed after `to_empty`.
        """
        super().init_weights(needs_reset)
        for module in self.modules():
            if isinstance(module, BiMamba):
                for weight in (module.x_proj_weight, module.dt_weight):
                    init_in_float32_(weight, trunc_normal_, std=0.02)
                nn.init.zeros_(module.dt_bias)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: VideoMamba) -> dict[str, Tensor]:
    """Make a checkpoint fit, as `vim.checkpoint_filter_fn` does for Vim; a head for distillation is left out."""
    state = unwrap(state_dict)
    extra = [name for name in state if name.startswith("distill_head.")]
    if extra:
        _log.info("left out the head of distillation: %s", ", ".join(extra))
    return vim.checkpoint_filter_fn({name: state[name] for name in state if name not in extra}, model)


def _cfg(file: str = "", **kwargs: Any) -> dict[str, Any]:
    return {
        "hf_hub_id": "OpenGVLab/VideoMamba" if file else None,
        "hf_hub_filename": file or None,
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "crop_pct": 224 / 256,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "apache-2.0",
        "paper_name": "VideoMamba: State Space Model for Efficient Video Understanding",
        "paper_ids": "arXiv:2403.06977",
        "origin_url": "https://github.com/OpenGVLab/VideoMamba",
        **kwargs,
    }


_448, _576 = dict(input_size=(3, 448, 448)), dict(input_size=(3, 576, 576))

default_cfgs = generate_default_cfgs(
    {
        "videomamba_tiny_patch16_224.in1k": _cfg("videomamba_t16_in1k_res224.pth", notes=("top-1 76.9",)),
        "videomamba_small_patch16_224.in1k": _cfg("videomamba_s16_in1k_res224.pth", notes=("top-1 81.2",)),
        "videomamba_middle_patch16_224.dist_in1k": _cfg("videomamba_m16_in1k_res224.pth", notes=("top-1 82.8",)),
        "videomamba_base_patch16_224.dist_in1k": _cfg("videomamba_b16_in1k_res224.pth", notes=("top-1 82.7",)),
        # Trained further at 448 pixels, and from there at 576.
        "videomamba_tiny_patch16_448.in1k": _cfg("videomamba_t16_in1k_res224to448.pth", **_448, notes=("top-1 79.3",)),
        "videomamba_tiny_patch16_576.in1k": _cfg(
            "videomamba_t16_in1k_res224to448to576.pth", **_576, notes=("top-1 79.6",)
        ),
        "videomamba_small_patch16_448.in1k": _cfg("videomamba_s16_in1k_res224to448.pth", **_448, notes=("top-1 83.2",)),
        "videomamba_small_patch16_576.in1k": _cfg(
            "videomamba_s16_in1k_res224to448to576.pth", **_576, notes=("top-1 83.5",)
        ),
        "videomamba_middle_patch16_448.dist_in1k": _cfg(
            "videomamba_m16_in1k_res224to448.pth", **_448, notes=("top-1 83.8",)
        ),
        "videomamba_middle_patch16_576.dist_in1k": _cfg(
            "videomamba_m16_in1k_res224to448to576.pth", **_576, notes=("top-1 84.0",)
        ),
        "test_videomamba.untrained": _cfg(input_size=(3, 160, 160), crop_pct=0.95),
    }
)


def _create(variant: str, pretrained: bool = False, **kwargs: Any) -> VideoMamba:
    return build(VideoMamba, variant, pretrained, checkpoint_filter_fn, dict(out_indices=3), **kwargs)


_ARCHITECTURE: dict[str, Any] = dict(class_token="head", average_routes=False)


@register_model
def videomamba_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> VideoMamba:
    """VideoMamba-Ti; 76.9 top-1 as published."""
    model_args = dict(_ARCHITECTURE, embed_dim=192)
    return _create("videomamba_tiny_patch16_224", pretrained, **dict(model_args, **kwargs))


@register_model
def videomamba_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> VideoMamba:
    """VideoMamba-S; 81.2 top-1 as published."""
    model_args = dict(_ARCHITECTURE, embed_dim=384)
    return _create("videomamba_small_patch16_224", pretrained, **dict(model_args, **kwargs))


@register_model
def videomamba_middle_patch16_224(pretrained: bool = False, **kwargs: Any) -> VideoMamba:
    """VideoMamba-M; 82.8 top-1 as published."""
    model_args = dict(_ARCHITECTURE, embed_dim=576, depth=32)
    return _create("videomamba_middle_patch16_224", pretrained, **dict(model_args, **kwargs))


@register_model
def videomamba_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> VideoMamba:
    """VideoMamba-B; 82.7 top-1 as published."""
    model_args = dict(_ARCHITECTURE, embed_dim=768)
    return _create("videomamba_base_patch16_224", pretrained, **dict(model_args, **kwargs))


@register_model
def videomamba_tiny_patch16_448(pretrained: bool = False, **kwargs: Any) -> VideoMamba:
    """VideoMamba-Ti at 448 pixels; 79.3 top-1 as published."""
    model_args = dict(_ARCHITECTURE, embed_dim=192, img_size=448)
    return _create("videomamba_tiny_patch16_448", pretrained, **dict(model_args, **kwargs))


@register_model
def videomamba_tiny_patch16_576(pretrained: bool = False, **kwargs: Any) -> VideoMamba:
    """VideoMamba-Ti at 576 pixels; 79.6 top-1 as published."""
    model_args = dict(_ARCHITECTURE, embed_dim=192, img_size=576)
    return _create("videomamba_tiny_patch16_576", pretrained, **dict(model_args, **kwargs))


@register_model
def videomamba_small_patch16_448(pretrained: bool = False, **kwargs: Any) -> VideoMamba:
    """VideoMamba-S at 448 pixels; 83.2 top-1 as published."""
    model_args = dict(_ARCHITECTURE, embed_dim=384, img_size=448)
    return _create("videomamba_small_patch16_448", pretrained, **dict(model_args, **kwargs))


@register_model
def videomamba_small_patch16_576(pretrained: bool = False, **kwargs: Any) -> VideoMamba:
    """VideoMamba-S at 576 pixels; 83.5 top-1 as published."""
    model_args = dict(_ARCHITECTURE, embed_dim=384, img_size=576)
    return _create("videomamba_small_patch16_576", pretrained, **dict(model_args, **kwargs))


@register_model
def videomamba_middle_patch16_448(pretrained: bool = False, **kwargs: Any) -> VideoMamba:
    """VideoMamba-M at 448 pixels; 83.8 top-1 as published."""
    model_args = dict(_ARCHITECTURE, embed_dim=576, depth=32, img_size=448)
    return _create("videomamba_middle_patch16_448", pretrained, **dict(model_args, **kwargs))


@register_model
def videomamba_middle_patch16_576(pretrained: bool = False, **kwargs: Any) -> VideoMamba:
    """VideoMamba-M at 576 pixels; 84.0 top-1 as published."""
    model_args = dict(_ARCHITECTURE, embed_dim=576, depth=32, img_size=576)
    return _create("videomamba_middle_patch16_576", pretrained, **dict(model_args, **kwargs))


@register_model
def test_videomamba(pretrained: bool = False, **kwargs: Any) -> VideoMamba:
    """A VideoMamba small enough for tests."""
    model_args = dict(_ARCHITECTURE, img_size=160, embed_dim=48, depth=3)
    return _create("test_videomamba", pretrained, **dict(model_args, **kwargs))


register_model_deprecations(
    __name__,
    {
        "videomamba_tiny": "videomamba_tiny_patch16_224.in1k",
        "videomamba_small": "videomamba_small_patch16_224.in1k",
        "videomamba_middle": "videomamba_middle_patch16_224.dist_in1k",
        "videomamba_base": "videomamba_base_patch16_224.dist_in1k",
    },
)
