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
LONG = 16  # tiles of a segment from which on larger code pays
FIRST_LESS = 4  # the first of such segments is by one part in so many shorter, where it alone is done in one go
# Whether the wide kernels save less where sequences of a channel are at least so many, memory for time. It is decided
# once a process, so that no backward pass finds what another choice has saved.
LEAN, MANY = os.environ.get("VISION_MAMBA_LEAN") == "1", 2**15
WARPS = 4  # of a block of the wide kernels
BACKWARD_WARPS = 12  # of the wide backward kernel that a multiprocessor holds
NARROW_CHANNELS = 16  # of a block of the narrow kernels
WAVE_STATES = 16  # of a channel that the wave kernels take
WAVE_FORWARD = 16  # channels of a column of the forward one
WAVE_TURNS = 4  # its warps
WAVE_TIMES = {1: 0.67, 2: 0.77, 3: 1.0}  # that a multiprocessor takes over so many columns, relatively; measured
WAVE_FORWARD_STEPS = 128  # of a route from which on it is taken that way
WAVE_COLUMNS = 6  # of 8 channels, of a block of the backward wave kernel
WAVE_CHANNELS = 8 * WAVE_COLUMNS
WAVE_SHARED = 206 * 1024  # bytes of shared memory that its block needs, at most
WAVE_STEPS = 256  # of a route from which on it is taken that way
WAVE_COUNTS = 33  # kGroups of it
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


def forward_tiles(states: int) -> tuple[Tile, Tile]:
    """For few sequences and for many: eight states a lane read B and C half as often."""
    few = Tile(wide_shape(states, 2), WARPS, 4)
    return few, Tile(wide_shape(states, 2, 8), 2, 6) if 8 < states <= 16 else few


def backward_tile(states: int, shared: int, rank: int = 0) -> Tile:
    """`shared`: bytes of shared memory that a block may have; rows of many states, and a low rank's weights for many
    channels, leave fewer warps that."""
    shape = wide_shape(states, 2)
    row = shape.lanes * shape.states
    large = row == 64 or (shape.channels >= 32 and rank > 24)
    warps = 1 if row > 64 else WARPS // 2 if large and shared < 128 * 1024 else WARPS
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
    copies: bool = False  # what is read ahead waits in shared memory, where sequences are many; forwards by wide_flow
    long: bool = False  # segments are: the first of two kernels does all of the first one going forwards
    every: int = 1  # tiles between two states that are saved
    add: bool = False  # to what blocks of another route have left
    whole: bool = False  # blocks are full of channels, and lanes of states


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


