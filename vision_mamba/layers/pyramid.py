"""A feature pyramid for plain models, which have maps of one size only."""

import math
from collections import OrderedDict
from collections.abc import Sequence

import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn


class SimpleFeaturePyramid(nn.Module):
    """Maps of several sizes from the last map of a plain model, each by itself: there is no top-down path.

    For every scale s: the map is made larger by transposed convolutions of stride 2, which halve its channels, with a
    norm and a GELU between them, or smaller by max pooling; then come a projection 1 x 1 and a convolution 3 x 3, a
    norm behind each. A patch size of 16 and scales of 4, 2, 1 and 1/2 give the strides 4, 8, 16 and 32 that detectors
    and segmenters expect.

    Args:
        in_channels: C, of the map.
        out_channels: of every level.
        scales: size of each level over that of the map, powers of 2; stride of the map / stride of the level.
        extra_blocks: make the levels above the last; called as torchvision's `ExtraFPNBlock`, with lists of levels, of
            the maps that they were made of, and of names.

    Shape: (B, C, H, W) -> levels by name "0", "1", ..., each (B, out_channels, H * s, W * s), rounded up where s < 1.
    Raises: ValueError for a scale that is no power of 2, or that leaves no channel.
    Reference: Li et al. 2022, Exploring Plain Vision Transformer Backbones for Object Detection, arXiv:2203.16527.

    >>> levels = SimpleFeaturePyramid(64, 32)(torch.randn(1, 64, 10, 7))
    >>> {name: tuple(level.shape[1:]) for name, level in levels.items()}
    {'0': (32, 40, 28), '1': (32, 20, 14), '2': (32, 10, 7), '3': (32, 5, 4)}
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int = 256,
        scales: Sequence[float] = (4, 2, 1, 0.5),
        extra_blocks: nn.Module | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.scales, self.out_channels = tuple(scales), out_channels
        self.levels = nn.ModuleList(_level(in_channels, out_channels, scale, device, dtype) for scale in scales)
        self.extra_blocks = extra_blocks

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        levels = [level(x) for level in self.levels]
        names = [str(i) for i in range(len(levels))]
        if self.extra_blocks is not None:
            levels, names = self.extra_blocks(levels, [x] * len(levels), names)
        return OrderedDict(zip(names, levels, strict=True))


def _level(
    channels: int, out_channels: int, scale: float, device: torch.device | str | None, dtype: torch.dtype | None
) -> nn.Sequential:
    octaves = math.log2(scale) if scale > 0 else math.nan
    if not octaves.is_integer() or channels >> max(int(octaves), 0) == 0:
        raise ValueError(
            f"SimpleFeaturePyramid: a scale must be a power of 2 that leaves some of {channels} channels when each "
            f"doubling halves them, got {scale}; choose strides that are the map's times or over a power of 2."
        )
    modules: list[nn.Module] = []
    for i in range(int(octaves)):
        if i:
            modules += [LayerNorm2d(channels, device=device, dtype=dtype), nn.GELU()]
        modules.append(nn.ConvTranspose2d(channels, channels // 2, 2, stride=2, device=device, dtype=dtype))
        channels //= 2
    modules += [nn.MaxPool2d(2, ceil_mode=True) for _ in range(-int(octaves))]
    for width, kernel in ((channels, 1), (out_channels, 3)):
        conv = nn.Conv2d(width, out_channels, kernel, padding=kernel // 2, bias=False, device=device, dtype=dtype)
        modules += [conv, LayerNorm2d(out_channels, device=device, dtype=dtype)]
    return nn.Sequential(*modules)
