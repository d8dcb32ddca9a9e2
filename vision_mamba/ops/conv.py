"""The convolution before Vim's scan and the gate behind it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vision_mamba.ops.fused import Fused, Kernels


def plain_conv_both_ways(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`conv_both_ways` by torch's convolutions; TorchScript compiles this one."""
    length, channels, taps = x.shape[1], weight.shape[1], weight.shape[2]
    x = x.transpose(1, 2).contiguous()
    # Padded on both sides, a convolution gives W - 1 elements too many: at the end of the one way, at the start of the
    # other, whose taps come in reverse.
    y0 = F.conv1d(x, weight[0].unsqueeze(1), bias[0], padding=taps - 1, groups=channels)[..., :length]
    y1 = F.conv1d(x, weight[1].flip(-1).unsqueeze(1), bias[1], padding=taps - 1, groups=channels)[..., taps - 1 :]
    return F.silu(torch.stack((y0.transpose(1, 2), y1.transpose(1, 2)), 2))


def _shifted_conv_both_ways(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Sums of shifted tokens, which a compiler joins to one pass over them."""
    length, taps = x.shape[1], weight.shape[2]
    padded = F.pad(x, (0, 0, taps - 1, taps - 1))
    shifted = [padded[:, j : j + length] for j in range(2 * taps - 1)]
    y0 = bias[0] + sum(weight[0, :, j] * shifted[j] for j in range(taps))
    y1 = bias[1] + sum(weight[1, :, j] * shifted[2 * taps - 2 - j] for j in range(taps))
    # As torch's convolution does, which autocast casts.
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype
    return F.silu(torch.stack((y0, y1), 2)).to(dtype)


def plain_gated(y: Tensor, z: Tensor) -> Tensor:
    """`gated` by torch's functions; TorchScript compiles this one."""
    return y * F.silu(z)


def _conv_kernels() -> Kernels:
    from vision_mamba.ops.backends import rows_cuda

    return rows_cuda.CONV_BOTH_WAYS


def _gate_kernels() -> Kernels:
    from vision_mamba.ops.backends import rows_cuda

    return rows_cuda.GATED


_fused_conv = Fused("conv_both_ways", plain_conv_both_ways, _conv_kernels, _shifted_conv_both_ways)
_fused_gate = Fused("gated", plain_gated, _gate_kernels)


def conv_both_ways(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Depthwise convolution and SiLU along a sequence, causal from its start and causal from its end.

    With W taps and zeros outside of the sequence:
        y_t0 = silu(bias_0 + sum_j weight_0j x_{t-(W-1)+j})          y_t1 = silu(bias_1 + sum_j weight_1j x_{t+(W-1)-j})

    The second is what a causal convolution gives on the reversed sequence, reversed back; nothing is reversed here.

    Args:
        x: (B, L, D) tokens.
        weight: (2, D, W) taps of each way, the last one on the token itself.
        bias: (2, D).

    Returns: (B, L, 2, D), contiguous.
    """
    return _fused_conv(x, weight, bias)


def gated(y: Tensor, z: Tensor) -> Tensor:
    """y silu(z), of two tensors of one shape (B, L, D).

    >>> gated(torch.ones(1, 1, 1), torch.zeros(1, 1, 1))
    tensor([[[0.]]])
    """
    return _fused_gate(y, z)
