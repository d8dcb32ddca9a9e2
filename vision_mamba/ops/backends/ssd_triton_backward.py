"""The launches of the backward pass of the state-space dual scan in Triton."""

from __future__ import annotations

import torch
from torch import Tensor

from vision_mamba.ops import contract
from vision_mamba.ops.backends import ssd_triton_backward_kernels as kernels
from vision_mamba.ops.backends.ssd_triton import Route, _padded, _processors, parts_of, split_heads
from vision_mamba.ops.backends.triton import _like, _on
from vision_mamba.ops.ssd_call import GRADIENTS, SsdCall


def launch(call: SsdCall, dy: Tensor | None, dlast: Tensor | None) -> tuple[Tensor | None, ...]:
    """Every gradient, in the order of GRADIENTS, from those of y and of the last state."""
    if (parts := parts_of(call)) > 1:
        return _launch_split(call, parts, dy, dlast)
    tensors = (call.x, call.dt, call.B, call.C)
    dx, ddt, dB, dC = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in tensors)
    if not contract.visits_all(call):
        for gradient in (dx, ddt, dB, dC):
            gradient.zero_()
    dinitial = None if call.initial_state is None else call.initial_state.new_empty(call.initial_state.shape)
    if dy is None:
        heads = (call.heads, call.channels) if call.merge else (call.routes, call.heads, call.channels)
        dy = call.x.new_zeros(()).expand(call.batch, call.tokens, *heads)
    sums: list[dict[str, Tensor | None]] = []
    with _on(call.x.device):
        for k in range(call.routes):
            results = (dx if call.shared_x else dx[:, :, k], ddt[:, :, k], dB[:, :, k], dC[:, :, k])
            sums.append(
                _launch_route(
                    Route(call, k, True),
                    dy if call.merge else dy[:, :, k],
                    None if dlast is None else dlast[:, k].contiguous(),
                    results,
                    None if dinitial is None else dinitial[:, k],
                    call.shared_x and k > 0,
                )
            )
    found: dict[str, Tensor | None] = dict(x=dx, dt=ddt, B=dB, C=dC, initial_state=dinitial)
    for name in ("A", "D", "dt_bias"):
        routes = [route for each in sums if (route := each[name]) is not None]
        found[name] = (routes[0].unsqueeze(0) if len(routes) == 1 else torch.stack(routes)) if routes else None
    return tuple(_like(getattr(call, name), found[name]) for name in GRADIENTS)


def _launch_split(call: SsdCall, parts: int, dy: Tensor | None, dlast: Tensor | None) -> tuple[Tensor | None, ...]:
    """The same where a head is run in parts: what they share has the sum of their gradients."""
    if dy is not None:
        dy = dy.unflatten(-1, (parts, -1)).flatten(-3, -2)
    if dlast is not None:
        dlast = dlast.unflatten(3, (parts, -1)).flatten(2, 3)
    found = dict(zip(GRADIENTS, launch(split_heads(call, parts), dy, dlast), strict=True))

    def whole(name: str) -> Tensor | None:
        gradient, like = found[name], getattr(call, name)
        if gradient is None:
            return None
        if gradient.numel() > like.numel():
            gradient = gradient.unflatten(-1, (-1, parts)).sum(-1)
        return _like(like, gradient.reshape(like.shape))

    return tuple(whole(name) for name in GRADIENTS)


