"""PlainMamba: one resolution from end to end, scanned along snakes that always go on to a neighbour.

Yang et al. 2024, "PlainMamba: Improving Non-Hierarchical Mamba in Visual Recognition", arXiv:2403.17695. Published code
and weights: https://github.com/ChenhongyiYang/PlainMamba (Apache-2.0).

The published code resamples the position embedding for other image sizes without a filter. The models here filter where
they make it smaller, unless they are made with ``published_quirks=True``.
"""

import logging
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import ConvNormAct, LayerNorm, trunc_normal_
from timm.models import generate_default_cfgs, register_model, register_model_deprecations
from torch import Tensor, nn

from vision_mamba.layers.embed import PatchGrid
from vision_mamba.layers.init import init_in_float32_
from vision_mamba.layers.plain import PlainMixer
from vision_mamba.models import vim
from vision_mamba.models.builder import build
from vision_mamba.models.checkpoint import rename, unwrap
from vision_mamba.models.vim import Block, VisionMamba

__all__ = ["PlainMamba"]

_log = logging.getLogger(__name__)


class ConvPatchEmbed(PatchGrid):
    """Convolutions at half the resolution, then patches that do not overlap.

    Args: those of `PatchGrid`, and
        in_chans: channels of the image.
        embed_dim: E, width of a token.
        width: channels of the convolutions.
        convs: how many of 3 x 3 follow the first, of 7 x 7 and stride 2; each with a batch norm and ReLU.

    Shape: (B, in_chans, H, W) -> (B, H / P, W / P, E), rounded up, with P = patch_size, which is even.
    """

    fineness = 2

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        stride: int | tuple[int, int] | None = None,
        in_chans: int = 3,
        embed_dim: int = 192,
        strict_img_size: bool = False,
        width: int = 64,
        convs: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(img_size, patch_size, stride, strict_img_size)
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        if any(side % 2 for side in (*self.patch_size, *self.stride)):
            raise ValueError(
                f"PlainMamba: patch_size must be even, got {patch_size}; the patches are of every 2nd pixel."
            )
        self.stem = nn.Sequential(
            ConvNormAct(in_chans, width, 7, stride=2, **dd), *(ConvNormAct(width, width, 3, **dd) for _ in range(convs))
        )
        self.half_patch = (self.patch_size[0] // 2, self.patch_size[1] // 2)
        self.half_stride = (self.stride[0] // 2, self.stride[1] // 2)
        self.proj = nn.Conv2d(width, embed_dim, self.half_patch, self.half_stride, **dd)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2], x.shape[3]
        self.check_size(height, width)
        rows, columns = self.dynamic_feat_size((height, width))
        x = self.stem(x.contiguous(memory_format=torch.channels_last))
        lower = (rows - 1) * self.half_stride[0] + self.half_patch[0] - x.shape[2]
        right = (columns - 1) * self.half_stride[1] + self.half_patch[1] - x.shape[3]
        return self.proj(F.pad(x, (0, right, 0, lower))).permute(0, 2, 3, 1)


class PlainBlock(Block):
    """`Block`, and where asked for a depthwise convolution with a batch norm and GELU behind, without a shortcut."""

    def __init__(self, dim: int, conv: bool = False, **options: Any) -> None:
        super().__init__(dim, **options)
        dd: dict[str, Any] = {"device": options.get("device"), "dtype": options.get("dtype")}
        self.conv = ConvNormAct(dim, dim, 3, groups=dim, act_layer=nn.GELU, **dd) if conv else None

    def forward(self, x: Tensor, height: int, width: int, turns: Tensor | None = None) -> Tensor:
        x = x + self.drop_path(self.ls(self.mixer(self.norm(x), height, width)))
        if self.conv is not None:
            x = self.conv(x.unflatten(1, (height, width)).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).flatten(1, 2)
        return x


class PlainMamba(VisionMamba):
    """PlainMamba as an image classifier or a backbone of one resolution.

    Args:
        img_size: nominal image size, which the position embedding is made for.
        patch_size: side of a patch, even.
        in_chans: channels of the image.
        num_classes: classes of the head, 0 for none.
        global_pool: what the head sees: "avg", "max" or "avgmax", or "" for all tokens.
        embed_dim: E, width of the tokens.
        depth: number of blocks.
        d_state: N, states of a channel.
        d_conv: side of the mixers' convolutions, odd.
        expand: inner width of a mixer over E.
        dt_rank: R, rank of the step sizes; E / 16 rounded up by default.
        scan_order: name of a registered `ScanOrder` whose routes visit every token.
        stem_width: channels of the convolutions before the patches.
        stem_convs: how many of these follow the first.
        conv_blocks: numbers of the blocks that have a convolution behind.
        pos_embed: learn a position embedding.
        published_quirks: resample that without a filter.
        dynamic_img_size: take images of any size, resampling the position embedding; else refuse other sizes.
        drop_rate: dropout before the head.
        pos_drop_rate: dropout after the position embedding.
        drop_path_rate: stochastic depth, rising linearly from 0 at the first block to this at the last.

    Reference: Yang et al. 2024, arXiv:2403.17695.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 192,
        depth: int = 24,
        d_state: int = 16,
        d_conv: int = 7,
        expand: float = 2.0,
        dt_rank: int | None = None,
        scan_order: str = "snake",
        stem_width: int = 64,
        stem_convs: int = 1,
        conv_blocks: tuple[int, ...] = (),
        pos_embed: bool = True,
        published_quirks: bool = False,
        dynamic_img_size: bool = True,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        mixer = partial(
            PlainMixer, d_state=d_state, d_conv=d_conv, expand=expand, dt_rank=dt_rank, scan_order=scan_order
        )
        block = partial(PlainBlock, norm_layer=partial(LayerNorm, eps=1e-5), mixer=mixer)
        super().__init__(
            img_size=img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            embed_dim=embed_dim,
            depth=depth,
            class_token="none",
            pos_embed=pos_embed,
            published_quirks=published_quirks,
            dynamic_img_size=dynamic_img_size,
            drop_rate=drop_rate,
            pos_drop_rate=pos_drop_rate,
            drop_path_rate=drop_path_rate,
            final_norm_layer=partial(LayerNorm, eps=1e-6),
            embed_layer=partial(ConvPatchEmbed, width=stem_width, convs=stem_convs),
            block_layers=[partial(block, conv=number in conv_blocks) for number in range(depth)],
            device=device,
            dtype=dtype,
        )

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Fill all parameters as published: every projection by a truncated normal, that to step sizes too.

        Args:
            needs_reset: fill those of the submodules anew too, as is needed after `to_empty`.
        """
        for module in self.modules():
            reset = getattr(module, "reset_parameters", None)
            if needs_reset and callable(reset):
                reset()
            if isinstance(module, nn.Linear):
                init_in_float32_(module.weight, trunc_normal_, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            if isinstance(module, PlainMixer):
                init_in_float32_(module.dt_weight, trunc_normal_, std=0.02)
                nn.init.zeros_(module.dt_bias)
        if self.pos_embed is not None:
            init_in_float32_(self.pos_embed, trunc_normal_, std=0.02)
        if isinstance(self.head, nn.Linear):
            init_in_float32_(self.head.weight, nn.init.normal_, std=0.01)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {"pos_embed", "blocks.*.A_log", "blocks.*.D", "blocks.*.dt_bias", "blocks.*.move_B"}


# Our names -> those of the published code, applied in this order.
_PUBLISHED_NAMES: tuple[tuple[str, Any], ...] = (
    (r"^head\.", "head.fc."),
    (r"^norm\.", "backbone.ln1."),
    (r"^blocks\.", "backbone.layers."),
    (r"^(patch_embed|pos_embed)", r"backbone.\1"),
    (r"\.stem\.0\.conv\.", ".stem.0."),
    (r"\.stem\.0\.bn\.", ".stem.1."),
    (r"\.stem\.(\d+)\.conv\.", lambda conv: f".convs.{3 * int(conv[1]) - 3}."),
    (r"\.stem\.(\d+)\.bn\.", lambda conv: f".convs.{3 * int(conv[1]) - 2}."),
    (r"\.patch_embed\.proj\.", ".patch_embed.projection."),
    (r"\.conv\.conv\.", ".dw.0."),
    (r"\.conv\.bn\.", ".dw.1."),
    (r"\.mixer\.", ".mamba."),
    (r"\.dt_(weight|bias)$", r".dt_proj.\1"),
    (r"\.move_B$", ".direction_Bs"),
)


def published_names(name: str) -> tuple[str]:
    """What the published code calls one of our parameters.

    >>> published_names("patch_embed.stem.2.bn.weight")
    ('backbone.patch_embed.convs.4.weight',)
    """
    return (rename(name, _PUBLISHED_NAMES),)


def to_published(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename our state dict into what the published code loads; the inverse of checkpoint_filter_fn."""
    return vim.to_published(state_dict, published_names)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: PlainMamba) -> dict[str, Tensor]:
    """Make a checkpoint fit a PlainMamba, as `vim.checkpoint_filter_fn` does for Vim.

    Files of training runs that averaged their weights may hold the raw ones beside, which are left out.
    """
    state = unwrap(state_dict)
    raw = [name for name in state if name.startswith("ema_")]
    if raw:
        _log.info("left out %d tensors beside the averaged weights, %s and so on", len(raw), raw[0])
    state = {name: state[name] for name in state if name not in set(raw)}
    return vim.checkpoint_filter_fn(state, model, published_names)


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
        "first_conv": "patch_embed.stem.0.conv",
        "classifier": "head",
        "license": "apache-2.0",
        "paper_name": "PlainMamba: Improving Non-Hierarchical Mamba in Visual Recognition",
        "paper_ids": "arXiv:2403.17695",
        "origin_url": "https://github.com/ChenhongyiYang/PlainMamba",
        **kwargs,
    }


_WEIGHTS = "https://huggingface.co/ChenhongyiYang/PlainMamba/resolve/main/"

default_cfgs = generate_default_cfgs(
    {
        "plainmamba_l1.in1k": _cfg(_WEIGHTS + "l1.pth", notes=("top-1 77.9",)),
        "plainmamba_l2.in1k": _cfg(_WEIGHTS + "l2.pth", notes=("top-1 81.6",)),
        "plainmamba_l3.in1k": _cfg(_WEIGHTS + "l3.pth", notes=("top-1 82.3",)),
        "test_plainmamba.untrained": _cfg(input_size=(3, 160, 160), crop_pct=0.95),
    }
)


def _create(variant: str, pretrained: bool = False, **kwargs: Any) -> PlainMamba:
    return build(PlainMamba, variant, pretrained, checkpoint_filter_fn, dict(out_indices=3), **kwargs)


@register_model
def plainmamba_l1(pretrained: bool = False, **kwargs: Any) -> PlainMamba:
    """PlainMamba-L1; 77.9 top-1 as published."""
    return _create("plainmamba_l1", pretrained, **dict(dict(embed_dim=192, conv_blocks=(0,)), **kwargs))


@register_model
def plainmamba_l2(pretrained: bool = False, **kwargs: Any) -> PlainMamba:
    """PlainMamba-L2; 81.6 top-1 as published."""
    return _create("plainmamba_l2", pretrained, **dict(dict(embed_dim=384, stem_convs=2), **kwargs))


@register_model
def plainmamba_l3(pretrained: bool = False, **kwargs: Any) -> PlainMamba:
    """PlainMamba-L3; 82.3 top-1 as published."""
    return _create("plainmamba_l3", pretrained, **dict(dict(embed_dim=448, depth=36, stem_convs=2), **kwargs))


@register_model
def test_plainmamba(pretrained: bool = False, **kwargs: Any) -> PlainMamba:
    """A PlainMamba small enough for tests."""
    model_args = dict(img_size=160, embed_dim=48, depth=3, d_state=4, stem_width=16, conv_blocks=(0,))
    return _create("test_plainmamba", pretrained, **dict(model_args, **kwargs))


register_model_deprecations(__name__, {f"plain_mamba_l{n}_in1k_300e": f"plainmamba_l{n}.in1k" for n in (1, 2, 3)})
