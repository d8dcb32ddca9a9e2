"""The CUDA C++ kernels beside the scans, which go through rows of channels: norms, Vim's convolution, its gate."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vision_mamba.ops.backends import gpu, nvrtc
from vision_mamba.ops.backends.cuda_kernels import TYPES, vector
from vision_mamba.ops.backends.launch import Launch, on, whole
from vision_mamba.ops.backends.sums_cuda import Parts, finished
from vision_mamba.ops.fused import Kernels, Tensors

MAX_WIDTH = 1024  # channels of a norm's row, which a group of lanes holds in registers
TAPS = 4  # of the convolution; fewer are filled up with zeros
_HEADER = "rows.cuh"
MAP_STRIPS = {True: 2, False: 2}  # rows of a map that a thread of the forward and backward convolution takes together
MAP_RUNS = {True: 4, False: 2}  # channels of such a thread
MAP_BLOCKS = {True: 4, False: 3}  # of theirs that a multiprocessor holds
AHEAD = {True: True, False: True}  # whether the forward and backward convolution reads its next tokens early
CONV_ROOM = {True: 1536, False: 256}  # threads of theirs that a multiprocessor should have at least
_RING = 7  # tokens that a thread of the convolution takes together

Macros = dict[str, Any]


def _kernel(name: str, types: dict[str, torch.dtype], macros: Macros) -> nvrtc.Specialisation:
    """Types of x, of what comes beside it, and of y."""
    named = {key: TYPES[value] for key, value in types.items()}
    named = dict(X_TYPE="Float", DT_TYPE="Float", B_TYPE="Float", C_TYPE="Float", Y_TYPE="Float") | named
    values = {key: str(value).lower() if isinstance(value, bool) else str(value) for key, value in macros.items()}
    return nvrtc.Specialisation(name, (*named.items(), *values.items()))


def norm(
    forward: bool,
    x: torch.dtype,
    branch: torch.dtype | None,
    y: torch.dtype,
    width: int,
    rms: bool,
    eps: float,
    run: int,
    again: bool = False,
    shift: bool = False,
) -> nvrtc.Specialisation:
    """A norm over rows of `width` channels; a backward pass writes the branch's gradient if its type is not x's, and
    the norm's result `again` if that is wanted. Rows may be shifted first, all alike."""
    macros = dict(WIDTH=width, RUN=run, LANES=norm_lanes(width, run), RMS=rms, BRANCH=branch is not None, AGAIN=again)
    macros |= dict(SHIFT=shift)
    types = dict(X_TYPE=x, B_TYPE=branch or x, Y_TYPE=y)
    return _kernel("norm_forward" if forward else "norm_backward", types, macros | dict(EPSILON=f"{float(eps)!r}f"))


