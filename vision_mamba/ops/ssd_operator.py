"""The state-space dual scan as torch operators, `vision_mamba::ssd` and its two halves; see ops.operator."""

from __future__ import annotations

from typing import Any

from vision_mamba.ops import contract, ssd_call
from vision_mamba.ops.operator import Operator
from vision_mamba.ops.registry import Registry
from vision_mamba.ops.ssd_call import GRADIENTS, SsdCall

_ARGUMENTS = (
    "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D=None, Tensor? indices=None, Tensor? dt_bias=None, "
    "Tensor? initial_state=None, bool causal=True, int descending=0, bool dt_softplus=False, float dt_min=0.0, "
    "float? dt_max=None, bool merge=True, bool return_last_state=False, int? chunk=None, ScalarType? out_dtype=None"
)


def flops(
    x: Any,
    dt: Any,
    A: Any,
    B: Any,
    C: Any,
    D: Any = None,
    indices: Any = None,
    dt_bias: Any = None,
    initial_state: Any = None,
    causal: bool = True,
    *_: Any,
    **__: Any,
) -> int:
    """Floating-point operations of one forward scan, from the shapes of its arguments.

    A step of a head with P channels and N states costs 2 P N to write the state, 2 P N to read it, P N to let it decay
    if there is an order, and 3 P for the step size and the skip. These are the operations of the recurrence, whatever
    a backend makes of it. MACs are half of FLOPs throughout this library.
    """
    routes, heads = A
    steps = x[1] if indices is None else indices[1]
    return x[0] * steps * routes * heads * x[-1] * ((5 if causal else 4) * B[-1] + 3)


registry = Registry("ssd", "state-space dual scan")
operator = Operator(registry, SsdCall, _ARGUMENTS, GRADIENTS, ssd_call.check, contract.check_values, flops)
