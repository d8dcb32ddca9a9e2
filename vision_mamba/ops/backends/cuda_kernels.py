"""Which specialisation of csrc/cuda a scan takes: functions of its sizes, types and strides; and what is shipped."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from vision_mamba.ops.backends.nvrtc import Specialisation

TYPES = {torch.float32: "Float", torch.float16: "Half", torch.bfloat16: "Bfloat"}
MAX_RANK = 64  # columns of a low-rank step size that the kernels multiply themselves
CHECKPOINT = 16  # steps between two states that the wide kernels save
WARPS = 4  # of a block of the wide kernels
FORWARD_BLOCKS = 4  # of the wide forward kernel that a multiprocessor holds
BACKWARD_WARPS = 12  # of the wide backward kernel
NARROW_CHANNELS = 16  # of a block of the narrow kernels
WALK_WARPS = 12  # of the walking kernels that a multiprocessor has at least where routes are taken in segments

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


class Wide(NamedTuple):
    """What a wide kernel is specialised on beside its types."""

    shape: Shape
    warps: int
    rank: int
    softplus: bool
    vector_x: bool  # channels are neighbours, aligned, a multiple of a run
    vector_bc: bool  # so are states, as many as lanes hold
    vector_rank: bool  # and pairs of columns of a low-rank step size
    tensor_rank: bool  # which is multiplied on the tensor cores
    tokens_first: bool  # tokens are neighbours in memory, channels are not
    part: int = 0  # of two kernels over a route in segments, or 0


def wide_segments(steps: int, blocks: int, room: int) -> tuple[int, int]:
    """Segments a route is taken in, and tiles of a segment: at least three, fewer do not pay for the first launch."""
    tiles = (steps + CHECKPOINT - 1) // CHECKPOINT
    wanted = min(room // max(blocks, 1), tiles // 2)
    if wanted < 3:
        return 1, tiles
    per_segment = (tiles + wanted - 1) // wanted
    return (tiles + per_segment - 1) // per_segment, per_segment


def backward_warps(shape: Shape, shared: int) -> int:
    """Warps of a block of the wide backward kernel, of which the rows of many states leave fewer the shared memory."""
    row = shape.lanes * shape.states
    if row <= 64:
        return WARPS if row < 64 or shared >= 128 * 1024 else WARPS // 2
    return 1


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
    rank: int
    part: int = 0  # of two kernels over a route in segments, or 0


def walks(sequences: Any, channels: Any) -> bool:
    """Whether the walking kernels are the faster ones; they take 32 channels at a time."""
    return False


def walk_run(channels: int, rank: int) -> int:
    """Channels of a lane going forwards: two save loads, where sequences and registers are plenty."""
    return 2 if channels % 64 == 0 and rank <= 16 else 1


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
    few_digits = types[3:] == ("Bfloat", "Bfloat")  # then tensor cores are exact enough for <C, h>
    return Specialisation("wide_forward", _macros(types, **_wide(how), MIN_BLOCKS=FORWARD_BLOCKS, TENSOR_Y=few_digits))


def wide_backward(types: Types, how: Wide, dx: str, ddt: str) -> Specialisation:
    exact = types[2:4] != ("Bfloat", "Bfloat")  # dB or dC has more digits than one term on the tensor cores
    more = dict(
        MIN_BLOCKS=BACKWARD_WARPS // how.warps, SUB=min(8, 64 // (how.shape.slots * how.shape.states)), TWO_TERMS=exact
    )
    return Specialisation("wide_backward", _macros(types, **_wide(how), **more, DX_TYPE=dx, DDT_TYPE=ddt))


def narrow_forward(types: Types, how: Narrow) -> Specialisation:
    return Specialisation("narrow_forward", _macros(types, **_narrow(types, how, 3)))


def narrow_backward(types: Types, how: Narrow, dx: str, ddt: str) -> Specialisation:
    return Specialisation("narrow_backward", _macros(types, **_narrow(types, how, 2), DX_TYPE=dx, DDT_TYPE=ddt))


def walk_forward(types: Types, how: Walk) -> Specialisation:
    return Specialisation("walk_forward", _macros(types, **_walk(how, ahead=2, blocks=4)))


def walk_backward(types: Types, how: Walk, dx: str, ddt: str) -> Specialisation:
    few_digits = types[2:4] == (
        "Bfloat",
        "Bfloat",
    )  # of dB and dC: one term on the tensor cores is enough
    more = dict(DX_TYPE=dx, DDT_TYPE=ddt, FEW_DIGITS=few_digits)
    return Specialisation("walk_backward", _macros(types, **_walk(how, ahead=2, blocks=3), **more))


def finish(types: tuple[str, str, str], states: int, rank: int, run: int) -> Specialisation:
    """Types of dt, B and C."""
    ddt = types[0] if states == 1 else "Float"
    return Specialisation(
        "finish", _macros(("Float", *types, "Float"), STATES=states, RANK=rank, RUN=run, DDT_TYPE=ddt)
    )


def merge(part: str, out: str, run: int) -> Specialisation:
    return Specialisation("merge", _macros((part, "Float", "Float", "Float", out), RUN=run))


def on_tensor_cores(rank: int, dt: str) -> bool:
    """Whether kernels can form a low-rank step size on the tensor cores, where the GPU has those for bfloat16."""
    return rank > 0 and dt == "Bfloat"


def _wide(how: Wide) -> dict[str, Any]:
    shape = how.shape
    sizes = dict(LANES=shape.lanes, STATES=shape.states, SLOTS=shape.slots, WARPS=how.warps, RANK=how.rank)
    sizes |= dict(PASS=how.part)
    flags = dict(SOFTPLUS=how.softplus, VECTOR_X=how.vector_x, VECTOR_BC=how.vector_bc)
    return sizes | flags | dict(VECTOR_RANK=how.vector_rank, TENSOR_RANK=how.tensor_rank, TOKENS_FIRST=how.tokens_first)


def _narrow(types: Types, how: Narrow, blocks: int) -> dict[str, Any]:
    sizes = dict(STEPS=how.steps, MAX_WARPS=how.warps, MIN_BLOCKS=1 if how.warps > 4 else blocks, RANK=how.rank)
    flags = dict(SOFTPLUS=how.softplus, MERGE=how.merge, WHOLE=how.whole)
    flags |= dict(VECTOR=how.vector, VECTOR_RANK=how.vector_rank, TENSOR=how.tensor_rank)
    return sizes | flags


def _walk(how: Walk, ahead: int, blocks: int) -> dict[str, Any]:
    sizes = dict(RUN=how.run, RANK=how.rank, PASS=how.part, WARPS=WARPS, AHEAD=ahead, MIN_BLOCKS=blocks)
    return sizes | dict(SOFTPLUS=True)


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

#: What the published models run: compiled for every architecture by the tests, and warmed by the doctor.
SHIPPED = (
    narrow_forward(_HALF, Narrow(7, 4, 6, True, True, True, True, True, True)),
    narrow_forward(_FULL, Narrow(8, 8, 0, True, False, False, True, False, False)),
    narrow_backward(_HALF, Narrow(7, 4, 6, True, True, True, True, True, True), "Bfloat", "Bfloat"),
    wide_forward(_HALF, Wide(wide_shape(16, 2), WARPS, 0, True, True, True, False, False, False)),
    wide_forward(_HALF, Wide(wide_shape(16, 2), WARPS, 24, True, True, True, True, True, False)),
    wide_forward(_FULL, Wide(wide_shape(64, 2), WARPS, 0, True, True, True, False, False, False)),
    wide_backward(_HALF, Wide(wide_shape(16, 2), WARPS, 0, True, True, True, False, False, False), "Bfloat", "Bfloat"),
    wide_backward(_HALF, Wide(wide_shape(16, 2), WARPS, 24, True, True, True, True, True, False), "Bfloat", "Bfloat"),
    finish(("Bfloat",) * 3, 1, 6, 8),
    finish(("Bfloat",) * 3, 16, 24, 8),
    merge("Bfloat", "Bfloat", 8),
)
