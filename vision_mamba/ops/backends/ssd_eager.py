"""The state-space dual scan in plain torch: matrix products over chunks of T tokens; differentiable, exportable.

Within a chunk the scan is a product with a lower triangular matrix of T x T, and between chunks a state is carried:

    y_i = sum_{j<=i} exp(a_{j+1} + ... + a_i) s_j <C_i, B_j> x_j + exp(a_1 + ... + a_i) h C_i          a_t = s_t A
    h' = exp(a_1 + ... + a_T) h + sum_j exp(a_{j+1} + ... + a_T) s_j x_j B_j^T

Decays are exponentials of sums over a segment, each summed by itself. Nothing is divided by a decay and no long sums
are subtracted, so what underflows is forgotten, and nothing is lost where decays are strong.

Reference: Dao and Gu 2024, Mamba-2, arXiv:2405.21060, section 6; not causal: Shi et al. 2024, VSSD, arXiv:2407.18559.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vision_mamba.ops import ssd_reference
from vision_mamba.ops.backends.eager import linear_scan
from vision_mamba.ops.reference import without_autocast
from vision_mamba.ops.ssd_call import SsdCall

CHUNK = 64  # tokens


def segment_decays(a: Tensor) -> Tensor:
    """exp(a_{j+1} + ... + a_i) at [i, j], 0 where j > i; (..., T) -> (..., T, T)."""
    below = torch.ones(a.shape[-1], a.shape[-1], dtype=torch.bool, device=a.device).tril(-1)
    # Column j takes the terms after j alone, and adds them up downwards.
    sums = torch.where(below, a.unsqueeze(-1), 0).cumsum(-2)
    return sums.exp().tril()


def forward(call: SsdCall, save: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """The scan as in ops.ssd_reference, in matrix products.

    Returns: y, the last state or an empty tensor, and an empty tensor (nothing is kept for backward).
    """
    u, s, B, C = ssd_reference.prepare(call)
    # None and not zeros: those would have the batch that a tracer has seen.
    h = None if call.initial_state is None else ssd_reference.start(call, u)
    with without_autocast(u.device):
        y, h = (_chunked if call.causal else _summed)(call, u, s, B, C, h)
    y = ssd_reference.finish(call, y, u)
    return y, h if call.return_last_state else call.new_last_state(), call.x.new_empty(0)


def _by_group(t: Tensor, groups: int) -> Tensor:
    """Split the axis of heads, the third: (B, S, K, H, ...) -> (B, S, K, G, H / G, ...)."""
    return t.unflatten(3, (groups, -1))


def _chunked(call: SsdCall, u: Tensor, s: Tensor, B: Tensor, C: Tensor, h: Tensor | None) -> tuple[Tensor, Tensor]:
    """Letters of the subscripts: c chunk, i j steps in it, k route, g group, r head in it, p channel, n state."""
    chunk = min(call.chunk or CHUNK, call.steps)
    a = s * call.A.to(s.dtype)
    # A step of size 0 leaves the state as it is, so the last chunk is filled up with those.
    missing = -call.steps % chunk
    u, s, a, B, C = (
        F.pad(t, (0, 0) * (t.dim() - 2) + (0, missing)) if missing else t for t in (u * s[..., None], s, a, B, C)
    )
    u, a, B, C = (t.unflatten(1, (-1, chunk)) for t in (u, a, B, C))
    u = u.unflatten(4, (call.groups, -1))  # (B, c, T, K, G, R, P)
    a = a.unflatten(4, (call.groups, -1)).movedim(2, 5)  # (B, c, K, G, R, T)
    inside = segment_decays(a)  # (B, c, K, G, R, T, T)
    scores = torch.einsum("bcikgn,bcjkgn->bckgij", C, B).unsqueeze(4) * inside
    y = torch.einsum("bckgrij,bcjkgrp->bcikgrp", scores, u)
    # The last row: from each step to the end of the chunk. Products of three are left to opt_einsum where it is
    # installed, whose choice of an order makes constants of the sizes that an exporter lets vary.
    kept = inside[..., -1, :].movedim(5, 2).unsqueeze(-1)  # (B, c, T, K, G, R, 1)
    written = torch.einsum("bcjkgn,bcjkgrp->bckgrpn", B, kept * u)
    since = a.cumsum(-1).exp()  # (B, c, K, G, R, T), from the start of the chunk through each step
    decay = since[..., -1, None, None]
    if h is not None:
        h = h.unflatten(2, (call.groups, -1)).unsqueeze(1)
        written = torch.cat((torch.addcmul(written[:, :1], decay[:, :1], h), written[:, 1:]), 1)
    after = linear_scan(decay, written)  # states after each chunk
    before = F.pad(after, (0, 0) * (after.dim() - 2) + (1, 0))[:, :-1]
    if h is not None:
        before = torch.cat((h, before[:, 1:]), 1)
    carried = torch.einsum("bcikgn,bckgrpn->bcikgrp", C, before)
    y = y + carried * since.movedim(5, 2).unsqueeze(-1)
    y = y.flatten(4, 5).flatten(1, 2)[:, : call.steps]
    return y, after[:, -1].flatten(2, 3)


def _summed(call: SsdCall, u: Tensor, s: Tensor, B: Tensor, C: Tensor, h: Tensor | None) -> tuple[Tensor, Tensor]:
    """Not causal: one state of all tokens, read by all of them."""
    weighted = _by_group(u * (-s * call.A.to(s.dtype)).unsqueeze(-1), call.groups)
    written = torch.einsum("bskgn,bskgrp->bkgrpn", B, weighted).flatten(2, 3)
    h = written if h is None else h + written
    y = torch.einsum("bskgn,bkgrpn->bskgrp", C, h.unflatten(2, (call.groups, -1)))
    return y.flatten(3, 4), h
