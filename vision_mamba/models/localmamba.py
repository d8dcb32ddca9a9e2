"""LocalMamba: Vim and VMamba that scan along windows too, in every block along the four directions that a search chose.

Huang et al. 2024, "LocalMamba: Visual State Space Model with Windowed Selective Scan", arXiv:2403.09338. Published code
and weights: https://github.com/hunto/LocalMamba (Apache-2.0). The search itself is not here, its results are.

LocalVim is Vim's stack with mixers along the grid of patches, LocalVMamba is VMamba's first version with attention to
the routes' channels. The published code puts the results of columns where they belong on square maps alone, resamples
the tables of the rotary embedding for other sizes than the nominal one, and does not filter where it makes the position
embedding smaller. The models here do all of that right, which is the same at the size that the weights are for, unless
they are made with ``published_quirks=True``: that is for weights that have been tuned on other maps by that code.
"""

from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import trunc_normal_
from timm.models import (
    generate_default_cfgs,
    register_model,
    register_model_deprecations,
)
from torch import Tensor, nn

from vision_mamba.layers.init import init_in_float32_
from vision_mamba.models import vim, vmamba
from vision_mamba.models.builder import build
from vision_mamba.models.pyramid import build_pyramid
from vision_mamba.models.vim import VisionMamba
from vision_mamba.models.vmamba import VMamba

__all__ = ["LocalVim"]


def _orders(*directions: str) -> tuple[str, ...]:
    """Names of registered scan orders, from those of their directions: rows, columns, windows, "f" for flipped."""
    return tuple(f"local_{chosen}" for chosen in directions)


# What the search chose, block by block.
_LOCALVIM = _orders(
    "h_vf_w7_w7f", "hf_w2f_w7_w7f", "h_hf_v_w7", "h_hf_v_vf", "h_hf_v_vf",
    "h_hf_v_vf", "hf_v_vf_w7", "hf_v_vf_w2f", "h_hf_v_vf", "h_hf_v_vf",
    "h_v_vf_w2", "h_v_vf_w2f", "h_hf_vf_w7", "hf_v_vf_w2", "h_hf_v_vf",
    "h_v_w2_w2f", "v_vf_w2_w7", "h_hf_v_w2", "h_hf_w2f_w7", "v_vf_w2_w2f",
)  # fmt: skip
_LOCALVMAMBA_TINY = _orders(
    "h_hf_w7_w7f", "hf_vf_w2_w2f",
    "hf_vf_w2f_w7", "hf_v_vf_w2",
    "h_hf_vf_w2f", "hf_vf_w2_w2f", "h_w2f_w7_w7f", "h_hf_v_vf", "h_vf_w7_w7f", "hf_v_w2_w7f", "v_vf_w2_w7f",
    "h_hf_vf_w2f", "vf_w2f_w7_w7f",
    "hf_vf_w2f_w7f", "hf_v_w7_w7f",
)  # fmt: skip
_LOCALVMAMBA_SMALL = _orders(
    "h_v_vf_w7f", "h_hf_v_w7",
    "hf_v_vf_w7", "hf_v_w2f_w7",
    "hf_v_w2f_w7", "hf_vf_w2_w7f", "hf_v_vf_w7", "h_v_vf_w7", "h_v_vf_w7", "h_v_vf_w7f", "h_hf_v_vf",
    "h_v_vf_w2", "v_vf_w2f_w7", "h_hf_v_w2", "hf_v_vf_w7f", "h_hf_v_vf", "h_v_vf_w7f", "h_v_vf_w7f",
    "h_hf_vf_w7", "hf_vf_w2f_w7", "hf_v_vf_w7f", "v_vf_w7_w7f", "h_v_vf_w7f", "hf_v_vf_w2", "h_v_vf_w2f",
    "h_hf_v_w7", "h_hf_w7_w7f", "h_vf_w2_w2f", "h_vf_w2_w7", "h_v_vf_w7f", "hf_v_w2f_w7",
    "hf_vf_w7_w7f", "h_v_w7_w7f",
)  # fmt: skip


