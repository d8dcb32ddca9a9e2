"""Where the GPU kernels read and write: past 2^31 elements, beside pages that are not there, under a sanitizer."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.cases import BF16, F32, Case, make_call, run
from tests.tolerances import assert_close
from vision_mamba import ops
from vision_mamba.ops.call import ScanCall

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parents[2]
SWEEP = str(ROOT / "tests" / "ops" / "gpu_sweep.py")
BACKENDS = ("cuda", "triton")


def outcome_of(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, env=os.environ | environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.fixture(autouse=True)
def runs_here(request: pytest.FixtureRequest) -> None:
    backend = request.getfixturevalue("backend")
    reason = ops.available_backends()[backend]
    if reason:
        pytest.skip(f"{backend}: {reason}")


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("states", [1, 16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_beyond_32_bits(backend: str, states: int, dtype: torch.dtype) -> None:
    """A batch item of which the last tokens lie more than 2^31 elements from the first, neighbours 1 or 2 GiB apart."""
    case = Case(grid=(1, 5), batch=1, routes=1, channels=8, states=states, dtypes=(dtype,) * 4)
    call = make_call(case, device="cuda")
    far = torch.empty(4 * 2**29 + 64, dtype=dtype, device="cuda").as_strided(call.x.shape, (0, 2**29, 1))
    far.copy_(call.x)
    near, again = run(call, backend), run(call._replace(x=far), backend)
    for name, tensor in run(call._replace(x=far), backend).items():
        assert torch.equal(tensor, again[name]), name
        assert_close(name, tensor, near[name])  # other offsets are another kernel, which may round differently


@pytest.mark.parametrize(("states", "merge"), [(1, True), (1, False), (16, True)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_more_than_32_bits_of_elements(backend: str, states: int, merge: bool) -> None:
    """The last item of a batch of more than 2^31 step sizes gives what it gives alone, output and gradients."""
    batch, tokens, routes, channels = 33, 2**15 + 5, 4, 512  # 2.2e9 step sizes
    needed = 60 * 2**30
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of free memory")
    new = dict(device="cuda", dtype=BF16)
    A = -torch.rand(routes, channels, states, device="cuda")
    shape = (batch, tokens, routes)
    call = ScanCall(
        torch.randn(batch, tokens, channels, **new),
        torch.randn(*shape, channels, **new),
        A,
        torch.randn(*shape, states, **new),
        torch.randn(*shape, states, **new),
        merge=merge,
    )
    assert call.dt.numel() > 2**31
    leaves = [getattr(call, name).requires_grad_() for name in ("x", "dt", "B", "C")]
    y, _ = torch.ops.vision_mamba.cross_selective_scan(*call, backend)
    seed = torch.randn_like(y[-1:])
    found = torch.autograd.grad(y, leaves, torch.cat([torch.zeros_like(y[:-1]), seed]))
    alone = call._replace(**{n: getattr(call, n).detach()[-1:].requires_grad_() for n in ("x", "dt", "B", "C")})
    y_alone, _ = torch.ops.vision_mamba.cross_selective_scan(*alone, backend)
    want = torch.autograd.grad(y_alone, [getattr(alone, n) for n in ("x", "dt", "B", "C")], seed)
    # Another batch may take another tile, whose sums round differently.
    for name, tensor, expected in zip(("y", "dx", "ddt", "dB", "dC"), (y, *found), (y_alone, *want), strict=True):
        assert_close(name, tensor[-1:], expected)


@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_guard_pages(backend: str, place: str) -> None:
    outcome = outcome_of(sys.executable, SWEEP, backend, place)
    assert outcome.returncode == 0, outcome.stdout[-3000:]


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
@pytest.mark.parametrize("backend", ["cuda"])
def test_sanitizer(backend: str, tool: str) -> None:
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed")
    # Without torch's cache every buffer is an allocation of its own, and its end is known. Calls of the driver that
    # fail are left to those who make them: cuda-core asks for what a kernel may lack.
    options = ("--tool", tool, "--error-exitcode", "9", "--report-api-errors", "no")
    options += ("--padding", "512") if tool == "memcheck" else ()
    outcome = outcome_of(sanitizer, *options, sys.executable, SWEEP, backend, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    assert outcome.returncode == 0, outcome.stdout[:3000]
