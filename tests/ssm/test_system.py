"""Recurrence, kernel, convolution and scan are one function."""

from __future__ import annotations

import pytest
import torch
from scipy.signal import dlsim
from torch import Tensor
from torch.autograd import gradcheck

from vision_mamba.ssm import (
    convolve,
    diagonal,
    discretize,
    fft_convolve,
    hippo_legs,
    kernel,
    nplr_legs,
    powers,
    recurrence,
    scan,
    vandermonde_kernel,
)

F64, C128 = torch.float64, torch.complex128
LENGTHS = (1, 2, 49, 64, 197)


def relative(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


def real_system(channels: int = 3, states: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    A, B = -torch.rand(channels, states, dtype=F64), torch.randn(channels, states, dtype=F64)
    A, B = discretize(A, B, torch.rand(channels, dtype=F64) * 0.1)
    return A, B, torch.randn(channels, states, dtype=F64)


@pytest.mark.parametrize("length", LENGTHS)
def test_all_ways_of_a_diagonal_system_agree(length: int) -> None:
    A, B, C = real_system()
    x = torch.randn(2, length, 3, dtype=F64)
    y, last = recurrence(A, B, C, x)
    K = kernel(A, B, C, length)
    assert relative(vandermonde_kernel(A, B, C, length), K) < 1e-10
    for other in (convolve(x, K), fft_convolve(x, K), scan(A, B, C, x)):
        assert relative(other, y) < 1e-10
    expected = torch.einsum("ldn,bld,dn->bdn", powers(A, length).flip(0), x, B)
    assert relative(last, expected) < 1e-10


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("method", ["zoh", "bilinear"])
def test_all_ways_of_hippo_agree(length: int, method: str) -> None:
    """A dense matrix that no eigenvectors help with."""
    A, B = discretize(*hippo_legs(16), 0.01, method)
    C, x = torch.randn(16, dtype=F64), torch.randn(2, length, dtype=F64)
    y, _ = recurrence(A, B, C, x)
    K = kernel(A, B, C, length)
    assert relative(convolve(x, K), y) < 1e-10
    assert relative(fft_convolve(x, K), y) < 1e-10


@pytest.mark.parametrize("length", LENGTHS)
def test_all_ways_of_a_complex_system_agree(length: int) -> None:
    A, B = diagonal("legs", 32)
    A, B = discretize(A, B, 0.02)
    C, x = torch.randn(16, dtype=C128), torch.randn(2, length, dtype=F64)
    y, _ = recurrence(A, B, C, x)
    K = kernel(A, B, C, length)
    assert relative(vandermonde_kernel(A, B, C, length), K) < 1e-10
    assert relative(scan(A, B, C, x), y) < 1e-10
    assert relative(torch.complex(fft_convolve(x, K.real), fft_convolve(x, K.imag)), y) < 1e-10


def test_a_dense_system_is_its_normal_part_in_the_eigenbasis() -> None:
    """The normal part of HiPPO, run dense and real, or diagonal and complex: half of the pairs, twice the real part."""
    found = nplr_legs(8)
    normal = (found.V @ found.Lambda.diag() @ found.V.mH).real
    C, x = torch.randn(8, dtype=F64), torch.randn(2, 50, dtype=F64)
    y, _ = recurrence(*discretize(normal, found.B, 0.05), C, x)
    A, B = diagonal("legs", 8)
    C_half = (C.to(C128) @ found.V)[4:]
    assert relative(2 * recurrence(*discretize(A, B, 0.05), C_half, x)[0].real, y) < 1e-10


def test_the_recurrence_is_scipys() -> None:
    A, B = discretize(*hippo_legs(6), 0.05)
    C, x = torch.randn(6, dtype=F64), torch.randn(1, 40, dtype=F64)
    y, _ = recurrence(A, B, C, x)
    # scipy reads the state before a step's input comes in, so its output at t + 1 is <C, A h_t + B x_t> at t.
    system = (A.numpy(), B.numpy()[:, None], (C @ A).numpy()[None], (C @ B).reshape(1, 1).numpy(), 1.0)
    _, expected, _ = dlsim(system, x[0].numpy())
    assert relative(y[0], torch.from_numpy(expected[:, 0])) < 1e-10


def test_a_state_carries_over() -> None:
    A, B, C = real_system()
    x = torch.randn(2, 20, 3, dtype=F64)
    whole, last = recurrence(A, B, C, x)
    first, state = recurrence(A, B, C, x[:, :7])
    second, end = recurrence(A, B, C, x[:, 7:], state)
    assert relative(torch.cat((first, second), 1), whole) < 1e-14
    assert relative(end, last) < 1e-14


@pytest.mark.parametrize("run", [lambda *t: recurrence(*t)[0], scan, lambda A, B, C, x: fft_convolve(
    x, vandermonde_kernel(A, B, C, x.shape[1]))])  # fmt: skip
def test_gradients(run) -> None:
    inputs = [*real_system(2, 3), torch.randn(2, 5, 2, dtype=F64)]
    assert gradcheck(run, [t.requires_grad_() for t in inputs])


def test_gradient_of_the_definitions() -> None:
    A, B, C = (t.requires_grad_() for t in real_system(2, 3))
    assert gradcheck(lambda A, B, C: kernel(A, B, C, 5), (A, B, C))
    x, K = torch.randn(2, 5, dtype=F64, requires_grad=True), torch.randn(6, dtype=F64, requires_grad=True)
    assert gradcheck(convolve, (x, K))


def test_powers_that_underflow_are_zero_with_a_gradient_of_zero() -> None:
    A = torch.tensor([0.0, 1e-30, 0.5], requires_grad=True)
    table = powers(A, 200)
    table.sum().backward()
    assert torch.equal(table[:, 0], torch.tensor([1.0] + [0.0] * 199))
    assert torch.isfinite(table).all() and torch.isfinite(A.grad).all()
    assert torch.allclose(A.grad, torch.tensor([1.0, 1.0, 4.0]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_convolves_in_float32(dtype: torch.dtype) -> None:
    x, K = torch.randn(2, 30).to(dtype), torch.randn(30).to(dtype)
    y = fft_convolve(x, K)
    assert y.dtype == torch.float32
    assert relative(y.double(), convolve(x.double(), K.double())) < 1e-6


N, ones = 3, torch.ones


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: recurrence(ones(N, N), ones(N, 1), ones(1, N), ones(1, 5)), "recurrence: .*drop the axis of a single"),
        (lambda: recurrence(ones(N, 2), ones(N), ones(N), ones(1, 5)), "recurrence: A, B and C must have one number"),
        (lambda: recurrence(ones(N), ones(N), ones(N), ones(5)), r"recurrence: x must be \(batch, steps"),
        (lambda: recurrence(ones(N), ones(N), ones(N), ones(1, 0)), "recurrence: x must be .* with a step at least"),
        (lambda: scan(ones(N, N), ones(N), ones(N), ones(1, 5)), "scan: A must be a diagonal.*use recurrence"),
        (lambda: vandermonde_kernel(ones(N, N), ones(N), ones(N), 5), "vandermonde_kernel: .*use kernel"),
        (lambda: kernel(ones(N), ones(N), ones(N), 0), "kernel: length must be at least 1, got 0"),
        (lambda: powers(ones(N), 0), "powers: length must be at least 1, got 0"),
        (lambda: convolve(ones(1, 5), ones(4)), r"convolve: K must be .* with the 5 steps of x or more, got \(4,\)"),
        (lambda: fft_convolve(ones(1, 5), ones(5) * 1j), "fft_convolve: x and K must be real"),
    ],
)
def test_refusals(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