class LocalVim(VisionMamba):
    """`VisionMamba` with LocalVim's start: with `scan_order`, its mixers are those of LocalVim already."""

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Fill all parameters as published: as Vim's but for a truncated normal in every projection.

        Args:
            needs_reset: fill those of the submodules anew too, as is needed after `to_empty`.
        """
        super().init_weights(needs_reset)
        self.patch_embed.proj.reset_parameters()
        if self.cls_token is not None:
            nn.init.zeros_(self.cls_token)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear) and not name.endswith("out_proj"):
                init_in_float32_(module.weight, trunc_normal_, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)


# Our names within a mixer -> published names of route k.
_ROUTE_NAMES = {
    "conv_weight": "conv1d_{}.weight",
    "conv_bias": "conv1d_{}.bias",
    "x_proj_weight": "x_proj_{}.weight",
    "dt_weight": "dt_proj_{}.weight",
    "dt_bias": "dt_proj_{}.bias",
    "A_log": "A_log_{}",
    "D": "D_{}",
}
_ROUTES = range(4)  # of every published block


def published_names(name: str) -> tuple[str, ...]:
    """What the published code calls one of LocalVim's parameters: one name, or four if ours is a stack of all routes.

    >>> published_names("blocks.3.mixer.D")
    ('layers.3.mixer.D_0', 'layers.3.mixer.D_1', 'layers.3.mixer.D_2', 'layers.3.mixer.D_3')
    """
    if not name.startswith("blocks."):
        return vim.published_names(name)
    prefix, _, last = name.replace("blocks.", "layers.").rpartition(".")
    if last in _ROUTE_NAMES:
        return tuple(f"{prefix}.{_ROUTE_NAMES[last].format(k)}" for k in _ROUTES)
    return (f"{prefix}.{last}",)


def to_published(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename and unstack LocalVim's state dict into the parameters that the published code loads.

    The tables of the rotary embedding, which the published code saves as well, are left out.
    """
    return vim.to_published(state_dict, published_names)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: LocalVim) -> dict[str, Tensor]:
    """Make a checkpoint fit a LocalVim, as `vision_mamba.models.vim.checkpoint_filter_fn` does for Vim."""
    return vim.checkpoint_filter_fn(state_dict, model, published_names)


def _cfg(url: str = "", **kwargs: Any) -> dict[str, Any]:
    return {
        "url": url,
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
        "paper_name": "LocalMamba: Visual State Space Model with Windowed Selective Scan",
        "paper_ids": "arXiv:2403.09338",
        "origin_url": "https://github.com/hunto/LocalMamba",
        **kwargs,
    }


def _pyramid_cfg(url: str = "", **kwargs: Any) -> dict[str, Any]:
    return _cfg(url, **dict(dict(pool_size=(7, 7), first_conv="stem.conv1", classifier="head.fc"), **kwargs))


_RELEASE = "https://github.com/hunto/LocalMamba/releases/download/v1.0.0/"

# Where there is no address, no weights have been published: for localvim_small the authors' page links another model's.
default_cfgs = generate_default_cfgs(
    {
        "localvim_tiny_patch16_224.in1k": _cfg(_RELEASE + "local_vim_tiny.ckpt", notes=("top-1 76.2",)),
        "localvim_tiny_patch16_midcls_224.in1k": _cfg(
            _RELEASE + "local_vim_tiny_middle_cls_token.ckpt", notes=("top-1 77.8",)
        ),
        "localvim_tiny_patch16_nosearch_224.untrained": _cfg(),
        "localvim_small_patch16_224.untrained": _cfg(notes=("top-1 81.1",)),
        "localvim_small_patch16_midcls_224.untrained": _cfg(),
        "localvmamba_tiny.untrained": _pyramid_cfg(notes=("top-1 82.7",)),
        "localvmamba_small.in1k": _pyramid_cfg(_RELEASE + "local_vssm_small.ckpt", notes=("top-1 83.7",)),
        # Ours.
        "localvmamba_tiny_steady.untrained": _pyramid_cfg(
            description="LocalVMamba with the mean of the routes and bounded scans; not a published model",
        ),
        "test_localvim.untrained": _cfg(input_size=(3, 160, 160), crop_pct=0.95),
        "test_localvmamba.untrained": _pyramid_cfg(input_size=(3, 160, 160), pool_size=(5, 5), crop_pct=0.95),
    }
)


def _create_localvim(variant: str, pretrained: bool = False, **kwargs: Any) -> LocalVim:
    return build(LocalVim, variant, pretrained, checkpoint_filter_fn, dict(out_indices=3), **kwargs)


def _create_localvmamba(variant: str, pretrained: bool = False, **kwargs: Any) -> VMamba:
    return build_pyramid(VMamba, variant, pretrained, vmamba.checkpoint_filter_fn, **kwargs)


_PLAIN: dict[str, Any] = dict(depth=20, class_token="none", global_pool="avg", rope=True, average_routes=False)
_MIDDLE: dict[str, Any] = dict(_PLAIN, class_token="middle", global_pool="token", rope=False)
_PYRAMID: dict[str, Any] = dict(
    d_state=16,
    ssm_ratio=2.0,
    ssm_conv_bias=True,
    gate=True,
    route_attention=True,
    mlp_ratio=0.0,
    stem="patch",
    downsample="merge",
)


