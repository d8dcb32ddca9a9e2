"""The two mixers of EfficientVMamba: a scan beside a convolution on fine maps, an inverted residual on coarse ones."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timm.models._efficientnet_blocks import InvertedResidual, SqueezeExcite
from torch import Tensor, nn

from vision_mamba.layers.local import ChannelAttention


class ScanBesideConv(nn.Module):
    """Mix a map by a scan and by a convolution side by side, and add the two up by attention to their channels.

    With pointwise(.) a 1 x 1 and depthwise(.) a 3 x 3 convolution, both with a bias:
        y = attention(scan(x), pointwise(gelu(batch_norm(depthwise(x)))))

    Args:
        dim: C, channels of the map.
        scan: dim -> mixer of a (B, H, W, C) map.

    Shape: (B, H, W, C) -> (B, H, W, C).
    Reference: Pei et al. 2024, EfficientVMamba, arXiv:2403.09977, section 3.3; see `ChannelAttention`.

    >>> from vision_mamba.layers import SS2D
    >>> ScanBesideConv(16, partial(SS2D, scan_order="atrous_2"))(torch.randn(2, 5, 7, 16)).shape
    torch.Size([2, 5, 7, 16])
    """

    def __init__(
        self,
        dim: int,
        scan: Callable[..., nn.Module],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.scan = scan(dim, **dd)
        self.conv = nn.Sequential(
            nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd),
            nn.BatchNorm2d(dim, **dd),
            nn.GELU(),
            nn.Conv2d(dim, dim, 1, **dd),
        )
        self.attn = ChannelAttention(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        # Permuted views: the memory stays channels last, and the convolutions work on it as it is.
        beside = self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        both = torch.stack((self.scan(x), beside), 3).flatten(1, 2)
        return self.attn(both).unflatten(1, (x.shape[1], x.shape[2]))


class InvertedBlock(nn.Module):
    """MobileNet's inverted residual, with squeeze and excitation, on a map with channels last.

    Args:
        dim: C, channels of the map.
        expand: hidden width over C.
        squeeze: width of the squeeze over the hidden one.
        drop_path: stochastic depth.

    Shape: (B, H, W, C) -> (B, H, W, C).
    Reference: Sandler et al. 2018, MobileNetV2, arXiv:1801.04381; Hu et al. 2018, arXiv:1709.01507.

    >>> InvertedBlock(16)(torch.randn(2, 5, 7, 16)).shape
    torch.Size([2, 5, 7, 16])
    """

    def __init__(
        self,
        dim: int,
        expand: float = 4.0,
        squeeze: float = 0.125,
        drop_path: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.conv = InvertedResidual(
            dim,
            dim,
            exp_ratio=expand,
            se_layer=partial(SqueezeExcite, rd_ratio=squeeze),  # type: ignore[arg-type]
            drop_path_rate=drop_path,
            device=device,
            dtype=dtype,
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
