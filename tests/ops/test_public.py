"""The two public operators beside each other and beside the equation."""

from __future__ import annotations

import doctest
import importlib

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.cases import Case, double, make_call
from tests.tolerances import assert_close
from vision_mamba.ops import cross_selective_scan, selective_scan


def by_the_equation(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, bias: Tensor, h: Tensor
) -> tuple[Tensor, Tensor]:
    """Mamba's Algorithm 2, one number after the other, in float64: independent of everything in the package."""
    ys = torch.zeros_like(u)
    h = h.clone()
    batch, width, length = u.shape
    groups = B.shape[1]
    for b in range(batch):
        for c in range(width):
            g = c // (width // groups)
            for t in range(length):
                s = F.softplus(delta[b, c, t] + bias[c])
                h[b, c] = torch.exp(s * A[c]) * h[b, c] + s * B[b, g, :, t] * u[b, c, t]
                ys[b, c, t] = (C[b, g, :, t] @ h[b, c] + D[c] * u[b, c, t]) * z[b, c, t] * torch.sigmoid(z[b, c, t])
    return ys, h


@pytest.mark.parametrize("backend", ["cpu", "eager", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_selective_scan_is_the_equation(backend: str, dtype: torch.dtype) -> None:
    def random(*shape: int) -> Tensor:
        return torch.randn(*shape).to(dtype)

    u, delta, z, B, C = random(2, 6, 7), random(2, 6, 7), random(2, 6, 7), random(2, 3, 4, 7), random(2, 3, 4, 7)
    A, D, bias, h = -torch.rand(6, 4), torch.randn(6), torch.randn(6), torch.randn(2, 6, 4)
    wide = [t.double() for t in (u, delta, A, B, C, D, z, bias, h)]
    expected_y, expected_h = by_the_equation(*wide)
    y, last = selective_scan(u, delta, A, B, C, D, z, bias, True, True, initial_state=h, backend=backend)
    assert y.dtype == dtype and y.is_contiguous() and last.dtype == torch.float32
    assert_close("y", y, expected_y)
    assert_close("last_state", last, expected_h)
    # Two halves, the state carried over, are the whole.
    parts = [t[..., :3] for t in (u, delta, B, C, z)], [t[..., 3:] for t in (u, delta, B, C, z)]
    state, ys = h, []
    for u_, delta_, B_, C_, z_ in parts:
        y_, state = selective_scan(u_, delta_, A, B_, C_, D, z_, bias, True, True, initial_state=state, backend=backend)
        ys.append(y_)
    assert_close("y in two halves", torch.cat(ys, -1), expected_y)


@pytest.mark.parametrize("backend", ["cpu", "eager", "reference"])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("constant", ["B", "C", "BC"])
def test_constant_weights_are_those_of_every_token(constant: str, groups: int, backend: str) -> None:
    """(G*D, N) B or C against the same numbers written out for every token, each channel a group of its own."""
    torch.manual_seed(0)
    names = ("u", "delta", "A", "B", "C")
    tensors = dict(u=torch.randn(2, 6, 7), delta=torch.rand(2, 6, 7), A=-torch.rand(6, 4))
    written_out = {}
    for name in "BC":
        varying = torch.randn(2, groups, 4, 7)
        tensors[name] = torch.randn(6, 4) if name in constant else varying
        written_out[name] = (
            tensors[name].expand(2, 7, 6, 4).permute(0, 2, 3, 1)
            if name in constant
            else varying.repeat_interleave(6 // groups, 1)
        )
    z, h, seed = torch.randn(2, 6, 7), torch.randn(2, 6, 4), torch.randn(2, 6, 7)
    for t in tensors.values():
        t.requires_grad_()
    y, last = selective_scan(**tensors, z=z, return_last_state=True, initial_state=h, backend=backend)
    leaves = {n: t.detach().double().requires_grad_() for n, t in tensors.items()}
    wide = leaves | {n: t.detach().double().requires_grad_() for n, t in written_out.items()}
    plain = dict(z=z.double(), return_last_state=True, initial_state=h.double(), backend="reference")
    expected, expected_last = selective_scan(**wide, **plain)
    assert_close("y", y, expected)
    assert_close("last_state", last, expected_last)
    found = torch.autograd.grad(y, [tensors[n] for n in names], seed)
    for name, gradient, exact in zip(
        names, found, torch.autograd.grad(expected, [wide[n] for n in names], seed.double()), strict=True
    ):
        if name in constant:
            exact = exact.sum((0, 3))
        elif exact.dim() == 4:
            exact = exact.unflatten(1, (groups, -1)).sum(2)
        assert_close(f"d{name}", gradient, exact)


def test_one_group_may_leave_its_axis_out() -> None:
    u, delta, A = torch.randn(2, 6, 7), torch.rand(2, 6, 7), -torch.rand(6, 4)
    B, C = torch.randn(2, 4, 7), torch.randn(2, 4, 7)
    expected = selective_scan(u, delta, A, B[:, None], C[:, None])
    assert torch.equal(selective_scan(u, delta, A, B, C), expected)
    assert torch.equal(selective_scan(u, delta, A, B, C[:, None]), expected)


def test_defaults_are_plain() -> None:
    """No softplus, no skip, no gate unless asked for, as in mamba_ssm."""
    u, delta, A = torch.randn(1, 1, 3), torch.rand(1, 1, 3), torch.full((1, 1), -0.5)
    B = C = torch.ones(1, 1, 3)
    h, expected = torch.zeros(()), []
    for t in range(3):
        h = torch.exp(-0.5 * delta[0, 0, t]) * h + delta[0, 0, t] * u[0, 0, t]
        expected.append(h)
    torch.testing.assert_close(selective_scan(u, delta, A, B, C)[0, 0], torch.stack(expected))


@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_the_gate_is_taken_in_float32_and_rounded_once(backend: str) -> None:
    u, z, zero = torch.randn(2, 6, 7).bfloat16(), torch.randn(2, 6, 7).bfloat16(), torch.zeros(2, 6, 7)
    A, B, C = -torch.rand(6, 4), torch.randn(2, 4, 7), torch.randn(2, 4, 7)
    y = selective_scan(u, zero, A, B, C, torch.ones(6), z, backend=backend)  # steps of no size leave the skip alone
    assert torch.equal(y, (u.float() * F.silu(z.float())).bfloat16())


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_out_dtype(out_dtype: torch.dtype) -> None:
    call = make_call(Case(order="cross", dtypes=(torch.bfloat16,) * 4))
    public = dict(indices=call.indices, dt_bias=call.dt_bias, out_dtype=out_dtype)
    y = cross_selective_scan(*call[:6], **public)
    assert y.dtype == out_dtype
    wide = double(call)
    expected = cross_selective_scan(*wide[:6], indices=call.indices, dt_bias=wide.dt_bias, backend="reference")
    assert_close("y", y, expected)


def test_merge_is_the_sum_of_the_routes() -> None:
    call = double(make_call(Case(order="local_2", rank=3)))
    public = dict(indices=call.indices, dt_bias=call.dt_bias, dt_weight=call.dt_weight)
    alone = cross_selective_scan(*call[:6], **public, merge=False)
    assert alone.shape == (2, 35, 4, 20)
    torch.testing.assert_close(cross_selective_scan(*call[:6], **public), alone.sum(2))


def test_low_rank_step_sizes_are_their_product() -> None:
    call = double(make_call(Case(order="cross", rank=3)))
    whole = torch.einsum("blkr,kdr->blkd", call.dt, call.dt_weight)
    public = dict(indices=call.indices, dt_bias=call.dt_bias)
    given = cross_selective_scan(call.x, whole, *call[2:6], **public)
    torch.testing.assert_close(cross_selective_scan(*call[:6], **public, dt_weight=call.dt_weight), given)


@pytest.mark.parametrize(
    "module", ["ops.cross_selective_scan", "ops.selective_scan", "ops.registry", "ops.backends.eager", "scans.order"]
)
def test_examples_in_docstrings(module: str) -> None:
    result = doctest.testmod(importlib.import_module(f"vision_mamba.{module}"))
    assert result.attempted > 0 and result.failed == 0
