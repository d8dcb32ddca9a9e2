"""The CUDA C++ kernels of what LocalMamba puts around its scans: convolutions along routes, and the routes weighed."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vision_mamba.ops.backends import gpu, nvrtc
from vision_mamba.ops.backends import rows_cuda as rows
from vision_mamba.ops.contract import covers
from vision_mamba.ops.fused import Kernels, Tensors

MAX_WIDTH = 2048  # channels of a route's row, which a group of lanes holds in registers
MAX_ROUTES = 8  # of which a thread holds the weights


def route_sums(
    y: torch.dtype, z: torch.dtype | None, width: int, routes: int, eps: float, run: int
) -> nvrtc.Specialisation:
    return rows._kernel("routes_sums", dict(X_TYPE=y, B_TYPE=z or y), _row_macros(z, width, routes, eps, run))


def route_backward(
    y: torch.dtype, z: torch.dtype | None, dout: torch.dtype, width: int, routes: int, eps: float, run: int
) -> nvrtc.Specialisation:
    types = dict(X_TYPE=y, B_TYPE=z or y, Y_TYPE=dout)
    return rows._kernel("routes_backward", types, _row_macros(z, width, routes, eps, run))


def route_weigh(
    slopes: bool, y: torch.dtype, z: torch.dtype | None, out: torch.dtype, routes: int, run: int
) -> nvrtc.Specialisation:
    macros = dict(RUN=run, ROUTES=routes, GATED=z is not None, SLOPES=slopes)
    return rows._kernel("routes_weigh", dict(X_TYPE=y, B_TYPE=z or y, Y_TYPE=out), macros)


def _row_macros(z: torch.dtype | None, width: int, routes: int, eps: float, run: int) -> dict[str, Any]:
    """Those of a norm's rows, and what is ours."""
    macros = dict(WIDTH=width, RUN=run, LANES=rows.norm_lanes(width, run), RMS=False, BRANCH=False, SHIFT=False)
    return macros | dict(EPSILON=f"{float(eps)!r}f", ROUTES=routes, GATED=z is not None)


_HALF = torch.bfloat16

#: What the published models run under autocast: compiled for every architecture by the tests.
SHIPPED = (
    *(rows.convolution(forward, _HALF, 2, (768, 768, 2 * 768), 1, routes=True) for forward in (True, False)),
    *(route_sums(_HALF, z, 384, 4, 1e-5, 4) for z in (None, _HALF)),
    *(route_backward(_HALF, z, _HALF, 384, 4, 1e-5, 4) for z in (None, _HALF)),
    *(route_weigh(slopes, _HALF, z, _HALF, 4, 4) for slopes in (True, False) for z in (None, _HALF)),
)


# Convolutions along routes.


def _refuses_conv(tensors: Tensors, options: dict[str, Any]) -> bool:
    x, weight, bias, table = tensors
    assert x is not None and weight is not None and bias is not None and table is not None
    if x.dim() != 3 or weight.shape[:2] != (len(table), x.shape[2]) or bias.shape != weight.shape[:2]:
        return True  # plain torch says what is wrong
    if weight.dim() != 3 or rows._refuses_taps(x, weight, bias) or not table.is_contiguous():
        return True
    return table.shape[1] != x.shape[1] or not covers("conv_routes", table, x.shape[1])  # they take no padding


def _conv_forward(tensors: Tensors, options: dict[str, Any], keep: bool = True) -> tuple[tuple[Tensor, ...], Tensors]:
    x, weight, bias, table = tensors
    assert x is not None and weight is not None and bias is not None and table is not None
    y = x.new_empty((*x.shape[:2], len(table), x.shape[2]))
    run = rows._run(2, x)
    grid, fields = rows._conv_sizes(x, run, 0, len(table))
    how = (True, x.dtype, run, (x.shape[2], x.stride(1), 0), 1, rows.TAPS - 1, True)
    rows._start(
        rows.convolution, how, grid, fields, x=x, weight=rows._filled(weight), bias=rows._whole(bias), table=table, y=y
    )
    return (y,), tensors


