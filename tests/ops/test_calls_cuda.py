"""A scan's call as the CUDA kernels take it, as far as no GPU is needed to see it."""

from __future__ import annotations

import pytest
import torch

from tests.cases import BF16, F16, F32, Case, make_call
from vision_mamba.ops.backends import cuda, forward_cuda, gpu, nvrtc, wide_cuda
from vision_mamba.ops.backends.calls_cuda import SMALL, as_taken, rank_in_kernel

HALF = (BF16,) * 4


@pytest.fixture(autouse=True)
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "capability", lambda _: (9, 0))
    monkeypatch.setattr(nvrtc, "shared_limit", lambda _: 227 * 1024)


@pytest.mark.parametrize("states", [1, 3, 16, 64])
@pytest.mark.parametrize("rank", [0, 5, 6, 64, 65, 66])
@pytest.mark.parametrize("steps", [1, 100, 1000])
def test_what_is_saved_is_as_large_as_was_promised(states: int, rank: int, steps: int) -> None:
    """Compilers are promised a size for the call as it came, before a high rank is multiplied out."""
    call = make_call(Case(channels=8, states=states, rank=rank, dtypes=HALF, grid=(1, steps), batch=1))
    assert forward_cuda.new_saved(as_taken(call)).shape == forward_cuda.new_saved(call).shape


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
def test_low_ranks_of_every_type_go_by_the_tensor_cores(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "multiprocessors", lambda _: 1)
    monkeypatch.setattr(nvrtc, "kernel", lambda wanted, _: wanted)
    call = make_call(Case(channels=64, states=16, rank=6, dtypes=(dtype,) * 4, grid=(1, 50)))
    y = call.new_output()
    for plan, name in (
        (wide_cuda.forward(call, True, y, 0), "wide_flow"),
        (wide_cuda.backward(call, True, y, torch.empty_like(call.x), 0), "wide_backward"),
    ):
        assert plan.scan.kernel.name == name and dict(plan.scan.kernel.macros)["TENSOR_RANK"] == "true"
    # Not where lanes have too few channels, nor with one state but in bfloat16, nor on older GPUs.
    for states, rank, taken in ((16, 0, False), (64, 6, False), (32, 5, True), (1, 6, dtype == BF16)):
        other = make_call(Case(channels=64, states=states, rank=rank, dtypes=(dtype,) * 4))
        assert rank_in_kernel(other) == taken
    monkeypatch.setattr(gpu, "capability", lambda _: (7, 5))
    assert not rank_in_kernel(call)
    assert wide_cuda.forward(call, True, y, 0).scan.kernel.name == "wide_forward"


def test_small_tensors_begin_where_vectors_may() -> None:
    call = make_call(Case(rank=4, state=True, channels=8, states=16))
    assert all(getattr(as_taken(call), name) is getattr(call, name) for name in SMALL)
    for name in SMALL:
        small = getattr(call, name)
        part = small.new_empty(small.numel() + 1)[1:].view_as(small).copy_(small)
        for other in (part, small.double(), torch.stack((small, small), -1)[..., 0]):
            taken = getattr(as_taken(call._replace(**{name: other})), name)
            assert torch.equal(taken, small) and taken.dtype == torch.float32
            assert taken.is_contiguous() and taken.data_ptr() % 16 == 0
        assert forward_cuda.prepare(call._replace(**{name: part}), False) is None


@pytest.mark.parametrize("name", ["x", "dt", "B", "C"])
def test_tokens_that_are_far_apart_are_brought_together(name: str) -> None:
    call = make_call(Case(channels=8, states=16, grid=(1, 5), dtypes=HALF, routes=2))
    rows = getattr(call, name)
    for apart, far in ((2**30 - 1, False), (2**30, True)):  # elements of two bytes
        strided = torch.empty_strided(rows.shape, (1, apart, *rows.stride()[2:]), dtype=rows.dtype, device="meta")
        given = call._replace(**{name: strided})
        taken = getattr(as_taken(given), name)
        assert taken.is_contiguous() if far else taken is strided
        assert not far or forward_cuda.prepare(given, False) is None


def test_rows_of_tokens_that_no_kernel_reaches_over_are_refused() -> None:
    call = make_call(Case(channels=8, states=16, grid=(1, 5), routes=2))
    wide = call._replace(A=torch.empty(2, 2**24, 16, device="meta"), x=torch.empty(1, 1, 2, 2**24, device="meta"))
    assert cuda.BACKEND.refuses(call) is None
    assert "scan fewer channels at a time" in (cuda.BACKEND.refuses(wide) or "")
