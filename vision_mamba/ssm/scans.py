"""Ways to compute h_t = a_t h_{t-1} + b_t along a sequence: all of them the same function, not all of them safe.

Each takes the decays as logarithms, which is how state-space models have them: log a_t = s_t A. `associative_scan` is
what the eager backend of the library's operators runs; the others are here to be read, tested and compared with it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vision_mamba.ops.backends.eager import linear_scan

Scan = Callable[[Tensor, Tensor], Tensor]


def sequential_scan(log_a: Tensor, b: Tensor) -> Tensor:
    """All h_t = exp(log_a_t) h_{t-1} + b_t along axis 1, with h_0 = 0 before the first, one step after the other.

    Args:
        log_a: (B, L, ...) logarithms of the decays, real or complex.
        b: (B, L, ...) inputs.

    Returns: (B, L, ...) states.

    >>> a = torch.full((1, 3), 0.5)
    >>> sequential_scan(a.log(), torch.ones(1, 3)).tolist()
    [[1.0, 1.5, 1.75]]
    """
    log_a, b = _check("sequential_scan", log_a, b)
    h, states = torch.zeros_like(b[:, 0]), []
    for a_t, b_t in zip(log_a.exp().unbind(1), b.unbind(1), strict=True):
        h = a_t * h + b_t
        states.append(h)
    return torch.stack(states, 1)


def associative_scan(log_a: Tensor, b: Tensor) -> Tensor:
    """The same states from the associative product of the maps h -> a h + b, in log2(L) levels of pairs.

        (a_2, b_2) o (a_1, b_1) = (a_2 a_1, a_2 b_1 + b_2)

    Pairs are joined on the way up and filled in on the way down, so the work is linear in L. Products of decays may
    underflow to 0, which is a state forgotten; nothing is divided by them. Arguments and result as `sequential_scan`.

    Reference: Blelloch 1990, Prefix sums and their applications; as in S5, arXiv:2208.04933, section 2.2.
    """
    log_a, b = _check("associative_scan", log_a, b)
    return linear_scan(log_a.exp(), b)


def cumulative_sum_scan(log_a: Tensor, b: Tensor) -> Tensor:
    """The same states by two cumulative sums: short, and wrong as soon as a product of decays underflows.

        p_t = exp(sum_{r<=t} log_a_r)          h_t = p_t sum_{s<=t} b_s / p_s

    Once p_t is 0 the quotient is infinite and h_t is NaN: in float32 after a total decay of exp(-104), which Mamba's
    fastest state passes within 65 steps of size 0.1. Adding a small number below the fraction trades the NaN for a
    wrong state. The library never computes this; it stands here for the tests that show why.
    Arguments and result as `sequential_scan`.
    """
    log_a, b = _check("cumulative_sum_scan", log_a, b)
    p = log_a.cumsum(1).exp()
    return p * (b / p).cumsum(1)


def chunked_scan(log_a: Tensor, b: Tensor, chunk: int = 16) -> Tensor:
    """The same states chunk by chunk: one product with a lower triangle of decays inside, a carried state between.

    Inside a chunk that starts from h:  h_t = exp(sum_{0<r<=t} log_a_r) h + sum_{s<=t} exp(sum_{s<r<=t} log_a_r) b_s

    It is the cumulative-sum form, with the quotient p_t / p_s taken as one exponential of a sum that is never positive
    for decays up to 1, so it can underflow to 0 but not overflow. Arguments and result as `sequential_scan`.

    Args:
        chunk: steps of a chunk; the triangle holds chunk^2 / 2 decays for each state.

    Reference: Dao and Gu 2024, Mamba-2, arXiv:2405.21060, section 6, on scalar decays there.
    """
    log_a, b = _check("chunked_scan", log_a, b)
    if chunk < 1:
        raise ValueError(f"chunked_scan: chunk must be at least 1, got {chunk}.")
    h, states = torch.zeros_like(b[:, 0]), []
    for log_a_c, b_c in zip(log_a.split(chunk, 1), b.split(chunk, 1), strict=True):
        triangle = segment_sum(log_a_c).exp()  # (B, t, s, ...)
        carried = log_a_c.cumsum(1).exp() * h.unsqueeze(1)
        h_c = carried + (triangle * b_c.unsqueeze(1)).sum(2)
        states.append(h_c)
        h = h_c[:, -1]
    return torch.cat(states, 1)


def segment_sum(log_a: Tensor) -> Tensor:
    """Sums of log_a over every segment: S[t, s] = sum_{s<r<=t} log_a_r, and minus infinity where s > t.

    Every segment is summed by itself. As a difference of two cumulative sums, which is shorter, it would lose the
    digits that long sums do not have, and be NaN where log_a is minus infinity.

    Args:
        log_a: (B, L, ...).

    Returns: (B, L, L, ...).

    >>> segment_sum(torch.tensor([[1.0, 2.0, 4.0]])).tolist()
    [[[0.0, -inf, -inf], [2.0, 0.0, -inf], [6.0, 4.0, 0.0]]]
    """
    steps = log_a.shape[1]
    below = torch.ones(steps, steps, dtype=torch.bool, device=log_a.device).tril(-1)
    below = below.reshape(1, steps, steps, *[1] * (log_a.dim() - 2))
    # Column s takes the terms after s alone, and adds them up downwards.
    sums = torch.where(below, log_a.unsqueeze(2), 0).cumsum(1)
    above = below.transpose(1, 2)
    return sums.masked_fill(above, -torch.inf)


def _check(where: str, log_a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the shape and type they have together; at least one step."""
    try:
        log_a, b = torch.broadcast_tensors(log_a, b)
    except RuntimeError:
        raise ValueError(
            f"{where}: log_a and b must have one shape (batch, steps, ...), got {tuple(log_a.shape)} and "
            f"{tuple(b.shape)}."
        ) from None
    if b.dim() < 2 or b.shape[1] < 1:
        raise ValueError(f"{where}: b must be (batch, steps, ...) with a step at least, got {tuple(b.shape)}.")
    dtype = torch.promote_types(log_a.dtype, b.dtype)
    return log_a.to(dtype), b.to(dtype)


#: Those that are safe at any length, by name.
SCANS: dict[str, Scan] = {"sequential": sequential_scan, "chunked": chunked_scan, "associative": associative_scan}
