"""The token mixer of LocalVim: a selective state-space model along each of several routes over a map, windows too."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm, trunc_normal_
from torch import Tensor, nn

from vision_mamba import scans
from vision_mamba.layers.bimamba import RouteMamba
from vision_mamba.layers.init import init_in_float32_
from vision_mamba.layers.joined import chains_on_gpu, is_product, untouched
from vision_mamba.layers.scan import SelectiveScan
from vision_mamba.layers.tokens import CLASS_TOKENS, class_place
from vision_mamba.ops import mixers


class ChannelAttention(nn.Module):
    """Weigh the channels of several results by what they are on average, then add the results up.

    With m_k the mean over all tokens of norm(y_k), for each result k of the K:
        y = sum_k y_k * sigmoid(W2 gelu(W1 m_k + b1) + b2)

    All results share norm and weights. The published name, BiAttn, tells of a second branch over space that the
    published code does not have.

    Args:
        dim: D, channels.
        ratio: hidden width over D.

    Shape: (B, L, K, D) -> (B, L, D).
    Reference: Huang et al. 2024, LocalMamba, arXiv:2403.09338, section 4.3.

    >>> ChannelAttention(16)(torch.randn(2, 6, 4, 16)).shape
    torch.Size([2, 6, 16])
    """

    def __init__(
        self,
        dim: int,
        ratio: float = 0.125,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm = LayerNorm(dim, eps=1e-5, **dd)
        self.global_reduce = nn.Linear(dim, int(dim * ratio), **dd)
        self.channel_select = nn.Linear(int(dim * ratio), dim, **dd)

    def given(self) -> tuple[Tensor | None, ...]:
        """The parameters in the order in which kernels take them."""
        norm, reduce, select = self.norm, self.global_reduce, self.channel_select
        return norm.weight, norm.bias, reduce.weight, reduce.bias, select.weight, select.bias

    def is_usual(self) -> bool:
        """Whether this is what was written here, all through: see `joined.untouched`."""
        layers = (self.norm, LayerNorm), (self.global_reduce, nn.Linear), (self.channel_select, nn.Linear)
        return all(untouched(layer, kind) for layer, kind in layers)

    def weigh(self, y: Tensor) -> Tensor:
        """(B, L, K, D) -> (B, L, D)."""
        mean = self.norm(y).mean(1)
        gate = self.channel_select(F.gelu(self.global_reduce(mean))).sigmoid()
        return (y * gate.unsqueeze(1)).sum(2)

    def forward(self, y: Tensor) -> Tensor:
        return self.weigh(y)


class RouteAttention(ChannelAttention):
    """`ChannelAttention` to the results of a scan's routes.

    Args:
        dim: D, channels.
        scan_order: name of the registered `ScanOrder` that the results come from.
        ratio: hidden width over D.
        published_quirks: put the results of column routes where the published code puts them: at the right places on
            square maps alone. Weights that were tuned on other maps have learned with it.

    Shape: (B, L, K, D) -> (B, L, D).

    >>> RouteAttention(16, "local_2")(torch.randn(2, 6, 4, 16), 2, 3).shape
    torch.Size([2, 6, 16])
    """

    def __init__(
        self,
        dim: int,
        scan_order: str,
        ratio: float = 0.125,
        published_quirks: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, ratio, device, dtype)
        self.routes = len(scans.get(scan_order))
        columns = scans.column_routes(scan_order) if published_quirks else []
        self.misplaces = bool(columns)
        self.misplaced = [k in columns for k in range(self.routes)]
        self.source = SelectiveScan(scans.COLUMNS_TWICE.name)

    def is_usual(self) -> bool:
        return super().is_usual() and untouched(self, RouteAttention) and not self.misplaces

    def forward(self, y: Tensor, height: int, width: int, class_token: int = -1) -> Tensor:  # type: ignore[override]
        if self.misplaces:
            source = self.source.table(y, height, width, class_token)[0]
            parts = y.unbind(2)
            y = torch.stack(
                [parts[k].index_select(1, source) if self.misplaced[k] else parts[k] for k in range(self.routes)], 2
            )
        return self.weigh(y)


class LocalMamba(RouteMamba):
    """Mix tokens by one selective state-space model per route over their grid; the routes share both projections.

    With (x, z) the halves of in_proj(u), and along every route k: u_k = silu(conv_k(x)), causal in the route's order,
    and (r_k, B_k, C_k) = X_k u_k per token:
        y_k = silu(z) * scan_k(u_k, W_k r_k + b_k, A_k, B_k, C_k, D_k)          y = out_proj(attention(y_1, ..., y_K))

    Where windows hang over the edge of the grid, a route goes through tokens of zeros. The convolution's bias makes
    inputs of those too, so they are steps like all others, and only their results are left out. For the convolution
    the tokens are laid out in the order of each route; the scan follows them there, and its result is laid back.

    Args: those of `RouteMamba`, and
        class_token: its place among the tokens: "middle" (M // 2 among M patches), "head" or "none". Every route visits
            it at the step of that number.
        published_quirks: see `RouteAttention`.

    Shape: (B, L, E) -> (B, L, E), L = height * width, one more with a class token.
    Reference: Huang et al. 2024, LocalMamba, arXiv:2403.09338, sections 4.1 and 4.3.

    >>> LocalMamba(32, "local_2")(torch.randn(2, 15, 32), 3, 5).shape
    torch.Size([2, 15, 32])
    """

    def __init__(
        self,
        dim: int,
        scan_order: str,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2.0,
        dt_rank: int | None = None,
        average: bool = False,
        norm_columns: bool = False,
        class_token: str = "none",
        published_quirks: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, scan_order, d_state, d_conv, expand, dt_rank, average, norm_columns, device, dtype)
        if CLASS_TOKENS.get(class_token, 2) > 1:
            raise ValueError(
                f"LocalMamba: class_token must be 'middle', 'head' or 'none', got {class_token!r}; routes over a grid "
                f"go through one class token at most."
            )
        self.class_token = class_token
        self.attn = RouteAttention(
            self.d_inner, scan_order, published_quirks=published_quirks, device=device, dtype=dtype
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fill what is not in a submodule as published, where steps start from softplus(0) = 0.69."""
        super().reset_parameters()
        for weight in (self.x_proj_weight, self.dt_weight):
            init_in_float32_(weight, trunc_normal_, std=0.02)
        nn.init.zeros_(self.dt_bias)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        length = x.shape[1]
        class_token = class_place(self.class_token, height, width)
        table = self.scan.table(x, height, width, class_token)
        x = self.in_proj(x)
        if not torch.jit.is_scripting():
            joined = self._joined(x, table)
            if joined is not None:
                return joined
        x, z = x.chunk(2, -1)
        u = self._convolve(x, table)  # (B, S, K, D) in the order of each route, and so is all that follows of it
        dt, B, C = self.columns(u)
        A = -torch.exp(self.A_log)
        y = self.scan.along(u, dt, A, B, C, self.D, self.dt_weight, self.dt_bias, None, False)
        y = self._lay_back(y, table, length) * F.silu(z).unsqueeze(2)
        y = self.attn(y, height, width, class_token)
        return self.out_proj(y if self.scale == 1.0 else y * self.scale)

    def _joined(self, xz: Tensor, table: Tensor) -> Tensor | None:
        """All behind in_proj as one, where that can be."""
        attn, out = self.attn, self.out_proj
        if not chains_on_gpu(xz) or self.norm_columns or self.scan.exportable or not attn.is_usual():
            return None
        if not is_product(out):
            return None
        return mixers.scan_routes(
            xz, self.conv_weight, self.conv_bias, self.x_proj_weight, self.A_log, self.D, self.dt_weight, self.dt_bias,
            table, *attn.given(), out.weight, attention_eps=attn.norm.eps, scale=self.scale,
        )  # fmt: skip

    def _convolve(self, x: Tensor, table: Tensor) -> Tensor:
        """SiLU of the causal depthwise convolution along each route: (B, L, D) and (K, S) -> (B, S, K, D)."""
        taps = self.d_conv
        # A first token of zeros stands before every route's first step and at its padding steps.
        x = F.pad(x, (0, 0, 1, 0))
        table = F.pad(table + 1, (taps - 1, 0))
        # Route by route, no token comes twice: then backward, which adds, does so in no order that could vary.
        steps = torch.stack([x.index_select(1, table[k]) for k in range(self.routes)], 2).flatten(2)
        # As a map of width 1, channels last: the convolution works on it as it lies.
        steps = steps.transpose(1, 2).unsqueeze(-1)
        weight = self.conv_weight.flatten(0, 1).unsqueeze(1).unsqueeze(-1)
        u = F.conv2d(steps, weight, self.conv_bias.flatten(), groups=weight.shape[0])
        return F.silu(u.squeeze(-1).transpose(1, 2).unflatten(2, (self.routes, self.d_inner)))

    def _lay_back(self, y: Tensor, table: Tensor, length: int) -> Tensor:
        """From the order of each route to that of the tokens: (B, S, K, D) -> (B, L, K, D), 0 off a route."""
        places = torch.zeros(self.routes, length + 1, dtype=torch.int64, device=y.device)
        steps = torch.arange(1, y.shape[1] + 1, device=y.device).expand(self.routes, -1)
        places = places.scatter(1, table.long() + 1, steps)[:, 1:]  # of padding, some step lands in column 0: cut off
        parts = F.pad(y, (0, 0, 0, 0, 1, 0)).unbind(2)
        return torch.stack([parts[k].index_select(1, places[k]) for k in range(self.routes)], 2)
