"""How few sequences are taken: clusters of blocks whose warps share out time, in one launch a pass.

Warps are what a choice is about: a cluster has 8 channels of a sequence, or of all routes that are added up, and each
warp takes 64 steps at a time. More warps leave fewer rounds, as long as the device has room for them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vision_mamba.ops.backends import cuda_kernels as kernels
from vision_mamba.ops.backends import gpu, nvrtc
from vision_mamba.ops.backends.cuda_kernels import TYPES, Types, vector
from vision_mamba.ops.backends.nvrtc import Specialisation
from vision_mamba.ops.call import ScanCall

CHANNELS = 8  # of a cluster, or of each of those that it takes together
SAVED = 64  # steps between two states that are saved
_SEGMENTS = 8  # of a warp
_STEPS = 8  # of a segment
_FEW_STEPS, _HELD = 4, 4  # of a segment, where a lane goes through it once more with up to so many held states
_CLUSTERS = (1, 2, 4, 8, 16)  # blocks
_WARPS = (1, 2, 4, 8)  # of a block
# Of a block that scans one state forwards, which leaves them registers: 13 x 64 steps are a map of 28 x 28, or a
# quarter of one of 56 x 56.
_MORE_WARPS = (7, 13)
_REGISTERS = 65536  # of a multiprocessor


class Few(NamedTuple):
    """What the kernels are specialised on beside their types; see csrc/cuda/few.cuh."""

    states: int
    warps: int  # of a block
    cluster: int  # blocks
    routes: int  # of a cluster
    merge: bool  # they are added up
    rank: int
    softplus: bool
    vector: bool  # channels are neighbours, pairs aligned
    along: bool  # tokens are neighbours, eights aligned, in the order of the routes
    table: bool  # a table gives their order
    row_run: int  # states of B and C that are read together
    merge_vector: bool  # four channels of what routes are added up into are neighbours and aligned
    steps: int = 8  # of a segment
    together: int = 1  # groups of channels of a cluster, whose shares of sums over channels are added up
    once: bool = False  # one round is enough
    chain: bool = False  # blocks take one round each, and leave the state to the next one
    whole_rows: bool = False  # a cluster has all channels: what it sums up over them are the gradients of B and C

    @property
    def route_warps(self) -> int:
        return self.cluster * self.warps // self.routes

    @property
    def span(self) -> int:
        """Blocks of a route."""
        return max(1, self.route_warps // self.warps)

    def possible(self) -> bool:
        """Whether warps can be dealt out evenly."""
        whole, part = self.route_warps, min(self.route_warps, self.warps)
        return self.cluster * self.warps % self.routes == 0 and whole % part == 0 and self.warps % part == 0

    @property
    def warp_steps(self) -> int:
        return _SEGMENTS * self.steps

    def rounds(self, call: ScanCall) -> int:
        """As often a route's warps begin anew; of a chain, its blocks."""
        return -(-call.steps // (self.route_warps * self.warp_steps))

    @property
    def joined(self) -> int:
        """Blocks of a cluster."""
        return self.cluster * self.together

    def clusters(self, call: ScanCall) -> int:
        each = call.batch * tiles(call) // self.together * (1 if self.merge else call.routes)
        return each * (self.rounds(call) if self.chain else 1)

    def grid(self, call: ScanCall) -> int:
        return self.clusters(call) * self.joined

    def words(self, call: ScanCall) -> int:
        """For the states that blocks leave to each other."""
        return self.grid(call) * self.states * CHANNELS if self.chain else 0

    def sum_shared(self, tokens: int) -> int:
        """Bytes for the sum over routes."""
        return 4 * self.routes * CHANNELS * -(-tokens // self.cluster) if self.merge else 0

    def shared(self, call: ScanCall, back: bool) -> int:
        """Bytes of shared memory that a block takes at most, see BlockMemory."""
        elements, steps = self.states * CHANNELS, self.warp_steps
        rows = steps * self.states * (call.B.element_size() + call.C.element_size())
        turns = 1 if self.once or self.chain else 2
        warp = 8 * steps + rows + 4 * elements + 256 * self.states + 8 * turns * elements + 16
        if back:
            half = call.B.dtype == call.C.dtype == torch.bfloat16 and self.together == 1
            warp += 4 * (2 * elements + 2 * CHANNELS + -(-self.rank // 8) * 64)
            if self.states > 1 or self.together > 1:
                warp += 2 * (steps + 2) * self.states * (2 if half else 4)
            if self.together > 1:
                warp += steps * self.rank * (4 if self.states > 1 else call.dt.element_size())
        carry = 8 * elements * (self.warps // min(self.route_warps, self.warps))
        return self.warps * warp + carry + 16 * self.span * elements + 80 + self.sum_shared(call.tokens)


def takes(states: int, lanes: Any, steps: Any) -> Any:
    """Whether so many sequences of a channel, each of so many steps, are few: within these bounds this was the faster
    way on an H200, at batch 1 of the published models and over one sequence of up to 65,536 steps; at batch 8 it was
    not."""
    work = lanes * steps
    if states > 16 or lanes >= 4096:
        return False
    return (work < 2**22 and work * states < 2**24) or (lanes <= 512 and work * states <= 2**26)


def goes_back(states: int, lanes: Any, steps: Any) -> Any:
    """Whether so many sequences are few for the backward pass alone, where that takes longer than the wide kernels do,
    but half of their memory or less, and less time than published kernels: small batches of short sequences, and many
    states."""
    of_two = 16 <= states <= 64 and states & (states - 1) == 0  # as the wide kernels save them
    return of_two and lanes < 2**14 and (steps <= 256 or states > 16) and lanes * steps * states <= 2**26


def takes_call(call: ScanCall, back: bool = False) -> bool:
    """Whether the kernels for few sequences take a call, or its backward pass, by sizes, types and device alone: how
    much of the states is saved hangs on it, and has to be known where tensors have no addresses."""
    sizes = (call.states, call.batch * call.routes * call.channels, call.steps)
    low_rank = 0 < call.rank <= kernels.MAX_RANK  # beyond, it is multiplied out
    if not (takes(*sizes) or (back and goes_back(*sizes) and (call.states <= 16 or not low_rank))):
        return False  # with more states a low rank's gradient is not multiplied in the kernels
    device = call.x.device.index
    if low_rank:
        on_cores = kernels.on_tensor_cores(call.rank, TYPES.get(call.dt.dtype, ""))
        if call.rank % 2 or not on_cores or gpu.capability(device) < (8, 0):
            return False
    return fits(call, nvrtc.shared_limit(device))


def fits(call: ScanCall, limit: int) -> bool:
    """Whether the smallest block, of one warp and no sum over routes, has room for a call in both passes."""
    rank = call.rank if call.rank <= kernels.MAX_RANK else 0
    least = Few(call.states, 1, 1, 1, False, rank, True, False, False, True, 1, False)
    return least.shared(call, True) <= limit


def saved(call: ScanCall) -> tuple[int, ...]:
    """The shape of the states that are saved; before the first step it is the initial one."""
    return (call.batch, call.routes, (call.steps - 1) // SAVED, call.channels, call.states)


def tiles(call: ScanCall) -> int:
    """Clusters for the channels of a route."""
    return -(-call.channels // CHANNELS)


def forward(types: Types, how: Few) -> Specialisation:
    return Specialisation("few_forward", kernels._macros(types, **_fields(how)))


def backward(types: Types, how: Few, dx: str, ddt: str, total: str) -> Specialisation:
    return Specialisation(
        "few_backward", kernels._macros(types, **_fields(how), DX_TYPE=dx, DDT_TYPE=ddt, SUM_TYPE=total)
    )


def _fields(how: Few) -> dict[str, Any]:
    return {name.upper(): value for name, value in how._asdict().items()}


def options(
    call: ScanCall, merge: bool, largest: int, in_order: bool, back: bool, out: Tensor, *more: Tensor
) -> Iterator[Few]:
    """Ways to take a call.

    Args:
        merge: routes are added up in the cluster.
        largest: blocks that can be joined to a cluster, 8 or 16; 1 where none can.
        out: what the sum over routes goes into.
        more: what else is read or written channel by channel, beside x and dt.
    """
    across = (call.x, out, *more, *(() if call.rank else (call.dt,)))
    along = in_order and call.rank == 0 and call.steps % 8 == 0 and _along(call.B, call.C, *across)
    row_run = next((n for n in (8, 4, 2) if call.states % n == 0 and vector(n, call.B, call.C)), 1)
    one = Few(
        call.states, 1, 1, call.routes if merge else 1, merge, call.rank, call.dt_softplus, vector(2, *across), along,
        not in_order, row_run, vector(4, out),
    )  # fmt: skip
    one_forwards = call.states == 1 and not back
    lengths = (_FEW_STEPS, _STEPS) if 1 < call.states <= _HELD and not back else (_STEPS,)
    for cluster, steps in itertools.product((n for n in _CLUSTERS if n <= min(largest, 8)), lengths):
        # Of 16 blocks none share steps with seven others: that took longer than it saved.
        most = (largest if cluster < 8 else 8) // cluster if back else 1
        together = (n for n in reversed(_CLUSTERS) if n <= most and tiles(call) % n == 0)
        for n, warps in itertools.product(together, (*_WARPS, *(_MORE_WARPS if one_forwards else ()))):
            how = one._replace(warps=warps, cluster=cluster, together=n, steps=steps)
            if how.possible():
                how = how._replace(once=how.rounds(call) == 1, whole_rows=n > 1 and n == tiles(call))
                if merge or how.once:
                    yield how
            if not merge and cluster == 1 and warps in _WARPS and steps == _STEPS:
                yield how._replace(chain=True, once=False)


def choose(call: ScanCall, ways: Iterator[Few], back: bool, processors: int, limit: int) -> Few | None:
    """The way that takes least time by `cycles`, if a block's shared memory is within the limit in any; of chains that
    of the largest blocks."""
    fit = [how for how in ways if how.shared(call, back) <= limit]
    link = max((how.warps for how in fit if how.chain), default=0)
    fit = [how for how in fit if not how.chain or how.warps == link]
    return min(fit, key=lambda how: cycles(how, call, back, processors, limit), default=None)


def cycles(how: Few, call: ScanCall, back: bool, processors: int, limit: int) -> float:
    """What a way takes, about, from what a warp executes in a round (counted in machine code), what it waits for, and
    what was measured on an H200."""
    states = how.states
    if states == 1:
        instructions = 4200 if back else 1100
    elif states <= _HELD:
        instructions = 4000 + 540 * states if back else 1000 + (265 if how.chain else 200) * states
    else:
        instructions = 4000 + 1160 * states if back else 1000 + 265 * states
    registers = 255 if back else 128 if how.chain or how.warps > 8 else 200 if states > 1 else 145
    held = max(1, min(_REGISTERS // (registers * 32 * how.warps), limit // how.shared(call, back)))
    busiest = -(-how.grid(call) // processors)  # blocks of the multiprocessor that has most
    # Four schedulers; one warp alone waits for its own results half of the time and more.
    part = 0.6 if how.steps == _FEW_STEPS else 1.0
    computing = part * instructions * max(2.7 if back else 2.0, 1.35 * min(held, busiest) * how.warps / 4)
    waiting = 1500 + (500 + 200 * states if how.span > 1 else 0)
    begin = 4000 + (1800 if how.cluster > 1 else 0)
    if how.merge and how.cluster > 1:  # what the routes send to a block goes through a bottleneck
        begin += 4 * CHANNELS * how.routes * call.tokens // how.cluster // 8
    waves = -(-busiest // held)
    # Going back, shares of sums over channels are added up one after the other; and they take memory.
    adding = 700 * (tiles(call) // how.together) if back else 0
    if how.chain:
        links, one = how.rounds(call), computing + waiting
        return begin + adding + max(waves * (begin + one), 1000 * links + one)
    return adding + waves * (begin + how.rounds(call) * (computing + waiting))


def _along(*tensors: Tensor) -> bool:
    """Whether eight neighbouring tokens can be read at once of all."""
    for tensor in tensors:
        each = 16 // tensor.element_size()
        apart = (tensor.stride(axis) for axis in range(tensor.dim()) if axis != 1)
        if tensor.stride(1) != 1 or tensor.data_ptr() % 16 or any(stride % each for stride in apart):
            return False
    return True


def _shipped(states: int, routes: int, rank: int, warps: int) -> Few:
    row_run = min(states, 8)
    return Few(states, warps, 1, routes, True, rank, True, True, False, True, row_run, True)


_HALF: Types = ("Bfloat",) * 5

#: What published models run at batch 1 where blocks are not joined; see cuda_kernels.SHIPPED.
SHIPPED = (
    forward(_HALF, _shipped(1, 4, 48, 4)),
    backward(_HALF, _shipped(16, 2, 24, 8), "Bfloat", "Float", "Bfloat"),
)
