"""A scan's call as the CUDA kernels take it: its tensors, what decides its plan, its fields of struct Params."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vision_mamba.constants import Constants
from vision_mamba.ops.backends import cuda_kernels as kernels
from vision_mamba.ops.backends import few_cuda as few
from vision_mamba.ops.backends import gpu
from vision_mamba.ops.backends.cuda_kernels import TYPES, vector
from vision_mamba.ops.backends.launch import is_whole, whole
from vision_mamba.ops.call import ScanCall

SMALL = ("A", "D", "dt_weight", "dt_bias", "initial_state")  # the kernels take these `whole`
ROWS = ("x", "dt", "B", "C")  # what every token has of its own


def as_taken(call: ScanCall) -> ScanCall:
    """The call as the kernels take it: small tensors `whole`, no tokens that are far from each other, no low-rank step
    size of a high rank, one of few sequences in aligned pairs.

    What this makes lives as long as the call, which is as long as kernels are being launched.
    """
    changed: dict[str, Any] = {}
    for name in SMALL:
        tensor = getattr(call, name)
        if tensor is not None and not is_whole(tensor):
            changed[name] = whole(tensor)
    for name in ROWS:
        if is_far(getattr(call, name)):
            changed[name] = getattr(call, name).contiguous()
    if call.indices is None:
        changed["indices"] = tables_in_order.get(call.x.device, call.routes, call.tokens)
    elif not call.indices.is_contiguous():
        changed["indices"] = call.indices.contiguous()
    if is_realigned(call):
        changed["dt"] = call.dt.clone(memory_format=torch.contiguous_format)
    if changed:
        call = call._replace(**changed)
    if call.rank > kernels.MAX_RANK:  # a matrix product does it better
        assert call.dt_weight is not None
        dt = torch.einsum("blkr,kdr->blkd", call.dt.float(), call.dt_weight)
        call = call._replace(dt=dt, dt_weight=None)
    return call


def is_far(tensor: Tensor) -> bool:
    """Whether the bytes from one token to the next do not fit the 32 bits that kernels have for them."""
    return tensor.stride(1) * tensor.element_size() >= 2**31


def is_realigned(call: ScanCall) -> bool:
    """Whether a low-rank step size is copied, for the sake of kernels that read its columns in pairs."""
    return call.rank > 0 and not vector(2, call.dt) and few.takes_call(call, back=True)


def is_in_order(call: ScanCall) -> bool:
    """Of a prepared call."""
    return call.indices is tables_in_order.made(call.x.device, call.routes, call.tokens)


def _make_in_order(device: torch.device, routes: int, tokens: int) -> Tensor:
    """The table of routes that visit tokens in their order."""
    return torch.arange(tokens, device=device, dtype=torch.int32).repeat(routes, 1)


def plan_key(call: ScanCall, complete: bool) -> tuple[Any, ...]:
    """All that a plan depends on."""
    tensors = tuple((t.dtype, t.shape, t.stride(), t.data_ptr() & 15) for t in (call.x, call.dt, call.B, call.C))
    flags = (call.dt_softplus, call.merge, call.out_dtype, call.rank, call.A.shape, call.steps)
    return (call.x.device.index, tensors, flags, complete, is_in_order(call))


def saved_every(call: ScanCall) -> int:
    """Tiles between two states that kernels of several states save: as many as those need that take the call back."""
    if few.takes_call(call, back=True):
        return few.SAVED // kernels.CHECKPOINT
    every: int = kernels.wide_every(call.batch * call.routes, call.channels)
    return every


def tokens_first(call: ScanCall) -> bool:
    return call.x.stride(1) == 1 != call.x.stride(-1)


def rank_in_kernel(call: ScanCall) -> bool:
    """Whether backward leaves the gradients of a low-rank step size and of its weights, not that of the step size."""
    if not call.rank or gpu.capability(call.x.device.index) < (8, 0):
        return False
    if call.states == 1:  # the wide kernels alone take other types than bfloat16
        return kernels.on_tensor_cores(call.rank, TYPES[call.dt.dtype])
    return kernels.wide_shape(call.states, 2).channels % 8 == 0


def types_of(call: ScanCall) -> tuple[str, str, str, str]:
    return TYPES[call.x.dtype], TYPES[call.dt.dtype], TYPES[call.B.dtype], TYPES[call.C.dtype]


def sizes(call: ScanCall) -> dict[str, int]:
    """Fields of struct Params that both passes fill alike."""
    x = call.x.unsqueeze(2).expand(-1, -1, call.routes, -1) if call.shared_x else call.x
    fields = dict(batch=call.batch, tokens=call.tokens, routes=call.routes, steps=call.steps)
    fields |= dict(channels=call.channels, states=call.states)
    for name, tensor in (("x", x), ("dt", call.dt), ("B", call.B), ("C", call.C)):
        fields |= strides(name, tensor)
    return fields


def strides(name: str, tensor: Tensor) -> dict[str, int]:
    axes = "blkn" if name[-1] in "BC" else "blkd"
    return {f"{name}_{axis}": stride for axis, stride in zip(axes, tensor.stride(), strict=True)}


def seen_by_routes(call: ScanCall, dy: Tensor | None) -> Tensor | None:
    """The gradient that comes in as each route sees it, (B, L, K, D)."""
    return None if dy is None else dy.unsqueeze(2).expand(-1, -1, call.routes, -1) if call.merge else dy


def ddt_like(call: ScanCall) -> Tensor:
    """A gradient of whole step sizes, without memory."""
    if call.rank:
        return call.dt.new_empty((call.batch, call.tokens, call.routes, call.channels), device="meta")
    return torch.empty_like(call.dt, device="meta")


def backward_fields(call: ScanCall, dx: Tensor, dy: Tensor | None, ddt: Tensor) -> dict[str, int]:
    """Fields of struct Params of a backward pass: strides of gradients as each route sees them."""
    fields = sizes(call) | strides("dx", dx) | strides("ddt", ddt)
    return fields if dy is None else fields | strides("dy", dy)


def type_of_ddt(call: ScanCall) -> str:
    """Of the step size's gradient as a kernel leaves it, or of its products with a low rank."""
    return TYPES[torch.float32 if call.rank and not rank_in_kernel(call) else call.dt.dtype]


def across_channels(call: ScanCall, dy: Tensor | None, dx: Tensor, ddt: Tensor) -> list[Tensor | None]:
    """What a backward pass reads and writes channel by channel."""
    more = [] if call.rank > 0 and rank_in_kernel(call) else [ddt]
    return [call.x, dy, dx, *more, *([] if call.rank else [call.dt])]


tables_in_order = Constants(_make_in_order)
