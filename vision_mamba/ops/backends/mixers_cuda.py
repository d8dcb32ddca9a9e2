"""Chains of a model's layers as one function, on the kernels of this folder: see ops.mixers.

Each keeps for the backward pass what is dear to compute again, and no more: norms, activations, gates and Vim's
convolution are computed twice. Gradients that meet are added up by the products that make one of them.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vision_mamba.ops.backends import routes_cuda, rows_cuda
from vision_mamba.ops.backends.cuda_kernels import TYPES
from vision_mamba.ops.backends.sums_cuda import Parts, Summed, finished
from vision_mamba.ops.call import ScanCall
from vision_mamba.ops.fused import Kernels, Tensors, without_autocast
from vision_mamba.ops.registry import scans

Options = dict[str, Any]
MUCH = 1 << 22  # inputs of routes beside which one more launch is little
WORD = 8  # numbers that rows of products are best multiples of


def _product_type(x: Tensor) -> torch.dtype:
    """The type that a linear layer behind x computes in."""
    return torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype


def _refuses(tensors: Tensors, products: tuple[int, ...]) -> bool:
    """Whether the kernels do not take these, where `products` are the places of weights that linear layers have.

    Without autocast those have x's type, or plain torch says what is wrong.
    """
    x = tensors[0]
    assert x is not None
    dtype = _product_type(x)
    if x.dtype not in TYPES or dtype not in TYPES or x.numel() == 0 or not x.is_contiguous():
        return True
    return not torch.is_autocast_enabled("cuda") and any(tensors[i].dtype != dtype for i in products)  # type: ignore


def _product_of_sums(left: Tensor, right: Tensor) -> Tensor:
    """left^T right over long sums, (M, I) and (M, J) -> (I, J); float32 whatever the types, as sums are."""
    if left.dtype == torch.float32:
        return left.t() @ right
    return torch.mm(left.t(), right, out_dtype=torch.float32)


class _Ahead(threading.local):
    """By the addresses of parameters: what `ahead` made of them."""

    def __init__(self) -> None:
        self.found: dict[int, Tensor] = {}


cast_ahead = _Ahead()


@contextlib.contextmanager
def ahead(x: Tensor, weights: list[Tensor], logs: list[Tensor]) -> Iterator[None]:
    """Cast weights to the type of products behind x, and make A of its logarithms, all at once for the layers that run
    within: one by one they are many small kernels."""
    before, dtype = cast_ahead.found, _product_type(x)
    with torch.no_grad():
        wide = [weight for weight in weights if weight.dtype != dtype]
        halves = [torch.empty_like(weight, dtype=dtype) for weight in wide]
        if wide:
            torch._foreach_copy_(halves, wide)
        logs = [log for log in logs if log.dtype == torch.float32]
        decays = list(torch._foreach_exp(logs)) if logs else []
        if logs:
            torch._foreach_neg_(decays)
    made = zip([*wide, *logs], [*halves, *decays], strict=True)
    cast_ahead.found = before | {parameter.data_ptr(): found for parameter, found in made}
    try:
        yield
    finally:
        cast_ahead.found = before


def _made_ahead(parameter: Tensor, dtype: torch.dtype) -> Tensor | None:
    found = cast_ahead.found.get(parameter.data_ptr())
    if found is None or found.dtype != dtype or found.numel() != parameter.numel():
        return None
    return found.view(parameter.shape)


def halved(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight in the type of products."""
    if weight.dtype == dtype:
        return weight
    found = _made_ahead(weight, dtype)
    return weight.to(dtype) if found is None else found


def decays_of(A_log: Tensor | None) -> Tensor:
    """A = -exp(A_log), in float32."""
    assert A_log is not None
    found = _made_ahead(A_log, torch.float32)
    return torch.exp(A_log.float()).neg_() if found is None else found


# A norm of a stream, and what reads it.


