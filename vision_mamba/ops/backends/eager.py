"""The scan in plain torch: any device, differentiable by autograd, traceable and exportable; no kernel of our own.

The recurrence h_t = a_t h_{t-1} + b_t is an associative composition of affine maps, so neighbours are joined into maps
of half the number, scanned, and the other half filled in: log2(S) levels of shrinking tensors, work linear in S. Decays
are multiplied, never divided by, so a product that underflows is a state that is forgotten and not a NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vision_mamba.ops import reference
from vision_mamba.ops.call import ScanCall


def linear_scan(a: Tensor, b: Tensor) -> Tensor:
    """All h_t = a_t h_{t-1} + b_t along axis 1, with h_0 = 0 before the first.

    Args:
        a: (B, S, ...) decays.
        b: (B, S, ...) inputs.

    Returns: (B, S, ...) states.

    >>> linear_scan(torch.tensor([[0.5, 0.5, 0.5]]), torch.tensor([[1.0, 1.0, 1.0]])).tolist()
    [[1.0, 1.5, 1.75]]
    """
    steps = a.shape[1]
    if steps == 1:
        return b
    half = steps // 2
    (even_a, odd_a), (even_b, odd_b) = (t[:, : 2 * half].unflatten(1, (half, 2)).unbind(2) for t in (a, b))
    odd = linear_scan(even_a * odd_a, torch.addcmul(odd_b, odd_a, even_b))
    even = torch.cat((b[:, :1], torch.addcmul(even_b[:, 1:], even_a[:, 1:], odd[:, :-1])), 1)
    pairs = torch.stack((even, odd), 2).flatten(1, 2)
    if steps % 2 == 0:
        return pairs
    return torch.cat((pairs, torch.addcmul(b[:, -1:], a[:, -1:], odd[:, -1:])), 1)


def forward(call: ScanCall, save: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """The scan as in ops.reference, loop-free over time.

    Returns: y, the last state or an empty tensor, and an empty tensor (nothing is kept for backward).
    """
    u, s, B, C = reference.prepare(call)
    a = torch.exp(s.unsqueeze(-1) * call.A.to(u.dtype))  # (B, S, K, D, N)
    b = (s * u).unsqueeze(-1) * B.unsqueeze(-2)
    if call.initial_state is not None:
        first = torch.addcmul(b[:, :1], a[:, :1], call.initial_state.to(u.dtype).unsqueeze(1))
        b = torch.cat((first, b[:, 1:]), 1)
    h = linear_scan(a, b)
    y = reference.finish(call, (h * C.unsqueeze(-2)).sum(-1), u)
    return y, h[:, -1] if call.return_last_state else call.new_last_state(), call.x.new_empty(0)
