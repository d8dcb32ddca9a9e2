"""A discrete linear time-invariant state-space model, run in each of the ways that give the same output.

    h_t = A h_{t-1} + B x_t          y_t = <C, h_t>          and so          y_t = sum_{s<=t} K_{t-s} x_s

with K_l = <C, A^l B>. Time is axis 1 of x (B, L, ...) and axis 0 of K (L, ...). One input, one output: B and C are
(..., N), and A is (..., N), a diagonal, or (..., N, N), dense, which its number of axes beside B's tells. Their axes
in front are those of x behind the time, its channels. A, B, C may be complex, and then so is the output.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vision_mamba.ops.backends.eager import linear_scan


def recurrence(A: Tensor, B: Tensor, C: Tensor, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Step by step, in constant memory: what generation and the definition need.

    Args:
        A: (..., N) or (..., N, N), discrete.
        B: (..., N), discrete.
        C: (..., N).
        x: (B, L, ...).
        state: (B, ..., N) before the first step; zeros by default.

    Returns: y (B, L, ...) and the state after the last step (B, ..., N).

    >>> y, _ = recurrence(torch.tensor([0.5]), torch.ones(1), torch.ones(1), torch.ones(1, 3))
    >>> y.tolist()
    [[1.0, 1.5, 1.75]]
    """
    dense = _is_dense("recurrence", A, B, C)
    _check_input("recurrence", x, 2)
    inputs = x.unsqueeze(-1) * B
    h = torch.zeros_like(inputs[:, 0]) if state is None else state
    h = h.to(torch.promote_types(A.dtype, inputs.dtype))
    ys = []
    for t in range(x.shape[1]):
        h = _apply(A, h, dense) + inputs[:, t]
        ys.append((C * h).sum(-1))
    return torch.stack(ys, 1), h


def scan(A: Tensor, B: Tensor, C: Tensor, x: Tensor) -> Tensor:
    """All states at once by the associative scan of the pairs (A, B x_t), which has log2(L) levels. A is diagonal.

    Arguments and result as `recurrence`.
    """
    if _is_dense("scan", A, B, C):
        raise ValueError(
            f"scan: A must be a diagonal (..., N), got {tuple(A.shape)} beside B {tuple(B.shape)}; diagonalise it, "
            f"as vision_mamba.ssm.nplr_legs does for HiPPO, or use recurrence."
        )
    _check_input("scan", x, 2)
    inputs = x.unsqueeze(-1) * B
    inputs = inputs.to(torch.promote_types(A.dtype, inputs.dtype))
    return (linear_scan(A.to(inputs.dtype).expand_as(inputs), inputs) * C).sum(-1)


def kernel(A: Tensor, B: Tensor, C: Tensor, length: int) -> Tensor:
    """The convolution kernel K_l = <C, A^l B> by its definition, one product with A a step. A diagonal or dense.

    Returns: (length, ...).

    >>> kernel(torch.tensor([0.5]), torch.ones(1), torch.ones(1), 4).tolist()
    [1.0, 0.5, 0.25, 0.125]
    """
    dense = _is_dense("kernel", A, B, C)
    _check_length("kernel", length)
    v = B.to(torch.promote_types(A.dtype, B.dtype))
    taps = [(C * v).sum(-1)]
    for _ in range(length - 1):
        v = _apply(A, v, dense)
        taps.append((C * v).sum(-1))
    return torch.stack(taps)


def vandermonde_kernel(A: Tensor, B: Tensor, C: Tensor, length: int) -> Tensor:
    """The same kernel for a diagonal A, whose powers form a Vandermonde matrix: no loop over time.

    Returns: (length, ...).
    """
    if _is_dense("vandermonde_kernel", A, B, C):
        raise ValueError(
            f"vandermonde_kernel: A must be a diagonal (..., N), got {tuple(A.shape)} beside B {tuple(B.shape)}; "
            f"use kernel for a dense A."
        )
    return (powers(A, length) * (C * B)).sum(-1)


