"""What MambaVision mixes windows by: a scan beside a gateless branch; and maps cut into windows, and put together."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_function
from torch import Tensor, nn

from vision_mamba.layers.init import init_a_log_
from vision_mamba.layers.scan import SelectiveScan


@torch.fx.wrap
@register_notrace_function
def cut_windows(x: Tensor, size: int) -> Tensor:
    """(B, H, W, C) -> (B windows, size^2, C), row by row; zeros fill the last ones up at the lower and right edge."""
    height, width, channels = x.shape[1], x.shape[2], x.shape[3]
    rows, columns = (height + size - 1) // size, (width + size - 1) // size
    x = F.pad(x, (0, 0, 0, columns * size - width, 0, rows * size - height))
    if not torch.jit.is_scripting():  # noqa: SIM102  TorchScript leaves out what stands in such an if of its own
        if torch.compiler.is_exporting():
            tokens = x.flatten(1, 2).index_select(1, _cut(rows, columns, size, x.device))
            return tokens.flatten(0, 1).view(-1, size * size, channels)
    x = x.reshape(x.shape[0], rows, size, columns, size, channels)
    return x.transpose(2, 3).flatten(0, 2).flatten(1, 2)


@torch.fx.wrap
@register_notrace_function
def join_windows(windows: Tensor, size: int, height: int, width: int) -> Tensor:
    """What `cut_windows` undoes: (B windows, size^2, C) -> (B, height, width, C), without what had been filled up."""
    rows, columns = (height + size - 1) // size, (width + size - 1) // size
    if not torch.jit.is_scripting():  # noqa: SIM102  as above
        if torch.compiler.is_exporting():
            tokens = windows.flatten(0, 1).view(-1, rows * columns * size * size, windows.shape[-1])
            joined = tokens.index_select(1, _joined(height, width, columns, size, windows.device))
            return joined.view(-1, height, width, windows.shape[-1])
    x = windows.view(windows.shape[0] // (rows * columns), rows, columns, size, size, windows.shape[-1]).transpose(2, 3)
    x = x.reshape(-1, rows * size, columns * size, windows.shape[-1])
    return x[:, :height, :width]


# Maps of a single window in a row or column have other strides than those of several, and so do slices that are the
# whole: torch.export would hold every size to the example's kind. Tables of indices know no strides.


def _cut(rows: int, columns: int, size: int, device: torch.device) -> Tensor:
    """Where in a map, row by row, the tokens of its windows lie, window by window."""
    place = torch.arange(rows * columns * size * size, device=device)
    window, inner = place // (size * size), place % (size * size)
    row, column = window // columns * size + inner // size, window % columns * size + inner % size
    return row * (columns * size) + column


def _joined(height: int, width: int, columns: int, size: int, device: torch.device) -> Tensor:
    """Where among the windows' tokens those of a map lie, row by row."""
    row, column = torch.arange(height, device=device)[:, None], torch.arange(width, device=device)
    window = row // size * columns + column // size
    return (window * (size * size) + row % size * size + column % size).flatten()


class ConcatMamba(nn.Module):
    """Mix tokens by one selective scan on half of the channels, and put the other half, convolved alike, beside it.

    With (x, z) the halves of in_proj(tokens), u = silu(conv_x(x)), (r, B, C) = X u per token:
        y = out_proj(concatenation of scan(u, W r + 2 b, A, B, C, D) and silu(conv_z(z)))

    Convolutions look to both sides. The bias of the step sizes counts twice, as in the published weights, whose code
    adds it before the scan and within. The padding of an even convolution is one token longer behind.

    Args:
        dim: C, width of the tokens.
        d_state: N, states of a channel.
        d_conv: taps of the convolutions.
        dt_rank: R, rank of the step sizes; C / 16 rounded up by default.

    Shape: (B, L, C) -> (B, L, C).
    Reference: Hatamizadeh and Kautz 2024, MambaVision, arXiv:2407.08083, section 3.2.

    >>> ConcatMamba(32)(torch.randn(2, 10, 32)).shape
    torch.Size([2, 10, 32])
    """

    def __init__(
        self,
        dim: int,
        d_state: int = 8,
        d_conv: int = 3,
        dt_rank: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        if dim % 2:
            raise ValueError(f"ConcatMamba: dim must be even, for two halves, got {dim}.")
        half = dim // 2
        # Half precision is too coarse for what is exponentiated or summed over a whole window.
        wide: dict[str, Any] = {
            "device": device,
            "dtype": torch.promote_types(dtype or torch.get_default_dtype(), torch.float32),
        }
        self.d_state = d_state
        self.dt_rank = math.ceil(dim / 16) if dt_rank is None else dt_rank
        self.in_proj = nn.Linear(dim, dim, bias=False, **dd)
        self.conv_x = nn.Conv1d(half, half, d_conv, padding="same", groups=half, bias=False, **dd)
        self.conv_z = nn.Conv1d(half, half, d_conv, padding="same", groups=half, bias=False, **dd)
        self.x_proj = nn.Linear(half, self.dt_rank + 2 * d_state, bias=False, **dd)
        self.dt_weight = nn.Parameter(torch.empty(half, self.dt_rank, **dd))
        self.dt_bias = nn.Parameter(torch.empty(half, **wide))
        self.A_log = nn.Parameter(torch.empty(half, d_state, **wide))
        self.D = nn.Parameter(torch.empty(half, **wide))
        self.scan = SelectiveScan("forward")
        self.out_proj = nn.Linear(dim, dim, bias=False, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fill what is not in a submodule as published: the step sizes start as any projection does."""
        nn.init.trunc_normal_(self.dt_weight, std=0.02)
        nn.init.zeros_(self.dt_bias)
        init_a_log_(self.A_log)
        nn.init.ones_(self.D)

    def forward(self, x: Tensor) -> Tensor:
        x, z = self.in_proj(x).transpose(1, 2).chunk(2, dim=1)
        x = F.silu(self.conv_x(x)).transpose(1, 2)
        z = F.silu(self.conv_z(z)).transpose(1, 2)
        # One route, token after token.
        dt, B, C = self.x_proj(x).unsqueeze(2).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        y = self.scan.along(
            x, dt, -torch.exp(self.A_log).unsqueeze(0), B, C, self.D.unsqueeze(0), self.dt_weight.unsqueeze(0),
            2 * self.dt_bias.unsqueeze(0), None,
        )  # fmt: skip
        return self.out_proj(torch.cat((y, z), dim=-1))
