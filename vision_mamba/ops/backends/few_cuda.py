"""How few sequences are taken: clusters of blocks whose warps share out time, in one launch a pass.

Warps are what a choice is about: a cluster has 8 channels of a sequence, or of all routes that are added up, and each
warp takes 64 steps at a time. More warps leave fewer rounds, as long as the device has room for them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor

from vision_mamba.ops.backends import cuda_kernels as kernels
from vision_mamba.ops.backends.cuda_kernels import Types, vector
from vision_mamba.ops.backends.nvrtc import Specialisation
from vision_mamba.ops.call import ScanCall

CHANNELS = 8  # of a cluster
SEGMENT = 8  # steps, before each of which the state is saved
_WARP_STEPS = 64
_CLUSTERS = (1, 2, 4, 8)  # blocks; more than 8 no device promises
_WARPS = (1, 2, 4, 8)  # of a block
_MANY_WARPS = 13  # x 64 steps are a map of 28 x 28, or a quarter of one of 56 x 56; they leave registers for one state
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

    def clusters(self, call: ScanCall) -> int:
        return call.batch * tiles(call) * (1 if self.merge else call.routes)

    def sum_shared(self, tokens: int) -> int:
        """Bytes for the sum over routes."""
        return 4 * self.routes * CHANNELS * -(-tokens // self.cluster) if self.merge else 0

    def shared(self, call: ScanCall, back: bool) -> int:
        """Bytes of shared memory that a block takes at most, see BlockMemory."""
        elements = self.states * CHANNELS
        rows = _WARP_STEPS * self.states * (call.B.element_size() + call.C.element_size())
        warp = 512 + rows + 4 * elements + 256 * self.states + 16 * elements + 16
        if back:
            warp += 4 * (elements + 2 * CHANNELS + -(-self.rank // 8) * 64) + (2 * rows if self.states > 1 else 0)
        return self.warps * (warp + 8 * elements) + 16 * self.span * elements + 64 + self.sum_shared(call.tokens)


def takes(states: int, lanes: Any, steps: Any) -> Any:
    """Whether so many sequences of a channel, each of so many steps, are few: within these bounds this was the faster
    way on an H200, at batch 1 of the published models forwards by a third, at batch 8 it was not. In longer routes the
    errors of slow states would add up, see csrc/README.md."""
    work = lanes * steps
    return states <= 16 and lanes < 4096 and steps <= 16384 and work < 2**22 and work * states < 2**24


def fits(call: ScanCall, limit: int) -> bool:
    """Whether the smallest block, of one warp and no sum over routes, has room for a call in both passes."""
    least = Few(call.states, 1, 1, 1, False, call.rank, True, False, False, True, 1, False)
    return least.shared(call, True) <= limit


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
    call: ScanCall, merge: bool, clusters: bool, in_order: bool, back: bool, out: Tensor, *more: Tensor
) -> Iterator[Few]:
    """Ways to take a call.

    Args:
        merge: routes are added up in the cluster.
        clusters: blocks can be joined to clusters.
        out: what the sum over routes goes into.
        more: what else is read or written channel by channel, beside x and dt.
    """
    across = (call.x, out, *more, *(() if call.rank else (call.dt,)))
    along = in_order and call.rank == 0 and call.steps % SEGMENT == 0 and _along(call.B, call.C, *across)
    row_run = next((n for n in (8, 4, 2) if call.states % n == 0 and vector(n, call.B, call.C)), 1)
    for cluster in _CLUSTERS if clusters else (1,):
        for warps in (*_WARPS, _MANY_WARPS) if call.states == 1 and not back else _WARPS:
            how = Few(
                call.states, warps, cluster, call.routes if merge else 1, merge, call.rank, call.dt_softplus,
                vector(2, *across), along, not in_order, row_run, vector(4, out),
            )  # fmt: skip
            if how.possible():
                yield how


def choose(call: ScanCall, ways: Iterator[Few], back: bool, processors: int, limit: int) -> Few | None:
    """The way that takes least time by `cycles`, if a block's shared memory is within the limit in any."""
    fit = [how for how in ways if how.shared(call, back) <= limit]
    return min(fit, key=lambda how: cycles(how, call, back, processors, limit), default=None)


def cycles(how: Few, call: ScanCall, back: bool, processors: int, limit: int) -> float:
    """What a way takes, about, from what a warp executes in a round (counted in machine code) and what it waits for."""
    states = how.states
    if states == 1:
        instructions = 2100 if back else 1100
    elif states <= 4:
        instructions = 2000 + 270 * states if back else 1000 + 200 * states
    else:
        instructions = 2000 + 580 * states if back else 1000 + 265 * states
    registers = 255 if back else 200 if states > 1 else 128 if how.warps == _MANY_WARPS else 145
    held = max(1, min(_REGISTERS // (registers * 32 * how.warps), limit // how.shared(call, back)))
    busiest = -(-how.clusters(call) * how.cluster // processors)  # blocks of the multiprocessor that has most
    at_once = min(held, busiest)
    # Four schedulers; one warp alone waits for its own results half of the time.
    computing = instructions * max(2.0, 1.25 * at_once * how.warps / 4)
    waiting = 1500 + (700 if how.span > 1 else 0)
    rounds = -(-call.steps // (how.route_warps * _WARP_STEPS))
    return -(-busiest // held) * (4000 + (1000 if how.cluster > 1 else 0) + rounds * (computing + waiting))


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