def _refuses_norm(tensors: Tensors, options: Options) -> bool:
    x = tensors[0]
    assert x is not None
    return _refuses(tensors, tuple(range(4, len(tensors)))) or rows_cuda.NORM.refuses(tensors[:4], _norm(x, options))


def _norm(x: Tensor, options: Options) -> Options:
    return dict(eps=options["eps"], rms=options["rms"], out_dtype=_product_type(x), stream=True)


def _linear_forward(tensors: Tensors, options: Options, keep: bool) -> tuple[tuple[Tensor, ...], Tensors]:
    x, _, _, _, weight = tensors
    assert x is not None and weight is not None
    (n, total), of_norm = rows_cuda.NORM.forward(tensors[:4], _norm(x, options), keep)
    with without_autocast():
        matrix, missing = halved(weight, n.dtype), -len(weight) % options.get("step", 1)
        matrix = F.pad(matrix, (0, 0, 0, missing)) if missing else matrix
        return (F.linear(n, matrix), total), (matrix, weight, *of_norm)


def _linear_backward(kept: Tensors, options: Options, grads: Tensors) -> Tensors:
    (dout, dtotal), (matrix, weight, *of_norm) = grads, kept
    assert matrix is not None and weight is not None
    if dout is None:
        return (*_of_stream(dtotal, of_norm), None, None, None)
    with without_autocast():
        dout = dout.flatten(0, -2).contiguous()
        n = dout.new_empty((len(dout), matrix.shape[1]))
        dx, dbranch, dnorm = _norm_backward(of_norm, options, dout @ matrix, dtotal, n)
        dweight = _product_of_sums(dout, n)[: len(weight)]
        return dx, dbranch, *finished((*dnorm, dweight), (*of_norm[1:3], weight))


def _of_stream(dtotal: Tensor | None, of_norm: list[Tensor | None]) -> Tensors:
    """Gradients of the stream and the branch from that of their sum alone."""
    branch = of_norm[3]
    return dtotal, None if branch is None or dtotal is None else dtotal.to(branch.dtype)


def _norm_backward(
    of_norm: list[Tensor | None], options: Options, dn: Tensor, dtotal: Tensor | None, n: Tensor
) -> tuple[Tensor, Tensor | None, list[Parts | None]]:
    """Gradients of the stream, the branch and the norm's parameters; what the norm gave is written to n."""
    x = of_norm[0]
    assert x is not None
    how = dict(eps=options["eps"], rms=options["rms"], out_dtype=n.dtype, stream=True)
    return rows_cuda.norm_parts(tuple(of_norm), how, (dn.view(x.shape), dtotal), again=n)


NORM_LINEAR = Kernels(_refuses_norm, _linear_forward, _linear_backward)


def _mlp_forward(tensors: Tensors, options: Options, keep: bool) -> tuple[tuple[Tensor, ...], Tensors]:
    x, _, _, _, weight1, bias1, weight2, bias2 = tensors
    assert x is not None and weight1 is not None and bias1 is not None and weight2 is not None and bias2 is not None
    (n, total), of_norm = rows_cuda.NORM.forward(tensors[:4], _norm(x, options), keep)
    with without_autocast():
        first, second, offset1, offset2 = (halved(w, n.dtype) for w in (weight1, weight2, bias1, bias2))
        h = F.linear(n, first, offset1)
        y = F.linear(rows_cuda.gelu_forward(h), second, offset2)
    return (y, total), (h, first, second, *tensors[4:], *of_norm)


