"""The wave kernels on a GPU: long routes of few sequences in the classic layout, against the float64 reference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import cases
from tests.cases import BF16, F16, F32, Case, make_call
from tests.tolerances import assert_close
from vision_mamba.ops.backends import backward_cuda, gpu, nvrtc, wave_cuda
from vision_mamba.ops.backends import cuda_kernels as kernels
from vision_mamba.ops.backends import few_cuda as few
from vision_mamba.ops.call import GRADIENTS, ScanCall
from vision_mamba.ops.known import Known

LONG = Case(
    states=16, routes=1, batch=1, channels=48, grid=(1, 37), shared_x=False, merge=False, layout="channels_first"
)


def routes() -> list[Case]:
    """Blocks full of channels and not, tiles full of steps and not, one tile and many, every option and type."""
    half = (BF16,) * 4
    found = [replace(LONG, dtypes=(dtype,) * 4, state=state) for dtype in (BF16, F16, F32) for state in (False, True)]
    found += [replace(LONG, grid=(1, n), channels=c, dtypes=half, state=True) for n, c in ((2, 48), (16, 5), (33, 100))]
    found += [replace(LONG, grid=(1, 1601), channels=96, batch=2, dtypes=(t,) * 4, state=True) for t in (BF16, F32)]
    found += [replace(LONG, grid=(1, 65), channels=96, batch=100, dtypes=half)]  # more blocks than multiprocessors
    found += [replace(LONG, routes=2, channels=52, dtypes=half, skip=False, bias=False, softplus=False, state=True)]
    found += [replace(LONG, routes=2, batch=3, channels=100, dtypes=half, state=True)]
    found += [replace(LONG, shared_x=True, merge=True, batch=3, dtypes=(BF16, F32, F32, BF16))]
    return [*found, replace(LONG, dtypes=(F16, BF16, BF16, F16), out_dtype=F32)]


def gradients(call: ScanCall, backend: str) -> dict[str, Tensor]:
    """Every gradient of a scan, by name, for a random gradient of the outputs that lies in memory as they do."""
    call = call._replace(
        **{n: getattr(call, n).detach().requires_grad_() for n in GRADIENTS if getattr(call, n) is not None}
    )
    outputs = torch.ops.vision_mamba.cross_selective_scan(*call, backend)[: 1 + call.return_last_state]
    generator = torch.Generator().manual_seed(1)
    grads = [torch.empty_like(o).copy_(torch.randn(o.shape, generator=generator).bfloat16()) for o in outputs]
    torch.autograd.backward(outputs, grads)
    tensors = {n: getattr(call, n) for n in GRADIENTS}
    return {f"d{n}": t.grad for n, t in tensors.items() if t is not None}


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The wave kernels take all that they can; of those going back, how they were made as they are asked for."""
    if nvrtc.shared_limit(0) < kernels.WAVE_SHARED:
        pytest.skip("blocks of the wave kernels need more shared memory than this GPU has")
    launched = list[tuple[Any, ...]]()
    wave = kernels.wave_backward
    monkeypatch.setattr(kernels, "wave_backward", lambda *how: launched.append(how) or wave(*how))
    monkeypatch.setattr(kernels, "wave_fills", lambda *_: True)
    monkeypatch.setattr(few, "takes_call", lambda *_, **__: False)
    monkeypatch.setattr(backward_cuda, "plans", {})
    return launched


@pytest.mark.gpu
@pytest.mark.parametrize("case", routes(), ids=str)
def test_wave_matches_the_reference(
    case: Case, poisoned: None, launched: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vision_mamba.ops.autograd.operator.known", Known(10, 5))
    monkeypatch.setattr("vision_mamba.ops.backends.forward_cuda.runners", {})
    expected = gradients(cases.double(make_call(case)), "reference")
    found = gradients(make_call(case, device="cuda"), "cuda")
    assert launched
    assert found.keys() == expected.keys()
    for name, reference in expected.items():
        assert_close(name, found[name], reference)
    again = gradients(make_call(case, device="cuda"), "cuda")
    assert all(torch.equal(again[name], tensor) for name, tensor in found.items())


@pytest.mark.gpu
def test_small_tensors_begin_anywhere(launched: list[tuple[Any, ...]]) -> None:
    """The wave kernels read them by 16 bytes."""
    call = make_call(replace(LONG, state=True), device="cuda")
    small = {n: getattr(call, n) for n in ("A", "D", "dt_bias", "initial_state")}
    parts = {n: t.new_empty(t.numel() + 1)[1:].view_as(t).copy_(t) for n, t in small.items()}
    expected, found = gradients(call, "cuda"), gradients(call._replace(**parts), "cuda")
    assert launched
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, F32])
def test_rows_of_B_and_C_lie_in_any_order(dtype: torch.dtype, launched: list[tuple[Any, ...]]) -> None:
    """Their gradients are written in the order of the arguments, whatever it is."""
    call = make_call(replace(LONG, routes=2, batch=3, channels=100, dtypes=(dtype,) * 4), device="cuda")
    expected = gradients(call, "cuda")
    assert launched
    for order in ((0, 1, 2, 3), (1, 3, 0, 2), (3, 2, 1, 0)):
        back = [order.index(axis) for axis in range(4)]
        rows = {name: getattr(call, name).permute(order).contiguous().permute(back) for name in "BC"}
        found = gradients(call._replace(**rows), "cuda")
        assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


