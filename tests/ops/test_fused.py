"""Norms, convolution and gate beside the scans: kernels against plain torch, and when each of them runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vision_mamba import ops
from vision_mamba.ops import conv
from vision_mamba.ops.fused import Fused

HERE = Path(__file__).parent


def test_in_interpreter() -> None:
    pytest.importorskip("triton")
    env = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", str(HERE / "fused_interpreted.py")]
    done = subprocess.run(command, env=env, cwd=HERE.parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["small", "large"])
def test_on_gpu(name: str) -> None:
    from tests.ops.fused_cases import CASES, LARGE, check

    torch.manual_seed(0)
    for make in (CASES if name == "small" else LARGE).values():
        check(make(), "cuda")


@pytest.mark.gpu
def test_runs_kernels_in_eager_mode_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from vision_mamba.ops.backends import conv_triton

    x = torch.randn(2, 9, 32, device="cuda", requires_grad=True)
    weight, bias = torch.randn(2, 32, 4, device="cuda"), torch.randn(2, 32, device="cuda")
    exact = conv.plain_conv_both_ways(x, weight, bias)
    torch.testing.assert_close(ops.conv_both_ways(x, weight, bias), exact)
    torch.testing.assert_close(torch.compile(ops.conv_both_ways, fullgraph=True)(x, weight, bias), exact)
    torch.testing.assert_close(torch.vmap(lambda row: ops.conv_both_ways(row[None], weight, bias)[0])(x), exact)
    (dx,) = torch.autograd.grad(ops.conv_both_ways(x, weight, bias).sum(), x, create_graph=False)
    torch.testing.assert_close(dx, torch.autograd.grad(exact.sum(), x)[0])
    y = ops.conv_both_ways(x, weight, bias)
    with pytest.raises(RuntimeError, match=r"conv_both_ways: second derivatives.*use_backend"):
        torch.autograd.grad(y.sum(), x, create_graph=True)
    with ops.use_backend("eager"):
        monkeypatch.setattr(conv_triton, "conv_forward", None)
        torch.testing.assert_close(ops.conv_both_ways(x, weight, bias), exact)


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
    fused = Fused("one more", lambda x: x + 1, lambda: pytest.fail("asked for kernels"))
    assert fused(torch.zeros(1)) == 1