def conv_backward(kept: Tensors, options: dict[str, Any], grads: Tensors, dx: Tensor | None = None) -> Tensors:
    """The gradient of x goes to `dx`, which may be a part of rows, if that is given."""
    (dy,), (x, weight, bias, table) = grads, kept
    assert x is not None and weight is not None and bias is not None and table is not None and dy is not None
    batch, routes, channels = len(x), len(table), x.shape[2]
    dy = dy.to(x.dtype).contiguous()
    run = rows._run(2, x, dy)
    grid, fields = rows._conv_sizes(x, run, 6, routes)
    shares = torch.empty_like(dy)
    fields |= dict(dx_b=shares.stride(0), dx_l=shares.stride(1))
    parts = torch.empty((batch, routes, fields["chunks"], 5, channels), dtype=torch.float32, device=x.device)
    how = (False, x.dtype, run, (channels, x.stride(1), shares.stride(1)), 1, rows.TAPS - 1, True)
    rows._start(
        rows.convolution, how, grid, fields, x=x, weight=rows._filled(weight), bias=rows._whole(bias), table=table,
        dy=dy, dx=shares, parts=parts,
    )  # fmt: skip
    if dx is None:
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    torch.sum(shares, 2, out=dx)
    sums = parts.sum((0, 2))
    dweight = sums[:, rows.TAPS - weight.shape[2] : rows.TAPS].transpose(1, 2)
    return dx, dweight.to(weight.dtype), sums[:, rows.TAPS].to(bias.dtype), None


#: Of x (B, L, D), taps (K, D, W), bias (K, D) and a table (K, L): silu of the causal convolution along each route, laid
#: where the tokens are, (B, L, K, D).
CONV_ROUTES = Kernels(_refuses_conv, _conv_forward, conv_backward)


# Results of routes, weighed by what they are on average.


def _refuses_attention(tensors: Tensors, options: dict[str, Any]) -> bool:
    y, z, weight, bias, reduce_weight, reduce_bias, select_weight, select_bias = tensors
    assert y is not None and reduce_weight is not None and select_weight is not None
    if y.dim() != 4 or y.shape[2] > MAX_ROUTES or y.shape[3] > MAX_WIDTH or not y.is_contiguous():
        return True
    channels, hidden = y.shape[3], len(reduce_weight)
    shapes = (weight, channels), (bias, channels), (reduce_bias, hidden), (select_bias, channels)
    if any(t is None or t.shape != (size,) for t, size in shapes):
        return True  # plain torch says what is wrong
    if reduce_weight.shape != (hidden, channels) or select_weight.shape != (channels, hidden):
        return True
    if z is not None and (z.shape != (y.shape[0], y.shape[1], channels) or not rows._in_rows(z)):
        return True
    return rows._unfit(*tensors)


