"""MambaVision: convolutions on fine maps, then windows mixed by scans first and by attention in the last blocks.

Hatamizadeh and Kautz 2024, "MambaVision: A Hybrid Mamba-Transformer Vision Backbone", arXiv:2407.08083. The published
weights are NVIDIA's, for non-commercial use alone (CC-BY-NC-SA-4.0). So is its code, NVIDIA Source Code License-NC, of
which nothing is here: this is written from the paper, and from names and shapes in published checkpoints.
https://github.com/NVlabs/MambaVision

As everywhere in timm a stage begins with its downsampling, where the published code ends with it. Tokens that fill a
window up beyond the edge take part in its scans and its attention, as published.
"""

from collections.abc import Sequence
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import Attention, ConvNormAct, DropPath, LayerNorm, LayerScale, Mlp
from timm.models import generate_default_cfgs, register_model, register_model_deprecations
from torch import Tensor, nn

from vision_mamba.layers.patch import ConvDownsample
from vision_mamba.layers.windowed import ConcatMamba, cut_windows, join_windows
from vision_mamba.models import vmamba
from vision_mamba.models.checkpoint import rename
from vision_mamba.models.pyramid import Pyramid, Stage, build_pyramid, drop_path_rates

__all__ = ["MambaVision"]


def _path(rate: float) -> nn.Module:
    return DropPath(rate) if rate > 0.0 else nn.Identity()


class ConvStem(nn.Module):
    """Two convolutions of stride 2, a batch norm and an activation behind each.

    Shape: (B, in_chans, H, W) -> (B, H / 4, W / 4, dim), rounded up.
    """

    def __init__(self, in_chans: int, hidden: int, dim: int, **dd: Any) -> None:
        super().__init__()
        self.conv1 = ConvNormAct(in_chans, hidden, 3, stride=2, norm_kwargs=dict(eps=1e-4), **dd)
        self.conv2 = ConvNormAct(hidden, dim, 3, stride=2, norm_kwargs=dict(eps=1e-4), **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.conv1(x.contiguous(memory_format=torch.channels_last))).permute(0, 2, 3, 1)


class ConvBlock(nn.Module):
    """x + norm2(conv2(gelu(norm1(conv1(x))))), of batch norms and of GELU's approximation by tanh."""

    def __init__(self, dim: int, drop_path: float = 0.0, **dd: Any) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, 3, padding=1, **dd)
        self.norm1 = nn.BatchNorm2d(dim, **dd)
        self.act = nn.GELU(approximate="tanh")
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1, **dd)
        self.norm2 = nn.BatchNorm2d(dim, **dd)
        self.drop_path = _path(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        # A permuted view: the memory stays channels last, and the convolutions work on it as it is.
        y = self.norm2(self.conv2(self.act(self.norm1(self.conv1(x.permute(0, 3, 1, 2))))))
        return x + self.drop_path(y).permute(0, 2, 3, 1)


class WindowBlock(nn.Module):
    """x + scale(mixer(norm(x))), then x + scale(mlp(norm(x))), on the tokens of windows, (B, L, C) -> (B, L, C)."""

    def __init__(
        self,
        dim: int,
        mixer: nn.Module,
        mlp_ratio: float = 4.0,
        init_values: float | None = None,
        norm_eps: float = 1e-5,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        **dd: Any,
    ) -> None:
        super().__init__()
        self.norm1 = LayerNorm(dim, eps=norm_eps, **dd)
        self.mixer = mixer
        self.ls1 = nn.Identity() if init_values is None else LayerScale(dim, init_values=init_values, **dd)
        self.drop_path1 = _path(drop_path)
        self.norm2 = LayerNorm(dim, eps=norm_eps, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop, **dd)
        self.ls2 = nn.Identity() if init_values is None else LayerScale(dim, init_values=init_values, **dd)
        self.drop_path2 = _path(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path1(self.ls1(self.mixer(self.norm1(x))))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class WindowStage(Stage):
    """`Stage` whose blocks see the windows of the map, each by itself."""

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module], window: int) -> None:
        super().__init__(downsample, blocks)
        self.window = window

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        height, width = x.shape[1], x.shape[2]
        return join_windows(self.run_blocks(cut_windows(x, self.window)), self.window, height, width)


