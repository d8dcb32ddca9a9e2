"""What the chains of mixers_cuda and local_cuda give, without computing it: for compilers, which plan ahead with it.

Each function makes uninitialised tensors of the sizes, strides and types that its chain gives, in the same order, and
gives back as they are those that its chain gives back.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vision_mamba.ops.backends import mixers_cuda as chains
from vision_mamba.ops.call import ScanCall
from vision_mamba.ops.compiled import Options, Shapes, Tensors
from vision_mamba.ops.registry import scans


def _cast(weight: Tensor, dtype: torch.dtype, axis: int = -1, size: int | None = None) -> Tensor:
    """Of another type, and filled up along one axis."""
    if size is None or size == weight.shape[axis]:
        return weight if weight.dtype == dtype else torch.empty_like(weight, dtype=dtype)
    sizes = list(weight.shape)
    sizes[axis] = size
    return weight.new_empty(sizes, dtype=dtype)


def _up(size: int, step: int) -> int:
    return size + -size % step


def _stream(x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensors]:
    """x + branch, and what a norm of it keeps."""
    if branch is None:
        return x, (x, weight, bias, None)
    total = torch.empty_like(x)
    return total, (total, weight, bias, branch.new_empty(0))


def _like_stream(of_norm: Tensors) -> Tensors:
    """For the stream, the branch, and the norm's parameters."""
    total, weight, bias, branch = of_norm
    assert total is not None
    like = None if branch is None else _cast(total, branch.dtype)  # of one type they have one gradient
    return total, like, weight, bias


def _linear(tensors: Tensors, options: Options, half: torch.dtype) -> tuple[Tensors, Tensors]:
    x, branch, norm_weight, norm_bias, weight = tensors
    assert x is not None and norm_weight is not None and weight is not None
    total, of_norm = _stream(x, branch, norm_weight, norm_bias)
    matrix = _cast(weight, half, 0, _up(len(weight), options.get("step", 1)))
    return (x.new_empty((*x.shape[:-1], len(matrix)), dtype=half), total), (matrix, weight, *of_norm)


def _like_linear(kept: Tensors) -> Tensors:
    _, weight, *of_norm = kept
    return *_like_stream(of_norm), weight


NORM_LINEAR = Shapes(_linear, _like_linear)


def _mlp(tensors: Tensors, options: Options, half: torch.dtype) -> tuple[Tensors, Tensors]:
    x, branch, norm_weight, norm_bias, weight1, _, weight2, _ = tensors
    assert x is not None and norm_weight is not None and weight1 is not None and weight2 is not None
    total, of_norm = _stream(x, branch, norm_weight, norm_bias)
    h, y = (x.new_empty((*x.shape[:-1], len(weight)), dtype=half) for weight in (weight1, weight2))
    return (y, total), (h, _cast(weight1, half), _cast(weight2, half), *tensors[4:], *of_norm)


def _like_mlp(kept: Tensors) -> Tensors:
    return *_like_stream(kept[7:]), *kept[3:7]


NORM_MLP = Shapes(_mlp, _like_mlp)


def _of_scan(call: ScanCall) -> Tensors:
    """A, states, and the weight of step sizes that are multiplied out, which a scan's backward pass needs."""
    weight = None
    if chains._multiplies_out(call):
        assert call.dt_weight is not None
        weight = _cast(call.dt_weight, call.dt.dtype, 2, _up(call.rank, chains.WORD))
        call = call._replace(dt=call.dt.new_empty((*call.dt.shape[:3], call.channels)), dt_weight=None)
    return call.A, scans.choose(call, None).new_saved(call), weight


def _scan(
    u: Tensor, columns: Tensor, of_scan: Tensors, out_dtype: torch.dtype | None, merge: bool, word: int = 1
) -> Tensors:
    A = torch.empty_like(of_scan[0], dtype=torch.float32)  # type: ignore[arg-type]
    return _of_scan(chains._scan_call(u, columns, A, tuple(of_scan), out_dtype, word)._replace(merge=merge))


