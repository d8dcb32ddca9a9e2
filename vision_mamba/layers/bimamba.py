"""The token mixer of Vim: one selective state-space model read from both ends of a token sequence."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_function
from torch import Tensor, nn

from vision_mamba import scans
from vision_mamba.layers.init import init_a_log_, init_dt_bias_, init_dt_weight_
from vision_mamba.layers.joined import chains_on_gpu, is_product, norm_linear
from vision_mamba.layers.norm import RMSNorm
from vision_mamba.layers.scan import SelectiveScan
from vision_mamba.ops import mixers
from vision_mamba.ops.conv import conv_both_ways, gated, plain_conv_both_ways, plain_gated


@torch.fx.wrap
@register_notrace_function
def _convolved(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    if torch.jit.is_scripting():
        return plain_conv_both_ways(x, weight, bias)
    return conv_both_ways(x, weight, bias)


@torch.fx.wrap
@register_notrace_function
def _gated(y: Tensor, z: Tensor) -> Tensor:
    if torch.jit.is_scripting():
        return plain_gated(y, z)
    return gated(y, z)


class RouteMamba(nn.Module):
    """What mixers of several selective state-space models have in common: one a route, both projections shared.

    Args:
        dim: E, width of the tokens.
        scan_order: name of a registered `ScanOrder`; its routes are K.
        d_state: N, states of a channel.
        d_conv: W, taps of the convolutions.
        expand: D / E, inner width over outer width.
        dt_rank: R, rank of the step sizes; E / 16 rounded up by default.
        average: take the mean of the routes rather than their sum ("div2").
        norm_columns: scale each token's step sizes, B and C of a route to a mean square of 1 together, so that no
            activation, however large, drives the scan further than its parameters allow.
    """

    def __init__(
        self,
        dim: int,
        scan_order: str,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2.0,
        dt_rank: int | None = None,
        average: bool = True,
        norm_columns: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.routes = routes = len(scans.get(scan_order))
        self.d_inner = int(expand * dim)
        self.d_state = d_state
        self.d_conv = d_conv
        self.dt_rank = math.ceil(dim / 16) if dt_rank is None else dt_rank
        self.scale = 1.0 / routes if average else 1.0
        self.norm_columns = norm_columns

        # Half precision is too coarse for what is exponentiated or summed over a whole route.
        wide = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)

        def parameter(*shape: int, dtype: torch.dtype | None = dtype) -> nn.Parameter:
            return nn.Parameter(torch.empty(routes, *shape, device=device, dtype=dtype))

        self.in_proj = nn.Linear(dim, 2 * self.d_inner, bias=False, device=device, dtype=dtype)
        self.conv_weight = parameter(self.d_inner, d_conv)
        self.conv_bias = parameter(self.d_inner)
        self.x_proj_weight = parameter(self.dt_rank + 2 * d_state, self.d_inner)
        self.dt_weight = parameter(self.d_inner, self.dt_rank)
        self.dt_bias = parameter(self.d_inner, dtype=wide)
        self.A_log = parameter(self.d_inner, d_state, dtype=wide)
        self.D = parameter(self.d_inner, dtype=wide)
        self.scan = SelectiveScan(scan_order)
        self.out_proj = nn.Linear(self.d_inner, dim, bias=False, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Fill what is not in a submodule, and is filled alike whatever the routes are."""
        for weight in (self.conv_weight, self.conv_bias):
            nn.init.uniform_(weight, -(self.conv_weight.shape[-1] ** -0.5), self.conv_weight.shape[-1] ** -0.5)
        init_a_log_(self.A_log)
        nn.init.ones_(self.D)

    def columns(self, u: Tensor) -> list[Tensor]:
        """(B, S, K, D) -> step sizes of rank R, B and C, each (B, S, K, .), by each route's own projection."""
        columns = torch.einsum("blkd,kcd->blkc", u, self.x_proj_weight)
        if self.norm_columns:
            columns = F.rms_norm(columns, [columns.shape[-1]], None, 1e-5)  # in float32 inside
        return columns.split([self.dt_rank, self.d_state, self.d_state], -1)


