"""EfficientVMamba: VMamba for small budgets, with a scan of every second token beside a convolution on fine maps only.

Pei et al. 2024, "EfficientVMamba: Atrous Selective Scan for Light Weight Visual Mamba", arXiv:2403.09977. Published
code and weights: https://github.com/TerryPei/EfficientVMamba (Apache-2.0 by its front page; there is no licence file).

The first two stages are VMamba's first version with a convolution beside each scan, whose four routes share the tokens
out: each goes through a quarter of them, once. The other two are MobileNet's inverted residuals. The published
configuration of S is wider than its weights, whose width the published log has, and so has the model here.
"""

import re
from collections.abc import Iterable
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import generate_default_cfgs, register_model, register_model_deprecations
from torch import Tensor

from vision_mamba.models import vmamba
from vision_mamba.models.checkpoint import rename
from vision_mamba.models.pyramid import build_pyramid
from vision_mamba.models.vmamba import VMamba

# Our names -> those of the published code where they differ from VMamba's, applied in this order.
_PUBLISHED_NAMES: tuple[tuple[str, Any], ...] = (
    (r"\.ss2d\.scan\.", ".op."),
    (r"\.ss2d\.conv\.", ".conv_branch."),
    (r"\.ss2d\.attn\.", ".se."),
    # A stage without scans is one sequence: a permutation, the blocks, a permutation, the downsampling behind.
    (r"\.blocks\.(\d+)\.conv\.", lambda block: f".{int(block[1]) + 1}."),
    (r"\.conv_pw\.", ".conv_pw.0."),
    (r"\.bn1\.", ".conv_pw.1."),
    (r"\.conv_dw\.", ".conv_dw.0."),
    (r"\.bn2\.", ".conv_dw.1."),
    (r"\.conv_pwl\.", ".conv_pw2.0."),
    (r"\.bn3\.", ".conv_pw2.1."),
)


def _downsampling_names(own: Iterable[str]) -> tuple[tuple[str, str], ...]:
    """The rules for what comes behind each stage without scans of a model with those parameters."""
    found = re.findall(r"stages\.(\d+)\.blocks\.(\d+)\.conv\.", " ".join(own))
    last = {int(stage): int(block) for stage, block in found}
    return tuple(
        rule
        for stage, block in last.items()
        for rule in (
            (rf"^stages\.{stage + 1}\.downsample\.pre_norm\.", f"layers.{stage}.{block + 3}.norm."),
            (rf"^stages\.{stage + 1}\.downsample\.", f"layers.{stage}.{block + 3}."),
        )
    )


def to_published(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Rename our state dict into what the published code loads; the inverse of checkpoint_filter_fn."""
    rules = (*_PUBLISHED_NAMES, *_downsampling_names(state_dict))
    return vmamba.to_published({rename(name, rules): tensor for name, tensor in state_dict.items()})


def checkpoint_filter_fn(state_dict: dict[str, Any], model: VMamba) -> dict[str, Tensor]:
    """Make a checkpoint fit an EfficientVMamba, as `vmamba.checkpoint_filter_fn` does for VMamba."""
    return vmamba.checkpoint_filter_fn(state_dict, model, to_published)


def _cfg(hub_id: str | None = None, file: str | None = None, **kwargs: Any) -> dict[str, Any]:
    return {
        "hf_hub_id": hub_id,
        "hf_hub_filename": file,
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.conv1",
        "classifier": "head.fc",
        "license": "apache-2.0",
        "paper_name": "EfficientVMamba: Atrous Selective Scan for Light Weight Visual Mamba",
        "paper_ids": "arXiv:2403.09977",
        "origin_url": "https://github.com/TerryPei/EfficientVMamba",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        # Names of files as the published code for detection has them.
        "efficientvmamba_tiny.in1k": _cfg(
            "TerryPei/EfficientVMamba-Tiny", "efficient_vmamba_tiny.ckpt", notes=("top-1 76.5",)
        ),
        "efficientvmamba_small.in1k": _cfg(
            "TerryPei/EfficientVMamba-Small", "efficient_vmamba_small.ckpt", notes=("top-1 78.7",)
        ),
        "efficientvmamba_base.in1k": _cfg(
            "TerryPei/EfficientVMamba-Base", "efficient_vmamba_base.ckpt", notes=("top-1 81.8",)
        ),
        "test_efficientvmamba.untrained": _cfg(input_size=(3, 160, 160), pool_size=(5, 5), crop_pct=0.95),
    }
)


def _create(variant: str, pretrained: bool = False, **kwargs: Any) -> VMamba:
    return build_pyramid(VMamba, variant, pretrained, checkpoint_filter_fn, **kwargs)


_ARCHITECTURE: dict[str, Any] = dict(
    block=("efficient", "efficient", "inverted", "inverted"),
    d_state=16,
    ssm_ratio=2.0,
    ssm_conv_bias=True,
    gate=True,
    scan_order="atrous_2",
    mlp_ratio=0.0,
    stem="patch",
    downsample="merge",
)


@register_model
def efficientvmamba_tiny(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """EfficientVMamba-T; 76.5 top-1 as published."""
    model_args = dict(_ARCHITECTURE, dims=(48, 96, 192, 384), depths=(2, 2, 4, 2))
    return _create("efficientvmamba_tiny", pretrained, **dict(model_args, **kwargs))


@register_model
def efficientvmamba_small(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """EfficientVMamba-S, as wide as in the published log; 78.7 top-1 as published."""
    model_args = dict(_ARCHITECTURE, dims=(64, 128, 256, 512), depths=(2, 2, 4, 2))
    return _create("efficientvmamba_small", pretrained, **dict(model_args, **kwargs))


@register_model
def efficientvmamba_base(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """EfficientVMamba-B; 81.8 top-1 as published."""
    model_args = dict(_ARCHITECTURE, dims=(96, 192, 384, 768), depths=(2, 2, 9, 2))
    return _create("efficientvmamba_base", pretrained, **dict(model_args, **kwargs))


@register_model
def test_efficientvmamba(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """An EfficientVMamba small enough for tests."""
    model_args = dict(_ARCHITECTURE, dims=(16, 24, 32, 48), depths=(1, 1, 1, 1), d_state=4)
    return _create("test_efficientvmamba", pretrained, **dict(model_args, **kwargs))


register_model_deprecations(
    __name__,
    {f"vssm_efficient_{size}": f"efficientvmamba_{size}.in1k" for size in ("tiny", "small", "base")},
)
