"""The convolutions before the scans of Vim and VMamba, and the gate behind Vim's."""

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
    """Sums of shifted tokens, which a compiler joins to few passes over them."""
    length, taps = x.shape[1], weight.shape[2]
    padded = F.pad(x, (0, 0, taps - 1, taps - 1))
    shifted = [padded[:, j : j + length] for j in range(2 * taps - 1)]
    y0 = bias[0] + sum(weight[0, :, j] * shifted[j] for j in range(taps))
    y1 = bias[1] + sum(weight[1, :, j] * shifted[2 * taps - 2 - j] for j in range(taps))
    return F.silu(torch.stack((y0, y1), 2)).to(x.dtype)


def _compiled_conv_both_ways(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """For compilers: the kernels as an operator that they do not look into, or what they make most of themselves."""
    # As torch's convolution does, which autocast casts.
    x = x.to(torch.get_autocast_dtype("cuda")) if torch.is_autocast_enabled("cuda") else x
    if x.dtype == torch.float64 or weight.shape[2] > 4 or not _has_conv_kernels():
        return _shifted_conv_both_ways(x, weight, bias)
    return _conv_both_ways_of_kernels(x, weight, bias)


@torch.compiler.assume_constant_result
def _has_conv_kernels() -> bool:
    from vision_mamba.ops.backends import rows_cuda

    return rows_cuda.available()


@torch.library.custom_op("vision_mamba::conv_both_ways", mutates_args=(), device_types="cuda")
def _conv_both_ways_of_kernels(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    if x.numel() == 0:
        return x.new_empty((x.shape[0], x.shape[1], 2, x.shape[2]))
    x = x if x.stride(2) == 1 else x.contiguous()
    return _conv_kernels().forward((x, weight, bias), {}, False)[0][0]


@torch.library.custom_op("vision_mamba::conv_both_ways_backward", mutates_args=(), device_types="cuda")
def _conv_both_ways_backward(dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if x.numel() == 0:
        return torch.zeros_like(x), torch.zeros_like(weight), torch.zeros_like(bias)
    x = x if x.stride(2) == 1 else x.contiguous()
    dx, dweight, dbias = _conv_kernels().backward((x, weight, bias), {}, (dy,))
    assert dx is not None and dweight is not None and dbias is not None
    return dx, dweight.contiguous(), dbias.contiguous()


@_conv_both_ways_of_kernels.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], x.shape[1], 2, x.shape[2]))


@_conv_both_ways_backward.register_fake
def _(dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dx, dweight, dbias = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, weight, bias))
    return dx, dweight, dbias


_conv_both_ways_of_kernels.register_autograd(
    lambda ctx, dy: _conv_both_ways_backward(dy, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


def plain_conv_along(x: Tensor, weight: Tensor, bias: Tensor | None, *, before: int) -> Tensor:
    """`conv_along` by torch's convolution."""
    channels, behind = weight.shape[0], weight.shape[2] - 1 - before
    y = F.conv1d(F.pad(x.transpose(1, 2), (before, behind)), weight, bias, groups=channels)
    return F.silu(y.transpose(1, 2))


def plain_conv_map(x: Tensor, weight: Tensor, bias: Tensor | None, shortcut: bool = False) -> Tensor:
    """`conv_map` by torch's convolution; TorchScript compiles this one."""
    # Permuted views: the memory stays channels last, and the convolution works on it as it is.
    y = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=weight.shape[-1] // 2, groups=weight.shape[0])
    y = y.permute(0, 2, 3, 1)
    return x + y if shortcut else F.silu(y)


def plain_gated(y: Tensor, z: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
    """`gated` by torch's functions; TorchScript compiles this one."""
    if out_dtype is None:
        return y * F.silu(z)
    return y.to(out_dtype) * F.silu(z.to(out_dtype))


def _conv_kernels() -> Kernels:
    from vision_mamba.ops.backends import rows_cuda

    return rows_cuda.CONV_BOTH_WAYS


def _along_kernels() -> Kernels:
    from vision_mamba.ops.backends import rows_cuda

    return rows_cuda.CONV_ALONG


def _map_kernels() -> Kernels:
    from vision_mamba.ops.backends import rows_cuda

    return rows_cuda.CONV_MAP


def _gate_kernels() -> Kernels:
    from vision_mamba.ops.backends import rows_cuda

    return rows_cuda.GATED


_fused_conv = Fused("conv_both_ways", _conv_kernels, plain_conv_both_ways, _compiled_conv_both_ways)
_fused_along = Fused("conv_along", _along_kernels, plain_conv_along)
_fused_map = Fused("conv_map", _map_kernels, plain_conv_map)
_fused_gate = Fused("gated", _gate_kernels, plain_gated)


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


def conv_along(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, before: int) -> Tensor:
    """Depthwise convolution and SiLU along a sequence, with zeros outside of it.

    With W taps, the last of a causal convolution on the token itself:
        y_t = silu(bias + sum_j weight_j x_{t-before+j})

    Args:
        x: (B, L, D) tokens.
        weight: (D, 1, W) taps, as torch's convolution has them; up to four have kernels.
        bias: (D,).
        before: taps before the token: W - 1 is causal, 0 causal from the end.

    Returns: (B, L, D).

    >>> conv_along(torch.ones(1, 3, 1), torch.ones(1, 1, 2), torch.zeros(1), before=1).squeeze()
    tensor([0.7311, 1.7616, 1.7616])
    """
    return _fused_along(x, weight, bias, before=before)


def conv_map(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, shortcut: bool = False) -> Tensor:
    """Depthwise convolution over a map that is channels last, with zeros around it; then SiLU, or beside a shortcut.

    With W x W taps, of which W is odd:
        y_rcd = silu(bias_d + sum_ij weight_dij x_(r+i-W/2)(c+j-W/2)d)

    Args:
        x: (B, H, W, D) map.
        weight: (D, 1, W, W) taps, as torch's convolution has them; W = 3 has kernels.
        bias: (D,).
        shortcut: add x, and leave SiLU out.

    Returns: (B, H, W, D), in memory as x.

    >>> conv_map(torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 3, 3))
    tensor([[[[0.]]]])
    """
    return _fused_map(x, weight, bias, shortcut=shortcut)


def gated(y: Tensor, z: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
    """y silu(z), of two tensors of one shape (B, L, D); of the type that both promote to, unless another is wanted.

    >>> gated(torch.ones(1, 1, 1), torch.zeros(1, 1, 1))
    tensor([[[0.]]])
    """
    return _fused_gate(y, z, out_dtype=out_dtype)