class BiMamba(RouteMamba):
    """Mix tokens by two selective state-space models, one read forwards and one backwards, that share both projections.

    With (x, z) the halves of in_proj(u), u = `ops.conv_both_ways`(x), (r_k, B_k, C_k) = X_k u_k per token:
        y = out_proj(silu(z) * sum_k scan_k(u_k, W_k r_k + b_k, A_k, B_k, C_k, D_k) [/ 2])

    The published code gates either way with its own order of z. That is the same gate in token order, so it gates the
    sum; and the sum's half is taken where it costs least, on C and D, in which the scan is linear.

    Args: those of `RouteMamba` but for the order.

    Shape: (B, L, E) -> (B, L, E).
    Reference: Zhu et al. 2024, Vision Mamba, arXiv:2401.09417, algorithm 1.

    >>> BiMamba(32)(torch.randn(2, 10, 32)).shape
    torch.Size([2, 10, 32])
    """

    def __init__(
        self,
        dim: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2.0,
        dt_rank: int | None = None,
        average: bool = True,
        norm_columns: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, "bidirectional", d_state, d_conv, expand, dt_rank, average, norm_columns, device, dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fill what is not in a submodule as published; of the two step-size biases only the first has its own rule."""
        super().reset_parameters()
        nn.init.uniform_(self.x_proj_weight, -(self.d_inner**-0.5), self.d_inner**-0.5)
        init_dt_weight_(self.dt_weight, self.dt_rank)
        with torch.no_grad():
            init_dt_bias_(self.dt_bias[0])
            self.dt_bias[1].zero_()

    def forward(self, x: Tensor, height: int = 1, width: int = 0) -> Tensor:
        """The grid that the tokens form is of no matter here: both ways are along the sequence."""
        return self.mix(self.in_proj(x))

    def mix(self, x: Tensor) -> Tensor:
        """What is behind in_proj: (B, L, 2 D) -> (B, L, E)."""
        if not torch.jit.is_scripting():
            y = self._joined(x)
            if y is not None:
                return y
        x, z = x.chunk(2, -1)
        x = _convolved(x, self.conv_weight, self.conv_bias)
        dt, B, C = self.columns(x)
        A = -torch.exp(self.A_log)
        C, D = C * self.scale, self.D * self.scale
        y = self.scan(x, dt, A, B, C, D, self.dt_weight, self.dt_bias, 1, x.shape[1])
        return self.out_proj(_gated(y, z))

    def _usual(self) -> bool:
        return not (self.norm_columns or self.scan.exportable) and is_product(self.out_proj)

    def _behind(self, like: Tensor) -> tuple[Tensor | None, ...]:
        """What all behind in_proj needs to run as one, for tokens like these."""
        indices = self.scan.table(like, 1, like.shape[1])
        of_scan = (self.A_log, self.D, self.dt_weight, self.dt_bias, indices)
        return self.conv_weight, self.conv_bias, self.x_proj_weight, *of_scan, self.out_proj.weight

    def _joined(self, xz: Tensor) -> Tensor | None:
        """All behind in_proj as one, where that can be."""
        if not (chains_on_gpu(xz) and self._usual()):
            return None
        return mixers.scan_both_ways(xz, *self._behind(xz), scale=self.scale)

    def mix_normed(self, x: Tensor, branch: Tensor | None, norm: Any) -> tuple[Tensor, Tensor]:
        """The mixer of a usual norm of x + branch, and that sum; as one where that can be."""
        if self._usual():
            given = (x, branch, norm.weight, getattr(norm, "bias", None), self.in_proj.weight, *self._behind(x))
            how = dict(eps=norm.eps, rms=isinstance(norm, RMSNorm), scale=self.scale)
            found = mixers.norm_both_ways(*given, **how)
            if found is not None:
                return found
        y, x = norm_linear(x, branch, norm, self.in_proj)
        return self.mix(y), x