def _mlp_backward(kept: Tensors, options: Options, grads: Tensors) -> Tensors:
    (dy, dtotal), (h, first, second, weight1, bias1, weight2, bias2, *of_norm) = grads, kept
    assert h is not None and first is not None and second is not None
    if dy is None:
        return (*_of_stream(dtotal, of_norm), *(None,) * 6)
    with without_autocast():
        dy = dy.flatten(0, -2).contiguous()
        a, dh, dbias1 = rows_cuda.gelu_backward(h.flatten(0, -2), dy @ second)
        dweight2, dbias2 = _product_of_sums(dy, a), rows_cuda.row_parts(dy)
        del a
        n = dh.new_empty((len(dh), first.shape[1]))
        dx, dbranch, dnorm = _norm_backward(of_norm, options, dh @ first, dtotal, n)
        sums = (*dnorm, _product_of_sums(dh, n), dbias1, dweight2, dbias2)
        return dx, dbranch, *finished(sums, (*of_norm[1:3], weight1, bias1, weight2, bias2))


NORM_MLP = Kernels(_refuses_norm, _mlp_forward, _mlp_backward)


# A stream's last sum, where a product reads it.


def _refuses_product_sum(tensors: Tensors, options: Options) -> bool:
    x, branch = tensors
    assert x is not None and branch is not None
    return not torch.is_autocast_enabled("cuda") or x.shape != branch.shape


def _product_sum_forward(tensors: Tensors, options: Options, keep: bool) -> tuple[tuple[Tensor, ...], Tensors]:
    x, branch = tensors
    assert x is not None and branch is not None
    out = torch.empty_like(x, dtype=_product_type(x))
    return (torch.add(x, branch, out=out),), (x.new_empty(0), branch.new_empty(0))  # their types are all it needs


def _product_sum_backward(kept: Tensors, options: Options, grads: Tensors) -> Tensors:
    (dout,) = grads
    return tuple(None if dout is None or like is None else dout.to(like.dtype) for like in kept)


PRODUCT_SUM = Kernels(_refuses_product_sum, _product_sum_forward, _product_sum_backward)


# What both mixers do with a scan.


def _first(rank: int, word: int) -> int:
    """Where B begins among columns, behind step sizes that are filled up to a multiple of a word."""
    return rank + -rank % word


def _scan_call(
    u: Tensor,
    columns: Tensor,
    A: Tensor,
    parameters: tuple[Tensor | None, ...],
    out_dtype: torch.dtype | None,
    word: int = 1,
) -> ScanCall:
    """Of columns (B, L, K, step sizes filled up, B, C, or more), A, and its logarithm, D, weight and bias of step
    sizes, the table."""
    _, D, dt_weight, dt_bias, indices = parameters
    assert dt_weight is not None
    rank, states = dt_weight.shape[2], A.shape[2]
    first = _first(rank, word)
    B, C = columns[..., first : first + 2 * states].split(states, -1)
    return ScanCall(u, columns[..., :rank], A, B, C, D, indices, dt_weight, dt_bias, out_dtype=out_dtype)


def _multiplies_out(call: ScanCall) -> bool:
    """Whether step sizes are to be as large as what is scanned, where each route has its own: kernels of several states
    take these faster, by more than the product takes where there is much to scan. In float16 it could overflow."""
    if call.states == 1 or call.shared_x or call.dt_weight is None or call.dt.dtype == torch.float16:
        return False
    return call.x.numel() >= MUCH


def _multiplied_out(call: ScanCall, columns: Tensor, weight: Tensor) -> ScanCall:
    dt = _each_route(columns[..., : weight.shape[2]], weight.transpose(1, 2))
    return call._replace(dt=dt, dt_weight=None)


def _scan_forward(call: ScanCall, columns: Tensor, keep: bool) -> tuple[Tensor, Tensors]:
    """y, and what the backward pass needs of it: A, states, the weight of step sizes that were multiplied out."""
    weight = None
    if _multiplies_out(call):
        assert call.dt_weight is not None
        weight = halved(call.dt_weight, columns.dtype)
        missing = -weight.shape[2] % WORD
        weight = F.pad(weight, (0, missing)) if missing else weight
        call = _multiplied_out(call, columns, weight)
    y, _, states = scans.choose(call, None).forward(call, keep)
    return y, (call.A, states, weight)


