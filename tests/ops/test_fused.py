"""Norms, convolution and gate beside the scans: kernels against plain torch, and when each of them runs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from tests.ops import fused_cases
from tests.tolerances import assert_close
from vision_mamba import ops
from vision_mamba.ops import conv
from vision_mamba.ops.fused import Fused


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*fused_cases.CASES, *fused_cases.LARGE])
def test_on_gpu(name: str) -> None:
    fused_cases.check((fused_cases.CASES | fused_cases.LARGE)[name](), "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 7, 1000), (5, 33), (2, 6)])
def test_on_gpu_gelu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    from vision_mamba.ops.backends import rows_cuda

    h = (3 * torch.randn(shape, device="cuda")).to(dtype)
    assert_close("gelu", rows_cuda.gelu_forward(h), F.gelu(h.double()))


@pytest.mark.gpu
def test_what_kernels_refuse_is_plain_torch() -> None:
    wide = torch.randn(2, 1030, device="cuda")
    weight, bias = torch.rand(1030, device="cuda"), torch.randn(1030, device="cuda")
    assert torch.equal(ops.normed(wide, weight, bias), F.layer_norm(wide, (1030,), weight, bias))
    z = torch.randn(4, 3, 2, device="cuda").transpose(0, 2)
    assert torch.equal(ops.gated(z, z), z * F.silu(z))
    none = torch.empty(0, 5, 8, device="cuda")
    assert ops.conv_both_ways(none, torch.ones(2, 8, 4, device="cuda"), torch.ones(2, 8, device="cuda")).numel() == 0


@pytest.mark.gpu
def test_runs_kernels_in_eager_mode_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from vision_mamba.ops.backends import rows_cuda

    x = torch.randn(2, 9, 32, device="cuda", requires_grad=True)
    weight, bias = torch.randn(2, 32, 4, device="cuda"), torch.randn(2, 32, device="cuda")
    exact = conv.plain_conv_both_ways(x, weight, bias)
    torch.testing.assert_close(ops.conv_both_ways(x, weight, bias), exact)
    compiled = torch.compile(ops.conv_both_ways, fullgraph=True)(x, weight, bias)
    torch.testing.assert_close(compiled, exact)
    torch.testing.assert_close(
        torch.autograd.grad(compiled.sum(), x)[0], torch.autograd.grad(exact.sum(), x, retain_graph=True)[0]
    )
    torch.testing.assert_close(torch.vmap(lambda row: ops.conv_both_ways(row[None], weight, bias)[0])(x), exact)
    (dx,) = torch.autograd.grad(ops.conv_both_ways(x, weight, bias).sum(), x, create_graph=False)
    torch.testing.assert_close(dx, torch.autograd.grad(exact.sum(), x)[0])
    y = ops.conv_both_ways(x, weight, bias)
    with pytest.raises(RuntimeError, match=r"conv_both_ways: second derivatives.*use_backend"):
        torch.autograd.grad(y.sum(), x, create_graph=True)
    with ops.use_backend("eager"):
        monkeypatch.setattr(rows_cuda, "_conv_forward", None)
        torch.testing.assert_close(ops.conv_both_ways(x, weight, bias), exact)


@pytest.mark.gpu
def test_on_gpu_tangents_are_not_dropped() -> None:
    x, z = torch.randn(2, 3, 4, device="cuda"), torch.randn(2, 3, 4, device="cuda")
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(ops.gated(forward_ad.make_dual(x, torch.ones_like(x)), z)).tangent
    torch.testing.assert_close(tangent, F.silu(z))


@pytest.mark.gpu
def test_on_gpu_parameters_may_begin_anywhere() -> None:
    flat, x = torch.rand(1000, device="cuda"), torch.randn(5, 8, device="cuda")
    weight, bias = flat[1:9], flat[10:18]
    torch.testing.assert_close(ops.normed(x, weight, bias), F.layer_norm(x, (8,), weight, bias))
    taps, bias = flat[3:67].view(2, 8, 4), flat[70:86].view(2, 8)
    torch.testing.assert_close(ops.conv_both_ways(x[None], taps, bias), conv.plain_conv_both_ways(x[None], taps, bias))


@pytest.mark.gpu
def test_on_gpu_no_epsilon_is_needed() -> None:
    x, weight = torch.randn(5, 8, device="cuda"), torch.rand(8, device="cuda", requires_grad=True)
    for eps in (0, 0.0):
        (found,) = torch.autograd.grad(ops.normed(x, weight, eps=eps).sum(), weight)
        torch.testing.assert_close(found, F.layer_norm(x, (8,), eps=eps).sum(0))


def test_kernels_leave_wrong_shapes_and_types_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    from vision_mamba.ops.backends import gpu, rows_cuda

    monkeypatch.setattr(gpu, "unavailable", lambda device: None)
    x, weight, bias = torch.randn(2, 5, 8), torch.rand(8), torch.randn(8)
    options = dict(eps=1e-5, rms=False, out_dtype=None, stream=False)
    assert not rows_cuda.NORM.refuses((x, None, weight, bias), options)
    assert rows_cuda.NORM.refuses((x, None, weight[:4], bias), options)
    assert rows_cuda.NORM.refuses((x, None, weight, bias[None]), options)
    assert rows_cuda.NORM.refuses((x, None, weight, bias), options | dict(out_dtype=torch.float64))
    taps, biases = torch.rand(2, 8, 4), torch.rand(2, 8)
    assert not rows_cuda.CONV_BOTH_WAYS.refuses((x, taps, biases), {})
    for wrong in ((x[0], taps, biases), (x, taps[:, :4], biases), (x, taps[0], biases), (x, taps, biases[0])):
        assert rows_cuda.CONV_BOTH_WAYS.refuses(wrong, {})


def test_a_parameter_is_read_from_where_vectors_may_begin() -> None:
    from vision_mamba.ops.backends import rows_cuda

    flat = torch.arange(9.0)
    assert flat.data_ptr() % 16 == 0 and rows_cuda._whole(flat) is flat
    for other in (flat[1:], flat.double(), torch.arange(18.0)[::2]):
        whole = rows_cuda._whole(other)
        assert whole is not None and torch.equal(whole, other.float())
        assert whole.dtype == torch.float32 and whole.is_contiguous() and whole.data_ptr() % 16 == 0


@pytest.mark.parametrize("rms", [False, True])
def test_norms_are_torchs(rms: bool) -> None:
    torch.manual_seed(0)
    x, branch, weight = torch.randn(3, 4, 8), torch.randn(3, 4, 8), torch.rand(8)
    bias = None if rms else torch.randn(8)

    def exact(v: Tensor) -> Tensor:
        return F.rms_norm(v, (8,), weight, 1e-5) if rms else F.layer_norm(v, (8,), weight, bias, 1e-5)

    assert torch.equal(ops.normed(x, weight, bias, rms=rms), exact(x))
    y, total = ops.add_normed(x, branch, weight, bias, rms=rms, out_dtype=torch.bfloat16)
    assert torch.equal(total, x + branch) and torch.equal(y, exact(x + branch).bfloat16())


def test_convolution_is_causal_from_both_ends() -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 7, 5).double(), torch.randn(2, 5, 4).double(), torch.randn(2, 5).double()
    y = ops.conv_both_ways(x, weight, bias)
    for way in range(2):
        seen = x if way == 0 else x.flip(1)
        padded = F.pad(seen, (0, 0, 3, 0))
        expected = F.silu(bias[way] + sum(weight[way, :, j] * padded[:, j : j + 7] for j in range(4)))
        torch.testing.assert_close(y[:, :, way] if way == 0 else y[:, :, way].flip(1), expected)


def test_gate() -> None:
    y, z = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    assert torch.equal(ops.gated(y, z), y * F.silu(z))


def test_plain_torch_runs_on_a_cpu() -> None:
    fused = Fused("one more", lambda: pytest.fail("asked for kernels"), lambda x: x + 1)
    assert fused(torch.zeros(1)) == 1
