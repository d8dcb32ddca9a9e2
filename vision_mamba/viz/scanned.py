"""What a model's selective scans were given and what follows from it: each route's result, and implicit attention.

A selective scan is linear in its input once step sizes, B and C are known, so it is a matrix that multiplies tokens, as
attention is. With S_t the sum of a route's step sizes up to step t:
    y_t = sum_{s <= t} M_ts x_s          M_ts = sum_n C_tn exp(A_n (S_t - S_s)) dt_s B_sn  [+ D where t = s]
Ali et al. 2024, The Hidden Attention of Mamba Models, arXiv:2403.01590.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from vision_mamba.layers.tokens import class_first, count_class_tokens
from vision_mamba.ops.call import ScanCall

_SCANS = (torch.ops.vision_mamba.cross_selective_scan, torch.ops.vision_mamba.cross_selective_scan_forward)


@dataclass(frozen=True)
class Scan:
    """One selective scan of a forward pass.

    Args:
        layer: name of the mixer in the model, such as "stages.0.blocks.1.ss2d".
        call: the operator's arguments.
        table: int64 (K, S), the token that each route visits at each step, -1 for none.
        grid: rows and columns of the patches; of a window where a layer scans each by itself, and then the batch is
            that of the windows.
        patches: int64 (rows * columns,), the place of each patch among the tokens; class tokens have the others.
    """

    layer: str
    call: ScanCall
    table: Tensor
    grid: tuple[int, int]
    patches: Tensor

    @property
    def laid_out(self) -> bool:
        """Whether the tensors come in the order of each route rather than in that of the tokens."""
        return self.call.indices is None

    @property
    def tokens(self) -> int:
        return int(self.table.max()) + 1

    def maps(self, tokens: Tensor) -> Tensor:
        """(..., L) of something that every token has -> (..., rows, columns) of the patches."""
        return tokens[..., self.patches].unflatten(-1, self.grid)


class _Watch(TorchDispatchMode):
    """Sees every operator that runs, whatever called it."""

    def __init__(self, seen: Callable[[Any, tuple[Any, ...], Any], None]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.seen(func.overloadpacket, args, result)
        return result


def scans_of(model: nn.Module, images: Tensor) -> list[Scan]:
    """Run a model without gradients and return its selective scans, in order.

    Args:
        model: any that holds mixers of this library, in evaluation mode.
        images: (B, C, H, W), prepared for it.

    Raises: ValueError if nothing of it is a selective scan.
    """
    found: list[Scan] = []
    here: list[tuple[str, tuple[int, int]]] = []
    table: list[Tensor] = []

    def seen(operator: Any, args: tuple[Any, ...], result: Any) -> None:
        if operator is torch.ops.vision_mamba.scan_indices:
            table[:] = [result]
        elif operator in _SCANS and here:
            call = ScanCall(*args[: len(ScanCall._fields)])
            name, grid = here[-1]
            # Without a table of its own a scan takes the tokens as they come, all of them.
            visits = table.pop().long() if table else torch.arange(call.x.shape[1], device=call.x.device)[None]
            found.append(Scan(name, call, visits, grid, _patches(model, int(visits.max()) + 1)))

    with torch.no_grad(), _noting(model, here), _Watch(seen):
        model(images)
    if not found:
        raise ValueError(f"scans_of: no layer of {type(model).__name__} is a selective scan.")
    return found


@contextmanager
def _noting(model: nn.Module, here: list[tuple[str, tuple[int, int]]]) -> Iterator[None]:
    """Inside, `here` ends in the mixer that is running and its grid."""

    def enter(name: str) -> Callable[..., None]:
        def note(module: nn.Module, args: tuple[Any, ...]) -> None:
            here.append((name, _grid(*args)))

        return note

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        here.pop()

    hooks = []
    for name, module in model.named_modules():
        if isinstance(getattr(module, "scan", None), nn.Module):
            hooks += [module.register_forward_pre_hook(enter(name)), module.register_forward_hook(leave)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _grid(x: Tensor, *size: Any) -> tuple[int, int]:
    """Rows and columns of what a mixer is given: a map, tokens with the size of theirs, or those of a square window."""
    if x.dim() == 4:
        return x.shape[1], x.shape[2]
    return (int(size[0]), int(size[1])) if size else (math.isqrt(x.shape[1]),) * 2


def _patches(model: nn.Module, tokens: int) -> Tensor:
    """Places of the patches among so many tokens."""
    where = getattr(model, "class_token", "none")
    places = class_first(torch.arange(tokens)[None, :, None], where)[0, :, 0]
    return places[count_class_tokens(where) :]


@torch.no_grad()
def route_outputs(scan: Scan, skip: bool = True) -> Tensor:
    """Each route's result before the routes are added up, with D x or without, in token order: (B, L, K, D)."""
    call = scan.call._replace(merge=False, return_last_state=False, out_dtype=None)
    if not skip:
        call = call._replace(D=None)
    y = torch.ops.vision_mamba.cross_selective_scan(*call)[0]
    if not scan.laid_out:
        return y
    laid_back = y.new_zeros(y.shape[0], scan.tokens, *y.shape[2:])
    for k, route in enumerate(scan.table):
        laid_back[:, route[route >= 0], k] = y[:, route >= 0, k]
    return laid_back


