"""Which A to start from: HiPPO's matrix, its normal-plus-low-rank form, and the diagonals that stand in for it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


def hippo_legs(states: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """HiPPO-LegS: the state-space model whose state holds the past as coefficients of Legendre polynomials.

        A_nk = -sqrt((2n+1)(2k+1)) for n > k, -(n+1) for n = k, else 0          B_n = sqrt(2n+1)

    Driven as dh/dt = (A h + B x) / t, h_n is the n-th coefficient of x on all of [0, t], scaled to the unit interval.

    Args:
        states: N.

    Returns: A (N, N) and B (N,).
    Raises: ValueError if there is no state.
    Reference: Gu et al. 2020, HiPPO, arXiv:2008.07669, theorem 2; negated, as in S4, arXiv:2111.00396, equation 2.

    >>> A, B = hippo_legs(3)
    >>> A
    tensor([[-1.0000,  0.0000,  0.0000],
            [-1.7321, -2.0000,  0.0000],
            [-2.2361, -3.8730, -3.0000]], dtype=torch.float64)
    """
    _check_states("hippo_legs", states)
    n = torch.arange(states, dtype=torch.float64)
    B = (2 * n + 1).sqrt()
    A = (-torch.outer(B, B)).tril(-1) - (n + 1).diag()
    return A.to(dtype), B.to(dtype)


class NormalPlusLowRank(NamedTuple):
    """A = V diag(Lambda) V* - P Q*, with V unitary; here Q = P."""

    Lambda: Tensor  # (N,) complex eigenvalues of the normal part
    P: Tensor  # (N,) real, A's own basis
    V: Tensor  # (N, N) complex eigenvectors, columns
    B: Tensor  # (N,) real, A's own basis

    @property
    def Q(self) -> Tensor:
        return self.P


def nplr_legs(states: int) -> NormalPlusLowRank:
    """HiPPO-LegS as a normal matrix less a rank of one: what makes it diagonal without its own hopeless eigenvectors.

    With P_n = sqrt(n + 1/2), A + P P* is -1/2 and a skew-symmetric matrix, hence normal, with eigenvalues -1/2 + i w.
    They come in conjugate pairs, ordered by w, and one is -1/2 where N is odd. In complex128.

    Args:
        states: N.

    Returns: Lambda, P, V and B, with A = V diag(Lambda) V* - P P* to rounding.
    Reference: Gu et al. 2022, S4, arXiv:2111.00396, theorem 1 and appendix C.1.

    >>> found = nplr_legs(4)
    >>> A, _ = hippo_legs(4)
    >>> normal = found.V @ found.Lambda.diag() @ found.V.mH
    >>> bool(torch.allclose(normal.real - torch.outer(found.P, found.Q), A))
    True
    """
    A, B = hippo_legs(states)
    P = (torch.arange(states, dtype=torch.float64) + 0.5).sqrt()
    skew = A + torch.outer(P, P) + 0.5 * torch.eye(states, dtype=torch.float64)
    # -i times a skew-symmetric matrix is Hermitian, whose eigenvectors come out orthonormal.
    w, V = torch.linalg.eigh(-1j * skew)
    return NormalPlusLowRank(torch.complex(torch.full_like(w, -0.5), w), P, V, B)


def _legs(pairs: int) -> tuple[Tensor, Tensor]:
    found = nplr_legs(2 * pairs)
    B = found.V.mH @ found.B.to(found.V.dtype)
    return found.Lambda[pairs:], B[pairs:]  # ordered by w: the half with w > 0


def _with_ones(real: Tensor, imag: Tensor) -> tuple[Tensor, Tensor]:
    A = torch.complex(real, imag)
    return A, torch.ones_like(A)


def _lin(pairs: int) -> tuple[Tensor, Tensor]:
    n = torch.arange(pairs, dtype=torch.float64)
    return _with_ones(torch.full_like(n, -0.5), math.pi * n)


def _inv(pairs: int) -> tuple[Tensor, Tensor]:
    n, states = torch.arange(pairs, dtype=torch.float64), 2 * pairs
    return _with_ones(torch.full_like(n, -0.5), states / math.pi * (states / (2 * n + 1) - 1))


def _real(pairs: int) -> tuple[Tensor, Tensor]:
    n = torch.arange(pairs, dtype=torch.float64)
    return _with_ones(-(n + 1), torch.zeros_like(n))


def _random(pairs: int) -> tuple[Tensor, Tensor]:
    A = torch.linalg.eigvals(torch.randn(pairs, pairs, dtype=torch.complex128))
    return _with_ones(-A.real.abs(), A.imag)


#: Diagonals by name: pairs N/2 -> A (N/2,) and B (N/2,), complex; each stands for itself and its conjugate.
DIAGONALS: dict[str, Callable[[int], tuple[Tensor, Tensor]]] = {
    "legs": _legs,
    "lin": _lin,
    "inv": _inv,
    "real": _real,
    "random": _random,
}


def diagonal(name: str, states: int) -> tuple[Tensor, Tensor]:
    """A diagonal A and its B to start from, one of each conjugate pair.

        legs    the eigenvalues of the normal part of HiPPO-LegS, B in their basis (S4D-LegS)
        inv     -1/2 + i N/pi (N/(2n+1) - 1), close to those and in closed form (S4D-Inv)
        lin     -1/2 + i pi n, the frequencies of a Fourier series (S4D-Lin)
        real    -(n+1), the diagonal of HiPPO-LegS itself and, for real states, Mamba's (S4D-Real)
        random  the eigenvalues of a complex Gaussian matrix, mirrored where they are unstable: what HiPPO is against

    Args:
        name: one of these.
        states: N, even; n counts from 0 to N/2 - 1.

    Returns: A (N/2,) and B (N/2,), complex128.
    Raises: ValueError for an unknown name or an odd number of states.
    Reference: Gu et al. 2022, S4D, arXiv:2206.11893, section 4.

    >>> A, B = diagonal("lin", 4)
    >>> A
    tensor([-0.5000+0.0000j, -0.5000+3.1416j], dtype=torch.complex128)
    """
    if name not in DIAGONALS:
        raise ValueError(f"diagonal: name must be one of {', '.join(DIAGONALS)}, got {name!r}.")
    _check_states("diagonal", states)
    if states % 2:
        raise ValueError(f"diagonal: states must be even, for they come in conjugate pairs, got {states}.")
    return DIAGONALS[name](states // 2)


def _check_states(where: str, states: int) -> None:
    if states < 1 or states != int(states):
        raise ValueError(f"{where}: states must be a whole number from 1, got {states}.")
