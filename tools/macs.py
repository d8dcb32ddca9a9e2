"""Multiply-adds as the authors of each family count them, beside what they publish: why their figures are not ours.

Ours are half of the floating-point operations of the scans' formulas and of what torch.utils.flop_counter knows. Each
family's authors count something else; told how, we come to their figures, which is the proof that we know why.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

#: As published, at the size of the weights, in thousand millions. Vim's authors give none: these are LocalMamba's.
PUBLISHED = {
    "vim_tiny_patch16_224": 1.5,
    "vim_small_patch16_224": 5.1,
    "vmamba_tiny_v0": 5.6,
    "vmamba_small_v0": 11.2,
    "vmamba_base_v0": 18.0,
    "vmamba_tiny_v1": 5.0,
    "vmamba_tiny_s2l5": 4.9,
    "vmamba_small_s2l15": 8.7,
    "vmamba_base_s2l15": 15.4,
    "vmamba_tiny_s1l8": 4.9,
    "vmamba_small_s1l20": 8.6,
    "vmamba_base_s1l20": 15.2,
    "localvim_tiny_patch16_224": 1.5,
    "localvim_tiny_patch16_midcls_224": 1.5,
    "localvim_small_patch16_224": 4.8,
    "localvmamba_tiny": 5.7,
    "localvmamba_small": 11.4,
    "efficientvmamba_tiny": 0.8,
    "efficientvmamba_small": 1.3,
    "efficientvmamba_base": 4.0,
    "plainmamba_l1": 3.0,
    "plainmamba_l2": 8.1,
    "plainmamba_l3": 14.4,
    "videomamba_tiny_patch16_224": 1.1,
    "videomamba_tiny_patch16_448": 4.3,
    "videomamba_tiny_patch16_576": 7.1,
    "videomamba_small_patch16_224": 4.3,
    "videomamba_small_patch16_448": 16.9,
    "videomamba_small_patch16_576": 28.0,
    "videomamba_middle_patch16_224": 12.7,
    "videomamba_middle_patch16_448": 50.4,
    "videomamba_middle_patch16_576": 83.1,
    "videomamba_base_patch16_224": 16.9,
    "mambavision_tiny": 4.4,
    "mambavision_tiny2": 5.1,
    "mambavision_small": 7.5,
    "mambavision_base": 15.0,
    "mambavision_large": 34.9,
    "mambavision_large2": 37.5,
    "mambavision_large2_512": 196.3,
    "mambavision_large3_256": 122.3,
    "mambavision_large3_512": 489.1,
    "vssd_micro": 2.3,
    "vssd_tiny": 4.5,
    "vssd_small": 7.4,
    "vssd_base": 16.1,
}


@dataclass(frozen=True)
class Count:
    """What is counted of a forward pass; by default as much as we do.

    Args:
        state: MACs of a step of a scan, for each state of a channel.
        step: MACs of it for each channel beside that.
        heads: whether every head of a scan by duality is counted, or the products of one alone.
        routes: share of what is computed from a token for each route, before the scan: projections and convolutions.
        ranks: share of the projections to step sizes.
        norms: MACs of an element of a layer norm; of a batch norm two fifths of them.
        attention: whether products of tokens with tokens are counted.
    """

    state: float = 4.5
    step: float = 0.5
    heads: bool = True
    routes: float = 1.0
    ranks: float = 1.0
    norms: float = 0.0
    attention: bool = True

    def macs(self, model: nn.Module, *size: int) -> float:
        """In thousand millions, of one image of that size (channels, height, width), both on the meta device."""
        left_out = 0.0

        def mixed(module: Any, tokens: tuple[Any, ...], _: Any) -> None:
            nonlocal left_out
            weights = [getattr(module, name, None) for name in ("x_proj_weight", "conv_weight")]
            each = sum(weight.numel() for weight in weights if weight is not None)
            left_out += (1 - self.routes) * each * tokens[0].numel() / tokens[0].shape[-1]

        handles = [m.register_forward_hook(mixed) for m in model.modules() if hasattr(m, "x_proj_weight")]
        with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=self._operations()) as counter:
            model(torch.empty(1, *size, device="meta"))
        for handle in handles:
            handle.remove()
        return (counter.get_total_flops() / 2 - left_out) / 1e9

    def _operations(self) -> dict[Any, Callable[..., float]]:
        """Operator -> its floating-point operations from the shapes of its arguments, where the count is not ours."""
        ours, aten = torch.ops.vision_mamba, torch.ops.aten
        counted: dict[Any, Callable[..., float]] = {
            ours.cross_selective_scan: self._scan,
            aten.native_layer_norm: lambda x, *_, **__: 2 * self.norms * prod(x),
            aten.native_batch_norm: lambda x, *_, **__: 0.8 * self.norms * prod(x),
        }
        if not self.heads:
            counted[ours.ssd] = lambda x, dt, A, B, *_, **__: 2 * prod(x[:2]) * x[-1] * 2 * B[-1]
        if not self.attention:
            counted[aten.bmm] = lambda *_, **__: 0
        return counted

    def _scan(
        self, x: Any, dt: Any, A: Any, B: Any, C: Any, D: Any, indices: Any, dt_weight: Any = None, *_: Any, **__: Any
    ) -> float:
        routes, channels, states = A
        steps = x[1] if indices is None else indices[1]
        rank = 0 if dt_weight is None else dt_weight[2]
        return 2 * x[0] * steps * routes * channels * (self.state * states + self.step + self.ranks * rank)


_VMAMBA = Count(state=9, step=1, norms=5)
#: How each family's authors count; Vim as LocalMamba's do.
COUNTS = {
    "vim": Count(state=5, step=2, routes=1 / 2, ranks=1 / 2),
    "vmamba": _VMAMBA,
    "localvim": Count(state=5, step=2, routes=1 / 4, ranks=1 / 4),
    "localvmamba": _VMAMBA,
    "efficientvmamba": Count(state=9, step=1, norms=5, routes=1 / 4),
    "plainmamba": Count(state=9, step=1, ranks=1 / 4),
    "videomamba": Count(state=0, step=0, routes=0, ranks=0),
    "mambavision": Count(state=0, step=0, attention=False),
    "vssd": Count(heads=False, norms=5),
}


def as_published(name: str, model: nn.Module, *size: int) -> float:
    """MACs of a model, counted as its authors do, in thousand millions."""
    return COUNTS[name.split("_")[0]].macs(model, *size)
