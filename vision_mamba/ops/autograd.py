"""The selective scan as torch operators, `vision_mamba::cross_selective_scan` and its two halves; see ops.operator."""

from __future__ import annotations

from typing import Any

from vision_mamba.ops import contract, registry
from vision_mamba.ops.call import GRADIENTS, ScanCall
from vision_mamba.ops.operator import Operator

_ARGUMENTS = (
    "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D=None, Tensor? indices=None, Tensor? dt_weight=None, "
    "Tensor? dt_bias=None, Tensor? initial_state=None, bool dt_softplus=True, bool merge=True, "
    "bool return_last_state=False, ScalarType? out_dtype=None"
)


def scan_flops(x: Any, dt: Any, A: Any, indices: Any = None, dt_weight: Any = None) -> int:
    """Floating-point operations of one forward scan, from the shapes of its arguments.

    A step of a channel costs 9 per state, as published since mamba_ssm, 1 for the skip, and 2 R where the step size
    comes in R columns. MACs are half of FLOPs throughout this library.
    """
    routes, channels, states = A
    steps = x[1] if indices is None else indices[1]
    rank = 0 if dt_weight is None else dt_weight[2]
    return x[0] * steps * routes * channels * (9 * states + 1 + 2 * rank)


def _flops(
    x: Any,
    dt: Any,
    A: Any,
    B: Any,
    C: Any,
    D: Any = None,
    indices: Any = None,
    dt_weight: Any = None,
    *_: Any,
    **__: Any,
) -> int:
    return scan_flops(x, dt, A, indices, dt_weight)


operator = Operator(registry.scans, ScanCall, _ARGUMENTS, GRADIENTS, contract.check, contract.check_values, _flops)
