"""The token-major scan over K routes: the operator that the vision models are built on."""

from __future__ import annotations

import torch
from torch import Tensor

from vision_mamba.ops import contract, registry
from vision_mamba.ops.autograd import operator
from vision_mamba.ops.call import ScanCall


def cross_selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    indices: Tensor,
    dt_weight: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = True,
    merge: bool = True,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """Scan each route's tokens with its own input-dependent state-space model and add the routes up.

    With s = dt + dt_bias, through softplus if asked, and h_0 = 0, along every route k and channel d:
        h_t = exp(s_t A) h_{t-1} + s_t B_t x_t          y_t = <C_t, h_t> + D x_t

    Args:
        x: (B, L, D) tokens shared by the routes, or (B, L, K, D), each route its own; float32, float16, bfloat16
            (float64 on eager and reference).
        dt: (B, L, K, D) step sizes before bias and softplus, or (B, L, K, R) their low-rank form with `dt_weight`.
        A: (K, D, N) decay rates, negative for a stable state; float32 is kept, anything else is widened to it.
        B: (B, L, K, N) input weights of each token.
        C: (B, L, K, N) output weights of each token.
        D: (K, D) skip weights, or None for no skip.
        indices: int32 (K, S), the token that each route visits at each step; -1 is a padding step, where x, B, C and
            dt are 0 (so that s = dt_bias, through softplus if asked). A route visits a token at most once.
        dt_weight: (K, D, R); dt becomes sum_r dt_weight[k, d, r] dt[..., k, r], formed in float32.
        dt_bias: (K, D) added to dt before softplus.
        dt_softplus: send dt + dt_bias through log(1 + exp(.)), the identity above 20.
        merge: add the routes up; else every route's result comes by itself.
        out_dtype: type of the result; x's by default.
        backend: the implementation to run (see `available_backends`); the library's choice by default.

    Returns: (B, L, D), or (B, L, K, D) with merge=False; in token order; a token off a route gets 0 from that route.
    Raises: ValueError if an argument breaks the contract; BackendError if the named backend refuses, with its reason.
    Numerics: state, step sizes and sums in float32; bounds per dtype in tests/tolerances.py; bitwise deterministic.
    Reference: Gu and Dao 2023, arXiv:2312.00752, Algorithm 2; routes as in VMamba, arXiv:2401.10166, section 4.

    >>> from vision_mamba.scans import CROSS
    >>> x, dt = torch.randn(1, 6, 4), torch.randn(1, 6, 4, 4)
    >>> A, B, C = -torch.ones(4, 4, 2), torch.randn(1, 6, 4, 2), torch.randn(1, 6, 4, 2)
    >>> cross_selective_scan(x, dt, A, B, C, indices=CROSS.indices(2, 3)).shape
    torch.Size([1, 6, 4])
    """
    if indices is None:
        raise ValueError("cross_selective_scan: indices must be an int32 table (routes, steps), got None.")
    call = ScanCall(x, dt, A, B, C, D, indices, dt_weight, dt_bias, None, dt_softplus, merge, False, out_dtype)
    arguments = (*call, backend or registry.forced())
    found = operator.at_once(arguments)
    if found is None:
        contract.check_tensors("cross_selective_scan", call)
        contract.require_out_dtype("cross_selective_scan", out_dtype, x)
        found = torch.ops.vision_mamba.cross_selective_scan(*arguments)
    return found[0]
