"""Plans of launches, made once for a kind of call, and where the routes' shares of a result go."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vision_mamba.ops.backends.launch import Launch
from vision_mamba.ops.call import ScanCall

HEADER = "params.cuh"


class Plan(NamedTuple):
    scan: Launch
    merging: bool  # the kernel adds the routes up itself
    parts: torch.dtype | None  # type of the routes' shares that are added up afterwards, or None
    edges: Launch | None = None  # what goes before the scan where routes are taken in segments
    segments: int = 1
    groups: int = 1  # of channels, whose shares of a backward pass's sums over channels are added up
    items: int = 1  # of the batch, of whose sums over the batch there is one share
    first: bool = False  # the first route's share is written where the result goes, and those of others added to it
    apart: int = 0  # shares of a sum over routes, where kernels are told
    blocks: int = 0  # where blocks wait for others: how many there are, or what they count
    whole_rows: bool = False  # the gradients of B and C are written as they are wanted
    middle: bool = False  # states between two that were saved need a place in memory
    rows: int = 0  # numbers of blocks' shares of `whole_rows`, where the kernel adds up those and all of the batch too


def adding_up(
    call: ScanCall, wanted: bool, result: Tensor, in_block: bool, first: bool
) -> tuple[torch.dtype | None, bool, Tensor]:
    """How routes are added up into a result.

    Args:
        wanted: they are.
        in_block: a block can do it by itself.
        first: the kernel can write the first route's share where the result goes.
    Returns:
        The type of the routes' shares or None, whether a block does it, and the result, or its shares, as the kernel
        sees them: (B, L, K, D).
    """
    if not wanted:
        return None, False, result
    if call.routes == 1 or in_block:
        return None, call.routes > 1, result.unsqueeze(2)
    parts = parts_type(result)
    shares = call.routes - (first and goes_first(parts, result))
    return parts, False, torch.empty(parts_shape(call, shares), dtype=parts, device="meta").transpose(1, 2)


def parts_type(result: Tensor) -> torch.dtype:
    """Of the routes' shares of a result: not float16, where a share can overflow though the sum does not."""
    return torch.bfloat16 if result.dtype == torch.bfloat16 else torch.float32


def goes_first(parts: torch.dtype | None, result: Tensor) -> bool:
    """Whether the walking and the wide kernels write the first route's share where the result goes."""
    return parts == result.dtype and result.is_contiguous()


def new_parts(call: ScanCall, plan: Plan) -> Tensor:
    return call.x.new_empty(parts_shape(call, (plan.apart or call.routes) - plan.first), dtype=plan.parts)


def parts_shape(call: ScanCall, shares: int) -> tuple[int, ...]:
    """Shape of the routes' shares of a result: each route's in one piece, since they are written route by route."""
    return (call.batch, shares, call.tokens, call.channels)


def new_edges(call: ScanCall, segments: int) -> dict[str, Tensor]:
    shape = (call.batch, call.routes, segments, call.channels)
    edges = call.A.new_empty((*shape, 1 << (call.states - 1).bit_length()))
    return dict(edges=edges, spans=call.A.new_empty(shape))
