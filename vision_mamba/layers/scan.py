"""The one place where layers call the scans: as operators, or as plain torch for exporters that know no operators."""

from typing import Any

import torch
from timm.layers.config import is_exportable
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import has_static_value

from vision_mamba import scans
from vision_mamba.ops.backends import eager, ssd_eager
from vision_mamba.ops.call import ScanCall
from vision_mamba.ops.operator import nobody_looks
from vision_mamba.ops.ssd_call import SsdCall
from vision_mamba.scans.order import all_visits, stack


class RouteScan(nn.Module):
    """What scans along the routes of a named order have in common: the order, its table, the way out for exporters.

    A model that timm builds with ``exportable=True`` holds plain torch instead of the operators of this library; its
    grid is then fixed by the example that it is exported with.

    Args:
        order: name of a registered `ScanOrder`.

    Raises: ValueError naming the nearest known order.
    """

    __constants__ = ("exportable", "order")  # TorchScript leaves the branch out that a constant closes

    def __init__(self, order: str) -> None:
        super().__init__()
        self.order = scans.get(order).name
        self.exportable = is_exportable()

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        # Without the hooks of modules: those of torch's FlopCounterMode fail where parameters are arguments and
        # gradients are off.
        return self.forward(*args, **kwargs)

    def extra_repr(self) -> str:
        return repr(self.order)

    def table(self, like: Tensor, height: int, width: int, class_token: int = -1) -> Tensor:
        """The order's int32 (K, S) on the device of `like`, with a class token at that place if it is not -1."""
        if self.exportable:
            return _plain_table(like, self.order, height, width, class_token)
        shared = not torch.compiler.is_compiling()
        if not torch.jit.is_scripting():
            if not shared and _is_compiled_for(height, width):
                place = None if class_token < 0 else int(class_token)
                return getattr(_held, _hold(self.order, int(height), int(width), place, like.device, False))
            shared = shared and isinstance(like, Tensor)  # and no stand-in of torch.fx
            if shared and nobody_looks():
                place = None if class_token < 0 else class_token
                return scans.get(self.order).indices(height, width, class_token=place, device=like.device)
        return torch.ops.vision_mamba.scan_indices(like, self.order, height, width, class_token, shared)

    def visits(self, like: Tensor, height: int, width: int) -> Tensor:
        """When and how each route comes to each token: int64 (2, K, L), see `scans.routes.visits`."""
        if self.exportable:
            return _plain_visits(like, self.order, height, width)
        shared = not torch.compiler.is_compiling()
        if not torch.jit.is_scripting():
            if not shared and _is_compiled_for(height, width):
                return getattr(_held, _hold(self.order, int(height), int(width), None, like.device, True))
            shared = shared and isinstance(like, Tensor)
        return torch.ops.vision_mamba.scan_visits(like, self.order, height, width, shared)


