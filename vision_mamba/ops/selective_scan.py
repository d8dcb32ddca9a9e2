"""The scan in its classic layout: a drop-in for mamba_ssm's selective_scan_fn."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vision_mamba.ops import contract, registry


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    initial_state: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Run an input-dependent state-space model along the last axis, channels in groups that share B and C.

    With s = delta + delta_bias, through softplus if asked, and h_0 = initial_state or 0, along every channel:
        h_t = exp(s_t A) h_{t-1} + s_t B_t u_t          y_t = (<C_t, h_t> + D u_t) silu(z_t)

    Args:
        u: (B, G*D, L) inputs; float32, float16, bfloat16 (float64 on eager and reference).
        delta: (B, G*D, L) step sizes before bias and softplus.
        A: (G*D, N) decay rates, negative for a stable state; float32 is kept, anything else is widened to it.
        B: (B, N, L), or (B, G, N, L) with G groups; channel c belongs to group c // D. Or (G*D, N), the same for all
            tokens, which makes every channel a group of its own and costs as much more memory traffic.
        C: like B; the two have as many groups, unless one is constant.
        D: (G*D,) skip weights, or None for no skip.
        z: (B, G*D, L) gate, or None for no gate.
        delta_bias: (G*D,) added to delta before softplus.
        delta_softplus: send delta + delta_bias through log(1 + exp(.)), the identity above 20.
        return_last_state: return the state after the last step too.
        initial_state: (B, G*D, N) state before the first step; zeros by default.
        out_dtype: type of the result; u's by default.
        backend: the implementation to run (see `available_backends`); the library's choice by default.

    Returns: y (B, G*D, L), or (y, last_state) with last_state (B, G*D, N) in float32 (float64 for float64 input).
    Raises: ValueError if an argument breaks the contract; BackendError if the named backend refuses, with its reason.
    Numerics: state, step sizes, gate and sums in float32; bounds per dtype in tests/tolerances.py; bitwise
        deterministic.
    Reference: Gu and Dao 2023, arXiv:2312.00752, Algorithm 2.

    >>> u = torch.randn(2, 6, 10)
    >>> y = selective_scan(u, torch.rand(2, 6, 10), -torch.ones(6, 4), torch.randn(2, 4, 10), torch.randn(2, 4, 10))
    >>> y.shape
    torch.Size([2, 6, 10])
    """
    contract.check_classic(u, delta, A, B, C, D, z, delta_bias, initial_state, out_dtype)
    batch, width, length = u.shape
    shared = max(t.shape[1] if t.dim() == 4 else 1 for t in (B, C))
    groups = shared if B.dim() > 2 and C.dim() > 2 else width
    channels = width // groups

    def tokens(t: Tensor) -> Tensor:
        """(B, G*D, L) -> (B, L, G, D), a view."""
        return t.unflatten(1, (groups, channels)).permute(0, 3, 1, 2)

    def weights(t: Tensor) -> Tensor:
        """(B, G, N, L), (B, N, L) or (G*D, N) -> (B, L, G, N), a view unless groups are repeated."""
        if t.dim() == 2:
            return t.expand(batch, length, -1, -1)
        t = t if t.dim() == 4 else t.unsqueeze(1)
        if t.shape[1] < groups:
            t = t.unsqueeze(2).expand(-1, -1, groups // t.shape[1], -1, -1).flatten(1, 2)
        return t.permute(0, 3, 1, 2)

    def per_channel(t: Tensor | None) -> Tensor | None:
        """(G*D, ...) -> (G, D, ...), a view."""
        return None if t is None else t.unflatten(0, (groups, channels))

    state = None if initial_state is None else initial_state.unflatten(1, (groups, channels))
    dtype = u.dtype if out_dtype is None else out_dtype
    # The gate multiplies the sum before it is rounded, so the scan hands it over as float32.
    inner = dtype if z is None or dtype == torch.float64 else torch.float32
    y, last = torch.ops.vision_mamba.cross_selective_scan(
        tokens(u), tokens(delta), per_channel(A), weights(B), weights(C), per_channel(D), None, None,
        per_channel(delta_bias), state, delta_softplus, False, return_last_state, inner, backend or registry.forced(),
    )  # fmt: skip
    y = y.permute(0, 2, 3, 1).flatten(1, 2)
    if z is not None:
        y = (y * F.silu(z.to(inner))).to(dtype)
    return (y, last.flatten(1, 2)) if return_last_state else y