class MapBatchNorm(nn.Module):
    """Batch norm of a map with channels last."""

    def __init__(self, dim: int, **dd: Any) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class MambaVision(Pyramid):
    """MambaVision as an image classifier or feature pyramid, for images of any size.

    Args:
        img_size: nominal image size, recorded for data configurations; every size runs whatever it is.
        in_chans: channels of the image.
        num_classes: width of the classifier; 0 for none.
        global_pool: pooling before the classifier; '' for none.
        stem_dim: channels between the stem's convolutions.
        dims: C, channels of each stage.
        depths: blocks of each stage.
        windows: side of each stage's windows; 0 for a stage of convolutions.
        num_heads: heads of each stage's attention, which its later half of blocks has, rounded down.
        d_state: N, states of a channel.
        d_conv: taps of the convolutions before the scan.
        mlp_ratio: hidden width of the MLP over C.
        init_values: start of a learned scale of either branch in windows; none by default.
        norm_eps: epsilon of the layer norms.
        drop_rate: dropout before the classifier.
        proj_drop_rate: dropout within MLPs and behind attention.
        published_weight_decay: let weight decay reach what the published training's reached, see `no_weight_decay`.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0.

    Shape: (B, in_chans, H, W) -> (B, num_classes).
    Raises: ValueError if depths, windows and heads are not for as many stages as dims.
    Reference: Hatamizadeh and Kautz 2024, arXiv:2407.08083.

    >>> import timm
    >>> timm.create_model("test_mambavision", num_classes=10)(torch.randn(2, 3, 33, 65)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] | None = None,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        stem_dim: int = 64,
        dims: Sequence[int] = (80, 160, 320, 640),
        depths: Sequence[int] = (1, 3, 8, 4),
        windows: Sequence[int] = (0, 0, 14, 7),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        d_state: int = 8,
        d_conv: int = 3,
        mlp_ratio: float = 4.0,
        init_values: float | None = None,
        norm_eps: float = 1e-5,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        published_weight_decay: bool = False,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        if not len(dims) == len(depths) == len(windows) == len(num_heads):
            raise ValueError(
                f"MambaVision: dims, depths, windows and num_heads must name as many stages, got {len(dims)}, "
                f"{len(depths)}, {len(windows)} and {len(num_heads)}."
            )

        def mixer(dim: int, heads: int, attention: bool) -> nn.Module:
            if attention:
                return Attention(dim, heads, qkv_bias=True, proj_drop=proj_drop_rate, **dd)
            return ConcatMamba(dim, d_state, d_conv, **dd)

        options: dict[str, Any] = dict(
            mlp_ratio=mlp_ratio, init_values=init_values, norm_eps=norm_eps, proj_drop=proj_drop_rate
        )
        stem = ConvStem(in_chans, stem_dim, dims[0], **dd)
        stages: list[Stage] = []
        for i, rates in enumerate(drop_path_rates(drop_path_rate, depths)):
            dim = dims[i]
            between: nn.Module = nn.Identity()
            if i:
                between = ConvDownsample(dims[i - 1], dim, norm_layer=_no_norm, bias=False, **dd)
            if not windows[i]:
                stages.append(Stage(between, [ConvBlock(dim, rate, **dd) for rate in rates]))
                continue
            scans = (depths[i] + 1) // 2
            blocks = [
                WindowBlock(dim, mixer(dim, num_heads[i], j >= scans), drop_path=rate, **options, **dd)
                for j, rate in enumerate(rates)
            ]
            stages.append(WindowStage(between, blocks, windows[i]))
        norm = MapBatchNorm(dims[-1], **dd)
        super().__init__(stem, stages, norm, dims, 4, in_chans, num_classes, global_pool, drop_rate, img_size, **dd)
        self.published_weight_decay = published_weight_decay

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """The published training left nothing out but vectors, which are left out anyhow."""
        return set() if self.published_weight_decay else {"*.A_log", "*.D", "*.dt_bias"}


def _no_norm(dim: int, **_: Any) -> nn.Module:
    return nn.Identity()


# Our names -> those in published checkpoints, applied in this order.
_PUBLISHED_NAMES: tuple[tuple[str, Any], ...] = (
    (r"^stem\.conv1\.conv\.", "patch_embed.conv_down.0."),
    (r"^stem\.conv1\.bn\.", "patch_embed.conv_down.1."),
    (r"^stem\.conv2\.conv\.", "patch_embed.conv_down.3."),
    (r"^stem\.conv2\.bn\.", "patch_embed.conv_down.4."),
    (
        r"^stages\.(\d+)\.downsample\.conv\.",
        lambda stage: f"levels.{int(stage[1]) - 1}.downsample.reduction.0.",
    ),
    (r"^stages\.", "levels."),
    (r"\.mixer\.conv_([xz])\.", r".mixer.conv1d_\1."),
    (r"\.mixer\.dt_(weight|bias)$", r".mixer.dt_proj.\1"),
    (r"\.ls([12])\.gamma$", r".gamma_\1"),
    (r"^norm\.bn\.", "norm."),
    (r"^head\.fc\.", "head."),
)


def to_published(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Rename our state dict into what the published code loads; the inverse of checkpoint_filter_fn."""
    return {rename(name, _PUBLISHED_NAMES): tensor for name, tensor in state_dict.items()}


