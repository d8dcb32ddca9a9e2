"""The scan on any GPU that Triton reaches: which tile a call takes, and the launches of its two passes."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import math
import os
import shutil
from collections.abc import Mapping
from types import ModuleType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from vision_mamba.ops import contract
from vision_mamba.ops.call import GRADIENTS, ScanCall
from vision_mamba.ops.registry import Backend

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # kernels run in numpy, for tests on machines without a GPU
_DEVICES = ("cuda", "xpu")  # torch calls ROCm devices cuda too
_OLDEST = (7, 0)
_DEPENDENT = (9, 0)  # compute capability that lets a launch come up while the one before runs
_MAX_RANK = 256
_INT32 = 2**31
_MOST_ROWS = 2**30  # of columns of low rank, which are counted in 32 bits
_LEAST_RANK = 16  # columns of the least product of matrices
_RANK_INSIDE = 64  # of one state, a step size of a higher rank is multiplied out before the scan
_CHUNKS = 1024  # of tokens, in programs that multiply back
_STAGES = 2  # tiles that such a program loads or multiplies at a time, where tensor cores multiply
_MERGED = 1024  # sums of one program of `merge`
_PROGRAMS = 1536  # that keep a GPU busy: a route in fewer sequences than that is cut into segments;
_WARPS = 1536  # that do, of those which walk uncut routes of several states
_SEGMENTS = range(5, 33)  # fewer cost as much as they gain, of more the last waits for what the others hand on,
_SHORTEST_SEGMENT = 16  # and each has at least so many steps
_SHORT_ROUTE = (
    128  # steps, twice as many with weights to load: so short, programs take several routes in turn, if enough,
)
_MOST_TOGETHER = 4  # not more, since a sum in bfloat16 is rounded with each
_FEW_SHARES = 16  # that are added up in one launch with others

_T = TypeVar("_T")


class Tile(NamedTuple):
    """What one program holds: `groups` channels for each of `lanes` lanes in each of `warps` warps; `steps` at once.

    Of several states each of `parts` lanes holds a part. `registers` is the most that a thread may have on an NVIDIA
    GPU, so that more warps fit at a time.
    """

    groups: int
    lanes: int
    steps: int
    parts: int = 1
    warps: int = 1
    registers: int | None = None

    @property
    def channels(self) -> int:
        return self.groups * self.lanes * self.warps


class Product(NamedTuple):
    """What one program multiplies at once: tokens, channels; warps."""

    tokens: int
    channels: int
    warps: int = 4


#: Tiles of the two passes by the states they have room for, padded to a power of two. Forward saves the states every
#: so many steps as a tile of the backward pass has.
FORWARD = {
    1: Tile(1, 32, 16, registers=168),
    4: Tile(2, 16, 8, parts=2),
    16: Tile(2, 16, 4, parts=2, registers=168),
    64: Tile(1, 8, 4, parts=4),
    256: Tile(1, 2, 4, parts=16, warps=4),
}
BACKWARD = {
    1: Tile(1, 32, 8, registers=168),
    4: Tile(2, 16, 8, parts=2),
    16: Tile(2, 8, 4, parts=4, warps=2, registers=168),
    64: Tile(1, 4, 4, parts=8, warps=4),
    256: Tile(2, 1, 4, parts=32, warps=8),
}

#: Tiles of both passes where tokens lie side by side and sequences are too few for those: a thread has fewer states, so
#: that one walk along uncut routes fills a GPU, where segments would be gone through twice.
FEW_FORWARD = {16: Tile(1, 4, 16, parts=8, warps=4, registers=168)}
FEW_BACKWARD = {16: Tile(1, 4, 8, parts=8, warps=4, registers=168)}

#: Tiles of the products that make up a step size of low rank, by the rank; of those back from a gradient in two terms.
#: With two stages they fit into the 99 KiB of shared memory of smaller GPUs.
LOW_RANK = {
    8: Product(32, 128),
    16: Product(64, 64),
    32: Product(64, 128, 8),
    64: Product(64, 64),
    256: Product(16, 32),
}
LOW_RANK_HALVED = {8: Product(64, 128), 64: Product(64, 64), 256: Product(16, 32)}


def tile_for(table: Mapping[int, _T], size: int) -> _T:
    """The tile of the first entry that has room for so many states, or columns."""
    return next(tile for room, tile in table.items() if size <= room)


def _tiles(call: ScanCall) -> tuple[Tile, Tile]:
    """Those of the forward and of the backward pass, together, since one saves states for the other."""
    tables = FORWARD, BACKWARD
    room = next(room for room in FORWARD if call.states <= room)
    if room in FEW_FORWARD and _along(call):
        many, few = FORWARD[room], FEW_FORWARD[room]
        if _grid(call, many)[0] * many.warps < _WARPS <= _grid(call, few)[0] * few.warps:
            tables = FEW_FORWARD, FEW_BACKWARD
    return tables[0][room], tables[1][room]


def _along(call: ScanCall) -> bool:
    """Whether tokens lie side by side in memory."""
    return all(tensor.stride(1) == 1 for tensor in (call.x, call.dt, call.B, call.C))


def _padded(size: int) -> int:
    return 1 << (size - 1).bit_length()


def _block(states: int) -> int:
    """States that kernels make room for: one, or a power of two from which every tile's parts get some."""
    parts = (tile_for(table, states).parts for table in (FORWARD, BACKWARD))
    return 1 if states == 1 else max(_padded(states), *parts)


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
    if _is_nvidia(device) and torch.cuda.get_device_capability(device) < _OLDEST:
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
    if call.rank and call.batch * call.tokens > _MOST_ROWS:
        return f"its step size has low rank and {call.batch * call.tokens} tokens, over 2^30; split the batch."
    if call.rank > _MAX_RANK:
        return f"the step size has rank {call.rank}, over {_MAX_RANK}; multiply it out and pass dt whole."
    return None


