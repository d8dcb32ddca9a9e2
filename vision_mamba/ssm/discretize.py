"""From the differential equation of a state-space model to its recurrence: three rules, three forms of A."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def discretize(
    A: Tensor | float, B: Tensor | float, step: Tensor | float, method: str = "zoh", *, diagonal: bool | None = None
) -> tuple[Tensor, Tensor]:
    """Turn dh/dt = A h + B x into h_t = A' h_{t-1} + B' x_t, one step of size s later.

        euler:     A' = 1 + s A                          B' = s B
        bilinear:  A' = (1 - s/2 A)^-1 (1 + s/2 A)       B' = (1 - s/2 A)^-1 s B
        zoh:       A' = exp(s A)                         B' = A^-1 (exp(s A) - 1) B

    Zero-order hold ("zoh") is exact where x is constant during a step. Mamba keeps its A' and takes the B' of Euler.

    Args:
        A: a scalar; (..., N) the diagonal of a diagonal matrix; or (..., N, N) a dense one. Real or complex, float.
        B: of any shape beside a scalar; (..., N) beside a diagonal; beside a dense A (..., N) with fewer axes than A,
            or (..., N, M) for M inputs. Axes before those broadcast.
        step: s, a number or a tensor of the broadcast axes (beside a scalar A it broadcasts with A and B).
        method: "zoh", "bilinear" (Tustin) or "euler" (forward).
        diagonal: what A is. By default a vector is diagonal, and so is what is no square and has as many axes as B; a
            square A is dense; where B has the shape of a square A, both readings are possible and this must say.

    Returns: A' shaped as A and B' as B, broadcast with the step.
    Raises: ValueError for an unknown method, shapes that do not fit, or a form of A that must be told.
    Numerics: zoh needs no inverse of A, which may be singular; where |s A| is small a series keeps value and gradient.
    Reference: Gu et al. 2022, S4, arXiv:2111.00396, section 2.3 (bilinear); S4D, arXiv:2206.11893, section 3.1 (zoh).

    >>> A, B = discretize(torch.tensor(-1.0), torch.tensor(1.0), 0.5, "bilinear")
    >>> round(A.item(), 4), round(B.item(), 4)
    (0.6, 0.4)
    >>> A, B = discretize(-torch.ones(8, 16), torch.ones(8, 16), torch.rand(8), "zoh")
    >>> A.shape, B.shape
    (torch.Size([8, 16]), torch.Size([8, 16]))
    """
    if method not in _DIAGONAL:
        raise ValueError(f"discretize: method must be one of {', '.join(_DIAGONAL)}, got {method!r}.")
    A, B = (torch.as_tensor(float(t) if isinstance(t, int) else t) for t in (A, B))
    for name, tensor in (("A", A), ("B", B)):
        if not (tensor.is_floating_point() or tensor.is_complex()):
            raise ValueError(f"discretize: {name} must be float or complex, got {tensor.dtype}; use {name}.float().")
    if A.dim() == 0:
        return _DIAGONAL[method](A, B, step)
    if B.dim() == 0:
        raise ValueError(f"discretize: B must have the states of A in an axis, got a scalar beside A {_show(A)}.")
    if _is_diagonal(A, B, diagonal):
        if A.shape[-1] != B.shape[-1]:
            raise ValueError(
                f"discretize: B must be (..., N) with the N = {A.shape[-1]} of a diagonal A {_show(A)}, "
                f"got {_show(B)}; pass diagonal=False if A is dense."
            )
        return _DIAGONAL[method](A, B, _expand(step, 1))
    if A.dim() < 2 or A.shape[-1] != A.shape[-2]:
        raise ValueError(
            f"discretize: a dense A must be (..., N, N), got {_show(A)} beside B {_show(B)}; "
            f"pass diagonal=True if its last axis is a diagonal."
        )
    states = A.shape[-1]
    vector = B.dim() < A.dim()
    columns = B.unsqueeze(-1) if vector else B
    if columns.shape[-2] != states:
        raise ValueError(
            f"discretize: B must be (..., N) with fewer axes than A or (..., N, M), with the N = {states} of a dense A "
            f"{_show(A)}, got {_show(B)}."
        )
    A, columns = _DENSE[method](A, columns, _expand(step, 2))
    return A, columns.squeeze(-1) if vector else columns


def _is_diagonal(A: Tensor, B: Tensor, told: bool | None) -> bool:
    if told is not None:
        return told
    if A.dim() == 1:
        return True
    if A.dim() != B.dim() or A.shape[-1] != B.shape[-1]:
        return False
    # One state has one reading. More of them, in a square, have two: refuse rather than follow a shape's accident.
    if A.shape[-1] == A.shape[-2] > 1:
        raise ValueError(
            f"discretize: A {_show(A)} beside B {_show(B)} is one dense matrix or {A.shape[-2]} diagonals; "
            f"pass diagonal=True or diagonal=False."
        )
    return True


def _expand(step: Tensor | float, axes: int) -> Tensor | float:
    """Give a step of the batch axes as many axes more; a number needs none."""
    return step.reshape(*step.shape, *[1] * axes) if isinstance(step, Tensor) else step


def _show(tensor: Tensor) -> str:
    return "(" + ", ".join(str(size) for size in tensor.shape) + ")"


#: 1 / (k + 1)!, the series of phi below; twelve terms reach float64 within the radius.
_SERIES = tuple(1.0 / torch.arange(1, k + 2, dtype=torch.float64).prod().item() for k in range(12))
_RADIUS = 0.25


def phi(z: Tensor) -> Tensor:
    """(exp(z) - 1) / z, which is 1 at 0; accurate there together with its derivatives.

    >>> phi(torch.tensor([0.0, 1.0]))
    tensor([1.0000, 1.7183])
    """
    near = z.abs() < _RADIUS
    # Either branch sees harmless numbers where the other is taken, so that no NaN comes back in a gradient.
    small, large = torch.where(near, z, 0), torch.where(near, 1, z)
    series = torch.full_like(small, _SERIES[-1])
    for coefficient in reversed(_SERIES[:-1]):
        series = series * small + coefficient
    return torch.where(near, series, (torch.exp(large) - 1) / large)


Rule = Callable[[Tensor, Tensor, "Tensor | float"], tuple[Tensor, Tensor]]


def _euler(A: Tensor, B: Tensor, step: Tensor | float) -> tuple[Tensor, Tensor]:
    return 1 + step * A, step * B


def _bilinear(A: Tensor, B: Tensor, step: Tensor | float) -> tuple[Tensor, Tensor]:
    half = step * A / 2
    return (1 + half) / (1 - half), step * B / (1 - half)


def _zoh(A: Tensor, B: Tensor, step: Tensor | float) -> tuple[Tensor, Tensor]:
    z = step * A
    return torch.exp(z), phi(z) * (step * B)


def _eye(A: Tensor) -> Tensor:
    return torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)


def _euler_dense(A: Tensor, B: Tensor, step: Tensor | float) -> tuple[Tensor, Tensor]:
    return _eye(A) + step * A, step * B


def _bilinear_dense(A: Tensor, B: Tensor, step: Tensor | float) -> tuple[Tensor, Tensor]:
    half, sB = step * A / 2, step * B
    dtype = torch.promote_types(half.dtype, sB.dtype)
    eye = _eye(A)
    left = (eye - half).to(dtype)
    return torch.linalg.solve(left, (eye + half).to(dtype)), torch.linalg.solve(left, sB.to(dtype))


def _zoh_dense(A: Tensor, B: Tensor, step: Tensor | float) -> tuple[Tensor, Tensor]:
    # exp of [[sA, sB], [0, 0]] is [[A', B'], [0, 1]]: no inverse of A.
    sA, sB = step * A, step * B
    states, inputs = sB.shape[-2:]
    batch = torch.broadcast_shapes(sA.shape[:-2], sB.shape[:-2])
    dtype = torch.promote_types(sA.dtype, sB.dtype)
    rows = torch.cat((sA.to(dtype).expand(*batch, -1, -1), sB.to(dtype).expand(*batch, -1, -1)), -1)
    block = torch.cat((rows, rows.new_zeros(*batch, inputs, states + inputs)), -2)
    whole = torch.matrix_exp(block)[..., :states, :]
    return whole[..., :states], whole[..., states:]


_DIAGONAL: dict[str, Rule] = {"zoh": _zoh, "bilinear": _bilinear, "euler": _euler}
_DENSE: dict[str, Rule] = {"zoh": _zoh_dense, "bilinear": _bilinear_dense, "euler": _euler_dense}