def _states(
    r: Route, dy: Tensor, dlast: Tensor | None, dinitial: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """States before each chunk, gradients of those after it, and what both are rounded by, (B, H, chunks, N, P)."""
    call, plan = r.call, r.plan
    shape = (call.batch, call.heads, plan.segments * plan.chunks, call.states, call.channels)
    if not call.causal:
        g = r.total(dy, True, dlast)
        if dinitial is not None:
            dinitial.copy_(g)
        h, g = (t.mT.contiguous().unsqueeze(2).expand(shape) for t in (r.total(r.x, False, r.initial), g))
        return h, g, None, None
    # In the type that they are multiplied in.
    rounded = plan.shared["FACTORS"] == "bfloat16"
    parts = call.x.new_empty((4 if rounded else 2, *shape), dtype=torch.bfloat16 if rounded else torch.float32)
    h, g, h_rest, g_rest = parts if rounded else (parts[0], parts[1], None, None)
    r.walk(r.x, False, r.enter(r.x, False, r.initial, None), (h, h_rest), None, None)
    before = r.enter(dy, True, dlast, dinitial)
    r.walk(dy, True, before, (g, g_rest), dinitial if plan.segments == 1 else None, None)
    return h, g, h_rest, g_rest


def _launch_route(
    r: Route, dy: Tensor, dlast: Tensor | None, results: tuple[Tensor, ...], dinitial: Tensor | None, add: bool
) -> dict[str, Tensor | None]:
    """Write the gradients of one route's tensors; returns those of its parameters."""
    call, plan = r.call, r.plan
    dx, ddt, dB, dC = results
    h, g, *rests = _states(r, dy, dlast, dinitial)
    chunks = -(-call.steps // plan.tile.steps)
    exact = call.causal and plan.shared["FACTORS"] != "bfloat16"
    kinds = 3 + exact if call.causal else 1
    rows = call.x.new_empty((kinds, call.batch, call.heads, plan.padded), dtype=torch.float32)
    parts = rows.new_empty((3 + exact, call.batch, call.heads, chunks))
    dA, dbias, carried = parts[:3]
    inner = parts[3] if exact else None
    dD = None if r.D is None else parts.new_empty((*dA.shape, *r.D.shape[1:]))
    programs, per_group = call.batch * call.groups * chunks, call.heads // call.groups
    # A divisor of the heads of a group, large enough to fill the GPU.
    wanted = min(per_group, -(-2 * _processors(call.x.device) // programs))
    shares = next(n for n in range(wanted, per_group + 1) if per_group % n == 0)
    dBs, dCs = (
        t.unsqueeze(0) if shares == 1 else t.new_zeros((shares, *t.shape), dtype=torch.float32) for t in (dB, dC)
    )
    shared = plan.shared | dict(BLOCK_P=max(plan.tile.least, _padded(call.channels)), DESCENDING=r.descending)
    sizes = (call.steps, call.tokens, chunks, plan.padded)
    strides = (*r.x.stride(), *r.B.stride(), *r.C.stride())
    kernels.inputs[(call.batch * call.heads * chunks,)](
        r.x, *r.prepared, r.A, r.B, r.C, r.D, r.indices, dy, h, g, *rests, dx, rows, carried, inner, dD,
        call.heads, per_group, *sizes, *strides, *r.skip, *dy.stride(), *dx.stride(), *h.stride()[:3], rows.stride(0),
        **shared, **plan.options["inputs"], ADD=add, EACH_CHANNEL=r.D is not None and r.D.dim() == 2,
    )  # fmt: skip
    kernels.weights[(programs * shares,)](
        r.x, *r.prepared, r.A, r.B, r.C, r.indices, dy, h, g, dBs, dCs,
        call.heads, per_group, shares, *sizes, *strides, *dy.stride(), *dBs.stride(), *dCs.stride(), *h.stride()[:3],
        **shared, **plan.options["weights"],
    )  # fmt: skip
    heads = min(16, _padded(call.heads))
    kernels.rates[(call.batch * chunks, -(-call.heads // heads))](
        r.dt, r.prepared[0], r.A, r.bias, r.indices, rows, carried, inner, ddt, dA, None if r.bias is None else dbias,
        call.heads, *sizes, *r.limits, *r.dt.stride(), *ddt.stride(), rows.stride(0),
        T=plan.tile.steps, HEADS=heads, CAUSAL=call.causal, DESCENDING=r.descending, SOFTPLUS=call.dt_softplus,
    )  # fmt: skip
    if shares > 1:
        dB.copy_(dBs.sum(0))
        dC.copy_(dCs.sum(0))
    sums = parts[:2].sum((1, 3))
    return dict(A=sums[0], dt_bias=None if r.bias is None else sums[1], D=None if dD is None else dD.sum((0, 2)))
