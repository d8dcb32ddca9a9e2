"""The scan on any GPU that Triton reaches: which tile a call takes, and the launches of its two passes."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import shutil
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vision_mamba.ops import contract
from vision_mamba.ops.call import GRADIENTS, ScanCall
from vision_mamba.ops.registry import Backend

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # kernels run in numpy, for tests on machines without a GPU
_DEVICES = ("cuda", "xpu")  # torch calls ROCm devices cuda too
_OLDEST = (7, 0)
_MAX_RANK = 256
_INT32 = 2**31
_MERGED = 1024  # sums of one program of `merge`


class Tile(NamedTuple):
    """What one program holds: `groups` channels for each of `lanes` lanes, steps read at once, and warps."""

    groups: int
    lanes: int
    steps: int
    warps: int = 1

    @property
    def channels(self) -> int:
        return self.groups * self.lanes


#: Tiles of the two passes by the states they have room for, padded to a power of two. Forward saves the states every
#: so many steps as a tile of the backward pass has.
FORWARD = {1: Tile(1, 32, 32), 4: Tile(1, 32, 16), 16: Tile(1, 16, 8), 64: Tile(1, 8, 8), 256: Tile(1, 8, 8, 4)}
BACKWARD = {1: Tile(1, 64, 4), 4: Tile(1, 32, 8), 16: Tile(1, 16, 4), 64: Tile(1, 8, 4, 2), 256: Tile(1, 8, 4, 4)}


def tile_for(table: dict[int, Tile], states: int) -> Tile:
    """The tile of the first entry that has room for the states."""
    return next(tile for room, tile in table.items() if states <= room)


def _padded(size: int) -> int:
    return 1 << (size - 1).bit_length()


@functools.cache
def _unavailable(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; install it with `pip install triton`."
    if _INTERPRETED and device.type == "cpu":
        return None
    if device.type not in _DEVICES:
        return (
            f"its tensors are on {device.type}, which Triton does not reach; move them to a GPU, or set "
            f"TRITON_INTERPRET=1 before Python starts to run the kernels, slowly, in numpy."
        )
    if not torch.get_device_module(device).is_available():
        return f"torch sees no {device.type} device; check the driver, and that torch is a build for this GPU."
    if torch.version.hip is None and device.type == "cuda" and torch.cuda.get_device_capability(device) < _OLDEST:
        major, minor = torch.cuda.get_device_capability(device)
        return f"{torch.cuda.get_device_name(device)} has compute capability {major}.{minor}; at least 7.0 is needed."
    if not (os.environ.get("CC") or any(map(shutil.which, ("cc", "gcc", "clang")))):
        return "Triton finds no C compiler for its launchers; install gcc or name one in the variable CC."
    try:
        import triton

        triton.runtime.driver.active.get_current_target()
    except (ImportError, RuntimeError) as error:
        return f"Triton does not start on this GPU: {error}; install a triton that fits torch {torch.__version__}."
    return None


def _refuses(call: ScanCall) -> str | None:
    if call.x.dtype == torch.float64:
        return "float64 is computed by 'eager' and 'reference' alone; convert with .float()."
    if call.rank > _MAX_RANK:
        return f"the step size has rank {call.rank}, over {_MAX_RANK}; multiply it out and pass dt whole."
    return None


def _new_saved(call: ScanCall) -> Tensor:
    tiles = -(-call.steps // tile_for(BACKWARD, call.states).steps)
    shape = (call.batch, call.routes, tiles, call.states, call.channels)
    return call.x.new_empty(shape, dtype=torch.float32)


def _forward(call: ScanCall, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    from vision_mamba.ops.backends import triton_kernels

    y, last = call.new_output(), call.new_last_state()
    saved = _new_saved(call) if save else call.x.new_empty(0)
    shares = _shares(y, call.routes, _rounded(y)) if call.merge else y
    target = shares.movedim(0, 2) if call.merge else y
    if not contract.visits_all(call):
        shares.zero_()
    tile, keep = tile_for(FORWARD, call.states), tile_for(BACKWARD, call.states)
    if save:  # states are written between tiles
        tile = tile._replace(steps=min(tile.steps, keep.steps))
    with _on(call.x.device):
        triton_kernels.forward[_grid(call, tile)](
            *_inputs(call),
            _dense(call.initial_state),
            target,
            last if call.return_last_state else None,
            saved if save else None,
            *_sizes(call),
            *target.stride(),
            SAVED=keep.steps,
            **_constants(call, tile, target),
        )
        if call.merge:
            _merge(shares, y)
    return y, last, saved


def _backward(call: ScanCall, saved: Tensor, dy: Tensor | None, dlast: Tensor | None) -> tuple[Tensor | None, ...]:
    from vision_mamba.ops.backends import triton_kernels

    tile = tile_for(BACKWARD, call.states)
    blocks = -(-call.channels // tile.channels)
    dx, ddt, dB, dC = (torch.empty_like(t) for t in (call.x, call.dt, call.B, call.C))
    dx_shares = _shares(dx, call.routes, _rounded(dx)) if call.shared_x else dx
    dx_target = dx_shares.movedim(0, 2) if call.shared_x else dx
    ddt_shares, dB_shares, dC_shares = (
        _shares(ddt, blocks if call.rank else 1),
        _shares(dB, blocks),
        _shares(dC, blocks),
    )
    rows = call.states + 2 + call.rank
    per_channel = call.x.new_empty((call.batch, call.routes, rows, call.channels), dtype=torch.float32)
    dinitial = None if call.initial_state is None else call.initial_state.new_empty(call.initial_state.shape)
    if not contract.visits_all(call):
        for shares in (dx_shares, ddt_shares, dB_shares, dC_shares):
            shares.zero_()
    if dy is not None and call.merge:
        dy = dy.unsqueeze(2).expand(-1, -1, call.routes, -1)
    with _on(call.x.device):
        triton_kernels.backward[_grid(call, tile)](
            *_inputs(call),
            saved,
            dy,
            _dense(dlast),
            dx_target,
            ddt_shares,
            dB_shares,
            dC_shares,
            per_channel,
            dinitial,
            *_sizes(call),
            *((0,) * 4 if dy is None else dy.stride()),
            *dx_target.stride(),
            *ddt_shares.stride(),
            *dB_shares.stride(),
            *dC_shares.stride(),
            **_constants(call, tile, dy, dx_target, ddt_shares[0], dB_shares[0], dC_shares[0]),
        )
        if call.shared_x:
            _merge(dx_shares, dx)
        for shares, total in ((ddt_shares, ddt), (dB_shares, dB), (dC_shares, dC)):
            _merge(shares, total)
    sums = per_channel.sum(0)
    dA, dD, dbias, dweight = sums.split([call.states, 1, 1, call.rank], dim=1)
    found: dict[str, Tensor | None] = dict(x=dx, dt=ddt, A=dA.mT, B=dB, C=dC, D=dD.squeeze(1))
    found |= dict(dt_bias=dbias.squeeze(1), dt_weight=dweight.mT, initial_state=dinitial)
    return tuple(_like(getattr(call, name), found[name]) for name in GRADIENTS)


def _like(argument: Tensor | None, gradient: Tensor | None) -> Tensor | None:
    """The gradient in the type and memory order of its argument, as the operator promises; None for an absent one."""
    if argument is None or gradient is None:
        return None
    promised = torch.empty_like(argument)
    if gradient.dtype == promised.dtype and gradient.stride() == promised.stride():
        return gradient
    return promised.copy_(gradient)


def _inputs(call: ScanCall) -> tuple[Tensor | None, ...]:
    """The first arguments of both kernels."""
    return (
        call.x,
        call.dt,
        _dense(call.A),
        call.B,
        call.C,
        _dense(call.D),
        _dense(call.indices),
        _dense(call.dt_weight),
        _dense(call.dt_bias),
    )


def _sizes(call: ScanCall) -> tuple[int, ...]:
    """Sizes, and the strides of x, dt, B and C over (batch, token, route, last axis)."""
    x = call.x.unsqueeze(2).expand(-1, -1, call.routes, -1) if call.shared_x else call.x
    strides = (stride for tensor in (x, call.dt, call.B, call.C) for stride in tensor.stride())
    return call.routes, call.channels, call.states, call.rank, call.steps, *strides


def _constants(call: ScanCall, tile: Tile, *results: Tensor | None) -> dict[str, Any]:
    """The constants that both kernels are specialised on."""
    spans = (
        call.tokens * abs(tensor.stride(1)) + tensor.shape[-1] * abs(tensor.stride(-1))
        for tensor in (call.x, call.dt, call.B, call.C, *results)
        if tensor is not None
    )
    return dict(
        SOFTPLUS=call.dt_softplus,
        STEPS=tile.steps,
        GROUPS=tile.groups,
        LANES=tile.lanes,
        BLOCK_N=_padded(call.states),
        BLOCK_R=_padded(max(call.rank, 1)),
        LONG=max(spans) > _INT32 - 4096,  # offsets within a batch item
        num_warps=tile.warps,
        enable_fp_fusion=True,
    )


def _grid(call: ScanCall, tile: Tile) -> tuple[int]:
    return (call.batch * call.routes * -(-call.channels // tile.channels),)


def _rounded(total: Tensor) -> torch.dtype:
    """The type of routes' shares: of a bfloat16 sum bfloat16, since shares are most of the traffic; never float16,
    in which a share can overflow though the sum does not."""
    return torch.bfloat16 if total.dtype == torch.bfloat16 else torch.float32


def _shares(total: Tensor, count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A buffer (count, *total.shape) for what is added up into `total`; itself if there is but one share."""
    if count == 1:
        return total.unsqueeze(0)
    strides = (total.numel(), *total.stride())  # `total` is dense, so are its shares, and in the same order
    return torch.empty_strided((count, *total.shape), strides, dtype=dtype, device=total.device)


def _merge(shares: Tensor, total: Tensor) -> None:
    from vision_mamba.ops.backends import triton_kernels

    if len(shares) > 1:
        size = total.numel()
        triton_kernels.merge[(-(-size // _MERGED),)](shares, total, len(shares), size, BLOCK=_MERGED)


def _dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Launches go to the device of the tensors, whichever is current."""
    return contextlib.nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)


BACKEND = Backend("triton", _unavailable, _refuses, _forward, _backward, _new_saved, automatic=not _INTERPRETED)