def norm_lanes(width: int, run: int) -> int:
    """Lanes of a row: a power of two that leaves each at least three runs, if there are as many."""
    runs = (width + run - 1) // run
    return min(32, 1 << max(0, (runs // 3).bit_length() - 1))


def convolution(
    forward: bool,
    x: torch.dtype,
    run: int,
    steps: tuple[int, int, int],
    ways: int = 2,
    before: int = TAPS - 1,
    routes: bool = False,
) -> nvrtc.Specialisation:
    """Steps: channels, and how far tokens of x and of its gradient lie apart."""
    macros = dict(RUN=run, WAYS=ways, BEFORE=before, ROUTES=routes, AHEAD=AHEAD[forward])
    macros |= dict(zip(("CHANNELS", "X_STEP", "DX_STEP"), steps, strict=True))
    return _kernel("conv_forward" if forward else "conv_backward", dict(X_TYPE=x), macros)


def gate(
    forward: bool, y: torch.dtype, z: torch.dtype, out: torch.dtype, run: int, shares: int = 1, scale: float = 1.0
) -> nvrtc.Specialisation:
    macros = dict(RUN=run, BACKWARD=not forward, SHARES=shares, SCALE=f"{float(scale)!r}f")
    return _kernel("gate", dict(X_TYPE=y, B_TYPE=z, Y_TYPE=out), macros)


def gelu(h: torch.dtype, run: int) -> nvrtc.Specialisation:
    return _kernel("gelu_forward", dict(X_TYPE=h), dict(RUN=run))


def gelu_gradients(h: torch.dtype, dy: torch.dtype, run: int, sums: bool = False) -> nvrtc.Specialisation:
    return _kernel("gelu_backward", dict(X_TYPE=h, Y_TYPE=dy), dict(RUN=run, SUMS=sums))


def map_convolution(forward: bool, x: torch.dtype, run: int, shortcut: bool = False) -> nvrtc.Specialisation:
    macros = dict(RUN=run, STRIP=MAP_STRIPS[forward], MIN_BLOCKS=MAP_BLOCKS[forward], SHORTCUT=shortcut)
    return _kernel("map_forward" if forward else "map_backward", dict(X_TYPE=x), macros)


_HALF, _FULL = torch.bfloat16, torch.float32

#: What the published models run under autocast: compiled for every architecture by the tests.
SHIPPED = (
    *(norm(forward, _FULL, None, _HALF, 96, False, 1e-5, 4) for forward in (True, False)),
    *(norm(forward, _FULL, _HALF, _HALF, 768, False, 1e-5, 4) for forward in (True, False)),
    *(norm(forward, _FULL, None, _HALF, 384, True, 1e-5, 4) for forward in (True, False)),
    *(norm(forward, _HALF, None, _FULL, 768, False, 1e-5, 4, False, True) for forward in (True, False)),
    *(convolution(forward, _HALF, 2, (768, 1536, 1536), ways) for forward in (True, False) for ways in (1, 2)),
    *(gate(forward, _HALF, _HALF, _HALF, 8) for forward in (True, False)),
    gate(True, _HALF, _HALF, _HALF, 8, 2),
    *(map_convolution(forward, _HALF, 2, shortcut) for forward in (True, False) for shortcut in (True, False)),
    gelu(_HALF, 8),
    *(gelu_gradients(_HALF, _HALF, 8, sums) for sums in (True, False)),
)


@functools.lru_cache(1024)
def _launch(
    make: Callable[..., nvrtc.Specialisation],
    how: tuple[Any, ...],
    device: int,
    grid: int,
    fields: tuple[tuple[str, int], ...],
) -> Launch:
    return Launch.of(make(*how), device, grid, _HEADER, dict(fields))


def _start(
    make: Callable[..., nvrtc.Specialisation],
    how: tuple[Any, ...],
    grid: int,
    fields: dict[str, int],
    **addresses: Tensor | None,
) -> None:
    """Run the kernel that `make` names by `how`, which is looked up by these alone: its macros take longer to write."""
    device = addresses["x"].device.index  # type: ignore[union-attr]
    with on(device):
        _launch(make, how, device, grid, tuple(fields.items()))(device, **addresses)


def _run(most: int, *tensors: Tensor | None) -> int:
    """The longest run of neighbouring channels up to `most` that all tensors can be read and written in."""
    run = most
    while run > 1 and not vector(run, *tensors):
        run //= 2
    return run


def available() -> bool:
    """Whether the current device runs these kernels."""
    return gpu.unavailable(torch.device("cuda", torch.cuda.current_device())) is None


def _unfit(*tensors: Tensor | None) -> bool:
    """Whether kernels cannot take these: no NVRTC, nothing to do, or float64."""
    first = tensors[0]
    assert first is not None
    if gpu.unavailable(first.device) is not None or first.numel() == 0:
        return True
    return any(t is not None and t.dtype not in TYPES for t in tensors)


def _whole(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else whole(tensor)


# Norms.


def _refuses_norm(tensors: Tensors, options: dict[str, Any]) -> bool:
    x, branch, weight, bias, shift = (*tensors, None)[:5]
    assert x is not None
    if any(t is not None and t.shape != x.shape[-1:] for t in (weight, bias, shift)):
        return True  # plain torch says what is wrong
    if _norm_type(x, options) not in TYPES or _unfit(x, branch, weight, bias, shift):
        return True
    if not x.is_contiguous() or x.shape[-1] > MAX_WIDTH:
        return True
    if branch is None:
        return False
    return branch.shape != x.shape or torch.promote_types(x.dtype, branch.dtype) != x.dtype


def _norm_type(x: Tensor, options: dict[str, Any]) -> torch.dtype:
    if options["out_dtype"] is not None:
        return options["out_dtype"]
    return torch.float32 if torch.is_autocast_enabled("cuda") else x.dtype


def _norm_forward(tensors: Tensors, options: dict[str, Any], keep: bool = True) -> tuple[tuple[Tensor, ...], Tensors]:
    x, branch, weight, bias, shift = (*tensors, None)[:5]
    assert x is not None and weight is not None
    width = x.shape[-1]
    rows = x.numel() // width
    branch = None if branch is None else branch.contiguous()
    y = torch.empty_like(x, dtype=_norm_type(x, options))
    total = None if branch is None else torch.empty_like(x)
    run = _run(4, x, branch, y)
    kind = None if branch is None else branch.dtype
    how = (True, x.dtype, kind, y.dtype, width, options["rms"], options["eps"], run, False, shift is not None)
    per_block = 128 // norm_lanes(width, run)
    _start(
        norm, how, (rows + per_block - 1) // per_block, dict(batch=rows), x=x, branch=branch, weight=_whole(weight),
        bias=_whole(bias), shift=_whole(shift), y=y, total=total,
    )  # fmt: skip
    if branch is None or total is None:
        return (y, x) if options["stream"] else (y,), (x, weight, bias, None, *tensors[4:])
    return (y, total), (total, weight, bias, branch.new_empty(0))  # of the branch, backward needs its type


def norm_backward(kept: Tensors, options: dict[str, Any], grads: Tensors, again: Tensor | None = None) -> Tensors:
    """Writes the norm's result once more to `again`, of the type of its gradient, if that is given."""
    dx, of_branch, parts = norm_parts(kept, options, grads, again)
    return dx, of_branch, *finished(parts, (kept[1], kept[2], *kept[4:]))


def norm_parts(
    kept: Tensors, options: dict[str, Any], grads: Tensors, again: Tensor | None = None
) -> tuple[Tensor, Tensor | None, list[Parts | None]]:
    """The same with gradients of parameters that are still to be added up."""
    x, weight, bias, branch, shift = (*kept, None)[:5]
    assert x is not None and weight is not None
    dy = None if grads[0] is None else grads[0].contiguous()
    dtotal = None if len(grads) == 1 or grads[1] is None else grads[1].contiguous()
    width = x.shape[-1]
    rows = x.numel() // width
    dx = torch.empty_like(x)
    dbranch = None if branch is None or branch.dtype == x.dtype else torch.empty_like(x, dtype=branch.dtype)
    run = _run(4, x, dy, dtotal)
    kind = None if dbranch is None else dbranch.dtype
    y = _norm_type(x, options) if dy is None else dy.dtype
    how = (False, x.dtype, kind, y, width, options["rms"], options["eps"], run, again is not None, shift is not None)
    per_block = 256 // norm_lanes(width, run)
    blocks = min(2 * gpu.multiprocessors(x.device.index), (rows + per_block - 1) // per_block)
    parts = torch.empty((blocks, 2 + (shift is not None), width), dtype=torch.float32, device=x.device)
    _start(
        norm, how, blocks, dict(batch=rows), x=x, weight=_whole(weight), bias=_whole(bias), shift=_whole(shift), dy=dy,
        dtotal=dtotal, dx=dx, dbranch=dbranch, y=again, parts=parts,
    )  # fmt: skip
    of_weight, of_bias, *of_shift = map(Parts, parts.unbind(1))
    of_branch = None if branch is None else dx if dbranch is None else dbranch
    return dx, of_branch, [of_weight, None if bias is None else of_bias, *of_shift]


# The convolution.


def _refuses_conv(tensors: Tensors, options: dict[str, Any]) -> bool:
    x, weight, bias = tensors
    assert x is not None and weight is not None and bias is not None
    if x.dim() != 3 or weight.shape[:2] != (2, x.shape[2]) or bias.shape != (2, x.shape[2]):
        return True  # plain torch says what is wrong
    return weight.dim() != 3 or _refuses_taps(x, weight, bias)


def _refuses_taps(x: Tensor, weight: Tensor, bias: Tensor) -> bool:
    if torch.is_autocast_enabled("cuda") and x.dtype != torch.get_autocast_dtype("cuda"):
        return True  # torch's convolution casts, and so does its result
    return _unfit(x, weight, bias) or weight.shape[2] > TAPS or x.stride(2) != 1


def _filled(weight: Tensor) -> Tensor:
    missing = TAPS - weight.shape[2]
    return whole(F.pad(weight, (missing, 0)) if missing else weight)


def chunks(length: int, others: int, room: int) -> tuple[int, int]:
    """Chunks that a sequence is taken in, and tokens of one: long ones share few tokens, where threads are many."""
    steps = 56
    while steps > _RING and others * ((length + steps - 1) // steps) < room:
        steps //= 2
    count = (length + steps - 1) // steps
    return count, (length + count - 1) // count


def _conv_sizes(x: Tensor, run: int, reach: int, routes: int = 1) -> tuple[int, dict[str, int]]:
    batch, length, channels = x.shape
    threads = batch * routes * (channels // run)
    count = -(-CONV_ROOM[reach == 0] * gpu.multiprocessors(x.device.index) // threads)
    steps = max(1, -(-length // count))
    steps = -(-(steps + reach) // _RING) * _RING - reach  # what is taken seven at a time anyhow
    count = (length + steps - 1) // steps
    fields = dict(batch=batch, tokens=length, channels=channels, chunks=count, chunk_steps=steps)
    return (threads * count + 127) // 128, fields | dict(routes=routes, x_b=x.stride(0), x_l=x.stride(1))


def _conv_forward(tensors: Tensors, options: dict[str, Any], keep: bool = True) -> tuple[tuple[Tensor, ...], Tensors]:
    x, weight, bias = tensors
    assert x is not None and weight is not None and bias is not None
    ways = weight.shape[0]
    y = x.new_empty((x.shape[0], x.shape[1], ways, x.shape[2]))
    run = _run(2, x)
    grid, fields = _conv_sizes(x, run, 0)
    how = (True, x.dtype, run, (x.shape[2], x.stride(1), 0), ways, _before(weight, options))
    _start(convolution, how, grid, fields, x=x, weight=_filled(weight), bias=_whole(bias), y=y)
    return (y,), (x, weight, bias)


def _before(weight: Tensor, options: dict[str, Any]) -> int:
    """Taps before the token, of which `_filled` adds some."""
    taps: int = weight.shape[2]
    return TAPS - taps + int(options.get("before", taps - 1))


def conv_backward(kept: Tensors, options: dict[str, Any], grads: Tensors, dx: Tensor | None = None) -> Tensors:
    """The gradient of x goes to `dx`, which may be a part of rows, if that is given."""
    dx, parts = conv_parts(kept, options, grads, dx)
    return dx, *finished(parts, kept[1:])


def conv_parts(
    kept: Tensors, options: dict[str, Any], grads: Tensors, dx: Tensor | None = None
) -> tuple[Tensor, list[Parts | None]]:
    """The same with gradients of parameters that are still to be added up."""
    (dy,), (x, weight, bias) = grads, kept
    assert x is not None and weight is not None and bias is not None and dy is not None
    ways = weight.shape[0]
    dy = dy.to(x.dtype).contiguous()
    run = _run(2, x, dy, dx)
    grid, fields = _conv_sizes(x, run, 6)
    if dx is None:
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    fields |= dict(dx_b=dx.stride(0), dx_l=dx.stride(1))
    parts = torch.empty((fields["batch"] * fields["chunks"], ways, 5, x.shape[2]), dtype=torch.float32, device=x.device)
    how = (False, x.dtype, run, (x.shape[2], x.stride(1), dx.stride(1)), ways, _before(weight, options))
    _start(
        convolution, how, grid, fields, x=x, weight=_filled(weight), bias=_whole(bias), dy=dy, dx=dx,
        parts=parts,
    )  # fmt: skip
    of_weight = parts[:, :, TAPS - weight.shape[2] : TAPS].transpose(2, 3)
    return dx, [Parts(of_weight), Parts(parts[:, :, TAPS])]


def _one_way(weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Taps (D, 1, W) and bias (D,) of torch's convolution as those of one way."""
    return None if weight is None else weight.transpose(0, 1), None if bias is None else bias.unsqueeze(0)


def _refuses_along(tensors: Tensors, options: dict[str, Any]) -> bool:
    x, weight, bias = tensors
    assert x is not None and weight is not None
    if bias is None or weight.dim() != 3 or weight.shape[1] != 1 or bias.dim() != 1:
        return True
    if x.dim() != 3 or weight.shape[0] != x.shape[2] or not 0 <= options["before"] < weight.shape[2]:
        return True  # plain torch says what is wrong
    return _refuses_taps(x, weight, bias)


def _along_forward(tensors: Tensors, options: dict[str, Any], keep: bool = True) -> tuple[tuple[Tensor, ...], Tensors]:
    x, weight, bias = tensors
    (y,), _ = _conv_forward((x, *_one_way(weight, bias)), options)
    return (y.squeeze(2),), tensors


def _along_backward(kept: Tensors, options: dict[str, Any], grads: Tensors) -> Tensors:
    (dy,), (x, weight, bias) = grads, kept
    assert dy is not None
    dx, dweight, dbias = conv_backward((x, *_one_way(weight, bias)), options, (dy.unsqueeze(2),))
    assert dweight is not None and dbias is not None
    return dx, dweight.transpose(0, 1), dbias.squeeze(0)


# The convolution over a map.


def _refuses_map(tensors: Tensors, options: dict[str, Any]) -> bool:
    x, weight, bias = tensors
    assert x is not None and weight is not None
    if x.dim() != 4 or weight.shape != (x.shape[3], 1, 3, 3) or not _in_map(x):
        return True
    if bias is not None and bias.shape != x.shape[3:]:
        return True  # plain torch says what is wrong
    if torch.is_autocast_enabled("cuda") and x.dtype != torch.get_autocast_dtype("cuda"):
        return True  # torch's convolution casts, and so does its result
    return _unfit(*tensors) or x.shape[1] * x.stride(1) >= 2**31


def _in_map(x: Tensor) -> bool:
    """Whether all tokens of a map lie equally far apart, row after row: whole ones, or a part of their channels."""
    return x.stride(3) == 1 and x.stride(1) == x.shape[2] * x.stride(2)


def _map_sizes(x: Tensor, run: int, strip: int) -> tuple[int, dict[str, int]]:
    """Pieces that all maps are taken in, and fields that say so."""
    batch, height, width, channels = x.shape
    strips = (height + strip - 1) // strip
    steps = width
    room = 512 * gpu.multiprocessors(x.device.index)
    while steps > 8 and batch * strips * (channels // run) * ((width + steps - 1) // steps) < room:
        steps = (steps + 1) // 2
    count = (width + steps - 1) // steps
    fields = dict(batch=batch, tokens=height * width, channels=channels, height=height, width=width)
    return batch * strips * count, fields | dict(chunks=count, chunk_steps=steps, x_b=x.stride(0), x_l=x.stride(2))


def _map_forward(tensors: Tensors, options: dict[str, Any], keep: bool = True) -> tuple[tuple[Tensor, ...], Tensors]:
    x, weight, bias = tensors
    assert x is not None and weight is not None
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    run = _run(MAP_RUNS[True], x)
    pieces, fields = _map_sizes(x, run, MAP_STRIPS[True])
    grid = (pieces * (x.shape[3] // run) + 127) // 128
    how = (True, x.dtype, run, options.get("shortcut", False))
    _start(map_convolution, how, grid, fields, x=x, weight=_whole(weight), bias=_whole(bias), y=y)
    return (y,), (x, weight, bias)


def map_backward(kept: Tensors, options: dict[str, Any], grads: Tensors, dx: Tensor | None = None) -> Tensors:
    """The gradient of x goes to `dx`, which may be a part of the channels of a map, if that is given."""
    dx, parts = map_parts(kept, options, grads, dx)
    return dx, *finished(parts, kept[1:])


def map_parts(
    kept: Tensors, options: dict[str, Any], grads: Tensors, dx: Tensor | None = None
) -> tuple[Tensor, list[Parts | None]]:
    """The same with gradients of parameters that are still to be added up."""
    (dy,), (x, weight, bias) = grads, kept
    assert x is not None and weight is not None and dy is not None
    dy = dy.to(x.dtype).contiguous()
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if dx is None else dx
    run = _run(MAP_RUNS[False], x, dy, dx)
    pieces, fields = _map_sizes(x, run, MAP_STRIPS[False])
    channels = x.shape[3]
    fields["workers"] = workers = min(
        pieces, max(1, 128 * MAP_BLOCKS[False] * gpu.multiprocessors(x.device.index) * run // channels)
    )
    fields |= dict(dx_b=dx.stride(0), dx_l=dx.stride(2))
    parts = torch.empty((workers, 10, channels), dtype=torch.float32, device=x.device)
    grid = (workers * (channels // run) + 127) // 128
    how = (False, x.dtype, run, options.get("shortcut", False))
    _start(
        map_convolution, how, grid, fields, x=x, weight=_whole(weight), bias=_whole(bias), dy=dy, dx=dx, parts=parts,
    )  # fmt: skip
    of_weight = parts[:, :9].transpose(1, 2).unflatten(2, (3, 3)).unsqueeze(2)
    return dx, [Parts(of_weight), None if bias is None else Parts(parts[:, 9])]


# GELU.


def gelu_forward(h: Tensor) -> Tensor:
    """gelu(h) of h in one piece. Of float32 it is torch's, which has all digits."""
    if h.dtype == torch.float32:
        return F.gelu(h)
    y, count, run = torch.empty_like(h), h.numel(), _run(16 // h.element_size(), h)
    _start(gelu, (h.dtype, run), -(-count // (512 * run)), dict(batch=count), x=h, y=y)
    return y


def _gelu_start(h: Tensor, dy: Tensor | None, a: Tensor | None, dh: Tensor | None) -> Parts:
    """Sums over rows of what the kernel computes, which are still to be added up."""
    rows, channels = h.shape
    run = _run(16 // h.element_size(), h, dy)
    tiles = (channels // run + 15) // 16
    blocks = max(1, min(4 * gpu.multiprocessors(h.device.index) // tiles, (rows + 31) // 32))
    parts = torch.empty((blocks, channels), dtype=torch.float32, device=h.device)
    how = (h.dtype, h.dtype if dy is None else dy.dtype, run, dy is None)
    _start(
        gelu_gradients, how, tiles * blocks, dict(batch=rows, channels=channels), x=h, dy=dy, y=a, dx=dh, parts=parts
    )
    return Parts(parts)


def gelu_backward(h: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, Parts]:
    """From h (M, C) and the gradient of gelu(h): gelu(h) again, the gradient of h, parts of its sum over M."""
    a, dh = torch.empty_like(dy), torch.empty_like(h)
    return a, dh, _gelu_start(h, dy, a, dh)


def row_parts(x: Tensor) -> Parts:
    """Parts of the sum of x (M, C) over M."""
    return _gelu_start(x, None, None, None)


# The gate.


def _refuses_gate(tensors: Tensors, options: dict[str, Any]) -> bool:
    y, z = tensors
    assert y is not None and z is not None
    if options.get("out_dtype") not in (None, *TYPES):
        return True
    return _unfit(y, z) or y.shape != z.shape or y.dim() != 3 or not (_in_rows(y) and _in_rows(z))


def _in_rows(t: Tensor) -> bool:
    """Whether all rows of channels lie equally far apart."""
    return t.stride(2) == 1 and t.stride(0) == t.shape[1] * t.stride(1)


def _gate_sizes(y: Tensor, z: Tensor, run: int) -> tuple[int, dict[str, int]]:
    fields = dict(batch=y.shape[0] * y.shape[1], channels=y.shape[2], x_l=y.stride(1), z_l=z.stride(1))
    return (y.numel() // run + 255) // 256, fields


def _gate_forward(tensors: Tensors, options: dict[str, Any], keep: bool = True) -> tuple[tuple[Tensor, ...], Tensors]:
    y, z = tensors
    assert y is not None and z is not None
    out = y.new_empty(y.shape, dtype=options.get("out_dtype") or torch.promote_types(y.dtype, z.dtype))
    run = _run(8, y, z)
    grid, fields = _gate_sizes(y, z, run)
    _start(gate, (True, y.dtype, z.dtype, out.dtype, run), grid, fields, x=y, z=z, y=out)
    return (out,), (y, z)


def gated_sum(shares: Tensor, z: Tensor, keep: bool, scale: float = 1.0) -> tuple[Tensor, Tensor | None]:
    """Of shares (B, L, K, D) of y: scale y silu(z), and y if it is to be kept."""
    y = shares.select(2, 0)
    total = torch.empty_like(y, memory_format=torch.contiguous_format) if keep else None
    out = y.new_empty(y.shape, dtype=torch.promote_types(y.dtype, z.dtype))
    run = _run(8, shares, z)
    grid, fields = _gate_sizes(y, z, run)
    how = (True, y.dtype, z.dtype, out.dtype, run, shares.shape[2], scale)
    _start(gate, how, grid, fields, x=shares, z=z, y=out, total=total)
    return out, total


def _gate_backward(kept: Tensors, options: dict[str, Any], grads: Tensors) -> Tensors:
    (dout,), (y, z) = grads, kept
    assert y is not None and z is not None and dout is not None
    dz = torch.empty_like(z, memory_format=torch.contiguous_format)
    return gate_backward(y, z, dout.contiguous(), dz), dz


def gate_backward(
    y: Tensor, z: Tensor, dout: Tensor, dz: Tensor, again: Tensor | None = None, scale: float = 1.0
) -> Tensor:
    """The gradient of y, from that of y silu(z), which goes once more, times scale, to `again`; the gradient of z
    goes to `dz`, which may be a part of rows."""
    dy = torch.empty_like(y, memory_format=torch.contiguous_format)
    run = _run(8, y, z, dout, dz)
    grid, fields = _gate_sizes(y, z, run)
    fields["dz_l"] = dz.stride(1)
    how = (False, y.dtype, z.dtype, dout.dtype, run, 1, scale)
    _start(gate, how, grid, fields, x=y, z=z, dy=dout, dx=dy, dz=dz, y=again)
    return dy


NORM = Kernels(_refuses_norm, _norm_forward, norm_backward)
CONV_BOTH_WAYS = Kernels(_refuses_conv, _conv_forward, conv_backward)
CONV_ALONG = Kernels(_refuses_along, _along_forward, _along_backward)
CONV_MAP = Kernels(_refuses_map, _map_forward, map_backward)
GATED = Kernels(_refuses_gate, _gate_forward, _gate_backward)
