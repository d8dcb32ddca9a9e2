"""What is measured, as data: the scans of published models by name, and random tensors of their shapes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from vision_mamba import scans
from vision_mamba.layers.init import init_a_log_, init_dt_bias_, init_dt_weight_
from vision_mamba.ops.call import ScanCall


@dataclass(frozen=True)
class ScanCase:
    """One scan of K routes over a map of height x width tokens (height 1 for a sequence).

    `order` names a registered scan order; None is one pass along the sequence for every route, in the classic layout
    (B, K*D, L) through `selective_scan`. `rank` is the width of a low-rank step size, 0 for one that comes whole.
    """

    batch: int
    routes: int
    channels: int
    states: int
    height: int
    width: int
    rank: int = 0
    order: str | None = "cross"

    @property
    def tokens(self) -> int:
        return self.height * self.width

    @property
    def op(self) -> str:
        return "selective_scan" if self.order is None else "cross_selective_scan"

    def shape(self) -> dict[str, Any]:
        """For the record."""
        return asdict(self)


_STAGES = {"stage1": (96, 56), "stage2": (192, 28), "stage3": (384, 14), "stage4": (768, 7)}  # channels, side


def _vmamba_t(batch: int, stage: str, low_rank: bool = True) -> ScanCase:
    """A layer of VMamba-T (s1l8) at 224 px; its step size comes in dim/16 columns."""
    channels, side = _STAGES[stage]
    return ScanCase(batch, 4, channels, 1, side, side, rank=channels // 16 if low_rank else 0)


def _vim_s(batch: int, low_rank: bool = True) -> ScanCase:
    """A layer of Vim-S at 224 px, class token included."""
    return ScanCase(batch, 2, 768, 16, 1, 197, rank=24 if low_rank else 0, order="bidirectional")


# One axis at a time, to see how the cost grows along it; render.py fits the exponent.
_GROWING = {"tokens": (197, 784, 3136, 12544, 65536), "states": (1, 4, 16, 64), "channels": (16, 64, 256, 1024)}


def _grown(axis: str, size: int) -> ScanCase:
    sizes = {"tokens": 784, "states": 4, "channels": 64} | {axis: size}
    return ScanCase(1, 4, sizes["channels"], sizes["states"], 1, sizes["tokens"], order=None)


CASES: dict[str, ScanCase] = {
    # The classic layout, on which published pure-PyTorch scans can be timed too.
    "classic_b1_k4_d96_l3136_n1": ScanCase(1, 4, 96, 1, 1, 3136, order=None),
    "classic_b4_k2_d384_l197_n16": ScanCase(4, 2, 384, 16, 1, 197, order=None),
    "classic_b1_k4_d192_l784_n16": ScanCase(1, 4, 192, 16, 1, 784, order=None),
    **{f"grow_{axis}_{size}": _grown(axis, size) for axis, sizes in _GROWING.items() for size in sizes},
    # As the models call the scan.
    **{f"vmamba_t_{stage}_b{batch}": _vmamba_t(batch, stage) for batch in (1, 8, 128) for stage in _STAGES},
    **{f"vim_s_b{batch}": _vim_s(batch) for batch in (1, 8, 128)},
    # The same with the step size given whole, as the published CUDA kernels take it.
    **{f"vmamba_t_{stage}_b128_dt": _vmamba_t(128, stage, low_rank=False) for stage in _STAGES},
    "vmamba_v0_stage1_b64_dt": ScanCase(64, 4, 192, 16, 56, 56),
    "vim_s_b128_dt": _vim_s(128, low_rank=False),
    "long_b8_d768_l6085_n16": ScanCase(8, 1, 768, 16, 1, 6085, order=None),
}


def make_call(case: ScanCase, dtype: torch.dtype, device: torch.device, seed: int = 0) -> ScanCall:
    """Random arguments with the parameters of a freshly initialised model, which stay float32 whatever `dtype` says.

    The classic layout gets slower decays: published closed forms divide by products of them, which at A = -16 are 0
    within a chunk, and a scan that gives NaN is not timed. Drawn on the device, so kinds of devices differ.
    """
    torch.manual_seed(seed)
    routes, channels, states, rank = case.routes, case.channels, case.states, case.rank
    wide = (case.batch, case.tokens, routes)
    classic = case.order is None

    def tokens(*shape: int) -> Tensor:
        """(B, L, ...); in the classic layout the tokens lie side by side in memory."""
        if classic:
            return torch.randn(shape[0], *shape[2:], shape[1], device=device).to(dtype).movedim(-1, 1)
        return torch.randn(shape, device=device).to(dtype)

    def per_channel(*more: int) -> Tensor:
        return torch.empty(routes, channels, *more, device=device)

    return ScanCall(
        x=tokens(*wide, channels) if classic else tokens(case.batch, case.tokens, channels),
        dt=tokens(*wide, rank or channels),
        A=per_channel(states).uniform_(-0.5, 0) if classic else -init_a_log_(per_channel(states)).exp(),
        B=tokens(*wide, states),
        C=tokens(*wide, states),
        D=torch.ones_like(per_channel()),
        indices=None if case.order is None else scans.get(case.order).indices(case.height, case.width).to(device),
        dt_weight=init_dt_weight_(per_channel(rank), rank) if rank else None,
        dt_bias=init_dt_bias_(per_channel()),
        merge=not classic,
    )