def _scan_backward(
    call: ScanCall, columns: Tensor, saved: Tensors, dy: Tensor, word: int = 1
) -> tuple[Tensor, Tensor, tuple[Summed, ...]]:
    """Gradients of u, of the columns, and of A's logarithm, D, weight and bias of step sizes, table."""
    A, states, weight = saved
    assert A is not None and states is not None
    whole = call if weight is None else _multiplied_out(call, columns, weight)
    backend = scans.choose(whole, None)
    assert backend.backward is not None, backend.name
    du, ddt, dA, dB, dC, dD, of_weight, dbias, _ = backend.backward(whole, states, dy, None)
    assert du is not None and ddt is not None and dA is not None and dB is not None and dC is not None
    dweight: Summed = of_weight
    if weight is not None:
        dweight = Parts(_sums_of_routes(ddt, columns)[..., : call.rank].unsqueeze(0))  # all columns lie in one piece
        ddt = _each_route(ddt, weight)
    first = _first(call.rank, word)
    gaps = first - ddt.shape[-1], columns.shape[-1] - first - 2 * call.states
    between, behind = (dC.new_zeros((*dC.shape[:-1], gap)) if gap else None for gap in gaps)
    parts = [part for part in (ddt, between, dB, dC, behind) if part is not None]
    return du, torch.cat(parts, -1), (dA * A, dD, dweight, dbias, None)


def filled_up(projection: Tensor, dtype: torch.dtype, dt_weight: Tensor | None) -> Tensor:
    """(K, R + 2 N, D) with rows of zeros behind the R of step sizes and behind all, so that each begins and ends at a
    multiple of a word: products of other widths are far slower."""
    assert dt_weight is not None
    (routes, rows, channels), rank = projection.shape, dt_weight.shape[2]
    first = _first(rank, WORD)
    width = _first(first + rows - rank, WORD)
    projection = halved(projection, dtype)
    if width == rows:
        return projection
    filled = projection.new_zeros((routes, width, channels))
    filled[:, :rank], filled[:, first : first + rows - rank] = projection[:, :rank], projection[:, rank:]
    return filled


# VMamba's.


def _refuses_map(tensors: Tensors, options: Options) -> bool:
    if _refuses(tensors, (3, len(tensors) - 1)):
        return True
    x = _halves(tensors[0], options)[0]
    if rows_cuda.CONV_MAP.refuses((x, *tensors[1:3]), {}):
        return True
    attention = tensors[9:15]
    if attention[0] is None:
        return False
    routes = x.new_empty((1, 1, len(tensors[3]), x.shape[3]), dtype=options["out_dtype"])  # type: ignore[arg-type]
    return routes_cuda.ROUTE_ATTENTION.refuses((routes, None, *attention), {})


def _halves(xz: Tensor | None, options: Options) -> tuple[Tensor, Tensor | None]:
    """x, and the gate z if there is one, of what in_proj gives."""
    assert xz is not None
    if not options["gate"]:
        return xz, None
    x, z = xz.chunk(2, -1)
    return x, z


