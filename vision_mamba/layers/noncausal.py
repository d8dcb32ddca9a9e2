"""The token mixers of VSSD: state-space duality without an order, where every token reads all; and plain attention."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Attention
from torch import Tensor, nn

from vision_mamba.layers.init import init_dt_bias_
from vision_mamba.layers.joined import eager_on_gpu, is_centred
from vision_mamba.layers.norm import LayerNorm, before_product
from vision_mamba.layers.scan import DualScan
from vision_mamba.layers.ss2d import sum_dtype
from vision_mamba.ops.conv import conv_map


class NonCausalSSD(nn.Module):
    """Mix the tokens of a map through one state a head, which all tokens write and all tokens read.

    With (z, xBC, dt) = in_proj(tokens), (x, B, C) the parts of silu(conv(xBC)) and w_t = exp(A_log) softplus(dt + b):
        h = sum_t w_t x_t B_t^T         y_t = h C_t + D x_t         out_proj(norm(y) * z)

    That is `ops.ssd` with direction "none": Mamba-2 whose decay only weighs the tokens. Heads share B and C.

    Args:
        dim: C, channels of the map.
        num_heads: heads, of which the inner width is a multiple.
        d_state: N, states of a channel.
        expand: inner width over C.
        d_conv: side of the depthwise convolution, odd.
        norm_eps: epsilon of the norm behind the sum.

    Shape: (B, H, W, C) -> (B, H, W, C).
    Raises: ValueError if the heads do not divide the inner width, or d_conv is even.
    Reference: Shi et al. 2024, VSSD, arXiv:2407.18559, section 3.2.

    >>> NonCausalSSD(32, num_heads=2, d_state=8)(torch.randn(2, 5, 7, 32)).shape
    torch.Size([2, 5, 7, 32])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        d_state: int = 64,
        expand: float = 2.0,
        d_conv: int = 3,
        norm_eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        # Half precision is too coarse for what is exponentiated or summed over a whole map.
        wide: dict[str, Any] = {
            "device": device,
            "dtype": torch.promote_types(dtype or torch.get_default_dtype(), torch.float32),
        }
        self.num_heads = num_heads
        d_inner = int(expand * dim)
        if d_inner % num_heads:
            raise ValueError(
                f"NonCausalSSD: num_heads must divide the {d_inner} inner channels, got {num_heads}; choose a divisor."
            )
        if d_conv % 2 == 0:
            raise ValueError(f"NonCausalSSD: d_conv must be odd, got {d_conv}; an even kernel would move the map.")
        self.parts = [d_inner, d_state, d_state]  # x, B, C
        self.in_proj = nn.Linear(dim, d_inner + sum(self.parts) + num_heads, bias=False, **dd)
        mixed = sum(self.parts)
        self.conv2d = nn.Conv2d(mixed, mixed, d_conv, padding=(d_conv - 1) // 2, groups=mixed, **dd)
        self.dt_bias = nn.Parameter(torch.empty(num_heads, **wide))
        self.A_log = nn.Parameter(torch.empty(num_heads, **wide))
        self.D = nn.Parameter(torch.empty(num_heads, **wide))
        self.scan = DualScan("forward")
        self.norm = before_product(LayerNorm(d_inner, eps=norm_eps, **dd))
        self.out_proj = nn.Linear(d_inner, dim, bias=False, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fill what is not in a submodule as published."""
        init_dt_bias_(self.dt_bias)
        with torch.no_grad():
            self.A_log.uniform_(1, 16).log_()
        nn.init.ones_(self.D)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(self.in_proj(x))

    def mix(self, x: Tensor) -> Tensor:
        """What is behind in_proj, of whose channels there may be more than are used."""
        height, width = x.shape[1], x.shape[2]
        known = self.parts[0] + sum(self.parts)
        z, mixed, dt = x.split([self.parts[0], sum(self.parts), x.shape[3] - known], dim=-1)
        dt = dt[..., : self.num_heads]
        x, B, C = self._convolved(mixed).flatten(1, 2).split(self.parts, dim=-1)
        # One route, to which the order of the tokens is nothing: no table, and not causal.
        y = self.scan.along(
            x.unflatten(-1, (self.num_heads, -1)), dt.flatten(1, 2).unsqueeze(2), -torch.exp(self.A_log).unsqueeze(0),
            B.unsqueeze(2).unsqueeze(3), C.unsqueeze(2).unsqueeze(3), self.D.unsqueeze(0), self.dt_bias.unsqueeze(0),
            None, out_dtype=sum_dtype(x, self.norm.weight.dtype), causal=False,
        )  # fmt: skip
        y = self.norm(y.flatten(-2)).unflatten(1, (height, width))
        return self.out_proj(y * z)

    def _convolved(self, x: Tensor) -> Tensor:
        conv = self.conv2d
        if not torch.jit.is_scripting():  # noqa: SIM102 - TorchScript would look into both sides of an "and"
            if eager_on_gpu(x) and is_centred(conv):
                return conv_map(x, conv.weight, conv.bias)
        # Permuted views: the memory stays channels last, and the convolution works on it as it is.
        return F.silu(conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class MapAttention(nn.Module):
    """timm's `Attention` among all tokens of a map; (B, H, W, C) -> (B, H, W, C)."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = False, **dd: Any) -> None:
        super().__init__()
        self.attn = Attention(dim, num_heads, qkv_bias=qkv_bias, **dd)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1], x.shape[2]
        return self.attn(x.flatten(1, 2)).unflatten(1, (height, width))
