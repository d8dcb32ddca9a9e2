"""The token mixers of VMamba: a depthwise convolution, then a scan of the map along four routes."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_function
from torch import Tensor, nn

from vision_mamba import scans
from vision_mamba.layers.init import init_a_log_, init_dt_bias_, init_dt_weight_
from vision_mamba.layers.joined import chains_on_gpu, is_centred, is_product, untouched
from vision_mamba.layers.local import RouteAttention
from vision_mamba.layers.norm import LayerNorm, before_product
from vision_mamba.layers.scan import DualScan, SelectiveScan
from vision_mamba.ops import mixers


@torch.fx.wrap
@register_notrace_function
def sum_dtype(x: Tensor, wide: torch.dtype) -> torch.dtype:
    """In float16 the sum of the routes could overflow before the norm, so there that of the norm; else that of x."""
    return wide if x.dtype == torch.float16 else x.dtype


class SS2D(nn.Module):
    """Mix the tokens of a map by one selective state-space model per route, which share both projections.

    With u = silu(conv(x)), x = in_proj(tokens), and (r_k, B_k, C_k) = X_k u per token:
        y = out_proj(norm(sum_k scan_k(u, W_k r_k + b_k, A_k, B_k, C_k, D_k) [/ K]) [* silu(z)])

    with A = -exp(A_logs); z is the second half of what in_proj gives where there is a gate. The map stays channels last
    from end to end: the routes are an index table for the scan, and the projections X of all routes are one product.

    Args:
        dim: C, channels of the map.
        d_state: N, states of a channel.
        ssm_ratio: D / C, inner width over outer width.
        dt_rank: R, rank of the step sizes; C / 16 rounded up by default.
        d_conv: side of the depthwise convolution's kernel, odd; 1 for no convolution.
        conv_bias: give the convolution a bias.
        act_layer: activation of u and z.
        gate: multiply by silu(z), as in VMamba's first version.
        scan_order: name of a registered `ScanOrder`; its routes are K.
        route_attention: add the routes up by `RouteAttention`, as in LocalMamba.
        published_quirks: see there.
        average: take the mean of the routes rather than their sum.
        norm_columns: scale each token's step sizes, B and C of a route to a mean square of 1 together, so that
            no activation, however large, drives the scan further than its parameters allow.
        norm_eps: epsilon of the norm behind the scan.
        proj_drop: dropout behind out_proj.

    Shape: (B, H, W, C) -> (B, H, W, C).
    Raises: ValueError for an even kernel.
    Reference: Liu et al. 2024, VMamba, arXiv:2401.10166, sections 4.2 and 4.3.

    >>> SS2D(32)(torch.randn(2, 5, 7, 32)).shape
    torch.Size([2, 5, 7, 32])
    """

    def __init__(
        self,
        dim: int,
        d_state: int = 1,
        ssm_ratio: float = 1.0,
        dt_rank: int | None = None,
        d_conv: int = 3,
        conv_bias: bool = False,
        act_layer: Callable[..., nn.Module] = nn.SiLU,
        gate: bool = False,
        scan_order: str = "cross",
        route_attention: bool = False,
        published_quirks: bool = False,
        average: bool = False,
        norm_columns: bool = False,
        norm_eps: float = 1e-5,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        if d_conv % 2 == 0:
            raise ValueError(
                f"{type(self).__name__}: d_conv must be odd, got {d_conv}; an even kernel would move the map."
            )
        self.d_inner = d_inner = int(ssm_ratio * dim)
        self.d_state = d_state
        self.dt_rank = math.ceil(dim / 16) if dt_rank is None else dt_rank
        self.gate = gate
        self.norm_columns = norm_columns
        self.routes = routes = len(scans.get(scan_order))
        self.scale = 1.0 / routes if average else 1.0

        self.in_proj = nn.Linear(dim, 2 * d_inner if gate else d_inner, bias=False, **dd)
        padding = (d_conv - 1) // 2
        self.conv2d: nn.Module = (
            nn.Conv2d(d_inner, d_inner, d_conv, padding=padding, groups=d_inner, bias=conv_bias, **dd)
            if d_conv > 1
            else nn.Identity()
        )
        self.act = act_layer()
        self.x_proj_weight = nn.Parameter(torch.empty(routes, self.dt_rank + 2 * d_state, d_inner, **dd))
        # Half precision is too coarse for what is exponentiated or summed over a whole route.
        wide = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
        self._make_scan(scan_order, dd, {"device": device, "dtype": wide})
        self.attn: nn.Module | None = None
        if route_attention:
            self.attn = RouteAttention(d_inner, scan_order, published_quirks=published_quirks, **dd)
        self.out_norm = before_product(LayerNorm(d_inner, eps=norm_eps, **dd))
        self.out_proj = nn.Linear(d_inner, dim, bias=False, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self.reset_parameters()

    def _make_scan(self, scan_order: str, dd: dict[str, Any], wide: dict[str, Any]) -> None:
        """The scan and its own parameters; `wide` is for those that are exponentiated or summed."""
        channels = self.routes * self.d_inner
        self.dt_projs_weight = nn.Parameter(torch.empty(self.routes, self.d_inner, self.dt_rank, **dd))
        self.dt_projs_bias = nn.Parameter(torch.empty(self.routes, self.d_inner, **wide))
        self.A_logs = nn.Parameter(torch.empty(channels, self.d_state, **wide))
        self.Ds = nn.Parameter(torch.empty(channels, **wide))
        self.scan: nn.Module = SelectiveScan(scan_order)

    def reset_parameters(self) -> None:
        """Fill what is not in a submodule as published."""
        nn.init.uniform_(self.x_proj_weight, -(self.d_inner**-0.5), self.d_inner**-0.5)
        init_dt_weight_(self.dt_projs_weight, self.dt_rank)
        init_dt_bias_(self.dt_projs_bias)
        init_a_log_(self.A_logs)
        nn.init.ones_(self.Ds)

    def _scan_routes(
        self,
        x: Tensor,
        dt: Tensor,
        B: Tensor,
        C: Tensor,
        height: int,
        width: int,
        merge: bool,
        out_dtype: torch.dtype,
    ) -> Tensor:
        """u (B, L, D), step sizes of rank R, B and C, each (B, L, K, .) -> (B, L, D), or (B, L, K, D) unmerged."""
        A = -torch.exp(self.A_logs).unflatten(0, (self.routes, self.d_inner))
        D = self.Ds.unflatten(0, (self.routes, self.d_inner)) * self.scale
        return self.scan(
            x, dt, A, B, C, D, self.dt_projs_weight, self.dt_projs_bias, height, width,
            merge=merge, out_dtype=out_dtype,
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(self.in_proj(x))

    def mix(self, x: Tensor) -> Tensor:
        """What is behind in_proj: (B, H, W, D), or (B, H, W, 2 D) with a gate, -> (B, H, W, C)."""
        height, width = x.shape[1], x.shape[2]
        if not torch.jit.is_scripting():
            joined = self._joined(x)
            if joined is not None:
                return self.proj_drop(joined)
        z: Tensor | None = None
        if self.gate:
            x, z = x.chunk(2, dim=-1)
        # Permuted views: the memory stays channels last, and the convolution works on it as it is.
        x = self.act(self.conv2d(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)).flatten(1, 2)  # (B, L, D)
        columns = F.linear(x, self.x_proj_weight.flatten(0, 1)).unflatten(-1, (self.routes, -1))
        if self.norm_columns:
            columns = F.rms_norm(columns, [columns.shape[-1]], None, 1e-5)  # in float32 inside
        dt, B, C = columns.split([self.dt_rank, self.d_state, self.d_state], dim=-1)  # (B, L, K, .)
        out_dtype = sum_dtype(x, self.out_norm.weight.dtype)
        y = self._scan_routes(
            x, dt, B, C if self.scale == 1.0 else C * self.scale, height, width, self.attn is None, out_dtype
        )
        if self.attn is not None:
            y = self.attn(y, height, width)
        y = self.out_norm(y).unflatten(1, (height, width))
        if z is not None:
            y = y * self.act(z)
        return self.proj_drop(self.out_proj(y))

    def _joined(self, x: Tensor) -> Tensor | None:
        """All behind in_proj as one, where that can be."""
        usual = not self.norm_columns and self.scale == 1.0
        if not usual or not isinstance(self.scan, SelectiveScan) or self.scan.exportable or not chains_on_gpu(x):
            return None
        conv, norm, out, attn = self.conv2d, self.out_norm, self.out_proj, self.attn
        attention: tuple[Tensor | None, ...] = (None,) * 6
        if attn is not None:
            if not isinstance(attn, RouteAttention) or not attn.is_usual():
                return None
            attention = attn.given()
        if not (is_centred(conv) and untouched(self.act, nn.SiLU) and untouched(norm, LayerNorm)):
            return None
        if not (is_product(out) and isinstance(conv, nn.Conv2d)):
            return None
        A_log, D = (t.unflatten(0, (self.routes, self.d_inner)) for t in (self.A_logs, self.Ds))
        return mixers.scan_map(
            x, conv.weight, conv.bias, self.x_proj_weight, A_log, D, self.dt_projs_weight, self.dt_projs_bias,
            self.scan.table(x, x.shape[1], x.shape[2]), *attention, norm.weight, norm.bias, out.weight, eps=norm.eps,
            out_dtype=sum_dtype(x, norm.weight.dtype), gate=self.gate,
            attention_eps=None if attn is None else attn.norm.eps,
        )  # fmt: skip


class SSD2D(SS2D):
    """`SS2D` whose scan is that of Mamba-2: R heads of D / R channels, each with one decay and one step size a token.

    Step sizes come straight from the columns, so there is no W; D is a weight for every channel. Otherwise as `SS2D`,
    R being the heads of a route: C / 16 rounded up by default, of which D must be a multiple.

    Shape: (B, H, W, C) -> (B, H, W, C).
    Raises: ValueError if the heads do not divide the inner width.
    Reference: Dao and Gu 2024, Mamba-2, arXiv:2405.21060; along four routes in VMamba's published code, "m0".

    >>> SSD2D(32, d_state=8)(torch.randn(2, 5, 7, 32)).shape
    torch.Size([2, 5, 7, 32])
    """

    def _make_scan(self, scan_order: str, dd: dict[str, Any], wide: dict[str, Any]) -> None:
        if self.d_inner % self.dt_rank:
            raise ValueError(
                f"SSD2D: the heads must divide the {self.d_inner} inner channels, got {self.dt_rank}; choose another "
                f"dt_rank or ssm_ratio."
            )
        heads = self.dt_rank
        self.dt_projs_bias = nn.Parameter(torch.empty(self.routes, heads, **wide))
        self.A_logs = nn.Parameter(torch.empty(self.routes, heads, **wide))
        self.Ds = nn.Parameter(torch.empty(self.routes, heads, self.d_inner // heads, **wide))
        self.scan = DualScan(scan_order)

    def reset_parameters(self) -> None:
        """Fill what is not in a submodule as published."""
        nn.init.uniform_(self.x_proj_weight, -(self.d_inner**-0.5), self.d_inner**-0.5)
        nn.init.uniform_(self.dt_projs_bias, 0.0, 0.1)
        nn.init.zeros_(self.A_logs)
        nn.init.ones_(self.Ds)

    def _scan_routes(
        self,
        x: Tensor,
        dt: Tensor,
        B: Tensor,
        C: Tensor,
        height: int,
        width: int,
        merge: bool,
        out_dtype: torch.dtype,
    ) -> Tensor:
        return self.scan(
            x.unflatten(-1, (self.dt_rank, -1)), dt, -torch.exp(self.A_logs), B.unsqueeze(3), C.unsqueeze(3),
            self.Ds * self.scale, self.dt_projs_bias, height, width, merge=merge, out_dtype=out_dtype,
        ).flatten(-2)  # fmt: skip