def checkpoint_filter_fn(state_dict: dict[str, Any], model: MambaVision) -> dict[str, Tensor]:
    """Make a checkpoint fit, as `vision_mamba.models.vmamba.checkpoint_filter_fn` does for VMamba.

    On the hub the published model is one part of another, "model".
    """
    nested = {name.removeprefix("model."): tensor for name, tensor in state_dict.items() if name.startswith("model.")}
    return vmamba.checkpoint_filter_fn(nested or state_dict, model, to_published)


def _cfg(name: str | None = None, file: str | None = None, top1: str | None = None, **kwargs: Any) -> dict[str, Any]:
    return {
        "hf_hub_id": name and f"nvidia/MambaVision-{name}",
        "hf_hub_filename": file,
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.conv1.conv",
        "classifier": "head.fc",
        "license": "cc-by-nc-sa-4.0",  # no commercial use
        "paper_name": "MambaVision: A Hybrid Mamba-Transformer Vision Backbone",
        "paper_ids": "arXiv:2407.08083",
        "origin_url": "https://github.com/NVlabs/MambaVision",
        "notes": top1 and (f"top-1 {top1}",),
        **kwargs,
    }


_256: dict[str, Any] = dict(input_size=(3, 256, 256), pool_size=(8, 8))
_512: dict[str, Any] = dict(input_size=(3, 512, 512), pool_size=(16, 16), crop_pct=0.93, crop_mode="squash")

default_cfgs = generate_default_cfgs(
    {
        "mambavision_tiny.nvidia_in1k": _cfg("T-1K", "mambavision_tiny_1k.pth.tar", "82.3"),
        "mambavision_tiny2.nvidia_in1k": _cfg("T2-1K", "mambavision_tiny2_1k.pth.tar", "82.7", crop_pct=0.98),
        "mambavision_small.nvidia_in1k": _cfg("S-1K", "mambavision_small_1k.pth.tar", "83.3", crop_pct=0.93),
        "mambavision_base.nvidia_in1k": _cfg("B-1K", "mambavision_base_1k.pth.tar", "84.2"),
        "mambavision_base.nvidia_in21k_ft_in1k": _cfg("B-21K", "mambavision_base_21k.pth.tar", "84.9"),
        "mambavision_large.nvidia_in1k": _cfg("L-1K", "mambavision_large_1k.pth.tar", "85.0"),
        "mambavision_large.nvidia_in21k_ft_in1k": _cfg("L-21K", "mambavision_large_21k.pth.tar", "86.1"),
        "mambavision_large2.nvidia_in1k": _cfg("L2-1K", "mambavision_large2_1k.pth.tar", "85.3"),
        "mambavision_large2_512.nvidia_in21k_ft_in1k": _cfg(
            "L2-512-21K", "mambavision_L2_21k_240m_512.pth.tar", "87.3", **_512
        ),
        "mambavision_large3_256.nvidia_in21k_ft_in1k": _cfg(
            "L3-256-21K", "mambavision_L3_21k_740m_256.pth.tar", "87.3", **_256
        ),
        "mambavision_large3_512.nvidia_in21k_ft_in1k": _cfg(
            "L3-512-21K", "mambavision_L3_21k_740m_512.pth.tar", "88.1", **_512
        ),
        "test_mambavision.untrained": _cfg(
            input_size=(3, 160, 160), pool_size=(5, 5), crop_pct=0.95, license="apache-2.0"
        ),
    }
)


def _create_mambavision(variant: str, pretrained: bool = False, **kwargs: Any) -> MambaVision:
    return build_pyramid(MambaVision, variant, pretrained, checkpoint_filter_fn, **kwargs)


