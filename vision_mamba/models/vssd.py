"""VSSD: a pyramid whose fine maps mix tokens by state-space duality without an order, and whose last by attention.

Shi et al. 2024, "VSSD: Vision Mamba with Non-Causal State Space Duality", arXiv:2407.18559. Published code:
https://github.com/YuHengsss/VSSD, whose files name no licence; weights: https://huggingface.co/YuhengSSS/VSSD.

As everywhere in timm a stage begins with its downsampling, where the published code ends with it. Maps whose sides no
power of 2 divides round up at each halving; the published classifier refuses them.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, Mlp
from timm.models import generate_default_cfgs, register_model, register_model_deprecations
from torch import Tensor, nn

from vision_mamba.layers.joined import (
    chains_on_gpu,
    conv_beside,
    is_centred,
    is_product,
    is_usual_mlp,
    is_usual_norm,
    norm_linear,
    norm_mlp,
    untouched,
    weights_of,
)
from vision_mamba.layers.noncausal import MapAttention, NonCausalSSD
from vision_mamba.layers.norm import LayerNorm, before_product
from vision_mamba.layers.patch import InvertedDownsample, ResidualStem
from vision_mamba.models import vmamba
from vision_mamba.models.checkpoint import rename
from vision_mamba.models.pyramid import Pyramid, Stage, build_pyramid, drop_path_rates

__all__ = ["VSSD", "VSSDBlock"]


class VSSDBlock(nn.Module):
    """A mixer and an MLP, each after a norm, beside a shortcut, and behind a convolution that tells where a token is.

        x += conv1(x);   x += mixer(norm1(x));   x += conv2(x);   x += mlp(norm2(x))

    Args:
        dim: C, channels of the map.
        mixer: dim -> token mixer of a (B, H, W, C) map.
        mlp_ratio: hidden width of the MLP over C.
        norm_eps: epsilon of both norms.
        proj_drop: dropout within the MLP.
        drop_path: stochastic depth of either branch, drawn for each.

    Shape: (B, H, W, C) -> (B, H, W, C).
    """

    def __init__(
        self,
        dim: int,
        mixer: Callable[..., nn.Module],
        mlp_ratio: float = 4.0,
        norm_eps: float = 1e-5,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.cpe1 = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd)
        self.norm1 = before_product(LayerNorm(dim, eps=norm_eps, **dd))
        self.mixer = mixer(dim, **dd)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.cpe2 = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd)
        self.norm2 = before_product(LayerNorm(dim, eps=norm_eps, **dd))
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop, **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.cpe1(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        x = x + self.drop_path1(self.mixer(self.norm1(x)))
        x = x + self.cpe2(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x + self.drop_path2(self.mlp(self.norm2(x)))

    def joins(self, x: Tensor) -> bool:
        """Whether the norms run with what is before and behind them; see `layers.joined`."""
        usual = untouched(self, VSSDBlock) and is_usual_norm(self.norm1) and is_usual_norm(self.norm2)
        convs = is_centred(self.cpe1) and is_centred(self.cpe2)
        return chains_on_gpu(x) and usual and convs and is_usual_mlp(self.mlp)

    def ahead(self) -> tuple[list[Tensor], list[Tensor]]:
        mixer: Any = self.mixer
        weights = weights_of(self.mlp)
        return [*weights, mixer.in_proj.weight] if untouched(mixer, NonCausalSSD) else weights, []

    def join(self, x: Tensor, branch: Tensor | None) -> tuple[Tensor, Tensor]:
        """As forward, of a stream x + branch, into a stream and what is to be added to it."""
        mixer: Any = self.mixer
        x = conv_beside(x if branch is None else x + branch, self.cpe1)
        if untouched(mixer, NonCausalSSD) and is_product(mixer.in_proj):
            y, x = norm_linear(x, None, self.norm1, mixer.in_proj, step=8)
            y = mixer.mix(y)
        else:
            y = mixer(self.norm1(x))
        x = conv_beside(x + self.drop_path1(y), self.cpe2)
        added, x = norm_mlp(x, None, self.norm2, self.mlp)
        return x, self.drop_path2(added)


class VSSD(Pyramid):
    """VSSD as an image classifier or feature pyramid, for images of any size.

    Args:
        img_size: nominal image size, recorded for data configurations; every size runs whatever it is.
        in_chans: channels of the image.
        num_classes: width of the classifier; 0 for none.
        global_pool: pooling before the classifier; '' for none.
        dims: C, channels of each stage.
        depths: blocks of each stage.
        num_heads: heads of each stage.
        attention: for each stage, whether its mixers are attention rather than `NonCausalSSD`.
        d_state: N, states of a channel.
        expand: inner width of `NonCausalSSD` over C.
        d_conv: side of its depthwise convolution.
        mlp_ratio: hidden width of the MLP over C.
        norm_eps: epsilon of all layer norms.
        drop_rate: dropout before the classifier.
        proj_drop_rate: dropout within MLPs.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0.

    Shape: (B, in_chans, H, W) -> (B, num_classes).
    Raises: ValueError if depths, heads and attention are not for as many stages as dims.
    Reference: Shi et al. 2024, arXiv:2407.18559.

    >>> import timm
    >>> timm.create_model("test_vssd", num_classes=10)(torch.randn(2, 3, 33, 65)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] | None = None,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (2, 4, 8, 4),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        attention: Sequence[bool] = (False, False, False, True),
        d_state: int = 64,
        expand: float = 2.0,
        d_conv: int = 3,
        mlp_ratio: float = 4.0,
        norm_eps: float = 1e-5,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        if not len(dims) == len(depths) == len(num_heads) == len(attention):
            raise ValueError(
                f"VSSD: dims, depths, num_heads and attention must name as many stages, got {len(dims)}, "
                f"{len(depths)}, {len(num_heads)} and {len(attention)}."
            )
        stem = ResidualStem(in_chans, dims[0], **dd)
        ssd = partial(NonCausalSSD, d_state=d_state, expand=expand, d_conv=d_conv, norm_eps=norm_eps)
        stages = []
        for i, rates in enumerate(drop_path_rates(drop_path_rate, depths)):
            mixer = partial(MapAttention if attention[i] else ssd, num_heads=num_heads[i])
            blocks = [VSSDBlock(dims[i], mixer, mlp_ratio, norm_eps, proj_drop_rate, rate, **dd) for rate in rates]
            between = InvertedDownsample(dims[i - 1], dims[i], **dd) if i else nn.Identity()
            stages.append(Stage(between, blocks))
        norm = LayerNorm(dims[-1], eps=norm_eps, **dd)
        super().__init__(stem, stages, norm, dims, 4, in_chans, num_classes, global_pool, drop_rate, img_size, **dd)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {"*.A_log", "*.D", "*.dt_bias"}


