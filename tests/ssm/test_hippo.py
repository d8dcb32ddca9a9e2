"""HiPPO-LegS does what it is derived for, and its other forms are the same matrix."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from vision_mamba.ssm import DIAGONALS, diagonal, discretize, hippo_legs, nplr_legs

STATES = (1, 2, 5, 16, 64)


def test_the_state_holds_legendre_coefficients() -> None:
    """Driven by a function, the state at time T is its projection on normalised Legendre polynomials over [0, T]."""
    states, steps = 8, 4000

    def signal(t: np.ndarray | float) -> np.ndarray | float:
        return np.sin(5 * t) + 0.5 * np.cos(11 * t) + t

    A, B = hippo_legs(states)
    h = torch.zeros(states, dtype=torch.float64)
    for k in range(1, steps + 1):
        # dh/dt = (A h + B x) / t over a step 1 that ends at t = k is a time-invariant model with a step of 1/k.
        dA, dB = discretize(A, B, 1 / k, "bilinear")
        h = dA @ h + dB * float(signal((k - 0.5) / steps))
    nodes, weights = np.polynomial.legendre.leggauss(60)
    polynomials = np.polynomial.legendre.legvander(nodes, states - 1)
    expected = np.sqrt(2 * np.arange(states) + 1) * ((weights / 2 * signal((nodes + 1) / 2)) @ polynomials)
    assert np.abs(h.numpy() - expected).max() < 2e-3 < 0.1 < np.abs(expected).max()


@pytest.mark.parametrize("states", STATES)
def test_normal_plus_low_rank_is_the_matrix(states: int) -> None:
    A, B = hippo_legs(states)
    Lambda, P, V, B_found = nplr = nplr_legs(states)
    scale = float(A.abs().max())
    rebuilt = V @ Lambda.diag() @ V.mH - torch.outer(P, nplr.Q).to(V.dtype).conj()
    assert float((rebuilt - A).abs().max()) < 1e-12 * scale
    assert float((V.mH @ V - torch.eye(states)).abs().max()) < 1e-12
    assert torch.equal(B, B_found)


@pytest.mark.parametrize("states", STATES)
def test_eigenvalues(states: int) -> None:
    """Of A itself, by its triangle, -1 to -N; of its normal part, -1/2 and conjugate pairs."""
    A, _ = hippo_legs(states)
    assert torch.equal(A.diagonal(), -torch.arange(1, states + 1, dtype=torch.float64))
    assert torch.equal(A.triu(1), torch.zeros_like(A))
    Lambda = nplr_legs(states).Lambda
    assert torch.equal(Lambda.real, torch.full((states,), -0.5, dtype=torch.float64))
    assert float((Lambda + Lambda.flip(0) + 1).abs().max()) < 1e-10 * states**2


def test_its_own_eigenvectors_are_hopeless() -> None:
    """Why the normal part is split off: diagonalising A directly loses all digits before N = 64."""
    _, vectors = torch.linalg.eig(hippo_legs(64)[0])
    assert float(torch.linalg.cond(vectors)) > 1e15
    assert float(torch.linalg.cond(nplr_legs(64).V)) < 1 + 1e-10


def test_the_diagonal_is_hippos_in_the_eigenbasis() -> None:
    A, B = diagonal("legs", 16)
    Lambda, _, V, B_own = nplr_legs(16)
    both, both_B = torch.cat((A, A.conj())), torch.cat((B, B.conj()))
    order = both.imag.argsort()
    assert float((both[order] - Lambda).abs().max()) < 1e-12
    # An eigenvector has a phase of its own, its product with what it is read by has not.
    found, expected = both_B[order].abs(), (V.mH @ B_own.to(V.dtype)).abs()
    assert float((found - expected).abs().max()) < 1e-10


def test_closed_forms() -> None:
    n = torch.arange(8, dtype=torch.float64)
    for name, real, imag in (
        ("lin", torch.full_like(n, -0.5), math.pi * n),
        ("inv", torch.full_like(n, -0.5), 16 / math.pi * (16 / (2 * n + 1) - 1)),
        ("real", -(n + 1), torch.zeros_like(n)),
    ):
        A, B = diagonal(name, 16)
        assert torch.allclose(A, torch.complex(real, imag), rtol=1e-14), name
        assert torch.equal(B, torch.ones_like(B)), name


def test_inverse_law_approaches_hippos_eigenvalues() -> None:
    """S4D-Inv comes from the eigenvalues' own law: the largest are near N^2 / pi and match within a few percent."""
    states = 256
    legs = diagonal("legs", states)[0].imag.sort(descending=True).values
    inv = diagonal("inv", states)[0].imag
    assert abs(float(legs[0]) / (states**2 / math.pi) - 1) < 0.02
    assert float((inv[:8] / legs[:8] - 1).abs().max()) < 0.1


@pytest.mark.parametrize("name", DIAGONALS)
def test_every_diagonal_is_stable(name: str) -> None:
    A, B = diagonal(name, 32)
    assert A.shape == B.shape == (16,) and A.dtype == B.dtype == torch.complex128
    assert bool((A.real < 0).all()) and bool(B.isfinite().all())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: hippo_legs(0), "hippo_legs: states must be a whole number from 1, got 0"),
        (lambda: diagonal("hippo", 4), "diagonal: name must be one of legs, lin, inv, real, random, got 'hippo'"),
        (lambda: diagonal("lin", 5), "diagonal: states must be even.*got 5"),
        (lambda: diagonal("lin", 0), "diagonal: states must be a whole number from 1, got 0"),
    ],
)
def test_refusals(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
