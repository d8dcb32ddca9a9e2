"""The state-space dual scan on any GPU that Triton reaches: how a call is cut up, and the launches of both passes."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vision_mamba.ops import contract
from vision_mamba.ops.backends.triton import _INTERPRETED, _on, _padded, _unavailable
from vision_mamba.ops.registry import Backend
from vision_mamba.ops.ssd_call import SsdCall

_MAX_CHANNELS = 128
_LEAST = 16  # rows and columns of the smallest product
_CARRIED = 1024  # states of one program of `carry`
_SEGMENT = 4  # chunks at least in a segment, below which its own start costs too much


class Launch(NamedTuple):
    """Warps of a program, chunks in flight, and on NVIDIA's GPUs a limit on the registers of a thread.

    Fewer registers let more programs run on a processor.
    """

    warps: int = 4
    stages: int = 2
    registers: int | None = None


class Tile(NamedTuple):
    """What one program holds: steps of a chunk, and channels at most where it walks; how each kernel is launched.

    Blocks have room for `least` channels, and `plain` tiles multiply float32 without matrix units.
    """

    steps: int
    channels: int
    walk: Launch = Launch()  # forward, and states of the backward pass
    inputs: Launch = Launch()
    weights: Launch = Launch()
    least: int = _LEAST
    plain: bool = False


#: Tiles by the states and channels they have room for: with factors of 16 bits, and of 32.
Tiles = dict[tuple[int, int], Tile]
_WIDE = Launch(8, 1)
_NARROW = Launch(4, 1)
FORWARD: dict[int, Tiles] = {
    16: {
        (16, 32): Tile(64, 32, walk=Launch(4, 2, 168)),
        (32, _MAX_CHANNELS): Tile(64, 64),
        # As backwards, no blocks of 16 columns beside many states: heads of 16 channels and 64 states ended in illegal
        # accesses here too.
        (128, _MAX_CHANNELS): Tile(64, 64, least=64),
        (256, _MAX_CHANNELS): Tile(64, 32, least=32),
    },
    32: {
        (64, _MAX_CHANNELS): Tile(32, 64),
        (128, _MAX_CHANNELS): Tile(32, 32),
        (256, _MAX_CHANNELS): Tile(32, 16),
    },
}
BACKWARD: dict[int, Tiles] = {
    16: {
        (32, 64): Tile(64, 64, inputs=Launch(4, 1, 168)),
        # Blocks of 16 columns beside 64 states and more ended in illegal accesses; those of 64 columns are sound.
        (64, 64): Tile(64, 64, inputs=Launch(4, 1, 168), least=64),
        (128, 64): Tile(64, 64, walk=Launch(4, 3), inputs=Launch(4, 1), least=64),
        (256, _MAX_CHANNELS): Tile(64, 64, walk=_WIDE, inputs=_WIDE, weights=_WIDE, least=64),
    },
    32: {
        # Asynchronous products of eight warps on blocks of 16 columns came out wrong (Triton 3.6, three tf32 products):
        # 32 steps are too few for them, and take the other kind; what is larger has blocks of 64 columns.
        (32, 32): Tile(32, 32, walk=_NARROW, inputs=_NARROW, weights=_NARROW, plain=True),
        (256, _MAX_CHANNELS): Tile(64, 64, walk=_WIDE, inputs=_WIDE, weights=_WIDE, least=64),
    },
}


class Sizes(NamedTuple):
    """What the cutting of a route depends on."""

    batch: int
    steps: int
    heads: int
    channels: int
    groups: int
    states: int
    chunk: int | None
    causal: bool
    factors: str
    device: torch.device


class Plan(NamedTuple):
    """How a route is cut: `segments` of `chunks` chunks of `tile.steps` steps; constants that all kernels share."""

    tile: Tile
    segments: int
    chunks: int
    grid: tuple[int, int]
    shared: dict[str, Any]  # constants of every kernel
    options: dict[str, dict[str, int]]  # of a launch, by the kinds of a Tile
    padded: int  # steps with those that fill the last chunk up


def _factors(call: SsdCall) -> tuple[torch.dtype, ...]:
    """The types of what is multiplied; the widest is that of the products."""
    return call.x.dtype, call.B.dtype, call.C.dtype


def _sizes(call: SsdCall) -> Sizes:
    types = _factors(call)
    if torch.float32 in types:
        factors = "tf32x3" if torch.version.hip is None and call.x.device.type != "xpu" else "ieee"
    else:
        factors = "float16" if torch.float16 in types else "bfloat16"
    return Sizes(
        call.batch, call.steps, call.heads, call.channels, call.groups, call.states, call.chunk, call.causal, factors,
        call.x.device,
    )  # fmt: skip


@functools.lru_cache(1024)
def _plan(backward: bool, sizes: Sizes) -> Plan:
    tables = BACKWARD if backward else FORWARD
    table = tables[16 if sizes.factors == "bfloat16" else 32]
    tile = next(tile for (n, p), tile in table.items() if sizes.states <= n and sizes.channels <= p)
    asked = tile.steps if sizes.chunk is None else min(sizes.chunk, tile.steps)
    steps = max(_LEAST, min(_padded(asked), _padded(sizes.steps)))
    tile = tile._replace(steps=steps, channels=max(tile.least, min(tile.channels, _padded(sizes.channels))))
    total, blocks = -(-sizes.steps // steps), -(-sizes.channels // tile.channels)
    wanted = -(-2 * _processors(sizes.device) // (sizes.batch * sizes.heads * blocks))
    chunks = -(-total // max(1, min(wanted, total // _SEGMENT)))
    segments = -(-total // chunks)
    factors = "ieee" if tile.plain and sizes.factors == "tf32x3" else sizes.factors
    shared: dict[str, Any] = dict(P=sizes.channels, N=sizes.states, T=steps, BLOCK_P=tile.channels)
    shared |= dict(BLOCK_N=max(_LEAST, _padded(sizes.states)), CAUSAL=sizes.causal, FACTORS=factors)
    limited = sizes.device.type == "cuda" and torch.version.hip is None
    options = {kind: _options(getattr(tile, kind), limited) for kind in ("walk", "inputs", "weights")}
    grid = (sizes.batch * sizes.heads * segments, blocks)
    return Plan(tile, segments, chunks, grid, shared, options, segments * chunks * steps)


def _options(launch: Launch, limited: bool) -> dict[str, int]:
    limit = dict(maxnreg=launch.registers) if launch.registers and limited else {}
    return dict(num_warps=launch.warps, num_stages=launch.stages) | limit


def _refuses(call: SsdCall) -> str | None:
    if call.x.dtype == torch.float64:
        return "float64 is computed by 'eager' and 'reference' alone; convert with .float()."
    return None


def parts_of(call: SsdCall) -> int:
    """In how many heads side by side a head is run, since the state of one has to fit into a processor."""
    most = 64 if call.states > 128 and torch.float32 in _factors(call) else _MAX_CHANNELS
    return next(n for n in range(-(-call.channels // most), call.channels + 1) if call.channels % n == 0)


def split_heads(call: SsdCall, parts: int) -> SsdCall:
    """The same scan with every head as `parts` narrower ones, which share its decay; views but for what a head has."""

    def narrower(t: Tensor, axis: int) -> Tensor:
        """The axes of heads and of channels: (..., H, P, ...) -> (..., H parts, P / parts, ...)."""
        return t.unflatten(axis + 1, (parts, -1)).flatten(axis, axis + 1)

    def each(t: Tensor) -> Tensor:
        return t.repeat_interleave(parts, -1)

    D, bias, state = call.D, call.dt_bias, call.initial_state
    return call._replace(
        x=narrower(call.x, -2 % call.x.dim()),
        dt=each(call.dt.float()),  # float32, since gradients of the parts are added
        A=each(call.A),
        D=None if D is None else narrower(D, 1) if D.dim() == 3 else each(D),
        dt_bias=None if bias is None else each(bias),
        initial_state=None if state is None else narrower(state, 2),
    )


@functools.cache
def _processors(device: torch.device) -> int:
    if device.type == "cpu":
        return 1
    return torch.get_device_module(device).get_device_properties(device).multi_processor_count


class Route:
    """One route of a call, without an axis of routes: its tensors, its step sizes, and the launches that they share."""

    def __init__(self, call: SsdCall, k: int, backward: bool) -> None:
        self.call, self.plan = call, _plan(backward, _sizes(call))
        self.x = call.x if call.shared_x else call.x[:, :, k]
        self.dt, self.B, self.C = call.dt[:, :, k], call.B[:, :, k], call.C[:, :, k]
        self.A = call.A[k].contiguous()
        self.D = None if call.D is None else call.D[k].contiguous()
        self.bias = None if call.dt_bias is None else call.dt_bias[k].contiguous()
        self.indices = None if call.indices is None else call.indices[k].contiguous()
        self.initial = None if call.initial_state is None else call.initial_state[:, k].contiguous()
        self.descending = k >= call.routes - call.descending
        self.sizes = (call.heads, call.heads // call.groups, call.steps, call.tokens)
        self.limits = (call.dt_min, float("inf") if call.dt_max is None else call.dt_max)
        self.skip = (0, 0) if self.D is None else (self.D.stride(0), self.D.stride(1) if self.D.dim() == 2 else 0)
        self._prepare()

    def _prepare(self) -> None:
        """Step sizes s, their running sums c, and what c has beyond float32: (B, H, padded) each."""
        call, plan = self.call, self.plan
        kinds = (1 if plan.shared["FACTORS"] == "bfloat16" else 2) if call.causal else 0
        out = call.x.new_empty((1 + kinds, call.batch, call.heads, plan.padded), dtype=torch.float32)
        s, c, low = (out[i] if i <= kinds else None for i in range(3))
        self.prepared = (s, s if c is None else c, low)
        heads = min(16, _padded(call.heads))
        kernels().prepare[(call.batch * plan.segments * plan.chunks, -(-call.heads // heads))](
            self.dt, self.A, self.bias, self.indices, *self.prepared, call.heads, call.steps, call.tokens, plan.padded,
            *self.limits, *self.dt.stride(), T=plan.tile.steps, HEADS=heads, CAUSAL=call.causal,
            DESCENDING=self.descending, SOFTPLUS=call.dt_softplus,
        )  # fmt: skip

    def walk(
        self, x: Tensor, adjoint: bool, before: Tensor | None, each: tuple[Tensor | None, Tensor | None],
        after: Tensor | None, decay: Tensor | None,
    ) -> None:  # fmt: skip
        """Launch `states`: of x and B, or of dy and C backwards. `each` takes states in two parts, rounded and rest."""
        B, plan = self.C if adjoint else self.B, self.plan
        kernels().states[plan.grid](
            x, *self.prepared, self.A, B, self.indices, before, *each, after, decay, *self.sizes, plan.segments,
            plan.chunks, *x.stride(), *B.stride(), *_state_strides(before), *_state_strides(after), **plan.shared,
            DESCENDING=self.descending, ADJOINT=adjoint, **plan.options["walk"],
        )  # fmt: skip

    def enter(self, x: Tensor, adjoint: bool, start: Tensor | None, end: Tensor | None) -> Tensor | None:
        """The state before each segment; `end` takes that after the last, if there are several."""
        call, plan = self.call, self.plan
        if plan.segments == 1 and call.causal:
            return start
        shape = (call.batch, call.heads, plan.segments, call.states, call.channels)
        added, before = x.new_empty((2, *shape), dtype=torch.float32)
        decay = added.new_empty(shape[:3])
        self.walk(x, adjoint, None, (None, None), added, decay)
        kernels().carry[(call.batch * call.heads, -(-call.states * call.channels // _CARRIED))](
            added, decay, start, before, end, call.heads, plan.segments, 0 if start is None else start.stride(0),
            0 if end is None else end.stride(0), P=call.channels, N=call.states, ADJOINT=adjoint, BLOCK=_CARRIED,
        )  # fmt: skip
        return before

    def total(self, x: Tensor, adjoint: bool, start: Tensor | None) -> Tensor:
        """Not causal: the one state, (B, H, P, N)."""
        call = self.call
        end = x.new_empty((call.batch, call.heads, call.channels, call.states), dtype=torch.float32)
        self.enter(x, adjoint, start, end)
        return end


def kernels() -> Any:
    """Their module, imported when there is a Triton to compile them."""
    from vision_mamba.ops.backends import ssd_triton_kernels

    return ssd_triton_kernels


def _state_strides(state: Tensor | None) -> tuple[int, ...]:
    """Over (batch, head, segment, state, channel), of (B, H, segments, N, P), or of one (B, H, P, N) for all."""
    if state is None:
        return (0,) * 5
    strides = state.stride()
    return strides if len(strides) == 5 else (*strides[:2], 0, strides[3], strides[2])


def _forward(call: SsdCall, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    if (parts := parts_of(call)) > 1:
        y, last, kept = _forward(split_heads(call, parts), save)
        y = y.unflatten(-2, (-1, parts)).flatten(-2)
        return y, last.unflatten(2, (-1, parts)).flatten(3, 4) if call.return_last_state else last, kept
    y, last = call.new_output(), call.new_last_state()
    if not contract.visits_all(call):
        y.zero_()
    with _on(call.x.device):
        for k in range(call.routes):
            r = Route(call, k, False)
            out = y if call.merge else y[:, :, k]
            end = last[:, k] if call.return_last_state else None
            before = r.enter(r.x, False, r.initial, None) if call.causal else r.total(r.x, False, r.initial)
            kernels().forward[r.plan.grid](
                r.x, *r.prepared, r.B, r.C, r.D, r.indices, before, out, end, *r.sizes, r.plan.segments, r.plan.chunks,
                *r.x.stride(), *r.B.stride(), *r.C.stride(), *r.skip, *_state_strides(before), *out.stride(),
                0 if end is None else end.stride(0), **r.plan.shared, DESCENDING=r.descending,
                ADD=call.merge and k > 0, **r.plan.options["walk"],
            )  # fmt: skip
    return y, last, call.x.new_empty(0)


def _backward(call: SsdCall, saved: Tensor, dy: Tensor | None, dlast: Tensor | None) -> tuple[Tensor | None, ...]:
    from vision_mamba.ops.backends import ssd_triton_backward

    return ssd_triton_backward.launch(call, dy, dlast)


BACKEND = Backend("triton", _unavailable, _refuses, _forward, _backward, automatic=not _INTERPRETED)