# Our names -> those of the published code, applied in this order.
_PUBLISHED_NAMES: tuple[tuple[str, Any], ...] = (
    (r"\.bn\.", ".norm."),
    (r"^stem\.conv1\.", "patch_embed.conv1."),
    (r"^stem\.residual\.", "patch_embed.conv2."),
    (r"^stem\.project\.", "patch_embed.conv3."),
    (r"\.downsample\.norm\.", ".downsample.conv.2.norm."),
    (r"\.downsample\.expand\.", ".downsample.conv.0.conv."),
    (r"\.downsample\.halve\.", ".downsample.conv.1.conv."),
    (r"\.downsample\.project\.", ".downsample.conv.2.conv."),
    (r"^stages\.(\d+)\.downsample\.", lambda stage: f"layers.{int(stage[1]) - 1}.downsample."),
    (r"^stages\.", "layers."),
    (r"\.mixer\.attn\.qkv\.", ".attn.to_qkv."),
    (r"\.mixer\.attn\.proj\.", ".attn.to_out."),
    (r"\.mixer\.", ".attn."),
    (r"^head\.fc\.", "head."),
)


def to_published(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Rename our state dict into what the published code loads; the inverse of checkpoint_filter_fn."""
    return {rename(name, _PUBLISHED_NAMES): tensor for name, tensor in state_dict.items()}


def checkpoint_filter_fn(state_dict: dict[str, Any], model: VSSD) -> dict[str, Tensor]:
    """Make a checkpoint fit a VSSD, as `vision_mamba.models.vmamba.checkpoint_filter_fn` does for VMamba."""
    return vmamba.checkpoint_filter_fn(state_dict, model, to_published)


def _cfg(file: str | None = None, top1: str | None = None, **kwargs: Any) -> dict[str, Any]:
    return {
        "hf_hub_id": file and "YuhengSSS/VSSD",
        "hf_hub_filename": file,
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.conv1.conv",
        "classifier": "head.fc",
        "license": "unspecified",
        "paper_name": "VSSD: Vision Mamba with Non-Causal State Space Duality",
        "paper_ids": "arXiv:2407.18559",
        "origin_url": "https://github.com/YuHengsss/VSSD",
        "notes": top1 and (f"top-1 {top1}",),
        **kwargs,
    }


# "mesa": trained with the authors' later recipe, that of arXiv:2205.14083.
default_cfgs = generate_default_cfgs(
    {
        "vssd_micro.in1k": _cfg("vssd_micro_best.pth", "82.5"),
        "vssd_tiny.in1k": _cfg("vssd_tiny_best_ema.pth", "83.6"),
        "vssd_tiny.mesa_in1k": _cfg("vssd_tiny_e300_with_mesa.pth", "84.1"),
        "vssd_small.in1k": _cfg("vssd_small_best_ema.pth", "84.1"),
        "vssd_small.mesa_in1k": _cfg("vssd_small_e300_with_mesa.pth", "84.5"),
        "vssd_base.in1k": _cfg("vssd_base_best_ema.pth", "84.7"),
        "vssd_base.mesa_in1k": _cfg("vssd_base_e300_with_mesa.pth", "85.4"),
        "test_vssd.untrained": _cfg(input_size=(3, 160, 160), pool_size=(5, 5), crop_pct=0.95, license="apache-2.0"),
    }
)


def _create_vssd(variant: str, pretrained: bool = False, **kwargs: Any) -> VSSD:
    return build_pyramid(VSSD, variant, pretrained, checkpoint_filter_fn, **kwargs)


@register_model
def vssd_micro(pretrained: bool = False, **kwargs: Any) -> VSSD:
    model_args = dict(dims=(48, 96, 192, 384), depths=(2, 2, 8, 4), d_state=48)
    return _create_vssd("vssd_micro", pretrained, **dict(model_args, **kwargs))


@register_model
def vssd_tiny(pretrained: bool = False, **kwargs: Any) -> VSSD:
    return _create_vssd("vssd_tiny", pretrained, **dict(dict(depths=(2, 4, 8, 4)), **kwargs))


@register_model
def vssd_small(pretrained: bool = False, **kwargs: Any) -> VSSD:
    return _create_vssd("vssd_small", pretrained, **dict(dict(depths=(3, 4, 21, 5)), **kwargs))


@register_model
def vssd_base(pretrained: bool = False, **kwargs: Any) -> VSSD:
    model_args = dict(dims=(96, 192, 384, 768), depths=(3, 4, 21, 5), num_heads=(3, 6, 12, 24))
    return _create_vssd("vssd_base", pretrained, **dict(model_args, **kwargs))


@register_model
def test_vssd(pretrained: bool = False, **kwargs: Any) -> VSSD:
    """A VSSD small enough for tests."""
    model_args = dict(dims=(16, 24, 32, 48), depths=(1, 1, 2, 1), num_heads=(1, 2, 2, 3), d_state=8, mlp_ratio=2.0)
    return _create_vssd("test_vssd", pretrained, **dict(model_args, **kwargs))


register_model_deprecations(
    __name__,
    {
        "vssd_micro_e300": "vssd_micro.in1k",
        "vssd_tiny_e300": "vssd_tiny.in1k",
        "vssd_small_e300": "vssd_small.in1k",
        "vssd_base_e300": "vssd_base.in1k",
    },
)
