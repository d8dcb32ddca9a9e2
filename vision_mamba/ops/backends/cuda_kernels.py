"""Which specialisation of csrc/cuda a scan takes: functions of its sizes, types and strides; and what is shipped."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vision_mamba.ops.backends.nvrtc import Specialisation

TYPES = {torch.float32: "Float", torch.float16: "Half", torch.bfloat16: "Bfloat"}
MAX_RANK = 64  # columns of a low-rank step size that the kernels multiply themselves
CHECKPOINT = 16  # steps of a tile of the wide kernels
# Whether the wide kernels save less where sequences of a channel are at least so many, memory for time. It is decided
# once a process, so that no backward pass finds what another choice has saved.
LEAN, MANY = os.environ.get("VISION_MAMBA_LEAN") == "1", 2**15
WARPS = 4  # of a block of the wide kernels
BACKWARD_WARPS = 12  # of the wide backward kernel that a multiprocessor holds
NARROW_CHANNELS = 16  # of a block of the narrow kernels
WALK_FORWARD = 16  # warps of the walking kernels that a multiprocessor holds
WALK_BACKWARD = 12
WALK_ROOM = 8  # warps for which routes are cut into segments, going back; twice as many going forwards

Types = tuple[str, str, str, str, str]  # of x, dt, B, C and y


class Shape(NamedTuple):
    """How a warp's lanes share channels and states; see csrc/cuda/wide_forward.cuh."""

    lanes: int
    states: int
    slots: int

    @property
    def channels(self) -> int:
        """Channels of a warp."""
        return self.slots * 32 // self.lanes


