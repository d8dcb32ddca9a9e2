"""Patches of an image as tokens, overlapping or not, on a grid that is known for every image size."""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from timm.layers import _assert, register_notrace_function, to_2tuple
from torch import Tensor, nn

from vision_mamba.layers.joined import eager_on_gpu, untouched


@torch.fx.wrap
@register_notrace_function
def count_patches(pixels: int, patch: int, stride: int) -> int:
    """Patches along one side of an image that see each of its pixels, the last ones beyond its edge if need be."""
    return (max(pixels - patch, 0) + stride - 1) // stride + 1


class PatchGrid(nn.Module):
    """What cuts an image into patches, and their grid: nominal, or that of any other image.

    Args:
        img_size: nominal height and width; what `grid_size` and the position embedding are made for.
        patch_size: height and width of a patch.
        stride: pixels from one patch to the next; the patch's size by default.
        strict_img_size: refuse images of another size than `img_size`.
    """

    fineness = 1  #: Pixels, along a side, per element of what the patches' kernel goes over.
    if TYPE_CHECKING:  # TorchScript takes no such annotation
        proj: nn.Conv2d

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        stride: int | tuple[int, int] | None = None,
        strict_img_size: bool = False,
    ) -> None:
        super().__init__()
        self.patch_size = to_2tuple(patch_size)
        self.stride = self.patch_size if stride is None else to_2tuple(stride)
        if any(not 1 <= s <= p for s, p in zip(self.stride, self.patch_size, strict=True)):
            raise ValueError(f"VisionMamba: stride must be from 1 to the patch size {self.patch_size}, got {stride}.")
        self.strict_img_size = strict_img_size
        self.set_input_size(img_size)

    @torch.jit.ignore
    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Change the nominal image size."""
        self.img_size = to_2tuple(img_size)
        self.grid_size = self.dynamic_feat_size(self.img_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]

    @torch.jit.ignore
    def feat_ratio(self) -> int:
        """Pixels per token, along the coarser side."""
        return max(self.stride)

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """Grid of patches that an image of (height, width) is cut into."""
        return (
            count_patches(img_size[0], self.patch_size[0], self.stride[0]),
            count_patches(img_size[1], self.patch_size[1], self.stride[1]),
        )

    def check_size(self, height: int, width: int) -> None:
        """Refuse another size than the nominal one, if so asked."""
        if self.strict_img_size:
            _assert(
                height == self.img_size[0] and width == self.img_size[1],
                f"VisionMamba: images must be {self.img_size}, got ({height}, {width}); "
                f"use dynamic_img_size=True or set_input_size.",
            )


class StridedPatchEmbed(PatchGrid):
    """Cut an image into patches, overlapping where the stride is smaller than the patch, and embed each.

    An image that the patches do not tile is padded with zeros at its right and lower edge, so every pixel is seen.

    Args: those of `PatchGrid`, and
        in_chans: channels of the image.
        embed_dim: E, width of a token.

    Shape: (B, in_chans, H, W) -> (B, grid height, grid width, E).
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        stride: int | tuple[int, int] | None = None,
        in_chans: int = 3,
        embed_dim: int = 192,
        strict_img_size: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(img_size, patch_size, stride, strict_img_size)
        self.proj = nn.Conv2d(in_chans, embed_dim, self.patch_size, self.stride, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2], x.shape[3]
        self.check_size(height, width)
        rows, columns = self.dynamic_feat_size((height, width))
        lower = (rows - 1) * self.stride[0] + self.patch_size[0] - height
        right = (columns - 1) * self.stride[1] + self.patch_size[1] - width
        if not torch.jit.is_scripting():  # noqa: SIM102 - TorchScript would look into both sides of an "and"
            if self._is_product(x):
                return self._product(F.pad(x, (0, right, 0, lower)) if right or lower else x)  # which copies
        return self.proj(F.pad(x, (0, right, 0, lower))).permute(0, 2, 3, 1)

    def _is_product(self, x: Tensor) -> bool:
        """Whether patches that do not overlap go through one matrix product, which on GPUs is several times faster."""
        return eager_on_gpu(x) and untouched(self.proj, nn.Conv2d) and self.stride == self.patch_size

    def _product(self, x: Tensor) -> Tensor:
        half = torch.is_autocast_enabled(x.device.type)
        dtype = torch.get_autocast_dtype(x.device.type) if half else x.dtype
        x = x.unflatten(2, (-1, self.patch_size[0])).unflatten(4, (-1, self.patch_size[1]))
        x = x.permute(0, 2, 4, 1, 3, 5).to(dtype, memory_format=torch.contiguous_format)  # cast as they are moved
        return F.linear(x.flatten(3), self.proj.weight.flatten(1), self.proj.bias)  # of in_chans * patch