@pytest.mark.gpu
def test_replayed_in_a_graph(launched: list[tuple[Any, ...]]) -> None:
    """Blocks count anew each time."""
    call = make_call(replace(LONG, batch=2, channels=100, grid=(1, 333), dtypes=(BF16,) * 4), device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        gradients(call, "cuda")
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    outputs_grad = torch.empty_like(call.new_output())

    def run() -> dict[str, Tensor]:
        inputs = {n: getattr(call, n).detach().requires_grad_() for n in GRADIENTS if getattr(call, n) is not None}
        y = torch.ops.vision_mamba.cross_selective_scan(*call._replace(**inputs), "cuda")[0]
        return dict(zip(inputs, torch.autograd.grad(y, list(inputs.values()), outputs_grad), strict=True))

    with torch.cuda.graph(graph):
        captured = run()
    assert launched
    for seed in range(3):
        torch.manual_seed(seed)
        outputs_grad.normal_()
        call.B.normal_()
        graph.replay()
        torch.cuda.synchronize()
        found = run()
        assert all(torch.equal(captured[name], gradient) for name, gradient in found.items())
        assert found["B"].abs().max() > 0


@pytest.mark.parametrize(
    ("change", "multiprocessors", "taken"),
    [
        (dict(), 4, True),
        (dict(), 6, True),
        (dict(), 7, False),  # too few blocks
        (dict(grid=(1, 255)), 4, False),  # too few steps
        (dict(layout="plain"), 4, False),
        (dict(states=8), 4, False),
        (dict(rank=4), 4, False),
        (dict(shared_x=True, merge=True, routes=2, batch=1), 4, False),
        (dict(routes=2, batch=1), 4, True),
        (dict(order="forward"), 4, False),
    ],
    ids=str,
)
def test_wave_is_chosen(
    change: dict[str, Any], multiprocessors: int, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "capability", lambda _: (9, 0))
    monkeypatch.setattr(gpu, "multiprocessors", lambda _: multiprocessors)
    monkeypatch.setattr(nvrtc, "shared_limit", lambda _: 227 * 1024)
    monkeypatch.setattr(nvrtc, "kernel", lambda wanted, _: wanted)
    monkeypatch.setattr(wave_cuda, "is_in_order", lambda call: call.indices is None)
    monkeypatch.setattr(few, "takes_call", lambda *_, **__: False)
    case = replace(replace(LONG, batch=2, channels=96, grid=(1, 512)), **change)
    call = make_call(case)
    plan = wave_cuda.backward(call, call.new_output(), torch.empty_like(call.x), 0)
    assert (plan is not None) == taken
    if plan is not None:
        assert plan.scan.kernel.name == "wave_backward" and plan.groups == 2
        assert plan.scan.grid == (8 if multiprocessors == 4 else 12)  # four of the scan
        assert plan.whole_rows and plan.rows == 4 * 512 * 32
    assert wave_cuda.backward(call, None, torch.empty_like(call.x), 0) is None


@pytest.mark.parametrize(
    ("module", "name", "other"),
    [
        (gpu, "capability", lambda _: (7, 5)),
        (nvrtc, "shared_limit", lambda _: 99 * 1024),
        (kernels, "LEAN", True),
        (wave_cuda, "_FAR", 512),
        (wave_cuda, "is_in_order", lambda _: False),
        (few, "takes_call", lambda *_, back=False: back),
    ],
)
def test_wave_leaves_what_it_cannot_take(module: Any, name: str, other: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "capability", lambda _: (9, 0))
    monkeypatch.setattr(gpu, "multiprocessors", lambda _: 4)
    monkeypatch.setattr(nvrtc, "shared_limit", lambda _: 227 * 1024)
    monkeypatch.setattr(nvrtc, "kernel", lambda wanted, _: wanted)
    monkeypatch.setattr(wave_cuda, "is_in_order", lambda call: call.indices is None)
    monkeypatch.setattr(few, "takes_call", lambda *_, **__: False)
    monkeypatch.setattr(kernels, "MANY", 0)
    call = make_call(replace(LONG, batch=2, channels=96, grid=(1, 512)))
    y, dx = call.new_output(), torch.empty_like(call.x)
    assert wave_cuda.backward(call, y, dx, 0) is not None
    assert wave_cuda.backward(call, torch.empty(()).expand_as(y), dx, 0) is None
    monkeypatch.setattr(module, name, other)
    assert wave_cuda.backward(call, y, dx, 0) is None