def _map_forward(tensors: Tensors, options: Options, keep: bool) -> tuple[tuple[Tensor, ...], Tensors]:
    xz, weight, bias, projection, *middle, norm_weight, norm_bias, out_weight = tensors
    of_scan, attention = tuple(middle[:5]), middle[5:]
    assert xz is not None and projection is not None and out_weight is not None and norm_weight is not None
    with without_autocast():
        x, z = _halves(xz, options)
        (u,), _ = rows_cuda.CONV_MAP.forward((x, weight, bias), {}, keep)
        projection = halved(projection, x.dtype)
        missing = -projection.shape[1] % (WORD // math.gcd(WORD, len(projection)))
        projection = F.pad(projection, (0, 0, 0, missing)) if missing else projection
        out_weight = halved(out_weight, x.dtype)
        columns = F.linear(u.flatten(1, 2), projection.flatten(0, 1)).unflatten(-1, projection.shape[:2])
        call = _scan_call(u.flatten(1, 2), columns, decays_of(of_scan[0]), of_scan, options["out_dtype"])
        y, saved = _scan_forward(call._replace(merge=attention[0] is None), columns, keep)
        of_attention: Tensors = (None, None)
        if attention[0] is not None:
            how = dict(eps=options["attention_eps"])
            (y,), (routes, _, sums, *_) = routes_cuda.ROUTE_ATTENTION.forward((y, None, *attention), how, keep)
            of_attention = routes, sums
        (n,), _ = rows_cuda.NORM.forward((y, None, norm_weight, norm_bias), _out_norm(x, options), keep)
        if z is not None:
            (n,), _ = rows_cuda.GATED.forward((n, z.flatten(1, 2)), {}, keep)
        out = F.linear(n, out_weight)
    kept = (xz, u, columns, y, *of_attention, *saved, projection, out_weight, *tensors[1:])
    return (out.unflatten(1, x.shape[1:3]),), kept


def _out_norm(x: Tensor, options: Options) -> Options:
    return dict(eps=options["eps"], rms=False, out_dtype=x.dtype, stream=False)


def _map_backward(kept: Tensors, options: Options, grads: Tensors) -> Tensors:
    (dout,), (xz, u, columns, y, routes, sums, A, states, dt_weight, projection, out_weight, *parameters) = grads, kept
    weight, bias, given, *middle, norm_weight, norm_bias, _ = parameters
    of_scan, attention = tuple(middle[:5]), middle[5:]
    assert given is not None and A is not None
    assert dout is not None and xz is not None and u is not None and columns is not None and y is not None
    assert projection is not None and out_weight is not None
    with without_autocast():
        x, z = _halves(xz, options)
        dxz = torch.empty_like(xz)
        dx, dz = _halves(dxz, options)
        dout = dout.flatten(0, 2).contiguous()
        dn = (dout @ out_weight).view(y.shape)
        n = torch.empty_like(y, dtype=x.dtype)
        how, of_norm = _out_norm(x, options), (y, norm_weight, norm_bias, None)
        if z is None or dz is None:
            dy, _, dnorm = rows_cuda.norm_parts(of_norm, how, (dn,), again=n)
        else:
            (normed,), _ = rows_cuda.NORM.forward((y, None, norm_weight, norm_bias), how, False)
            dn = rows_cuda.gate_backward(normed, z.flatten(1, 2), dn, dz.flatten(1, 2), again=n)
            del normed
            dy, _, dnorm = rows_cuda.norm_parts(of_norm, how, (dn,))
        dout_weight = _product_of_sums(dout, n.flatten(0, 1))
        del n, dn
        dattention: Tensors = (None,) * 6
        if routes is not None:
            of_attention = (routes, None, sums, *attention)
            found, _, *of_means = routes_cuda.attention_backward(
                of_attention, dict(eps=options["attention_eps"]), (dy,)
            )
            assert found is not None
            dy, dattention = found, tuple(of_means)
        call = _scan_call(u.flatten(1, 2), columns, A, of_scan, options["out_dtype"])
        call = call._replace(merge=routes is None)
        du, dcolumns, dscan = _scan_backward(call, columns, (A, states, dt_weight), dy)
        du, dcolumns = du.flatten(0, 1), dcolumns.flatten(2).flatten(0, 1)
        du.addmm_(dcolumns, projection.flatten(0, 1))
        dprojection = _product_of_sums(dcolumns, u.flatten(0, 2)).view(projection.shape)[:, : given.shape[1]]
        _, dconv = rows_cuda.map_parts((x, weight, bias), {}, (du.view(x.shape),), dx)
        return dxz, *finished((*dconv, dprojection, *dscan, *dattention, *dnorm, dout_weight), parameters)


SCAN_MAP = Kernels(_refuses_map, _map_forward, _map_backward)


# Vim's.


def _refuses_both_ways(tensors: Tensors, options: Options) -> bool:
    xz, weight, bias = tensors[:3]
    assert xz is not None
    if _refuses(tensors, (3, 9)) or xz.dim() != 3:
        return True
    x, z = xz.chunk(2, -1)
    return rows_cuda.CONV_BOTH_WAYS.refuses((x, weight, bias), {}) or rows_cuda.GATED.refuses((x, z), {})


def _both_ways_forward(tensors: Tensors, options: Options, keep: bool) -> tuple[tuple[Tensor, ...], Tensors]:
    xz, weight, bias, projection, *of_scan, out_weight = tensors
    assert xz is not None and projection is not None and out_weight is not None
    with without_autocast():
        x, z = xz.chunk(2, -1)
        (u,), _ = rows_cuda.CONV_BOTH_WAYS.forward((x, weight, bias), {}, keep)
        projection, out_weight = filled_up(projection, xz.dtype, of_scan[2]), halved(out_weight, xz.dtype)
        columns = columns_of_routes(u, projection)
        call = _scan_call(u, columns, decays_of(of_scan[0]), tuple(of_scan), None, WORD)
        shares, saved = _scan_forward(call._replace(merge=False), columns, keep)
        g, y = rows_cuda.gated_sum(shares, z, keep, options["scale"])
        out = F.linear(g, out_weight)
    return (out,), (xz, columns, y, *saved, projection, out_weight, *tensors[1:])


def _by_route(t: Tensor) -> Tensor:
    """(B, L, K, D) -> a view (K, B L, D)."""
    return t.flatten(0, 1).transpose(0, 1)


def _each_route(x: Tensor, matrices: Tensor) -> Tensor:
    """(B, L, K, I) and (K, I, J) -> (B, L, K, J), each route by its own matrix."""
    y = x.new_empty((*x.shape[:3], matrices.shape[2]))
    torch.bmm(_by_route(x), matrices, out=_by_route(y))
    return y


def _sums_of_routes(left: Tensor, right: Tensor) -> Tensor:
    """(B, L, K, I) and (B, L, K, J) -> a view (K, I, J), sums over tokens of each route's own products.

    Of the product of all routes with all only the diagonal is wanted; it is faster than one product a route.
    """
    crossed = _product_of_sums(left.flatten(2).flatten(0, 1), right.flatten(2).flatten(0, 1))
    return crossed.view(*left.shape[2:], *right.shape[2:]).diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def columns_of_routes(u: Tensor, projection: Tensor) -> Tensor:
    """(B, L, K, D) and (K, C, D) -> (B, L, K, C), each route by its own projection."""
    return _each_route(u, projection.transpose(1, 2))


def columns_backward(
    u: Tensor, du: Tensor, dcolumns: Tensor, projection: Tensor, given: Tensor, call: ScanCall
) -> Summed:
    """Adds to du, the gradient of u, what comes through the columns; returns the gradient of the given projection."""
    _by_route(du).baddbmm_(_by_route(dcolumns), projection)
    found, first, rank = _sums_of_routes(dcolumns, u), _first(call.rank, WORD), call.rank
    if first == rank:
        return Parts(found[:, : given.shape[1]].unsqueeze(0))
    return torch.cat((found[:, :rank], found[:, first : first + given.shape[1] - rank]), 1)


def _scaled_product(left: Tensor, right: Tensor, scale: float) -> Tensor:
    return left @ right if scale == 1.0 else torch.addmm(right.new_empty(1), left, right, beta=0, alpha=scale)


def _both_ways_backward(kept: Tensors, options: Options, grads: Tensors) -> Tensors:
    xz, *behind = kept
    assert xz is not None
    dxz, found = _behind_backward(xz, behind, options, grads[0])
    return dxz, *finished(found, behind[_KEPT:])


def _behind_backward(
    xz: Tensor, kept: Sequence[Tensor | None], options: Options, dout: Tensor | None
) -> tuple[Tensor, list[Summed]]:
    """Gradients of x and z, and of all parameters behind them."""
    x, z = xz.chunk(2, -1)
    columns, y, A, states, dt_weight, projection, out_weight, *parameters = kept
    weight, bias, given, *of_scan, _ = parameters
    assert given is not None and A is not None
    assert dout is not None and columns is not None and y is not None
    assert projection is not None and out_weight is not None
    scale = options["scale"]
    with without_autocast():
        dxz = y.new_empty((*y.shape[:2], 2 * y.shape[2]))
        dx, dz = dxz.chunk(2, -1)
        dout = dout.flatten(0, 1).contiguous()
        dg = _scaled_product(dout, out_weight, scale).view(y.shape)
        g = torch.empty_like(dg)
        dy = rows_cuda.gate_backward(y, z, dg, dz, again=g, scale=scale)
        dout_weight = _product_of_sums(dout, g.flatten(0, 1))
        del g, dg
        (u,), of_conv = rows_cuda.CONV_BOTH_WAYS.forward((x, weight, bias), {}, True)
        call = _scan_call(u, columns, A, tuple(of_scan), None, WORD)
        du, dcolumns, dscan = _scan_backward(call, columns, (A, states, dt_weight), dy, WORD)
        dprojection = columns_backward(u, du, dcolumns, projection, given, call)
        _, dconv = rows_cuda.conv_parts(of_conv, {}, (du,), dx)
    return dxz, [*dconv, dprojection, *dscan, dout_weight]


_KEPT = 7  # of what is kept beside x and z, before the parameters


SCAN_BOTH_WAYS = Kernels(_refuses_both_ways, _both_ways_forward, _both_ways_backward)


def _refuses_norm_both_ways(tensors: Tensors, options: Options) -> bool:
    x, weight = tensors[0], tensors[4]
    assert x is not None and weight is not None
    if _refuses_norm(tensors[:5], options) or x.dim() != 3:
        return True
    xz = torch.empty(1, 1, len(weight), dtype=_product_type(x), device=x.device)
    return _refuses_both_ways((xz, *tensors[5:]), options)


def _norm_both_ways_forward(tensors: Tensors, options: Options, keep: bool) -> tuple[tuple[Tensor, ...], Tensors]:
    x, _, _, _, weight, *behind = tensors
    assert x is not None and weight is not None
    (n, total), of_norm = rows_cuda.NORM.forward(tensors[:4], _norm(x, options), keep)
    with without_autocast():
        matrix = halved(weight, n.dtype)
        xz = F.linear(n, matrix)
    (out,), kept = _both_ways_forward((xz, *behind), options, keep)
    return (out, total), (matrix, weight, *of_norm, *kept[1:])


def _norm_both_ways_backward(kept: Tensors, options: Options, grads: Tensors) -> Tensors:
    (dout, dtotal), (matrix, weight, *of_norm), behind = grads, kept[:6], kept[6:]
    x, *of_its_norm = of_norm[:3]
    assert matrix is not None and x is not None
    if dout is None:
        return (*_of_stream(dtotal, of_norm), *(None,) * (3 + len(behind) - _KEPT))
    with without_autocast():
        how = dict(eps=options["eps"], rms=options["rms"], out_dtype=matrix.dtype, stream=True)
        (n, _), _ = rows_cuda.NORM.forward((x, None, *of_its_norm), how, False)
        dxz, found = _behind_backward(F.linear(n, matrix), behind, options, dout)
        dxz = dxz.flatten(0, 1)
        dweight = _product_of_sums(dxz, n.flatten(0, 1))
        del n
        dx, dbranch, dnorm = rows_cuda.norm_parts(tuple(of_norm), how, ((dxz @ matrix).view(x.shape), dtotal))
        return dx, dbranch, *finished((*dnorm, dweight, *found), (*of_norm[1:3], weight, *behind[_KEPT:]))


NORM_BOTH_WAYS = Kernels(_refuses_norm_both_ways, _norm_both_ways_forward, _norm_both_ways_backward)
