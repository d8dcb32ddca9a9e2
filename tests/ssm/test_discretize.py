"""Discretisation against scipy, in every form of A, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.signal import cont2discrete
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from vision_mamba.ssm import discretize, hippo_legs
from vision_mamba.ssm.discretize import phi

F64, C128 = torch.float64, torch.complex128
METHODS = ("zoh", "bilinear", "euler")


def scipy_pair(A: Tensor, B: Tensor, step: float, method: str) -> tuple[Tensor, Tensor]:
    """A' (N, N) and B' (N, M) by scipy, whose conventions are those of control theory."""
    n, m = B.shape
    system = (A.numpy(), B.numpy(), np.zeros((1, n)), np.zeros((1, m)))
    found = cont2discrete(system, step, method=method)
    return torch.from_numpy(found[0]), torch.from_numpy(found[1])


def assert_equal(found: Tensor, expected: Tensor, bound: float = 1e-12) -> None:
    assert found.shape == expected.shape, f"{tuple(found.shape)} is not {tuple(expected.shape)}"
    assert float((found - expected).abs().max()) <= bound * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("step", [1e-3, 0.1, 1.0])
def test_dense_is_scipys(method: str, step: float) -> None:
    A, B = torch.randn(5, 5, dtype=F64), torch.randn(5, 2, dtype=F64)
    for found, expected in zip(discretize(A, B, step, method), scipy_pair(A, B, step, method), strict=True):
        assert_equal(found, expected)


@pytest.mark.parametrize("method", METHODS)
def test_hippo_is_scipys(method: str) -> None:
    A, B = hippo_legs(16)
    dA, dB = discretize(A, B, 0.01, method)
    expected = scipy_pair(A, B.unsqueeze(1), 0.01, method)
    assert_equal(dA, expected[0])
    assert_equal(dB, expected[1].squeeze(1))


@pytest.mark.parametrize("method", METHODS)
def test_diagonal_is_dense(method: str) -> None:
    A, B = -torch.rand(3, 6, dtype=F64), torch.randn(3, 6, dtype=F64)
    steps = torch.rand(3, dtype=F64)
    dA, dB = discretize(A, B, steps, method)
    dense = discretize(A.diag_embed(), B, steps, method)
    assert_equal(dA.diag_embed(), dense[0])
    assert_equal(dB, dense[1])
    for d in range(3):
        expected = scipy_pair(A[d].diag(), B[d].unsqueeze(1), float(steps[d]), method)
        assert_equal(dB[d], expected[1].squeeze(1))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("a", [-3.0, -1e-9, 0.0, 0.5])
def test_scalar_is_scipys(method: str, a: float) -> None:
    A, B = torch.tensor(a, dtype=F64), torch.tensor(2.0, dtype=F64)
    expected = scipy_pair(A.reshape(1, 1), B.reshape(1, 1), 0.3, method)
    for found, wanted in zip(discretize(A, B, 0.3, method), expected, strict=True):
        assert found.shape == ()
        assert_equal(found, wanted.reshape(()))


def test_numbers_are_scalars() -> None:
    A, B = discretize(-1.0, 1.0, 0.5, "euler")
    assert (A.item(), B.item()) == (0.5, 0.5)
    assert discretize(-1, 1, 0.5, "euler") == (A, B)


@pytest.mark.parametrize("method", METHODS)
def test_steps_of_every_token(method: str) -> None:
    """The selective case: a step for each token and channel, A of each channel, B of each token."""
    A, B, steps = -torch.rand(4, 3, dtype=F64), torch.randn(2, 5, 1, 3, dtype=F64), torch.rand(2, 5, 4, dtype=F64)
    dA, dB = discretize(A, B, steps, method, diagonal=True)
    assert dA.shape == dB.shape == (2, 5, 4, 3)
    one = discretize(A[2], B[1, 3, 0], steps[1, 3, 2], method)
    assert_equal(dA[1, 3, 2], one[0])
    assert_equal(dB[1, 3, 2], one[1])


@pytest.mark.parametrize("method", METHODS)
def test_complex_diagonal_is_the_real_block(method: str) -> None:
    """a + bi on the complex line is [[a, -b], [b, a]] on the real plane."""
    A, B = torch.tensor([-0.5 + 3j], dtype=C128), torch.tensor([1 - 2j], dtype=C128)
    dA, dB = discretize(A, B, 0.2, method)
    block = torch.tensor([[-0.5, -3.0], [3.0, -0.5]], dtype=F64)
    expected = scipy_pair(block, torch.tensor([[1.0], [-2.0]], dtype=F64), 0.2, method)
    assert_equal(torch.view_as_real(dA)[0], expected[0][:, 0])
    assert_equal(torch.view_as_real(dB)[0], expected[1][:, 0])


def test_zero_order_hold_takes_a_singular_matrix() -> None:
    A, B = torch.tensor([[0.0, 1.0], [0.0, 0.0]], dtype=F64), torch.tensor([0.0, 1.0], dtype=F64)
    dA, dB = discretize(A, B, 0.5)
    assert_equal(dA, torch.tensor([[1.0, 0.5], [0.0, 1.0]], dtype=F64))
    assert_equal(dB, torch.tensor([0.125, 0.5], dtype=F64))


@pytest.mark.parametrize("method", METHODS)
def test_all_rules_meet_as_the_step_shrinks(method: str) -> None:
    A, B = hippo_legs(4)
    exact = discretize(A, B, 1e-4)
    found = discretize(A, B, 1e-4, method)
    assert_equal(found[0], exact[0], 1e-5)
    assert_equal(found[1], exact[1], 1e-2)


def test_bilinear_and_zoh_keep_a_stable_model_stable_and_euler_does_not() -> None:
    A, B = torch.tensor([-1.0 + 30j], dtype=C128), torch.ones(1, dtype=C128)
    radius = {method: float(discretize(A, B, 0.5, method)[0].abs()) for method in METHODS}
    assert radius["zoh"] < 1 and radius["bilinear"] < 1 and radius["euler"] > 1


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shapes", [((), (), ()), ((2, 3), (2, 3), (2,)), ((2, 3, 3), (2, 3), (2,))])
def test_gradients(method: str, shapes: tuple[tuple[int, ...], ...]) -> None:
    A, B, step = (torch.rand(shape, dtype=F64) for shape in shapes)
    inputs = tuple(t.requires_grad_() for t in (-A, B, step + 0.1))
    assert gradcheck(lambda *t: discretize(*t, method), inputs)
    assert gradgradcheck(lambda *t: discretize(*t, method), inputs, fast_mode=True)


def test_gradient_of_a_complex_diagonal() -> None:
    A = torch.complex(-torch.rand(4, dtype=F64), torch.randn(4, dtype=F64)).requires_grad_()
    step = torch.tensor(0.1, dtype=F64, requires_grad=True)
    assert gradcheck(lambda A, step: discretize(A, torch.ones_like(A), step), (A, step))


@pytest.mark.parametrize("z", [0.0, 1e-30, 1e-8, 0.2499, 0.25, 0.2501, -1.0, -700.0])
def test_phi_and_its_derivatives_near_zero(z: float) -> None:
    x = torch.tensor(z, dtype=F64, requires_grad=True)
    y = phi(x)
    (slope,) = torch.autograd.grad(y, x)
    # (exp(z) - 1) / z as the mean of exp over [0, z], which has nothing to cancel; Gauss-Legendre is exact here.
    nodes, weights = np.polynomial.legendre.leggauss(200)
    t = (nodes + 1) / 2
    mean = float((weights / 2 * np.exp(z * t)).sum())
    tilt = float((weights / 2 * t * np.exp(z * t)).sum())
    assert abs(y.item() - mean) <= 1e-13
    assert abs(slope.item() - tilt) <= 1e-12


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(3), torch.ones(3), 0.1, "tustin"), "method must be one of zoh, bilinear, euler, got 'tustin'"),
        ((torch.ones(3, dtype=torch.int64), torch.ones(3), 0.1), "A must be float or complex, got torch.int64"),
        ((torch.ones(3), torch.tensor(1.0), 0.1), "B must have the states of A in an axis"),
        ((torch.ones(3), torch.ones(4), 0.1), r"B must be \(..., N\) with the N = 3 of a diagonal A \(3\), got \(4\)"),
        ((torch.ones(4, 3), torch.ones(3), 0.1), r"dense A must be \(..., N, N\), got \(4, 3\).*pass diagonal=True"),
        ((torch.ones(3, 3), torch.ones(3, 3), 0.1), "one dense matrix or 3 diagonals; pass diagonal=True or diagonal="),
        ((torch.ones(3, 3), torch.ones(4, 1), 0.1), r"the N = 3 of a dense A \(3, 3\), got \(4, 1\)"),
    ],
)
def test_refusals(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match="discretize: .*" + message):
        discretize(*arguments)


def test_a_square_of_diagonals_is_taken_as_told() -> None:
    A, B = -torch.rand(3, 3, dtype=F64), torch.rand(3, 3, dtype=F64)
    assert_equal(discretize(A, B, 0.1, diagonal=True)[0], torch.exp(0.1 * A))
    assert_equal(discretize(A, B, 0.1, diagonal=False)[0], torch.matrix_exp(0.1 * A))