@register_model
def localvim_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> LocalVim:
    """LocalVim-T: the mean of the patches, turned by their places; 76.2 top-1 as published."""
    model_args = dict(_PLAIN, embed_dim=192, scan_order=_LOCALVIM)
    return _create_localvim("localvim_tiny_patch16_224", pretrained, **dict(model_args, **kwargs))


@register_model
def localvim_tiny_patch16_midcls_224(pretrained: bool = False, **kwargs: Any) -> LocalVim:
    """LocalVim-T with Vim's class token in the middle; 77.8 top-1 as published."""
    model_args = dict(_MIDDLE, embed_dim=192, scan_order=_LOCALVIM)
    return _create_localvim("localvim_tiny_patch16_midcls_224", pretrained, **dict(model_args, **kwargs))


@register_model
def localvim_tiny_patch16_nosearch_224(pretrained: bool = False, **kwargs: Any) -> LocalVim:
    """LocalVim-T before the search: every block along rows and windows of 2, both ways; in the published code alone."""
    model_args = dict(_PLAIN, embed_dim=192, scan_order="local_2")
    return _create_localvim("localvim_tiny_patch16_nosearch_224", pretrained, **dict(model_args, **kwargs))


@register_model
def localvim_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> LocalVim:
    """LocalVim-S; 81.1 top-1 as published, with one of two lists of directions.

    The published file defines the model twice, and the second definition, without a search, is the one in force and
    ours. The first has the list of LocalVim-T: ``scan_order=`` that of `localvim_small_patch16_midcls_224`.
    """
    model_args = dict(_PLAIN, embed_dim=384, scan_order="local_2")
    return _create_localvim("localvim_small_patch16_224", pretrained, **dict(model_args, **kwargs))


@register_model
def localvim_small_patch16_midcls_224(pretrained: bool = False, **kwargs: Any) -> LocalVim:
    """LocalVim-T with a class token in the middle, at the width of LocalVim-S; not published."""
    model_args = dict(_MIDDLE, embed_dim=384, scan_order=_LOCALVIM)
    return _create_localvim("localvim_small_patch16_midcls_224", pretrained, **dict(model_args, **kwargs))


@register_model
def localvmamba_tiny(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """LocalVMamba-T; 82.7 top-1 as published, its weights were never released."""
    model_args = dict(_PYRAMID, depths=(2, 2, 9, 2), scan_order=_LOCALVMAMBA_TINY)
    return _create_localvmamba("localvmamba_tiny", pretrained, **dict(model_args, **kwargs))


@register_model
def localvmamba_small(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """LocalVMamba-S; 83.7 top-1 as published."""
    model_args = dict(_PYRAMID, depths=(2, 2, 27, 2), scan_order=_LOCALVMAMBA_SMALL)
    return _create_localvmamba("localvmamba_small", pretrained, **dict(model_args, **kwargs))


@register_model
def localvmamba_tiny_steady(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """Not published: `localvmamba_tiny` with the mean of the routes and with scans that no activation drives far."""
    model_args = dict(
        _PYRAMID, depths=(2, 2, 9, 2), scan_order=_LOCALVMAMBA_TINY, average_routes=True, norm_columns=True
    )
    return _create_localvmamba("localvmamba_tiny_steady", pretrained, **dict(model_args, **kwargs))


@register_model
def test_localvim(pretrained: bool = False, **kwargs: Any) -> LocalVim:
    """A LocalVim small enough for tests."""
    orders = _orders("h_vf_w7_w7f", "hf_v_vf_w2f", "h_hf_w2f_w7")
    model_args = dict(_PLAIN, img_size=160, embed_dim=48, depth=3, scan_order=orders)
    return _create_localvim("test_localvim", pretrained, **dict(model_args, **kwargs))


@register_model
def test_localvmamba(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """A LocalVMamba small enough for tests."""
    orders = _orders("h_vf_w7_w7f", "hf_v_vf_w2f", "h_hf_w2f_w7", "v_vf_w2_w2f", "h_v_w2_w7f")
    model_args = dict(_PYRAMID, dims=(16, 32, 48, 64), depths=(1, 1, 2, 1), d_state=4, scan_order=orders)
    return _create_localvmamba("test_localvmamba", pretrained, **dict(model_args, **kwargs))


register_model_deprecations(
    __name__,
    {
        "local_vim_tiny": "localvim_tiny_patch16_224.in1k",
        "local_vim_tiny_middle_cls_token": "localvim_tiny_patch16_midcls_224.in1k",
        "local_vim_tiny_wo_search": "localvim_tiny_patch16_nosearch_224",
        "local_vim_small": "localvim_small_patch16_224",
        "local_vssm_tiny": "localvmamba_tiny",
        "local_vssm_small": "localvmamba_small.in1k",
    },
)