def wide_shape(states: int, slots: int, per_lane: int = 4) -> Shape:
    """Lanes of a group, states a lane holds, and channels of a group: at most `slots` if that leaves a warp four."""
    states = 1 << (states - 1).bit_length()
    per_lane = min(states, max(per_lane, states // 32))
    lanes = states // per_lane
    return Shape(lanes, per_lane, min(lanes, max(slots, lanes // 8)))


class Tile(NamedTuple):
    """A block of a wide kernel: how warps share channels and states, their number, blocks on a multiprocessor."""

    shape: Shape
    warps: int
    blocks: int

    def groups(self, channels: int) -> int:
        """Blocks for so many channels."""
        per_block = self.shape.channels * self.warps
        return (channels + per_block - 1) // per_block

    def waves(self, blocks: int, multiprocessors: int) -> int:
        """How many times the device is filled by so many blocks."""
        return (blocks + self.blocks * multiprocessors - 1) // (self.blocks * multiprocessors)


def forward_tiles(states: int, rank: int) -> tuple[Tile, Tile]:
    """For few sequences and for many: eight states a lane read B and C half as often, but leave fewer warps. More of
    them share the weights of a low-rank step size."""
    few = Tile(wide_shape(states, 2), WARPS, 4)
    warps = 4 if rank else 2
    return few, Tile(wide_shape(states, 2, 8), warps, 12 // warps) if 8 < states <= 16 else few


def backward_tile(states: int, shared: int) -> Tile:
    """`shared`: bytes of shared memory that a block may have; rows of many states leave fewer warps that."""
    shape = wide_shape(states, 2)
    row = shape.lanes * shape.states
    warps = 1 if row > 64 else WARPS if row < 64 or shared >= 128 * 1024 else WARPS // 2
    return Tile(shape, warps, BACKWARD_WARPS // warps)


class Wide(NamedTuple):
    """What a wide kernel is specialised on beside its types."""

    tile: Tile
    rank: int
    softplus: bool
    vector_x: bool  # channels are neighbours, aligned, a multiple of a run
    vector_bc: bool  # so are states, as many as lanes hold
    vector_rank: bool  # and pairs of columns of a low-rank step size
    tensor_rank: bool  # which is multiplied on the tensor cores
    tokens_first: bool  # tokens are neighbours in memory, channels are not
    part: int = 0  # of two kernels over a route in segments, or 0
    merge: bool = False  # a block takes the routes one after the other and adds them up
    copies: bool = False  # what is read ahead waits in shared memory, where sequences are many, not in registers
    every: int = 1  # tiles between two states that are saved
    add: bool = False  # going back, to what blocks of another route have left


def wide_every(sequences: Any, channels: Any) -> Any:
    """Tiles between two states that a forward pass saves: going back, the state between them is computed once more."""
    return 2 if LEAN and sequences * channels >= MANY else 1


def wide_turns(tile: Tile, sequences: int, channels: int, multiprocessors: int) -> int:
    """Groups of channels that a block of the backward pass takes one after the other, adding up their shares of dB and
    dC: as many as leave the device filled."""
    groups = tile.groups(channels)
    whole = tile.waves(sequences * groups, multiprocessors)
    divisors = (n for n in range(groups, 0, -1) if groups % n == 0)
    return next(n for n in divisors if n * tile.waves(sequences * groups // n, multiprocessors) <= whole)


def wide_segments(steps: int, blocks: int, room: int) -> tuple[int, int]:
    """Segments a route is taken in, and tiles of a segment: at least three, fewer do not pay for the first launch."""
    tiles = (steps + CHECKPOINT - 1) // CHECKPOINT
    wanted = min(room // max(blocks, 1), tiles // 2)
    if wanted < 3:
        return 1, tiles
    per_segment = (tiles + wanted - 1) // wanted
    return (tiles + per_segment - 1) // per_segment, per_segment


class Narrow(NamedTuple):
    """How the narrow kernels take a route: steps of a segment, warps of a block at most, and what to compile for."""

    steps: int
    warps: int
    rank: int
    softplus: bool
    merge: bool
    whole: bool
    vector: bool
    vector_rank: bool
    tensor_rank: bool  # a low-rank step size is multiplied on the tensor cores


class Walk(NamedTuple):
    """How the walking kernels take a route: channels of a lane, and what to compile for; see csrc/cuda/walk.cuh."""

    run: int
    warps: int  # of a block
    rank: int
    part: int = 0  # of two kernels over a route in segments, or 0
    items: int = 1  # of the batch that a warp takes one after the other


def walk(channels: int, run: int, rank: int) -> Walk:
    """Blocks of as many warps as divide those of a route: neighbouring channels are read together."""
    return Walk(run, next(n for n in (4, 3, 2, 1) if channels // (32 * run) % n == 0), rank)


def walks(steps: Any, sequences: Any, channels: Any) -> bool:
    """Whether the walking kernels are the faster ones: where sequences are many, or few and long, to be cut."""
    lanes = sequences * channels
    return channels % 32 == 0 and (lanes >= 24576 or (lanes <= 1024 and steps >= 2048))


def walk_run(channels: int, rank: int) -> int:
    """Channels of a lane going forwards: two save loads, where sequences and registers are plenty."""
    return 2 if channels % 64 == 0 and rank <= 16 else 1


def walk_held(rank: int) -> int:
    """Warps that a multiprocessor holds going back: the gradients of many weights need the registers."""
    return WALK_BACKWARD if rank <= 16 else WALK_ROOM


def walk_items(batch: int, warps: int, held: int) -> int:
    """Items of the batch that a warp takes one after the other, whose weights it reads once and whose sums it keeps: as
    many as don't make the device, which holds so many warps, work for longer."""
    time = {n: -(-warps // n // held) * n for n in (1, 2, 4, 8) if batch % n == 0}
    return max(n for n in time if time[n] == min(time.values()))


def narrow_segment(steps: Any) -> int:
    """Steps of a segment: maps of 7, 14, 28 and 56 tokens a side are cut into sevens without a rest, others seldom."""
    return 7 if steps % 7 == 0 else 8


def narrow_warps(sequences: Any, channels: Any) -> int:
    """Warps of a block of the narrow kernels at most: few where several blocks share a multiprocessor and overlap."""
    return 4 if sequences * channels >= 16384 else 8


def narrow_chunk(steps: Any, max_warps: int) -> tuple[Any, Any]:
    """Warps of a block of the narrow kernels, and chunks that a route of so many steps is taken in."""
    warp_steps = 8 * narrow_segment(steps)
    chunks = (steps + warp_steps * max_warps - 1) // (warp_steps * max_warps)
    return (steps + warp_steps * chunks - 1) // (warp_steps * chunks), chunks


def narrow_shared(warps: int, rank: int, tokens: int) -> int:
    """Bytes of shared memory that the backward kernel, which needs more, takes to add routes up; see BlockMemory."""
    return 256 + warps * (2240 + 512 * ((rank + 7) // 8)) + 4 * NARROW_CHANNELS * (tokens + tokens % 2)


def wide_forward(types: Types, how: Wide) -> Specialisation:
    return Specialisation("wide_forward", macros(types, **_wide(how), MERGE=how.merge))


def wide_backward(types: Types, how: Wide, dx: str, ddt: str) -> Specialisation:
    exact = types[2:4] != ("Bfloat", "Bfloat")  # dB or dC has more digits than one term on the tensor cores
    shape = how.tile.shape
    more = dict(SUB=min(8, 64 // (shape.slots * shape.states)), TWO_TERMS=exact, DX_TYPE=dx, DDT_TYPE=ddt, ADD=how.add)
    return Specialisation("wide_backward", macros(types, **_wide(how), **more, SUM_TYPE=sums(*types[2:4])))


def sums(B: str, C: str) -> str:
    """Type of the blocks' shares of dB and dC: bfloat16 has the range of float32, and is what their sums become."""
    return "Bfloat" if B == C == "Bfloat" else "Float"


def narrow_forward(types: Types, how: Narrow) -> Specialisation:
    return Specialisation("narrow_forward", macros(types, **_narrow(types, how, 3)))


def narrow_backward(types: Types, how: Narrow, dx: str, ddt: str) -> Specialisation:
    return Specialisation("narrow_backward", macros(types, **_narrow(types, how, 2), DX_TYPE=dx, DDT_TYPE=ddt))


def walk_forward(types: Types, how: Walk) -> Specialisation:
    ahead = 1 if how.rank and how.run > 1 else 2  # one tile more would leave room for a block less
    return Specialisation("walk_forward", macros(types, **_walk(how, ahead, WALK_FORWARD)))


def walk_backward(types: Types, how: Walk, dx: str, ddt: str) -> Specialisation:
    few_digits = types[2:4] == ("Bfloat", "Bfloat")  # of dB and dC: one term on the tensor cores is enough
    more = dict(DX_TYPE=dx, DDT_TYPE=ddt, FEW_DIGITS=few_digits)
    return Specialisation("walk_backward", macros(types, **_walk(how, 1, walk_held(how.rank)), **more))


def finish(types: tuple[str, str, str], states: int, rank: int, run: int) -> Specialisation:
    """Types of dt, B and C."""
    ddt = types[0] if states == 1 else "Float"
    return Specialisation(
        "finish",
        macros(("Float", *types, "Float"), STATES=states, RANK=rank, RUN=run, DDT_TYPE=ddt, SUM_TYPE=sums(*types[1:])),
    )


def merge(part: str, out: str, run: int, add: bool = False) -> Specialisation:
    """`add`: to what is there."""
    return Specialisation("merge", macros((part, "Float", "Float", "Float", out), RUN=run, ADD=add))


def on_tensor_cores(rank: int, dt: str) -> bool:
    """Whether kernels can form a low-rank step size on the tensor cores, where the GPU has those for bfloat16."""
    return rank > 0 and dt == "Bfloat"


def _wide(how: Wide) -> dict[str, Any]:
    shape, warps, blocks = how.tile
    sizes = dict(LANES=shape.lanes, STATES=shape.states, SLOTS=shape.slots, WARPS=warps, MIN_BLOCKS=blocks)
    sizes |= dict(RANK=how.rank, PASS=how.part, EVERY=how.every)
    flags = dict(SOFTPLUS=how.softplus, VECTOR_X=how.vector_x, VECTOR_BC=how.vector_bc)
    flags |= dict(VECTOR_RANK=how.vector_rank, TENSOR_RANK=how.tensor_rank, TOKENS_FIRST=how.tokens_first)
    return sizes | flags | dict(COPIES=how.copies)


def _narrow(types: Types, how: Narrow, blocks: int) -> dict[str, Any]:
    sizes = dict(STEPS=how.steps, MAX_WARPS=how.warps, MIN_BLOCKS=1 if how.warps > 4 else blocks, RANK=how.rank)
    flags = dict(SOFTPLUS=how.softplus, MERGE=how.merge, WHOLE=how.whole)
    flags |= dict(VECTOR=how.vector, VECTOR_RANK=how.vector_rank, TENSOR=how.tensor_rank)
    return sizes | flags


def _walk(how: Walk, ahead: int, held: int) -> dict[str, Any]:
    sizes = dict(RUN=how.run, WARPS=how.warps, RANK=how.rank, PASS=how.part, AHEAD=ahead, ITEMS=how.items)
    return sizes | dict(MIN_BLOCKS=held // how.warps, SOFTPLUS=True)


def macros(types: Types, **more: Any) -> tuple[tuple[str, str], ...]:
    names = ("X_TYPE", "DT_TYPE", "B_TYPE", "C_TYPE", "Y_TYPE")
    values = {key: str(value).lower() if isinstance(value, bool) else str(value) for key, value in more.items()}
    return (*zip(names, types, strict=True), *values.items())


def vector(run: int, *tensors: Tensor | None) -> bool:
    """Whether runs of so many neighbouring elements of the last axis can be read in pieces of up to 16 bytes."""
    for tensor in tensors:
        if tensor is None:
            continue
        piece = min(16, run * tensor.element_size())
        elements = piece // tensor.element_size()
        strides = tensor.stride()
        if strides[-1] != 1 or tensor.shape[-1] % run or tensor.data_ptr() % piece:
            return False
        if any(stride % elements for stride in strides[:-1]):
            return False
    return True


_HALF: Types = ("Bfloat",) * 5
_FULL: Types = ("Float",) * 5


def _shipped(tile: Tile, rank: int) -> Wide:
    return Wide(tile, rank, True, True, True, rank > 0, rank > 0, False)


def _many(tile: Tile, rank: int, **more: Any) -> Wide:
    """Of many sequences."""
    return _shipped(tile, rank)._replace(copies=not (rank and "add" in more), **more)


#: What the published models run: compiled for every architecture by the tests, and warmed by the doctor.
SHIPPED = (
    walk_forward(_HALF, Walk(2, 3, 12)),
    walk_forward(_FULL, Walk(1, 3, 0, 1)),
    walk_backward(_HALF, Walk(1, 3, 6), "Bfloat", "Bfloat"),
    walk_backward(_HALF, Walk(1, 4, 48, items=4), "Bfloat", "Bfloat"),
    walk_backward(_FULL, Walk(1, 3, 0, 2), "Float", "Float"),
    narrow_forward(_FULL, Narrow(8, 8, 0, True, False, False, True, False, False)),
    narrow_backward(_HALF, Narrow(7, 4, 6, True, True, True, True, True, True), "Bfloat", "Bfloat"),
    *(wide_forward(_HALF, _shipped(forward_tiles(16, rank)[0], rank)) for rank in (0, 24)),
    *(wide_forward(_HALF, _many(forward_tiles(16, rank)[1], rank, merge=rank > 0)) for rank in (0, 24)),
    wide_forward(_FULL, _shipped(forward_tiles(64, 0)[0], 0)),
    wide_backward(_HALF, _shipped(backward_tile(16, 2**17), 24), "Bfloat", "Bfloat"),
    *(wide_backward(_HALF, _many(backward_tile(16, 2**17), rank, add=True), "Bfloat", "Bfloat") for rank in (0, 24)),
    wide_forward(_HALF, _many(forward_tiles(16, 0)[1], 0, every=2)),
    wide_backward(_HALF, _many(backward_tile(16, 2**17), 0, add=True, every=2), "Bfloat", "Bfloat"),
    finish(("Bfloat",) * 3, 1, 6, 8),
    finish(("Bfloat",) * 3, 16, 24, 8),
    merge("Bfloat", "Bfloat", 8),
    merge("Bfloat", "Bfloat", 8, add=True),
)