def wide_items(tile: Tile, batch: int, blocks: int, multiprocessors: int) -> int:
    """Items of a batch that a block of the backward pass takes one after the other, adding up what is summed over the
    batch: as many as leave the device filled, of so many blocks that do not wait for others."""
    whole = tile.waves(blocks, multiprocessors)
    fits = (n for n in (8, 4, 2, 1) if batch % n == 0)
    return next(n for n in fits if n * tile.waves(blocks // n, multiprocessors) <= whole)


def wide_segments(steps: int, blocks: int, room: int, shorter: bool = False) -> tuple[int, int]:
    """Segments a route is taken in, and tiles of a segment: at least three, fewer do not pay for the first launch.
    `shorter`: the first of them is, by one part in FIRST_LESS."""
    tiles = (steps + CHECKPOINT - 1) // CHECKPOINT
    wanted = min(room // max(blocks, 1), tiles // 2)
    if wanted < 3:
        return 1, tiles

    def less(each: int) -> int:
        return each // FIRST_LESS if shorter else 0

    each = next(n for n in range((tiles + wanted - 1) // wanted, tiles + 1) if n * wanted - less(n) >= tiles)
    return (tiles + less(each) + each - 1) // each, each


class WaveForward(NamedTuple):
    """What the forward wave kernel is specialised on beside its types; see csrc/cuda/wave_forward.cuh."""

    columns: int  # of a block
    softplus: bool
    whole: bool  # columns are full of channels, and lanes of states
    every: int = 1  # as of the wide kernels


def wave_forward_columns(steps: int, columns: int, multiprocessors: int) -> int:
    """How many of so many columns a block has; 0 where routes are too short, or too few to keep a device busy."""
    if steps < WAVE_FORWARD_STEPS or columns < multiprocessors:
        return 0
    times = {n: -(-columns // (n * multiprocessors)) * time for n, time in WAVE_TIMES.items()}
    return min(times, key=times.__getitem__)


class WaveBackward(NamedTuple):
    """What the backward wave kernel is specialised on beside its types; see csrc/cuda/wave_backward.cuh."""

    softplus: bool
    whole: bool  # blocks are full of channels


def wave_fills(steps: int, blocks: int, multiprocessors: int) -> bool:
    """Whether routes are long enough, and so many blocks, one a multiprocessor, leave few of these idle."""
    waves = -(-blocks // multiprocessors)
    return steps >= WAVE_STEPS and 3 * blocks >= 2 * waves * multiprocessors


def wave_rows(steps: int) -> int:
    """Numbers of a block's shares of dB and dC, of whole tiles."""
    return -(-steps // CHECKPOINT) * CHECKPOINT * 2 * WAVE_STATES


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


class Merged(NamedTuple):
    """How a block of the walking kernel that adds up the routes takes them; see csrc/cuda/walk_merged.cuh."""

    run: int  # channels of a lane
    turns: int  # warps that take a route's tiles in turn
    stages: int  # tiles of a warp whose rows are in shared memory or on their way there
    warps: int  # of a multiprocessor, at most: more would leave them too few registers
    routes: int = 4
    rank: int = 0
    sums: str = "Float"  # type of the sums in shared memory

    @property
    def threads(self) -> int:
        return 32 * self.routes * self.turns

    def shared(self, types: Types, tokens: int) -> int:
        """Bytes of shared memory that a block takes."""
        channels, (x, dt, _, _, _), sums = 32 * self.run, map(_bytes, types), _bytes(self.sums)
        results = 16 * channels * sums
        step_sizes = max(64 * (channels + 8), results) if self.rank else 16 * channels * self.stages * dt + results
        state = 4 * channels if self.turns > 1 else 16
        warp = 16 * channels * self.stages * x + step_sizes + 128 + state
        return self.routes * self.turns * warp + self.sums_shared(tokens)

    def sums_shared(self, tokens: int) -> int:
        """What of it holds the sums, whose size is not known when the kernel is compiled."""
        return tokens * 32 * self.run * _bytes(self.sums)

    def blocks(self, types: Types, tokens: int, shared: int) -> int:
        """Blocks that a multiprocessor holds which lends each at most `shared` bytes."""
        return min((shared + 1024) // (self.shared(types, tokens) + 1024), self.warps // (self.routes * self.turns))


class Paired(NamedTuple):
    """The same where a warp takes two of four routes; see csrc/cuda/walk_paired.cuh."""

    rank: int
    turns: int = 5

    @property
    def threads(self) -> int:
        return 32 * (2 * self.turns + 2)

    def shared(self, tokens: int) -> int:
        """Bytes of shared memory that a block takes."""
        warp, barriers = 2048 + 128 + 256 + 256 + 256, 16 * self.turns + 8
        return -(-(2 * self.turns * warp + barriers) // 16) * 16 + self.sums_shared(tokens)

    def sums_shared(self, tokens: int) -> int:
        """What of it holds the sums, for an even number of tokens."""
        return 64 * (tokens + tokens % 2)


#: Ways of adding up routes in their blocks; the first one is taken whose blocks are enough for a multiprocessor.
MERGED = (Merged(2, 1, 2, 12), Merged(2, 2, 1, 8), Merged(1, 2, 1, 8))
MERGED_ENOUGH = 8  # warps, so that loads of some overlap with arithmetic of others
MERGED_MOST = 8  # warps of a block: each has two of sixteen barriers
PAIRED_RANK = 8  # of four times that many columns is what goes to the tensor cores


def merged(types: Types, tokens: int, routes: int, channels: int, rank: int, shared: int) -> Merged | None:
    """How the walking kernel adds up routes in their blocks, or None where a map is too large for that."""

    def held(how: Merged) -> int:
        return how.blocks(types, tokens, shared) * routes * how.turns

    for wanted in MERGED:
        # The weights of a low rank lie in registers.
        how = wanted._replace(routes=routes, rank=rank, warps=MERGED_ENOUGH if rank else wanted.warps)
        # Sums of few routes may be kept in bfloat16, if that is what they become; not in float16, where they overflow.
        short = how._replace(sums="Bfloat" if types[4] == "Bfloat" and routes <= 4 else "Float")
        how = max(how, short, key=held)  # the first of two alike
        fits = routes * how.turns <= MERGED_MOST and channels % (32 * how.run) == 0
        if fits and held(how) >= MERGED_ENOUGH:
            return how
    return None


def paired(types: Types, tokens: int, routes: int, rank: int, shared: int) -> Paired | None:
    """How two routes share a warp, where the types allow it and sums of 32 channels fit once, but not twice."""
    how = Paired(rank)
    sized = all(_bytes(dtype) == 2 for dtype in types[:2]) and types[4] == "Bfloat" and routes == 4
    formed = rank == 0 or (rank <= PAIRED_RANK and types[1] == "Bfloat")
    return how if sized and formed and how.shared(tokens) <= shared < 2 * how.shared(tokens) else None


def fills(blocks: int, room: int) -> bool:
    """Whether so many blocks keep a device busy that holds `room` of them: three quarters of it to the last."""
    return 4 * blocks >= 3 * room * -(-blocks // room)


def _bytes(dtype: str) -> int:
    return 4 if dtype == "Float" else 2


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
    name = "wide_flow" if how.copies else "wide_forward"
    return Specialisation(name, _macros(types, **_wide(how), MERGE=how.merge, ADD=how.add))


def wide_backward(types: Types, how: Wide, dx: str, ddt: str) -> Specialisation:
    exact = types[2:4] != ("Bfloat", "Bfloat")  # dB or dC has more digits than one term on the tensor cores
    shape = how.tile.shape
    more = dict(SUB=min(8, 64 // (shape.slots * shape.states)), TWO_TERMS=exact, DX_TYPE=dx, DDT_TYPE=ddt, ADD=how.add)
    return Specialisation("wide_backward", _macros(types, **_wide(how), **more, SUM_TYPE=sums(*types[2:4])))


def wave_forward(types: Types, how: WaveForward) -> Specialisation:
    sizes = dict(TURNS=WAVE_TURNS, COLUMNS=how.columns, EVERY=how.every)
    return Specialisation("wave_forward", _macros(types, **sizes, SOFTPLUS=how.softplus, WHOLE=how.whole))


def wave_backward(types: Types, how: WaveBackward, dx: str, ddt: str) -> Specialisation:
    exact = types[2:4] != ("Bfloat", "Bfloat")  # dB or dC has more digits than one term on the tensor cores
    flags = dict(TWO_TERMS=exact, SOFTPLUS=how.softplus, WHOLE=how.whole)
    more = dict(DX_TYPE=dx, DDT_TYPE=ddt, SUM_TYPE=sums(*types[2:4]))
    return Specialisation("wave_backward", _macros(types, COLUMNS=WAVE_COLUMNS, **flags, **more))


def sums(B: str, C: str) -> str:
    """Type of the blocks' shares of dB and dC: bfloat16 has the range of float32, and is what their sums become."""
    return "Bfloat" if B == C == "Bfloat" else "Float"


def narrow_forward(types: Types, how: Narrow) -> Specialisation:
    return Specialisation("narrow_forward", _macros(types, **_narrow(how, 3)))


def narrow_backward(types: Types, how: Narrow, dx: str, ddt: str) -> Specialisation:
    return Specialisation("narrow_backward", _macros(types, **_narrow(how, 2), DX_TYPE=dx, DDT_TYPE=ddt))


def walk_forward(types: Types, how: Walk) -> Specialisation:
    ahead = 1 if how.rank and how.run > 1 else 2  # one tile more would leave room for a block less
    return Specialisation("walk_forward", _macros(types, **_walk(how, ahead, WALK_FORWARD)))


def walk_merged(types: Types, how: Merged, blocks: int) -> Specialisation:
    """For so many blocks on a multiprocessor."""
    walk = Walk(how.run, how.routes * how.turns, how.rank)
    macros = _walk(walk, how.stages - 1, blocks * walk.warps) | dict(TURNS=how.turns, SUM_TYPE=how.sums, MERGE=True)
    return Specialisation("walk_merged", _macros(types, **macros))


def walk_paired(types: Types, how: Paired) -> Specialisation:
    macros = _walk(Walk(1, 2 * how.turns, how.rank), 0, 2 * how.turns) | dict(TURNS=how.turns)
    return Specialisation("walk_paired", _macros(types, **macros))


def walk_backward(types: Types, how: Walk, dx: str, ddt: str) -> Specialisation:
    few_digits = types[2:4] == ("Bfloat", "Bfloat")  # of dB and dC: one term on the tensor cores is enough
    more = dict(DX_TYPE=dx, DDT_TYPE=ddt, FEW_DIGITS=few_digits)
    return Specialisation("walk_backward", _macros(types, **_walk(how, 1, walk_held(how.rank)), **more))


def finish(types: tuple[str, str, str], states: int, rank: int, run: int) -> Specialisation:
    """Types of dt, B and C."""
    ddt = types[0] if states == 1 else "Float"
    return Specialisation(
        "finish",
        _macros(("Float", *types, "Float"), STATES=states, RANK=rank, RUN=run, DDT_TYPE=ddt, SUM_TYPE=sums(*types[1:])),
    )


def merge(part: str, out: str, run: int, add: bool = False) -> Specialisation:
    """`add`: to what is there."""
    return Specialisation("merge", _macros((part, "Float", "Float", "Float", out), RUN=run, ADD=add))


def on_tensor_cores(rank: int, dt: str) -> bool:
    """Whether the kernels for one state or for few sequences can form a low-rank step size on the tensor cores, where
    the GPU has those for bfloat16; the wide kernels can in every type."""
    return rank > 0 and dt == "Bfloat"


def _wide(how: Wide) -> dict[str, Any]:
    shape, warps, blocks = how.tile
    sizes = dict(LANES=shape.lanes, STATES=shape.states, SLOTS=shape.slots, WARPS=warps, MIN_BLOCKS=blocks)
    sizes |= dict(RANK=how.rank, PASS=how.part, EVERY=how.every)
    flags = dict(SOFTPLUS=how.softplus, VECTOR_X=how.vector_x, VECTOR_BC=how.vector_bc)
    flags |= dict(VECTOR_RANK=how.vector_rank, TENSOR_RANK=how.tensor_rank, TOKENS_FIRST=how.tokens_first)
    return sizes | flags | dict(COPIES=how.copies, LONG=how.long, WHOLE=how.whole)


def _narrow(how: Narrow, blocks: int) -> dict[str, Any]:
    sizes = dict(STEPS=how.steps, MAX_WARPS=how.warps, MIN_BLOCKS=1 if how.warps > 4 else blocks, RANK=how.rank)
    flags = dict(SOFTPLUS=how.softplus, MERGE=how.merge, WHOLE=how.whole)
    flags |= dict(VECTOR=how.vector, VECTOR_RANK=how.vector_rank, TENSOR=how.tensor_rank)
    return sizes | flags


def _walk(how: Walk, ahead: int, held: int) -> dict[str, Any]:
    sizes = dict(RUN=how.run, WARPS=how.warps, RANK=how.rank, PASS=how.part, AHEAD=ahead, ITEMS=how.items)
    return sizes | dict(MIN_BLOCKS=held // how.warps, SOFTPLUS=True, MERGE=False)


def _macros(types: Types, **more: Any) -> tuple[tuple[str, str], ...]:
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


def _many(rank: int, **more: Any) -> Wide:
    """Of many sequences, going back."""
    return _shipped(backward_tile(16, 2**17), rank)._replace(copies=rank == 0, whole=True, **more)


#: What the published models run: compiled for every architecture by the tests, and warmed by the doctor.
SHIPPED = (
    walk_forward(_HALF, Walk(2, 3, 12)),
    walk_merged(_HALF, Merged(1, 2, 1, 8, rank=6, sums="Bfloat"), 1),
    walk_merged(_HALF, Merged(2, 1, 2, 12), 3),
    walk_paired(_HALF, Paired(0)),
    walk_paired(_HALF, Paired(6)),
    walk_merged(_HALF, Merged(2, 2, 1, 8, rank=12, sums="Bfloat"), 1),
    walk_forward(_FULL, Walk(1, 3, 0, 1)),
    walk_backward(_HALF, Walk(1, 3, 6), "Bfloat", "Bfloat"),
    walk_backward(_HALF, Walk(1, 4, 48, items=4), "Bfloat", "Bfloat"),
    walk_backward(_FULL, Walk(1, 3, 0, 2), "Float", "Float"),
    narrow_forward(_FULL, Narrow(8, 8, 0, True, False, False, True, False, False)),
    narrow_backward(_HALF, Narrow(7, 4, 6, True, True, True, True, True, True), "Bfloat", "Bfloat"),
    *(wide_forward(_HALF, _shipped(forward_tiles(16)[0], rank)) for rank in (0, 24)),
    *(
        wide_forward(_HALF, _shipped(forward_tiles(16)[1], rank)._replace(copies=True, add=True, whole=True))
        for rank in (0, 24)
    ),
    wide_forward(_FULL, _shipped(forward_tiles(64)[0], 0)),
    wide_backward(_HALF, _shipped(backward_tile(16, 2**17), 24)._replace(whole=True), "Bfloat", "Bfloat"),
    wide_backward(_HALF, _many(0), "Bfloat", "Bfloat"),
    *(wide_backward(_HALF, _many(rank, add=True), "Bfloat", "Bfloat") for rank in (0, 24)),
    wide_backward(_HALF, _many(0, add=True, every=2), "Bfloat", "Bfloat"),
    wave_forward(_HALF, WaveForward(3, True, True)),
    wave_forward(_FULL, WaveForward(2, True, False)),
    wave_backward(_HALF, WaveBackward(True, True), "Bfloat", "Bfloat"),
    finish(("Bfloat",) * 3, 1, 6, 8),
    finish(("Bfloat",) * 3, 16, 24, 8),
    merge("Bfloat", "Bfloat", 8),
    merge("Bfloat", "Bfloat", 8, add=True),
)
