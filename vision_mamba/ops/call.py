"""What one scan is asked to do: the arguments of the operator, and the sizes that follow from them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class ScanCall(NamedTuple):
    """Arguments of ``torch.ops.vision_mamba.cross_selective_scan`` in its order; every tensor in token order.

    Letters: B batch, L tokens, K routes, S steps of a route, D channels, N states, R rank of the step size.
    """

    x: Tensor  # (B, L, D) shared by the routes, or (B, L, K, D)
    dt: Tensor  # (B, L, K, D), or (B, L, K, R) with dt_weight
    A: Tensor  # (K, D, N)
    B: Tensor  # (B, L, K, N)
    C: Tensor  # (B, L, K, N)
    D: Tensor | None = None  # (K, D)
    indices: Tensor | None = None  # int32 (K, S), -1 = padding step; None = every route visits 0, 1, ..., L - 1
    dt_weight: Tensor | None = None  # (K, D, R)
    dt_bias: Tensor | None = None  # (K, D)
    initial_state: Tensor | None = None  # (B, K, D, N)
    dt_softplus: bool = True
    merge: bool = True
    return_last_state: bool = False
    out_dtype: torch.dtype | None = None

    @property
    def operator(self) -> str:
        """Its name in ``torch.ops.vision_mamba``."""
        return "cross_selective_scan"

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
    def channels(self) -> int:
        return self.A.shape[1]

    @property
    def states(self) -> int:
        return self.A.shape[2]

    @property
    def steps(self) -> int:
        return self.tokens if self.indices is None else self.indices.shape[1]

    @property
    def rank(self) -> int:
        """Columns of the low-rank step size, 0 when dt comes whole."""
        return 0 if self.dt_weight is None else self.dt_weight.shape[2]

    @property
    def shared_x(self) -> bool:
        return self.x.dim() == 3

    @property
    def sum_dtype(self) -> torch.dtype:
        """Type of the state and of every sum: float32, or float64 for float64 input."""
        return torch.float64 if self.x.dtype == torch.float64 else torch.float32

    @property
    def y_dtype(self) -> torch.dtype:
        return self.x.dtype if self.out_dtype is None else self.out_dtype

    def new_output(self) -> Tensor:
        """Uninitialised y: (B, L, D) if merged, else (B, L, K, D); strides of x where the shapes agree."""
        if self.merge and not self.shared_x:
            # (B, L, D) in the memory order of one route of x, so that the classic layout stays the classic layout.
            return torch.empty_like(self.x.select(2, 0), dtype=self.y_dtype)
        if not self.merge and self.shared_x:
            return self.x.new_empty((self.batch, self.tokens, self.routes, self.channels), dtype=self.y_dtype)
        return torch.empty_like(self.x, dtype=self.y_dtype)

    def new_last_state(self) -> Tensor:
        """Uninitialised h after the last step, (B, K, D, N); of no elements when it was not asked for."""
        shape = (self.batch, self.routes, self.channels, self.states) if self.return_last_state else (0,)
        return self.x.new_empty(shape, dtype=self.sum_dtype)


#: Positions of the tensor arguments in a ScanCall that take a gradient, in the order backward returns them.
GRADIENTS = ("x", "dt", "A", "B", "C", "D", "dt_weight", "dt_bias", "initial_state")
