"""LocalVim's mixer as one function, on the kernels of this folder: see ops.mixers."""

from __future__ import annotations

import torch
from torch import Tensor

from vision_mamba.ops.backends import mixers_cuda as chains
from vision_mamba.ops.backends import routes_cuda
from vision_mamba.ops.backends.sums_cuda import finished
from vision_mamba.ops.fused import Kernels, Tensors, without_autocast


def _refuses(tensors: Tensors, options: chains.Options) -> bool:
    xz, weight, bias, projection, _, _, _, _, table, *attention, _ = tensors
    assert xz is not None and projection is not None
    if chains._refuses(tensors, (3, len(tensors) - 1)) or xz.dim() != 3:
        return True
    x, z = xz.chunk(2, -1)
    if routes_cuda.CONV_ROUTES.refuses((x, weight, bias, table), {}):
        return True
    y, like_z = x.new_empty((1, 1, len(projection), x.shape[2])), z.new_empty((1, 1, z.shape[2]))
    return routes_cuda.ROUTE_ATTENTION.refuses((y, like_z, *attention), {})


def _forward(tensors: Tensors, options: chains.Options, keep: bool) -> tuple[tuple[Tensor, ...], Tensors]:
    xz, weight, bias, projection, A_log, D, dt_weight, dt_bias, table, *attention, out_weight = tensors
    assert xz is not None and projection is not None and out_weight is not None
    with without_autocast():
        x, z = xz.chunk(2, -1)
        (u,), _ = routes_cuda.CONV_ROUTES.forward((x, weight, bias, table), {}, keep)
        projection = chains.filled_up(projection, xz.dtype, dt_weight)
        out_weight = chains.halved(out_weight, xz.dtype)
        columns = chains.columns_of_routes(u, projection)
        of_scan = (A_log, D, dt_weight, dt_bias, table)
        call = chains._scan_call(u, columns, chains.decays_of(A_log), of_scan, None, chains.WORD)
        y, saved = chains._scan_forward(call._replace(merge=False), columns, keep)
        how = dict(eps=options["attention_eps"])
        (g,), (_, _, sums, *_) = routes_cuda.ROUTE_ATTENTION.forward((y, z, *attention), how, keep)
        out = chains._scaled_product(g.flatten(0, 1), out_weight.t(), options["scale"])
    kept = (xz, columns, y, sums, g, *saved, projection, out_weight, *tensors[1:])
    return (out.unflatten(0, xz.shape[:2]),), kept


def _backward(kept: Tensors, options: chains.Options, grads: Tensors) -> Tensors:
    (dout,), (xz, columns, y, sums, g, A, states, half, projection, out_weight, *parameters) = grads, kept
    weight, bias, given, *of_scan, table = parameters[:8]
    attention = parameters[8:-1]
    assert dout is not None and xz is not None and columns is not None and y is not None and g is not None
    assert given is not None and A is not None and projection is not None and out_weight is not None
    with without_autocast():
        (x, z), dxz = xz.chunk(2, -1), torch.empty_like(xz)
        dx, dz = dxz.chunk(2, -1)
        dout = dout.flatten(0, 1).contiguous()
        dg = chains._scaled_product(dout, out_weight, options["scale"]).view(g.shape)
        dout_weight = chains._product_of_sums(dout, g.flatten(0, 1)) * options["scale"]
        of_attention, how = (y, z, sums, *attention), dict(eps=options["attention_eps"])
        dy, _, *dattention = routes_cuda.attention_backward(of_attention, how, (dg,), dz)
        assert dy is not None
        of_conv = (x, weight, bias, table)
        (u,), _ = routes_cuda.CONV_ROUTES.forward(of_conv, {}, True)
        call = chains._scan_call(u, columns, A, (*of_scan, table), None, chains.WORD)._replace(merge=False)
        du, dcolumns, dscan = chains._scan_backward(call, columns, (A, states, half), dy, chains.WORD)
        del dy
        dprojection = chains.columns_backward(u, du, dcolumns, projection, given, call)
        _, *dconv, _ = routes_cuda.conv_backward(of_conv, {}, (du,), dx)
        return dxz, *finished((*dconv, dprojection, *dscan, *dattention, dout_weight), parameters)


SCAN_ROUTES = Kernels(_refuses, _forward, _backward)