class SelectiveScan(RouteScan):
    """Scan a grid of tokens along the routes of a named order and add the routes up; see `ops.cross_selective_scan`.

    >>> scan = SelectiveScan("cross")
    >>> x, A, dt_weight = torch.randn(1, 6, 4), -torch.ones(4, 4, 2), torch.randn(4, 4, 3)
    >>> dt, B, C = torch.randn(1, 6, 4, 3), torch.randn(1, 6, 4, 2), torch.randn(1, 6, 4, 2)
    >>> scan(x, dt, A, B, C, torch.ones(4, 4), dt_weight, torch.zeros(4, 4), 2, 3).shape
    torch.Size([1, 6, 4])
    """

    def along(
        self,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        dt_weight: Tensor | None,
        dt_bias: Tensor | None,
        indices: Tensor | None,
        merge: bool = True,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Scan along a table, or as the tokens lie if it is None -> (B, L, D), or (B, L, K, D) with merge=False."""
        if self.exportable:
            return _plain_scan(x, dt, A, B, C, D, dt_weight, dt_bias, indices, merge, out_dtype)
        return torch.ops.vision_mamba.cross_selective_scan(
            x, dt, A, B, C, D, indices, dt_weight, dt_bias, None, True, merge, False, out_dtype
        )[0]

    def forward(
        self,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        dt_weight: Tensor | None,
        dt_bias: Tensor | None,
        height: int,
        width: int,
        class_token: int = -1,
        merge: bool = True,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        """x (B, L, D) or (B, L, K, D), dt (B, L, K, R) with dt_weight, A (K, D, N), B and C (B, L, K, N) -> (B, L, D).

        L is height * width, or one more with a class token at place `class_token`; a sequence is a grid of height 1.
        With merge=False the routes' results come side by side, (B, L, K, D).
        """
        indices = self.table(x, height, width, class_token)
        return self.along(x, dt, A, B, C, D, dt_weight, dt_bias, indices, merge, out_dtype)


class DualScan(RouteScan):
    """The same by state-space duality, heads of channels that decay as one; see `ops.ssd`.

    >>> scan = DualScan("cross")
    >>> x, A, D = torch.randn(1, 6, 2, 4), -torch.ones(4, 2), torch.ones(4, 2)
    >>> dt, B, C = torch.randn(1, 6, 4, 2), torch.randn(1, 6, 4, 1, 8), torch.randn(1, 6, 4, 1, 8)
    >>> scan(x, dt, A, B, C, D, torch.zeros(4, 2), 2, 3).shape
    torch.Size([1, 6, 2, 4])
    """

    def along(
        self,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        dt_bias: Tensor | None,
        indices: Tensor | None,
        merge: bool = True,
        out_dtype: torch.dtype | None = None,
        causal: bool = True,
    ) -> Tensor:
        """Scan along a table, or as the tokens lie if it is None; where nothing is causal every token reads all."""
        if self.exportable:
            return _plain_dual_scan(x, dt, A, B, C, D, dt_bias, indices, merge, out_dtype, causal)
        return torch.ops.vision_mamba.ssd(
            x, dt, A, B, C, D, indices, dt_bias, None, causal, 0, True, 0.0, None, merge, False, None, out_dtype
        )[0]

    def forward(
        self,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        dt_bias: Tensor | None,
        height: int,
        width: int,
        merge: bool = True,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        """x (B, L, H, P), dt (B, L, K, H), A (K, H), B and C (B, L, K, G, N), D (K, H) or (K, H, P) -> (B, L, H, P).

        With merge=False the routes' results come side by side, (B, L, K, H, P).
        """
        return self.along(x, dt, A, B, C, D, dt_bias, self.table(x, height, width), merge, out_dtype)


def _is_compiled_for(height: int, width: int) -> bool:
    """Whether torch.compile makes a graph for a grid of this size alone."""
    return torch.compiler.is_dynamo_compiling() and has_static_value(height) and has_static_value(width)


class _Held:
    """Tables that compiled graphs hold, as attributes."""


_held = _Held()


# What is found in `_held` is part of the graph: an input that is always the same, and that kernels know from other
# calls. An operator's output would be memory that Inductor may use again, and unknown to them.
@torch.compiler.assume_constant_result
def _hold(order: str, height: int, width: int, class_token: int | None, device: torch.device, visits: bool) -> str:
    """Run by torch.compile as it traces: have a table among those held, and return its name there."""
    name = f"{'visits' if visits else 'indices'}_{order}_{height}_{width}_{class_token}_{device}"
    if not hasattr(_held, name):
        found = scans.get(order)
        table = found.indices(height, width, class_token=class_token, device=device)
        table = found.visits(height, width, device=device) if visits else table
        torch._dynamo.mark_static_address(table, guard=True)
        setattr(_held, name, table)
    return name


def _plain_table(like: Tensor, order: str, height: int, width: int, class_token: int) -> Tensor:
    if torch.compiler.is_exporting() and any(isinstance(side, torch.SymInt) for side in (height, width)):
        raise ValueError(
            f"exportable=True: the scan in plain torch is laid out for one grid of tokens, got ({height}, {width}) "
            f"with a side that may vary; export with fixed height and width, or build the model without it."
        )
    # Tracers hand sizes over that are none; here they become those of the example.
    routes = [route(int(height), int(width)) for route in scans.get(order).routes]
    return stack(routes, None if int(class_token) < 0 else int(class_token)).to(like.device)


def _plain_visits(like: Tensor, order: str, height: int, width: int) -> Tensor:
    return all_visits(scans.get(order).routes, int(height), int(width)).to(like.device)


def _plain_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_weight: Tensor | None,
    dt_bias: Tensor | None,
    indices: Tensor | None,
    merge: bool,
    out_dtype: torch.dtype | None,
) -> Tensor:
    call = ScanCall(x, dt, A, B, C, D, indices, dt_weight, dt_bias, merge=merge, out_dtype=out_dtype)
    return eager.forward(call)[0]


def _plain_dual_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    indices: Tensor | None,
    merge: bool,
    out_dtype: torch.dtype | None,
    causal: bool,
) -> Tensor:
    call = SsdCall(
        x, dt, A, B, C, D, indices, dt_bias, causal=causal, dt_softplus=True, merge=merge, out_dtype=out_dtype
    )
    return ssd_eager.forward(call)[0]