_LARGE: dict[str, Any] = dict(dims=(196, 392, 784, 1568), num_heads=(4, 8, 16, 32), init_values=1e-5)
_LARGE2: dict[str, Any] = dict(_LARGE, depths=(3, 3, 12, 5))
_LARGE3: dict[str, Any] = dict(_LARGE, dims=(256, 512, 1024, 2048), depths=(3, 3, 20, 10))


@register_model
def mambavision_tiny(pretrained: bool = False, **kwargs: Any) -> MambaVision:
    return _create_mambavision("mambavision_tiny", pretrained, **dict(dict(stem_dim=32), **kwargs))


@register_model
def mambavision_tiny2(pretrained: bool = False, **kwargs: Any) -> MambaVision:
    model_args = dict(stem_dim=32, depths=(1, 3, 11, 4))
    return _create_mambavision("mambavision_tiny2", pretrained, **dict(model_args, **kwargs))


@register_model
def mambavision_small(pretrained: bool = False, **kwargs: Any) -> MambaVision:
    model_args = dict(dims=(96, 192, 384, 768), depths=(3, 3, 7, 5))
    return _create_mambavision("mambavision_small", pretrained, **dict(model_args, **kwargs))


@register_model
def mambavision_base(pretrained: bool = False, **kwargs: Any) -> MambaVision:
    model_args = dict(dims=(128, 256, 512, 1024), depths=(3, 3, 10, 5), init_values=1e-5)
    return _create_mambavision("mambavision_base", pretrained, **dict(model_args, **kwargs))


@register_model
def mambavision_large(pretrained: bool = False, **kwargs: Any) -> MambaVision:
    model_args = dict(_LARGE, depths=(3, 3, 10, 5))
    return _create_mambavision("mambavision_large", pretrained, **dict(model_args, **kwargs))


@register_model
def mambavision_large2(pretrained: bool = False, **kwargs: Any) -> MambaVision:
    return _create_mambavision("mambavision_large2", pretrained, **dict(_LARGE2, **kwargs))


@register_model
def mambavision_large2_512(pretrained: bool = False, **kwargs: Any) -> MambaVision:
    """MambaVision-L2 with windows for 512 pixels."""
    model_args = dict(_LARGE2, windows=(0, 0, 32, 16))
    return _create_mambavision("mambavision_large2_512", pretrained, **dict(model_args, **kwargs))


@register_model
def mambavision_large3_256(pretrained: bool = False, **kwargs: Any) -> MambaVision:
    """MambaVision-L3 with windows for 256 pixels."""
    model_args = dict(_LARGE3, windows=(0, 0, 16, 8))
    return _create_mambavision("mambavision_large3_256", pretrained, **dict(model_args, **kwargs))


@register_model
def mambavision_large3_512(pretrained: bool = False, **kwargs: Any) -> MambaVision:
    """MambaVision-L3 with windows for 512 pixels."""
    model_args = dict(_LARGE3, windows=(0, 0, 32, 16))
    return _create_mambavision("mambavision_large3_512", pretrained, **dict(model_args, **kwargs))


@register_model
def test_mambavision(pretrained: bool = False, **kwargs: Any) -> MambaVision:
    """A MambaVision small enough for tests."""
    model_args = dict(
        stem_dim=8, dims=(16, 24, 32, 48), depths=(1, 1, 3, 2), windows=(0, 0, 3, 2), num_heads=(1, 1, 2, 3),
        mlp_ratio=2.0, init_values=1e-1,
    )  # fmt: skip
    return _create_mambavision("test_mambavision", pretrained, **dict(model_args, **kwargs))


register_model_deprecations(
    __name__,
    {
        "mamba_vision_T": "mambavision_tiny.nvidia_in1k",
        "mamba_vision_T2": "mambavision_tiny2.nvidia_in1k",
        "mamba_vision_S": "mambavision_small.nvidia_in1k",
        "mamba_vision_B": "mambavision_base.nvidia_in1k",
        "mamba_vision_B_21k": "mambavision_base.nvidia_in21k_ft_in1k",
        "mamba_vision_L": "mambavision_large.nvidia_in1k",
        "mamba_vision_L_21k": "mambavision_large.nvidia_in21k_ft_in1k",
        "mamba_vision_L2": "mambavision_large2.nvidia_in1k",
        "mamba_vision_L2_512_21k": "mambavision_large2_512.nvidia_in21k_ft_in1k",
        "mamba_vision_L3_256_21k": "mambavision_large3_256.nvidia_in21k_ft_in1k",
        "mamba_vision_L3_512_21k": "mambavision_large3_512.nvidia_in21k_ft_in1k",
    },
)
