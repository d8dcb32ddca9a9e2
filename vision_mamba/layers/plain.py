"""The token mixer of PlainMamba: one selective state-space model along all routes, which is told how a route moves."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision_mamba import scans
from vision_mamba.layers.init import init_a_log_, init_dt_bias_, init_dt_weight_, init_in_float32_
from vision_mamba.layers.scan import SelectiveScan


class PlainMixer(nn.Module):
    """Mix the tokens of a map by one selective state-space model that goes along several routes.

    With (x, z) the halves of in_proj(tokens), u = silu(conv(x)), (r, B, C) = X u per token in the order of rows, and t
    the step at which route k comes to a token, by the move m:
        y = out_proj(silu(z) * sum_k scan_k(u, W r_t + 2 b, A, B_t + M_m, C_t, D))

    Two things are as in the published code, whose weights have learned with them: what drives a step is not that of the
    token visited but of the t-th token in the order of rows, and the bias b of the step sizes counts twice. Here it is
    r, B and C that are laid out for each route, a tenth of the channels of u, which stay where they are.

    Args:
        dim: E, width of the tokens.
        d_state: N, states of a channel.
        d_conv: side of the depthwise convolution's kernel, odd.
        expand: D / E, inner width over outer width.
        dt_rank: R, rank of the step sizes; E / 16 rounded up by default.
        scan_order: name of a registered `ScanOrder` whose routes visit every token.

    Shape: (B, L, E) -> (B, L, E), L = height * width.
    Reference: Yang et al. 2024, PlainMamba, arXiv:2403.17695, section 3.3; moves as in `scans.routes.visits`.

    >>> PlainMixer(32)(torch.randn(2, 15, 32), 3, 5).shape
    torch.Size([2, 15, 32])
    """

    def __init__(
        self,
        dim: int,
        d_state: int = 16,
        d_conv: int = 7,
        expand: float = 2.0,
        dt_rank: int | None = None,
        scan_order: str = "snake",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        # Half precision is too coarse for what is exponentiated or summed over a whole route.
        wide_dtype = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
        wide: dict[str, Any] = {"device": device, "dtype": wide_dtype}
        if d_conv % 2 == 0:
            raise ValueError(f"PlainMixer: d_conv must be odd, got {d_conv}; an even kernel would move the map.")
        if -1 in scans.get(scan_order).visits(2, 3):
            raise ValueError(
                f"PlainMixer: the routes of scan_order must each visit every token, those of {scan_order!r} do not."
            )
        self.routes = len(scans.get(scan_order))
        self.d_inner = d_inner = int(expand * dim)
        self.d_state = d_state
        self.dt_rank = math.ceil(dim / 16) if dt_rank is None else dt_rank

        self.in_proj = nn.Linear(dim, 2 * d_inner, **dd)
        self.conv2d = nn.Conv2d(d_inner, d_inner, d_conv, padding=d_conv // 2, groups=d_inner, **dd)
        self.x_proj = nn.Linear(d_inner, self.dt_rank + 2 * d_state, bias=False, **dd)
        self.dt_weight = nn.Parameter(torch.empty(d_inner, self.dt_rank, **dd))
        self.dt_bias = nn.Parameter(torch.empty(d_inner, **wide))
        self.A_log = nn.Parameter(torch.empty(d_inner, d_state, **wide))
        self.D = nn.Parameter(torch.empty(d_inner, **wide))
        self.move_B = nn.Parameter(torch.empty(len(scans.MOVES), d_state, **dd))
        self.scan = SelectiveScan(scan_order)
        self.out_proj = nn.Linear(d_inner, dim, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fill what is not in a submodule as published, the model's own start left aside."""
        init_dt_weight_(self.dt_weight, self.dt_rank)
        init_dt_bias_(self.dt_bias)
        init_a_log_(self.A_log)
        nn.init.ones_(self.D)
        init_in_float32_(self.move_B, nn.init.trunc_normal_, std=0.02)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        x, z = self.in_proj(x).chunk(2, -1)
        # Permuted views: the memory stays channels last, and the convolution works on it as it is.
        x = self.conv2d(x.unflatten(1, (height, width)).permute(0, 3, 1, 2))
        x = F.silu(x.permute(0, 2, 3, 1).flatten(1, 2))
        steps, moves = self.scan.visits(x, height, width).unbind(0)
        columns = self.x_proj(x)
        # Route by route, no token comes twice: then backward, which adds, does so in no order that could vary.
        columns = torch.stack([columns.index_select(1, steps[k]) for k in range(self.routes)], 2)
        dt, B, C = columns.split([self.dt_rank, self.d_state, self.d_state], -1)  # (B, L, K, .)
        B = B + F.embedding(moves.T, self.move_B).to(B.dtype)
        A = -torch.exp(self.A_log).expand(self.routes, -1, -1)
        y = self.scan(
            x, dt, A, B, C, self.D.expand(self.routes, -1), self.dt_weight.expand(self.routes, -1, -1),
            (2 * self.dt_bias).expand(self.routes, -1), height, width,
        )  # fmt: skip
        return self.out_proj(y * F.silu(z))