def powers(A: Tensor, length: int) -> Tensor:
    """A^0, A^1, ... A^(length-1), elementwise and stacked in front, by doubling.

    Each is a product of at most log2(length) roundings, and a power that underflows is 0 with a gradient of 0. Both
    fail for exp(l log A): the angle of a complex power loses digits with l, and log 0 is infinite.

    >>> powers(torch.tensor([2.0]), 5).squeeze(1).tolist()
    [1.0, 2.0, 4.0, 8.0, 16.0]
    """
    _check_length("powers", length)
    table, factor = torch.ones_like(A).unsqueeze(0), A
    while len(table) < length:
        table = torch.cat((table, table * factor))
        factor = factor * factor
    return table[:length]


def convolve(x: Tensor, K: Tensor) -> Tensor:
    """The causal convolution y_t = sum_{s<=t} K_{t-s} x_s by its definition, one lag after the other.

    Args:
        x: (B, L, ...).
        K: (L', ...), L' >= L.

    Returns: (B, L, ...).

    >>> convolve(torch.tensor([[1.0, 0.0, 2.0]]), torch.tensor([1.0, 0.5, 0.25])).tolist()
    [[1.0, 0.5, 2.25]]
    """
    _check_kernel("convolve", x, K)
    length = x.shape[1]
    y = K[0] * x
    for lag in range(1, length):
        late = K[lag] * x[:, :-lag]
        y = torch.cat((y[:, :lag], y[:, lag:] + late), 1)
    return y


def fft_convolve(x: Tensor, K: Tensor) -> Tensor:
    """The same convolution as a product of spectra, of sequences padded to twice their length so that none wraps round.

    Both must be real; half precision is widened to float32. Arguments and result as `convolve`.
    """
    _check_kernel("fft_convolve", x, K)
    if x.is_complex() or K.is_complex():
        raise ValueError("fft_convolve: x and K must be real, got a complex one; convolve real and imaginary parts.")
    length, dtype = x.shape[1], torch.promote_types(torch.promote_types(x.dtype, K.dtype), torch.float32)
    spectrum = torch.fft.rfft(x.to(dtype), 2 * length, dim=1) * torch.fft.rfft(K[:length].to(dtype), 2 * length, dim=0)
    return torch.fft.irfft(spectrum, 2 * length, dim=1)[:, :length]


def _apply(A: Tensor, h: Tensor, dense: bool) -> Tensor:
    return torch.einsum("...nm,...m->...n", A.to(h.dtype), h) if dense else A * h


def _is_dense(where: str, A: Tensor, B: Tensor, C: Tensor) -> bool:
    if B.dim() < 1 or C.dim() < 1 or A.dim() not in (B.dim(), B.dim() + 1):
        raise ValueError(
            f"{where}: B and C must be (..., N) and A (..., N) or (..., N, N), got A {tuple(A.shape)}, "
            f"B {tuple(B.shape)}, C {tuple(C.shape)}; drop the axis of a single input or output."
        )
    dense = A.dim() == B.dim() + 1
    states = A.shape[-1]
    if (dense and A.shape[-2] != states) or B.shape[-1] != states or C.shape[-1] != states:
        raise ValueError(
            f"{where}: A, B and C must have one number of states, got A {tuple(A.shape)}, B {tuple(B.shape)}, "
            f"C {tuple(C.shape)}; drop the axis of a single input or output."
        )
    return dense


def _check_length(where: str, length: int) -> None:
    if length < 1:
        raise ValueError(f"{where}: length must be at least 1, got {length}.")


def _check_input(where: str, x: Tensor, dims: int) -> None:
    if x.dim() < dims or x.shape[1] < 1:
        raise ValueError(f"{where}: x must be (batch, steps, ...) with a step at least, got {tuple(x.shape)}.")


def _check_kernel(where: str, x: Tensor, K: Tensor) -> None:
    _check_input(where, x, 2)
    if K.dim() < 1 or K.shape[0] < x.shape[1]:
        raise ValueError(
            f"{where}: K must be (steps, ...) with the {x.shape[1]} steps of x or more, got {tuple(K.shape)}; "
            f"make it that long, or pad it with zeros."
        )
