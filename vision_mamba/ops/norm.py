"""Norms of tokens, by themselves or of a residual stream to which a branch is added first."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vision_mamba.ops.fused import Fused, Kernels


def plain_normed(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    shift: Tensor | None = None,
    *,
    eps: float,
    rms: bool,
    out_dtype: torch.dtype | None,
    stream: bool,
) -> Any:
    total = x if branch is None else x + branch
    total = total if shift is None else total + shift
    shape = (int(x.shape[-1]),)  # a tracer's sizes are tensors
    y = F.rms_norm(total, shape, weight, eps) if rms else F.layer_norm(total, shape, weight, bias, eps)
    y = y if out_dtype is None else y.to(out_dtype)
    return (y, total) if stream else y


def _kernels() -> Kernels:
    from vision_mamba.ops.backends import rows_cuda

    return rows_cuda.NORM


_fused = Fused("normed", _kernels, plain_normed)


def normed(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    rms: bool = False,
    out_dtype: torch.dtype | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """Layer norm over the last axis, (x - mean) / sqrt(var + eps) * weight + bias, computed in float32.

    Args:
        x: (..., C).
        weight, bias: (C,).
        rms: divide by the root of the mean square, without mean and bias.
        out_dtype: type of the result; by default what torch's function gives.
        shift: (C,) added to x first, such as the bias of a convolution that gave x.

    >>> normed(torch.tensor([[1.0, 3.0]]), torch.ones(2), torch.zeros(2), 0.0)
    tensor([[-1.,  1.]])
    """
    more = () if shift is None else (shift,)
    return _fused(x, None, weight, bias, *more, eps=eps, rms=rms, out_dtype=out_dtype, stream=False)


def add_normed(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    rms: bool = False,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """The norm of x + branch, and that sum, in one pass.

    Args: those of `normed`, and
        branch: (..., C), of a type that x's holds; None for a stream to which nothing is added, whose two gradients,
            its own and that through the norm, then meet in one pass.

    Returns: the norm, and the sum in x's type.

    >>> x, branch = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 1.0]])
    >>> add_normed(x, branch, torch.ones(2), torch.zeros(2))[1]
    tensor([[1., 3.]])
    """
    return _fused(x, branch, weight, bias, eps=eps, rms=rms, out_dtype=out_dtype, stream=True)