def route_maps(scan: Scan) -> Tensor:
    """How strongly each route's states answer at each patch: (B, K, rows, columns).

    It is the norm over channels of <C, h>; what goes past the states, D x, is much the same along all routes.
    """
    return scan.maps(route_outputs(scan, skip=False).float().norm(dim=-1).transpose(1, 2))


@torch.no_grad()
def implicit_attention(scan: Scan, reduction: str = "abs", skip: bool = False) -> Tensor:
    """The matrices that a scan multiplies its tokens by, in token order.

    Args:
        scan: of `scans_of`.
        reduction: over channels: "abs", the mean of absolute values; "mean"; or "none".
        skip: add D to the diagonal.

    Returns: (B, K, L, L), from token (last) to token; (B, K, D, L, L) with "none"; float64. 0 off a route.
    Raises: ValueError for another reduction.
    """
    if reduction not in ("abs", "mean", "none"):
        raise ValueError(f"implicit_attention: reduction must be 'abs', 'mean' or 'none', got {reduction!r}.")
    call = scan.call
    steps, A = _in_order(scan), call.A.double()
    size = (call.batch, call.routes, *((call.channels,) if reduction == "none" else ()), scan.tokens, scan.tokens)
    made = torch.zeros(size, dtype=torch.float64, device=A.device)
    for k, route in enumerate(scan.table):
        dt, B, C = (part[:, :, k] for part in steps)
        total = dt.cumsum(1)
        visited = (route >= 0).nonzero().squeeze(1)
        rows, columns = route[visited][:, None], route[visited]
        for d in range(call.channels):  # one by one: all at once would take L * L * D * N numbers
            matrix = _matrix(A[k, d], dt[..., d], total[..., d], B, C)[:, visited[:, None], visited]
            if skip and call.D is not None:
                matrix = matrix + torch.eye(len(visited), dtype=matrix.dtype, device=matrix.device) * call.D[k, d]
            if reduction == "none":
                made[:, k, d, rows, columns] = matrix
            else:
                made[:, k, rows, columns] += (matrix.abs() if reduction == "abs" else matrix) / call.channels
    return made


def _matrix(A: Tensor, dt: Tensor, total: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """Of one channel: A (N,), dt and total (B, S), B and C (B, S, N) -> (B, S, S)."""
    elapsed = total[:, :, None] - total[:, None, :]
    later = torch.ones_like(elapsed[0], dtype=torch.bool).tril()
    # Masked before the exponential, which would overflow above the diagonal.
    decay = torch.exp(A * elapsed.masked_fill(~later, 0.0).unsqueeze(-1))
    return torch.einsum("btn,btsn,bsn->bts", C, decay, B) * dt[:, None, :] * later


def _in_order(scan: Scan) -> tuple[Tensor, Tensor, Tensor]:
    """Step sizes (B, S, K, D), B and C (B, S, K, N), in the order of each route, as the scan uses them; float64."""
    call = scan.call

    def gathered(x: Tensor) -> Tensor:
        x = x.double()
        if scan.laid_out:
            return x
        x = F.pad(x, (0, 0, 0, 0, 0, 1))  # -1, a padding step, reads the zeros behind the last token
        return torch.stack([x[:, route, k] for k, route in enumerate(scan.table)], 2)

    dt = gathered(call.dt)
    if call.dt_weight is not None:
        dt = torch.einsum("bskr,kdr->bskd", dt, call.dt_weight.double())
    if call.dt_bias is not None:
        dt = dt + call.dt_bias.double()
    if call.dt_softplus:
        dt = F.softplus(dt)
    return dt, gathered(call.B), gathered(call.C)