def _attention_forward(
    tensors: Tensors, options: dict[str, Any], keep: bool = True
) -> tuple[tuple[Tensor, ...], Tensors]:
    y, z, *parameters = tensors
    assert y is not None
    batch, length, routes, width = y.shape
    run = rows._run(4, y, z)
    z_type = None if z is None else z.dtype
    groups = 128 // rows.norm_lanes(width, run)
    wanted = -(-8 * gpu.multiprocessors(y.device.index) // (batch * routes))
    count = max(1, min(wanted, length // (4 * groups)))
    fields = _fields(y, z, count)
    parts = torch.empty((batch, fields["chunks"], routes, width), dtype=torch.float32, device=y.device)
    how = (y.dtype, z_type, width, routes, options["eps"], run)
    rows._start(route_sums, how, batch * fields["chunks"] * routes, fields, x=y, z=z, parts=parts)
    sums = parts.sum(1)
    gate = _gates(sums, length, parameters)[-1]
    out = y.new_empty((batch, length, width))
    grid, fields = _weigh_sizes(y, z, run)
    rows._start(route_weigh, (False, y.dtype, z_type, y.dtype, routes, run), grid, fields, x=y, z=z, gate=gate, y=out)
    return (out,), (y, z, sums, *parameters)


def _fields(y: Tensor, z: Tensor | None, count: int) -> dict[str, int]:
    batch, length, _, width = y.shape
    steps = -(-length // count)
    fields = dict(batch=batch, tokens=length, channels=width, chunks=-(-length // steps), chunk_steps=steps)
    return fields | dict(z_l=0 if z is None else z.stride(1))


def _weigh_sizes(y: Tensor, z: Tensor | None, run: int) -> tuple[int, dict[str, int]]:
    batch, length, _, width = y.shape
    threads = batch * (width // run)
    fields = _fields(y, z, rows.chunks(length, threads, 1024 * gpu.multiprocessors(y.device.index))[0])
    return (threads * fields["chunks"] + 127) // 128, fields


def _gates(sums: Tensor, length: int, parameters: list[Tensor | None]) -> tuple[Tensor, ...]:
    """What an MLP makes of routes' means: those, its hidden layer, the activated one, the gates, in float32."""
    weight, bias, reduce_weight, reduce_bias, select_weight, select_bias = (p.float() for p in parameters)  # type: ignore
    means = torch.addcmul(bias, sums, weight, value=1.0 / length)
    hidden = F.linear(means, reduce_weight, reduce_bias)
    active = F.gelu(hidden)
    return means, hidden, active, F.linear(active, select_weight, select_bias).sigmoid()


def attention_backward(kept: Tensors, options: dict[str, Any], grads: Tensors, dz: Tensor | None = None) -> Tensors:
    """The gradient of z goes to `dz`, which may be a part of rows, if that is given."""
    (dout,), (y, z, sums, *parameters) = grads, kept
    assert y is not None and sums is not None and dout is not None
    batch, length, routes, width = y.shape
    weight, _, reduce_weight, _, select_weight, _ = (p.float() for p in parameters)  # type: ignore[union-attr]
    dout = dout.contiguous()
    run = rows._run(4, y, z, dout)
    z_type = None if z is None else z.dtype
    grid, fields = _weigh_sizes(y, z, run)
    parts = torch.empty((batch, fields["chunks"], routes, width), dtype=torch.float32, device=y.device)
    how: tuple[Any, ...] = (True, y.dtype, z_type, dout.dtype, routes, run)
    rows._start(route_weigh, how, grid, fields, x=y, z=z, dy=dout, parts=parts)
    means, hidden, active, gate = _gates(sums, length, parameters)
    dgate = (parts.sum(1) * gate * (1 - gate)).flatten(0, 1)
    dhidden = torch.ops.aten.gelu_backward(dgate @ select_weight, hidden.flatten(0, 1))
    dmeans = dhidden @ reduce_weight
    slopes = (dmeans * (weight / length)).view_as(sums)
    found = (
        (dmeans * sums.flatten(0, 1)).sum(0) / length,
        dmeans.sum(0),
        dhidden.t() @ means.flatten(0, 1),
        dhidden.sum(0),
        dgate.t() @ active.flatten(0, 1),
        dgate.sum(0),
    )
    dy = torch.empty_like(y)
    if z is not None and dz is None:
        dz = torch.empty_like(z, memory_format=torch.contiguous_format)
    fields = _fields(y, z, 1) | dict(dz_l=0 if dz is None else dz.stride(1))
    per_block = 128 // rows.norm_lanes(width, run)
    how = (y.dtype, z_type, dout.dtype, width, routes, options["eps"], run)
    rows._start(
        route_backward, how, -(-batch * length // per_block), fields, x=y, z=z, dy=dout, gate=gate, slopes=slopes,
        dx=dy, dz=dz,
    )  # fmt: skip
    return dy, dz, *(grad.to(p.dtype) for grad, p in zip(found, parameters, strict=True))  # type: ignore[union-attr]


#: Of results (B, L, K, D) of routes, z (B, L, D) or None, and the parameters of `layers.local.ChannelAttention`: the
#: sum of v_k = y_k [silu(z)] over routes, each weighed by a function of the mean of norm(v_k) over tokens, (B, L, D).
ROUTE_ATTENTION = Kernels(_refuses_attention, _attention_forward, attention_backward)
