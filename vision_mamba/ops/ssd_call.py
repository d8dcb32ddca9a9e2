"""What one state-space dual scan is asked to do: arguments, the sizes that follow, and every check of them."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from vision_mamba.ops import contract
from vision_mamba.ops.contract import require_dim, require_kind, require_out_dtype, require_shape

WHERE = "ssd"
MAX_STATES = 256


class SsdCall(NamedTuple):
    """Arguments of ``torch.ops.vision_mamba.ssd`` in its order; every tensor in token order.

    Letters: B batch, L tokens, K routes, S steps of a route, H heads, P channels of a head, G groups, N states.
    """

    x: Tensor  # (B, L, H, P) shared by the routes, or (B, L, K, H, P)
    dt: Tensor  # (B, L, K, H)
    A: Tensor  # (K, H)
    B: Tensor  # (B, L, K, G, N)
    C: Tensor  # (B, L, K, G, N)
    D: Tensor | None = None  # (K, H) or (K, H, P)
    indices: Tensor | None = None  # int32 (K, S), -1 = padding step; None = every route visits 0, 1, ..., L - 1
    dt_bias: Tensor | None = None  # (K, H)
    initial_state: Tensor | None = None  # (B, K, H, P, N)
    causal: bool = True  # False: every token reads what all tokens of the route have written
    descending: int = 0  # so many of the last routes visit L - 1, ..., 1, 0; without indices alone
    dt_softplus: bool = False
    dt_min: float = 0.0
    dt_max: float | None = None
    merge: bool = True
    return_last_state: bool = False
    chunk: int | None = None
    out_dtype: torch.dtype | None = None

    @property
    def operator(self) -> str:
        """Its name in ``torch.ops.vision_mamba``."""
        return "ssd"

    @property
    def batch(self) -> int:
        return self.x.shape[0]

    @property
    def tokens(self) -> int:
        return self.x.shape[1]

    @property
    def routes(self) -> int:
        return self.A.shape[0]

    @property
    def heads(self) -> int:
        return self.A.shape[1]

    @property
    def channels(self) -> int:
        """P, of one head."""
        return self.x.shape[-1]

    @property
    def groups(self) -> int:
        return self.B.shape[3]

    @property
    def states(self) -> int:
        return self.B.shape[4]

    @property
    def steps(self) -> int:
        return self.tokens if self.indices is None else self.indices.shape[1]

    @property
    def shared_x(self) -> bool:
        return self.x.dim() == 4

    @property
    def sum_dtype(self) -> torch.dtype:
        """Type of the state and of every sum: float32, or float64 for float64 input."""
        return torch.float64 if self.x.dtype == torch.float64 else torch.float32

    @property
    def y_dtype(self) -> torch.dtype:
        return self.x.dtype if self.out_dtype is None else self.out_dtype

    def new_output(self) -> Tensor:
        """Uninitialised y, contiguous: (B, L, H, P) if merged, else (B, L, K, H, P)."""
        routes = () if self.merge else (self.routes,)
        return self.x.new_empty((self.batch, self.tokens, *routes, self.heads, self.channels), dtype=self.y_dtype)

    def new_last_state(self) -> Tensor:
        """Uninitialised h after the last step, (B, K, H, P, N); of no elements when it was not asked for."""
        shape = (self.batch, self.routes, self.heads, self.channels, self.states) if self.return_last_state else (0,)
        return self.x.new_empty(shape, dtype=self.sum_dtype)


#: The tensor arguments of an SsdCall that take a gradient, in the order backward returns them.
GRADIENTS = ("x", "dt", "A", "B", "C", "D", "dt_bias", "initial_state")


def check(call: SsdCall) -> None:
    """Raise ValueError if a call breaks the contract; by shapes and kinds, no value is read."""
    _check(call, ("routes",))


def check_one_route(call: SsdCall) -> None:
    """The same for tensors that have no axis of routes."""
    _check(call, ())


def check_state(call: SsdCall, routes: int) -> None:
    """Raise ValueError unless the initial state fits tensors that have no axis of routes."""
    assert call.initial_state is not None
    several = dict(routes=routes) if routes > 1 else {}
    size = dict(batch=call.x.shape[0], **several, heads=call.x.shape[2], channels=call.channels, states=call.B.shape[3])
    require_shape(WHERE, "initial_state", call.initial_state, _letters(*size), tuple(size.values()))


def check_tensors(call: SsdCall) -> None:
    """Raise ValueError where an argument that must be a tensor is something else."""
    for name in (*GRADIENTS, "indices"):
        value = getattr(call, name)
        if not isinstance(value, Tensor) and not (value is None and name in SsdCall._field_defaults):
            raise ValueError(f"{WHERE}: {name} must be a tensor, got {type(value).__name__}.")


def _check(call: SsdCall, route: tuple[str, ...]) -> None:
    x, A = call.x, call.A
    require_dim(WHERE, "A", A, _letters(*route, "heads"), (1 + len(route),))
    kinds = (4, 5) if route else (4,)
    require_dim(WHERE, "x", x, "(batch, tokens, heads, channels)" + " or one more for routes" * len(route), kinds)
    require_dim(WHERE, "B", call.B, _letters("batch", "tokens", *route, "groups", "states"), (4 + len(route),))
    size = dict(batch=x.shape[0], tokens=x.shape[1], heads=A.shape[-1], channels=x.shape[-1])
    size |= dict(groups=call.B.shape[-2], states=call.B.shape[-1], routes=A.shape[0] if route else 1)

    def shape(name: str, tensor: Tensor | None, *letters: str, hint: str = "") -> None:
        if tensor is not None:
            require_shape(WHERE, name, tensor, _letters(*letters), tuple(size[letter] for letter in letters), hint)

    if any(value < 1 for name, value in size.items() if name not in ("batch", "groups", "states")):
        found = contract._show(x.shape)
        raise ValueError(f"{WHERE}: x must have at least one token, route, head and channel, got {found}.")
    shape("x", x, "batch", "tokens", *(route if x.dim() == 5 else ()), "heads", "channels")
    shape("dt", call.dt, "batch", "tokens", *route, "heads")
    if size["groups"] < 1 or size["heads"] % size["groups"]:
        raise ValueError(
            f"{WHERE}: the groups of B must divide the heads of x, got {size['groups']} groups for {size['heads']} "
            f"heads; repeat or merge groups."
        )
    if not 1 <= size["states"] <= MAX_STATES:
        raise ValueError(f"{WHERE}: B must have 1 to {MAX_STATES} states in its last axis, got {size['states']}.")
    shape("B", call.B, "batch", "tokens", *route, "groups", "states")
    shape("C", call.C, "batch", "tokens", *route, "groups", "states", hint="B and C have one shape")
    if call.D is not None:
        each = ("channels",) if call.D.dim() == 2 + len(route) else ()
        shape("D", call.D, *route, "heads", *each, hint="one skip weight a head, or one a channel")
    shape("dt_bias", call.dt_bias, *route, "heads")
    shape("initial_state", call.initial_state, "batch", *route, "heads", "channels", "states")
    floats = dict(x=x, dt=call.dt, A=A, B=call.B, C=call.C, D=call.D, dt_bias=call.dt_bias)
    require_kind(WHERE, floats | {"initial_state": call.initial_state}, x)
    require_out_dtype(WHERE, call.out_dtype, x)
    _check_numbers(call)
    if call.indices is not None:
        contract._check_table(WHERE, call.indices, size["routes"], x)


def _check_numbers(call: SsdCall) -> None:
    low, high = call.dt_min, math.inf if call.dt_max is None else call.dt_max
    if not low < high:
        raise ValueError(f"{WHERE}: dt_limit must be (lowest, highest) with lowest < highest, got ({low}, {high}).")
    if call.chunk is not None and (not isinstance(call.chunk, int) or call.chunk < 1):
        raise ValueError(f"{WHERE}: chunk must be a number of tokens from 1, or None for the best, got {call.chunk}.")
    if not 0 <= call.descending <= call.routes or (call.descending and call.indices is not None):
        raise ValueError(
            f"{WHERE}: descending must be a number of routes up to {call.routes}, and 0 beside an index table, got "
            f"{call.descending}; a route that runs backwards is a row of the table."
        )


def _letters(*names: str) -> str:
    return "(" + ", ".join(names) + ")"
