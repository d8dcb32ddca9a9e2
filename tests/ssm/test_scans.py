"""The scans agree where they can, and where the short published one breaks ours stand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from vision_mamba import ops
from vision_mamba.ssm import SCANS, chunked_scan, cumulative_sum_scan, segment_sum, sequential_scan
from vision_mamba.ssm.scans import Scan

F64 = torch.float64
LENGTHS = (1, 2, 16, 49, 63, 197)
OTHERS = [scan for name, scan in SCANS.items() if name != "sequential"]


def relative(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("scan", [*OTHERS, cumulative_sum_scan])
def test_every_scan_is_the_loop(scan: Scan, length: int) -> None:
    """Decays mild enough for all of them."""
    log_a, b = -0.05 * torch.rand(2, length, 3, 4, dtype=F64), torch.randn(2, length, 3, 4, dtype=F64)
    assert relative(scan(log_a, b), sequential_scan(log_a, b)) < 1e-10


@pytest.mark.parametrize("scan", OTHERS)
def test_complex_decays(scan: Scan) -> None:
    log_a = torch.complex(-torch.rand(2, 40, 3, dtype=F64), 3 * torch.randn(2, 40, 3, dtype=F64))
    b = torch.randn(2, 40, 3, dtype=F64)
    assert relative(scan(log_a, b), sequential_scan(log_a, b)) < 1e-10


@pytest.mark.parametrize("chunk", [1, 2, 7, 64, 100])
def test_any_chunk(chunk: int) -> None:
    log_a, b = -torch.rand(2, 64, 3, dtype=F64), torch.randn(2, 64, 3, dtype=F64)
    assert relative(chunked_scan(log_a, b, chunk), sequential_scan(log_a, b)) < 1e-10


def s6_decays(length: int = 197) -> tuple[Tensor, Tensor]:
    """What Mamba's initialisation gives: A = -1 ... -16 and steps of 0.1, the largest it starts from."""
    log_a = -0.1 * torch.arange(1.0, 17).expand(1, length, 16)
    return log_a, torch.randn(1, length, 16)


def with_epsilon(log_a: Tensor, b: Tensor) -> Tensor:
    """The short form as it is published with a guard: dividing by p_t + 1e-12."""
    p = log_a.cumsum(1).exp()
    return (b / (p + 1e-12)).cumsum(1) * p


def test_the_cumulative_sum_form_breaks() -> None:
    """On decays no stronger than Mamba's own, in float32, every variant of the form is wrong."""
    log_a, b = s6_decays()
    expected = sequential_scan(log_a.double(), b.double())

    plain = cumulative_sum_scan(log_a, b)
    assert plain.isnan().any()
    # The fastest state is lost after log(2^-149) / -1.6, some 65 steps; until before that it was exact enough.
    assert bool(plain[:, 70:, -1].isnan().all())
    assert relative(plain[:, :50].double(), expected[:, :50]) < 1e-5

    guarded = with_epsilon(log_a, b)
    assert bool(guarded.isfinite().all())
    # No NaN tells that the last state is forgotten: it has inputs of size 1 and reads 0.
    assert float(guarded[:, 100:, -1].abs().max()) < 1e-6 < 0.1 < float(expected[:, 100:, -1].abs().max())
    assert relative(guarded.double(), expected) > 0.5


@pytest.mark.parametrize("scan", SCANS.values(), ids=SCANS)
def test_ours_do_not(scan: Scan) -> None:
    log_a, b = s6_decays()
    expected = sequential_scan(log_a.double(), b.double())
    log_a, b = log_a.clone().requires_grad_(), b.clone().requires_grad_()
    h = scan(log_a, b)
    assert relative(h.detach().double(), expected) < 1e-6
    h.sum().backward()
    assert bool(log_a.grad.isfinite().all()) and bool(b.grad.isfinite().all())


@pytest.mark.parametrize("scan", SCANS.values(), ids=SCANS)
def test_decays_of_zero_and_beyond_the_exponent(scan: Scan) -> None:
    """A state that is wiped at one step starts anew there; no scan may see infinity minus infinity."""
    log_a = torch.full((1, 40, 2), -0.1)
    log_a[:, 10], log_a[:, 25] = -torch.inf, -1e4
    b = torch.randn(1, 40, 2)
    h = scan(log_a, b)
    assert bool(h.isfinite().all())
    for start, stop in ((0, 10), (10, 25), (25, 40)):
        part = log_a[:, start:stop].clone()
        part[:, 0] = 0
        assert relative(h[:, start:stop], sequential_scan(part, b[:, start:stop])) < 1e-5


@pytest.mark.parametrize("scan", [*SCANS.values(), cumulative_sum_scan])
def test_gradients(scan: Scan) -> None:
    log_a, b = -torch.rand(2, 5, 2, dtype=F64), torch.randn(2, 5, 2, dtype=F64)
    assert gradcheck(scan, (log_a.requires_grad_(), b.requires_grad_()))


def test_segment_sum_keeps_the_digits_of_short_segments() -> None:
    """Behind a long sum, the difference of two cumulative sums has lost what is small."""
    log_a = torch.tensor([[-1e6, -1e-3, -1e-3, -1e-3]])
    exact = torch.tensor(-2e-3)
    cumulative = log_a.cumsum(1)
    assert abs(segment_sum(log_a)[0, 3, 1] - exact) < 1e-9
    assert abs(cumulative[0, 3] - cumulative[0, 1] - exact) > 1e-3


@pytest.mark.parametrize("scan", SCANS.values(), ids=SCANS)
def test_the_selective_scan_is_one_of_these(scan: Scan) -> None:
    """With log a = s A and b = s B x, contracted with C: the operator that every model here calls."""
    u, dt = torch.randn(2, 6, 50, dtype=F64), torch.rand(2, 6, 50, dtype=F64)
    A, B, C = -torch.rand(6, 4, dtype=F64), torch.randn(2, 4, 50, dtype=F64), torch.randn(2, 4, 50, dtype=F64)
    log_a = torch.einsum("bdl,dn->bldn", dt, A)
    h = scan(log_a, torch.einsum("bdl,bnl,bdl->bldn", dt, B, u))
    y = torch.einsum("bldn,bnl->bdl", h, C)
    assert relative(y, ops.selective_scan(u, dt, A, B, C, backend="reference")) < 1e-10


@pytest.mark.parametrize("scan", [*SCANS.values(), cumulative_sum_scan])
def test_refusals(scan: Scan) -> None:
    name = scan.__name__
    with pytest.raises(ValueError, match=rf"{name}: log_a and b must have one shape .*\(1, 3\) and \(1, 4\)"):
        scan(torch.zeros(1, 3), torch.zeros(1, 4))
    with pytest.raises(ValueError, match=rf"{name}: b must be \(batch, steps, ...\) with a step at least"):
        scan(torch.zeros(1, 0), torch.zeros(1, 0))


def test_a_chunk_has_a_step() -> None:
    with pytest.raises(ValueError, match="chunked_scan: chunk must be at least 1, got 0"):
        chunked_scan(torch.zeros(1, 3), torch.zeros(1, 3), 0)
