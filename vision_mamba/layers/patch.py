"""From pixels to a map of patches, and from a map to one of half its height and width; all but pixels channels last."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import ConvNormAct, LayerNorm, register_notrace_function
from torch import Tensor, nn

from vision_mamba.layers.joined import conv_norm, eager_on_gpu, is_usual_conv_norm, untouched
from vision_mamba.layers.norm import before_product

Norm = Callable[..., nn.Module]


@torch.fx.wrap
@register_notrace_function
def at_least(x: Tensor, side: int) -> Tensor:
    """Pad images (B, C, H, W) of fewer rows or columns than that by zeros at their lower and right edge."""
    lower, right = max(side - x.shape[2], 0), max(side - x.shape[3], 0)
    return F.pad(x, (0, right, 0, lower)) if lower > 0 or right > 0 else x


class PatchStem(nn.Module):
    """Patches that do not overlap, as in ViT: one convolution, then a norm.

    What is less than a patch at the lower and right edge is left out, unless it is all there is.

    Shape: (B, in_chans, H, W) -> (B, H // P, W // P, dim), at least 1 each, with P = patch_size.
    """

    def __init__(
        self,
        in_chans: int,
        dim: int,
        patch_size: int = 4,
        norm_layer: Norm = LayerNorm,
        act_layer: Norm = nn.GELU,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.patch_size = patch_size
        self.conv1 = nn.Conv2d(in_chans, dim, patch_size, stride=patch_size, **dd)
        self.norm1 = norm_layer(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = at_least(x, self.patch_size)
        # Pixels are turned once, where they have three channels; all that follows is channels last by itself.
        x = self.conv1(x.contiguous(memory_format=torch.channels_last))
        return self.norm1(x.permute(0, 2, 3, 1))


class OverlapStem(nn.Module):
    """Patches that overlap: convolutions of stride 2 and of half the patch, a norm behind each, an activation between.

    Shape: (B, in_chans, H, W) -> (B, H / P, W / P, dim), rounded up, with P = patch_size, which is even.
    """

    def __init__(
        self,
        in_chans: int,
        dim: int,
        patch_size: int = 4,
        norm_layer: Norm = LayerNorm,
        act_layer: Norm = nn.GELU,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        if patch_size % 2:
            raise ValueError(
                f"OverlapStem: patch_size must be even, got {patch_size}; take stem='patch' for odd patches."
            )
        stride = patch_size // 2
        border = max(1, stride // 2)
        self.conv1 = nn.Conv2d(in_chans, dim // 2, 3, stride=2, padding=1, **dd)
        self.norm1 = before_product(norm_layer(dim // 2, **dd))
        self.act = act_layer()
        self.conv2 = nn.Conv2d(dim // 2, dim, 2 * border + 1, stride=stride, padding=border, **dd)
        self.norm2 = norm_layer(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        if not torch.jit.is_scripting():
            usual = is_usual_conv_norm(self.conv1, self.norm1) and is_usual_conv_norm(self.conv2, self.norm2)
            if usual and eager_on_gpu(x):
                x = self.act(conv_norm(x, self.conv1, self.norm1))
                return conv_norm(x.permute(0, 3, 1, 2), self.conv2, self.norm2)
        x = self.act(self.norm1(self.conv1(x).permute(0, 2, 3, 1)))
        return self.norm2(self.conv2(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class ResidualStem(nn.Module):
    """Convolutions with batch norms: one of stride 2, two beside a shortcut, one of stride 2 that widens, one 1 x 1.

    Shape: (B, in_chans, H, W) -> (B, H / 4, W / 4, dim), rounded up.
    Reference: VSSD's published code, arXiv:2407.18559; from MLLA, arXiv:2405.16605.
    """

    def __init__(
        self,
        in_chans: int,
        dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        half = dim // 2
        self.conv1 = ConvNormAct(in_chans, half, 3, stride=2, **dd)
        self.residual = nn.Sequential(
            ConvNormAct(half, half, 3, **dd), ConvNormAct(half, half, 3, apply_act=False, **dd)
        )
        self.project = nn.Sequential(
            ConvNormAct(half, 4 * dim, 3, stride=2, **dd), ConvNormAct(4 * dim, dim, apply_act=False, **dd)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x.contiguous(memory_format=torch.channels_last))
        return self.project(x + self.residual(x)).permute(0, 2, 3, 1)


class PatchMerging(nn.Module):
    """Join 2 x 2 neighbours on the channel axis, norm, and project: Swin's downsampling; odd maps are padded by zeros.

    Shape: (B, H, W, dim) -> (B, H / 2, W / 2, dim_out), rounded up.
    Reference: Liu et al. 2021, Swin, arXiv:2103.14030, section 3.1.
    """

    def __init__(
        self,
        dim: int,
        dim_out: int,
        norm_layer: Norm = LayerNorm,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.pre_norm = before_product(norm_layer(4 * dim, **dd))
        self.reduction = nn.Linear(4 * dim, dim_out, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        x = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))  # (B, H / 2, row, W / 2, column, C)
        x = x.permute(0, 1, 3, 4, 2, 5).flatten(3)  # of the four, the row varies fastest
        return self.reduction(self.pre_norm(x))


class ConvDownsample(nn.Module):
    """A convolution of stride 2, then a norm.

    Args:
        kernel_size: 3 with overlap, which rounds odd sizes up; 2 without, which rounds them down.
        bias: give the convolution a bias.

    Shape: (B, H, W, dim) -> (B, H / 2, W / 2, dim_out).
    """

    def __init__(
        self,
        dim: int,
        dim_out: int,
        norm_layer: Norm = LayerNorm,
        kernel_size: int = 3,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.conv = nn.Conv2d(dim, dim_out, kernel_size, stride=2, padding=(kernel_size - 1) // 2, bias=bias, **dd)
        self.norm = norm_layer(dim_out, **dd)

    def multiplies_first(self) -> bool:
        """Whether its convolution is all that reads what it is given."""
        return untouched(self, ConvDownsample) and untouched(self.conv, nn.Conv2d)

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 3, 1, 2)
        if not torch.jit.is_scripting():  # noqa: SIM102 - TorchScript would look into both sides of an "and"
            if eager_on_gpu(x) and is_usual_conv_norm(self.conv, self.norm):
                return conv_norm(x, self.conv, self.norm)
        return self.norm(self.conv(x).permute(0, 2, 3, 1))


class InvertedDownsample(nn.Module):
    """An inverted residual's way down, without a shortcut: widen by 1 x 1, halve channel by channel, project and norm.

    Args:
        ratio: width between over dim_out.

    Shape: (B, H, W, dim) -> (B, H / 2, W / 2, dim_out), rounded up.
    Reference: VSSD's published code, arXiv:2407.18559; from MLLA, arXiv:2405.16605.
    """

    def __init__(
        self,
        dim: int,
        dim_out: int,
        ratio: float = 4.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        wide = int(ratio * dim_out)
        self.expand = nn.Conv2d(dim, wide, 1, **dd)
        self.halve = nn.Conv2d(wide, wide, 3, stride=2, padding=1, groups=wide, **dd)
        self.project = nn.Conv2d(wide, dim_out, 1, **dd)
        self.norm = nn.BatchNorm2d(dim_out, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.halve(F.relu(self.expand(x.permute(0, 3, 1, 2)))))
        return self.norm(self.project(x)).permute(0, 2, 3, 1)


#: What models call them.
STEMS: dict[str, Norm] = {"patch": PatchStem, "overlap": OverlapStem}
DOWNSAMPLES: dict[str, Norm] = {
    "merge": PatchMerging,
    "patch": partial(ConvDownsample, kernel_size=2),
    "overlap": ConvDownsample,
}