def _map(tensors: Tensors, options: Options, half: torch.dtype) -> tuple[Tensors, Tensors]:
    xz, _, _, given, *middle, _, _, out_weight = tensors
    assert xz is not None and given is not None and out_weight is not None
    of_scan, attention = middle[:5], middle[5:]
    batch, height, width, channels = xz.shape
    channels = channels // 2 if options["gate"] else channels
    projection = _cast(given, xz.dtype, 1, _up(given.shape[1], chains.WORD // math.gcd(chains.WORD, len(given))))
    u = xz.new_empty((batch, height, width, channels))
    columns = xz.new_empty((batch, height * width, *projection.shape[:2]))
    merge = attention[0] is None
    saved = _scan(u.flatten(1, 2), columns, of_scan, options["out_dtype"], merge)
    total = xz.new_empty((batch, height * width, channels), dtype=options["out_dtype"])
    routes = sums = None
    if not merge:
        routes = total.new_empty((batch, height * width, len(given), channels))
        sums = xz.new_empty((batch, len(given), channels), dtype=torch.float32)
    out = xz.new_empty((batch, height, width, len(out_weight)))
    kept = (xz, u, columns, total, routes, sums, *saved, projection, _cast(out_weight, xz.dtype), *tensors[1:])
    return (out,), kept


def _like_map(kept: Tensors) -> Tensors:
    return _without_table((kept[0], *kept[11:]))


def _without_table(tensors: Tensors) -> Tensors:
    return *tensors[:8], None, *tensors[9:]


SCAN_MAP = Shapes(_map, _like_map)


def _behind(xz: Tensor, tensors: Tensors) -> tuple[Tensor, Tensor, Tensor, Tensors, Tensors]:
    """Of what is behind x and z, where each route has its own columns: the result, the columns, results of the routes,
    what the scan keeps, weights."""
    weight, _, given, *of_scan = tensors[:8]
    out_weight = tensors[-1]
    assert weight is not None and given is not None and out_weight is not None
    rank = of_scan[2].shape[2]  # type: ignore[union-attr]
    width = _up(_up(rank, chains.WORD) + given.shape[1] - rank, chains.WORD)
    projection = _cast(given, xz.dtype, 1, width)
    u = xz.new_empty((*xz.shape[:2], *weight.shape[:2]))
    columns = xz.new_empty((*xz.shape[:2], *projection.shape[:2]))
    saved = _scan(u, columns, of_scan, None, False, chains.WORD)
    out = xz.new_empty((*xz.shape[:2], len(out_weight)))
    return out, columns, u, saved, (projection, _cast(out_weight, xz.dtype))


def _both_ways(tensors: Tensors, options: Options, half: torch.dtype) -> tuple[Tensors, Tensors]:
    xz, *others = tensors
    assert xz is not None
    out, columns, _, saved, weights = _behind(xz, others)
    y = xz.new_empty((*xz.shape[:2], xz.shape[2] // 2))
    return (out,), (xz, columns, y, *saved, *weights, *others)


def _like_both_ways(kept: Tensors) -> Tensors:
    return _without_table((kept[0], *kept[8:]))


SCAN_BOTH_WAYS = Shapes(_both_ways, _like_both_ways)


def _norm_both_ways(tensors: Tensors, options: Options, half: torch.dtype) -> tuple[Tensors, Tensors]:
    (xz, total), of_linear = _linear(tensors[:5], options, half)
    (out,), kept = _both_ways((xz, *tensors[5:]), options, half)
    return (out, total), (*of_linear, *kept[1:])


def _like_norm_both_ways(kept: Tensors) -> Tensors:
    return *_like_linear(kept[:6]), *_without_table((None, *kept[13:]))[1:]


NORM_BOTH_WAYS = Shapes(_norm_both_ways, _like_norm_both_ways)