def _new_saved(call: ScanCall) -> Tensor:
    tiles = -(-call.steps // _tiles(call)[1].steps)
    shape = (call.batch, call.routes, tiles, call.channels, _block(call.states))
    return call.x.new_empty(shape, dtype=torch.float32)


def _kernels(part: str) -> ModuleType:
    """Triton is imported when it is needed."""
    return importlib.import_module(f"vision_mamba.ops.backends.triton_{part}")


def _scan(call: ScanCall) -> ModuleType:
    """Where `forward` and `backward` for so many states are."""
    return _kernels("kernels" if call.states == 1 else "wide")


def _forward(call: ScanCall, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    y, last = call.new_output(), call.new_last_state()
    saved = _new_saved(call) if save else call.x.new_empty(0)
    tile, keep = _tiles(call)
    segments = _segments(call, tile, max(tile.steps, keep.steps))
    together = _together(call, tile, segments, y)
    shares = _shares(y, call.routes // together, _rounded(y)) if call.merge else y
    target = shares.movedim(0, 2) if call.merge else y
    partial = not contract.visits_all(call)
    if partial:
        shares.zero_()
    with _on(call.x.device):
        call = _taken(call)
        edges = _new_edges(call, segments)
        for ends in (True, False)[segments == 1 :]:
            _scan(call).forward[_grid(call, tile, segments - ends, together)](
                *_inputs(call),
                _padded_states(call.initial_state),
                *edges,
                target,
                last if call.return_last_state else None,
                saved if save and not ends else None,
                *_sizes(call, segments),
                *target.stride(),
                SAVED=keep.steps,
                ENDS=ends,
                **(dict(ROUTES=together, WRITTEN=partial and together > 1) if call.states == 1 else {}),
                **_constants(call, tile, target),
            )
        if call.merge:
            _merge((shares, y))
    return y, last, saved


def _backward(call: ScanCall, saved: Tensor, dy: Tensor | None, dlast: Tensor | None) -> tuple[Tensor | None, ...]:
    _, tile = _tiles(call)
    blocks = -(-call.channels // tile.channels)
    dx, dB, dC = (torch.empty_like(t) for t in (call.x, call.B, call.C))
    ddt = _new_whole(call, halved=_is_halved(call)) if call.rank else torch.empty_like(call.dt)
    dx_shares = _shares(dx, call.routes, _rounded(dx)) if call.shared_x else dx
    dx_target = dx_shares.movedim(0, 2) if call.shared_x else dx
    on_way = (blocks, call.batch, call.routes, call.steps)  # shares of one state are written in the order of steps
    dB_shares, dC_shares = (
        t.new_empty(on_way, dtype=torch.float32) if call.states == 1 else _shares(t, blocks, _rounded(t))
        for t in (dB, dC)
    )
    by_token = (dB, dC) if call.states == 1 else (dB_shares[0], dC_shares[0])
    dinitial = None if call.initial_state is None else call.initial_state.new_empty(call.initial_state.shape)
    if not contract.visits_all(call):
        for shares in (dx_shares, ddt, *((dB, dC) if call.states == 1 else (dB_shares, dC_shares))):
            shares.zero_()
    if dy is not None and call.merge:
        dy = dy.unsqueeze(2).expand(-1, -1, call.routes, -1)
    with _on(call.x.device):
        small = _taken(call)
        segments = _segments(call, tile, tile.steps)
        edges = _new_edges(call, segments)
        rows = (call.batch * segments, call.states + 2, call.routes, call.channels)
        per_channel = call.x.new_empty(rows, dtype=torch.float32)
        for ends in (True, False)[segments == 1 :]:
            _scan(call).backward[_grid(call, tile, segments - ends)](
                *_inputs(small),
                saved,
                dy,
                _padded_states(dlast),
                *edges,
                dx_target,
                ddt,
                dB_shares,
                dC_shares,
                per_channel,
                dinitial,
                *_sizes(small, segments),
                *((0,) * 4 if dy is None else dy.stride()),
                *dx_target.stride(),
                *ddt.stride(),
                *((call.batch,) if call.states == 1 else (*dB_shares.stride(), *dC_shares.stride())),
                ENDS=ends,
                **(dict(HALVED=_is_halved(call)) if call.states == 1 else {}),
                **_constants(small, tile, dy, dx_target, ddt, *by_token),
            )
        sums = [(dB_shares, dB), (dC_shares, dC)]
        if call.shared_x:
            sums.append((dx_shares, dx))
        dweight = None
        if call.rank:
            dlow_shares, dweights = _multiply_back(call, ddt)
            dweight = _sum(dweights, sums)
            ddt = torch.empty_like(call.dt) if len(dlow_shares) > 1 else dlow_shares[0]
            sums.append((dlow_shares, ddt))
        per_channel = _sum(per_channel, sums)
        _merge(*sums, on_way=call if call.states == 1 else None)
    dA = per_channel[0].unsqueeze(-1) if call.states == 1 else per_channel[:-2].movedim(0, -1)
    found: dict[str, Tensor | None] = dict(x=dx, dt=ddt, A=dA, B=dB, C=dC, D=per_channel[-2])
    found |= dict(dt_bias=per_channel[-1], dt_weight=dweight, initial_state=dinitial)
    return tuple(_like(getattr(call, name), found[name]) for name in GRADIENTS)


def _is_halved(call: ScanCall) -> bool:
    """Whether the gradient of all of dt is two terms of bfloat16, ready for tensor cores."""
    tensor_cores = _precision(call.x.device) != "ieee"
    return bool(call.rank) and call.states == 1 and call.dt.dtype == torch.bfloat16 and tensor_cores


def _new_whole(call: ScanCall, halved: bool = False) -> Tensor:
    """An uninitialised dt, or gradient of it, of all channels; halved, rests follow each row of first terms."""
    width, dtype = (2 * call.channels, torch.bfloat16) if halved else (call.channels, torch.float32)
    return call.x.new_empty((call.batch, call.tokens, call.routes, width), dtype=dtype)


def _taken(call: ScanCall) -> ScanCall:
    """The call as the scan takes it: dt of one state and of a small rank as it is, of another multiplied out."""
    if not call.rank or (call.states == 1 and call.rank <= _RANK_INSIDE):
        return call
    dt, tile = _new_whole(call), tile_for(LOW_RANK, call.rank)
    _kernels("low_rank").multiply_out[_low_rank_grid(call, tile)](
        call.dt, _dense(call.dt_weight), dt, *_low_rank_sizes(call), **_low_rank_constants(call, tile)
    )
    return call._replace(dt=dt, dt_weight=None)


def _multiply_back(call: ScanCall, ddt: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the columns of dt, a share of each block of channels, and of dt_weight, one of each chunk."""
    halved = _is_halved(call)
    tile = tile_for(LOW_RANK_HALVED if halved else LOW_RANK, call.rank)
    tiles, routes, blocks = _low_rank_grid(call, tile)
    at_once = -(-tiles * routes * blocks // _CHUNKS)
    chunks = -(-tiles // at_once)
    dlow = _shares(torch.empty_like(call.dt), blocks)
    dweight = ddt.new_empty((chunks, call.routes, call.channels, call.rank), dtype=torch.float32)
    _kernels("low_rank").multiply_back[chunks, routes, blocks](
        ddt,
        call.dt,
        _dense(call.dt_weight),
        dlow,
        dweight,
        *_low_rank_sizes(call),
        *dlow.stride(),
        at_once,
        HALVED=halved,
        STAGES=1 if _precision(call.x.device) == "ieee" else _STAGES,
        **_low_rank_constants(call, tile, dlow[0]),
        **_following(call.x.device),
    )
    return dlow, dweight


def _low_rank_grid(call: ScanCall, tile: Product) -> tuple[int, int, int]:
    """Tiles of tokens, routes, blocks of channels."""
    return -(-call.batch * call.tokens // tile.tokens), call.routes, -(-call.channels // tile.channels)


def _low_rank_sizes(call: ScanCall) -> tuple[int, ...]:
    return call.batch * call.tokens, call.tokens, call.channels, call.rank, *call.dt.stride()


def _low_rank_constants(call: ScanCall, tile: Product, *others: Tensor) -> dict[str, Any]:
    return dict(
        ROWS=tile.tokens,
        BLOCK_D=tile.channels,
        BLOCK_R=_columns(call),
        PRECISION=_precision(call.x.device),
        FLAT=all(tensor.stride(0) == call.tokens * tensor.stride(1) for tensor in (call.dt, *others)),
        num_warps=tile.warps,
        num_stages=1,  # more would not fit into the shared memory of smaller GPUs
    )


def _columns(call: ScanCall) -> int:
    """Columns of low rank that a product has room for."""
    return max(_padded(call.rank), _LEAST_RANK)


def _aligned(call: ScanCall) -> int:
    """Columns of low rank that always lie side by side and aligned, 16 bytes of them at most."""
    most = 16 // call.dt.element_size() if call.dt.stride(-1) == 1 else 1
    return math.gcd(most, call.rank, *call.dt.stride()[:-1])


def _precision(device: torch.device, total: torch.dtype = torch.float32) -> str:
    """How float32 goes to the tensor cores: on NVIDIA's GPUs in several terms, for a sum in bfloat16 in one of 11 bits,
    which is more than that keeps; elsewhere whole, without them."""
    if not _is_nvidia(device) or torch.cuda.get_device_capability(device) < (8, 0):
        return "ieee"
    return "tf32" if total == torch.bfloat16 else "tf32x3"


def _is_nvidia(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.hip is None


def _segments(call: ScanCall, tile: Tile, multiple: int) -> int:
    """In how many segments, of so many steps or a multiple, the routes are cut; none is empty."""
    tiles, programs = -(-call.steps // multiple), _grid(call, tile)[0]
    wanted = min(_PROGRAMS // max(1, programs), call.steps // _SHORTEST_SEGMENT, _SEGMENTS.stop - 1)
    return 1 if wanted < _SEGMENTS.start else -(-tiles // -(-tiles // wanted))


def _new_edges(call: ScanCall, segments: int) -> tuple[Tensor | None, Tensor | None]:
    """What segments pass on, and their sums of step sizes."""
    if segments == 1:
        return None, None
    shape = (call.batch, call.routes, segments, call.channels)
    spans = call.x.new_empty(shape, dtype=torch.float32)
    return spans.new_empty((*shape, _block(call.states))), spans


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
        _padded_states(call.A),
        call.B,
        call.C,
        _dense(call.D),
        _dense(call.indices),
        *((_dense(call.dt_weight),) if call.states == 1 else ()),
        _dense(call.dt_bias),
    )


def _sizes(call: ScanCall, segments: int) -> tuple[int, ...]:
    """Sizes, and the strides of x, dt, B and C over (batch, token, route, last axis)."""
    x = call.x.unsqueeze(2).expand(-1, -1, call.routes, -1) if call.shared_x else call.x
    strides = (stride for tensor in (x, call.dt, call.B, call.C) for stride in tensor.stride())
    ranks = (call.rank,) if call.states == 1 else ()
    return call.routes, call.channels, *ranks, call.steps, segments, *strides


def _constants(call: ScanCall, tile: Tile, *results: Tensor | None) -> dict[str, Any]:
    """The constants that both kernels are specialised on."""
    spans = (
        call.tokens * abs(tensor.stride(1)) + tensor.shape[-1] * abs(tensor.stride(-1))
        for tensor in (call.x, call.dt, call.B, call.C, *results)
        if tensor is not None
    )
    constants: dict[str, Any] = dict(
        SOFTPLUS=call.dt_softplus,
        STEPS=tile.steps,
        LONG=max(spans) > _INT32 - 4096,  # offsets within a batch item
        num_warps=tile.warps,
        num_stages=1,  # kernels load ahead themselves
        enable_fp_fusion=True,
    )
    if call.states == 1:
        columns = _columns(call) if call.rank else 1
        constants |= dict(CHANNELS=tile.channels, BLOCK_R=columns, PRECISION=_precision(call.x.device))
        constants |= dict(ALIGNED=_aligned(call) if call.rank else 1, **_following(call.x.device))
    else:
        constants |= dict(states=call.states, GROUPS=tile.groups, LANES=tile.lanes, WARPS=tile.warps)
        constants |= dict(PARTS=tile.parts, BLOCK_N=_block(call.states), ALONG=_along(call))
    if _is_nvidia(call.x.device):
        constants |= dict(maxnreg=tile.registers)
    return constants


def _following(device: torch.device) -> dict[str, Any]:
    """The constant of kernels that `_follow`, and the option of their launch."""
    if not _is_nvidia(device) or torch.cuda.get_device_capability(device) < _DEPENDENT:
        return dict(FOLLOWS=False)
    return dict(FOLLOWS=True, launch_pdl=True)


def _grid(call: ScanCall, tile: Tile, segments: int = 1, together: int = 1) -> tuple[int, int]:
    return call.batch * (call.routes // together) * -(-call.channels // tile.channels), segments


def _together(call: ScanCall, tile: Tile, segments: int, y: Tensor) -> int:
    """Routes that one program of the forward pass takes in turn and adds up itself, if there are programs enough."""
    short = _SHORT_ROUTE * (2 if call.rank else 1)
    if call.states > 1 or not call.merge or segments > 1 or call.steps > short:
        return 1
    shares = 1 if y.dtype == _rounded(y) else 2  # at the least: a sum in float16 can overflow before it is complete
    most = min(_MOST_TOGETHER, _grid(call, tile)[0] // _PROGRAMS, call.routes // shares)
    return max((n for n in range(2, most + 1) if call.routes % n == 0), default=1)


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


def _sum(shares: Tensor, sums: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The sum of shares: if they are few it is left to one launch with other sums, to which it is added."""
    if len(shares) > _FEW_SHARES:
        return shares.sum(0)
    total = shares[0] if len(shares) == 1 else torch.empty_like(shares[0])
    sums.append((shares, total))
    return total


def _merge(*sums: tuple[Tensor, Tensor], on_way: ScanCall | None = None) -> None:
    """Add up to six buffers of shares into their totals, all in one launch; a single share is its total.

    The first two may come in the order of steps, of the routes of the call `on_way`.
    """
    arguments: list[Any] = []
    blocks = 0
    for number, (shares, total) in enumerate(sums):
        if len(shares) > 1 or (on_way and number < 2):
            arguments += [shares, total, len(shares), shares[0].numel()]
            blocks += -(-shares[0].numel() // _MERGED)
    if not blocks:
        return
    arguments += [None, None, 0, 0] * (6 - len(arguments) // 4)
    if on_way:
        strides = (stride for _, total in sums[:2] for stride in total.stride()[:3])
        arguments += [_dense(on_way.indices), on_way.routes, on_way.steps, *strides]
    else:
        arguments += [None] + [0] * 8
    device = sums[0][1].device
    largest = max(shares[0].numel() for shares, _ in sums)
    _kernels("sums").merge[(blocks,)](
        *arguments, ON_WAY=on_way is not None, BLOCK=_MERGED, LONG=largest > _INT32 - _MERGED, **_following(device)
    )


def _dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _padded_states(tensor: Tensor | None) -> Tensor | None:
    """A tensor of states, dense, with as many as kernels make room for."""
    if tensor is None:
        return None
    more = _block(tensor.shape[-1]) - tensor.shape[-1]
    return functional.pad(tensor, (0, more)) if more else tensor.contiguous()


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Launches go to the device of the tensors, whichever is current."""
    return contextlib.nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)


BACKEND = Backend("triton", _unavailable, _refuses, _forward, _backward, _new_saved, automatic=not _INTERPRETED)
